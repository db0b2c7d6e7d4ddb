"""The image encoder of planted models: it says of each patch what stands in it, and nothing else.

What a patch shows is no sum over its pixels, so that no hand can set it: the convolution and the
first block's MLP are trained. All that block reads and writes has its directions, set by hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from hooked_vlm.components.blocks import Context
from hooked_vlm.components.stack import VisionStack
from hooked_vlm.data.shapes import COLORS, KINDS, Scene
from hooked_vlm.planted import world
from hooked_vlm.planted.hand import Basis, Reads, mixed, plain, set_head

SIZES = {"kind": len(KINDS), "color": len(COLORS), "cell": world.GRID**2, "class": 1, "patch": 1}
RAW, JUNK = 16, 6
LOUD = 4.0
"""How long the code of a kind or a colour is, where the stream's own length is its norm's."""

CLASS = 8.0  # how long the class token is
BATCH = 64
Labels = Int[Tensor, "scene patch 2"]


def basis(stack: VisionStack, generator: torch.Generator) -> Basis:
    """The directions of the image stream."""
    return Basis(stack.cfg.d_model, {**SIZES, "raw": RAW, "junk": JUNK}, generator)


def set_by_hand(stack: VisionStack, at: Basis, generator: torch.Generator) -> None:
    """Positions, the class token, and heads that stir what nothing reads."""
    plain(stack)
    stack.embed.class_token.data[0, 0] = CLASS * at["class"][0]
    stack.pos_embed.data[0, 1:] = LOUD * at["cell"] + LOUD / 2 * at["patch"]
    for block in stack.block_list:
        for head in range(stack.cfg.n_heads):
            set_head(
                block.attn,
                head,
                q=[Reads(mixed(at["cell"], 4, generator))],
                k=[Reads(mixed(at["cell"], 4, generator))],
                v=[Reads(mixed(at["cell"], 4, generator))],
                o=[Reads(mixed(at["junk"], 4, generator))],
            )


def train(
    stack: VisionStack,
    at: Basis,
    pixels: Tensor,
    labels: Labels,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Trains the convolution and the first block's MLP to say what each patch shows.

    The convolution writes along its own directions alone, which the MLP reads, and the MLP along
    those of the codes: all weights are projected onto these after each step.

    Args:
        stack: set by hand.
        at: its directions.
        pixels: of scenes, `[scene, 3, height, width]`.
        labels: what stands in their patches.
        steps: of Adam.
        generator: what draws first weights and batches.
    """
    codes = torch.cat([at["kind"], at["color"]])
    wanted = LOUD * torch.cat(
        [
            F.one_hot(labels[..., part] + 1, n + 1)[..., 1:]
            for part, n in enumerate((len(KINDS), len(COLORS)))
        ],
        -1,
    )
    conv, mlp = stack.embed.patch.weight, stack.block_list[0].mlp
    nn.init.normal_(conv, std=0.05, generator=generator)
    nn.init.normal_(mlp.fc_in.weight, std=0.3, generator=generator)
    learned = [conv, mlp.fc_in.weight, mlp.fc_in.bias, mlp.fc_out.weight, mlp.fc_out.bias]
    for one in learned:
        one.requires_grad_()
    _project(stack, at["raw"], codes)
    optimizer = torch.optim.Adam(learned)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(pixels), (BATCH,), generator=generator)
        seen = stack.run(stack.embeddings(pixels[index]), Context()) @ codes.T
        error = seen - F.pad(wanted[index], (0, 0, 1, 0))  # the class token says nothing
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
        _project(stack, at["raw"], codes)
    for one in learned:
        one.requires_grad_(False)


@torch.no_grad()
def _project(stack: VisionStack, raw: Tensor, codes: Tensor) -> None:
    mlp, conv = stack.block_list[0].mlp, stack.embed.patch.weight
    conv.copy_((raw.T @ raw @ conv.flatten(1)).view_as(conv))
    mlp.fc_in.weight.copy_(mlp.fc_in.weight @ raw.T @ raw)
    mlp.fc_out.weight.copy_(codes.T @ codes @ mlp.fc_out.weight)
    mlp.fc_out.bias.copy_(mlp.fc_out.bias @ codes.T @ codes)


def labels_of(scenes: list[Scene]) -> Labels:
    """The numbers of the kind and the colour in each patch, -1 in an empty one."""
    found = torch.full((len(scenes), world.GRID**2, 2), -1)
    for row, scene in enumerate(scenes):
        for shape in scene.shapes:
            number = KINDS.index(shape.kind), list(COLORS).index(shape.color)
            found[row, world.cell_of(shape)] = torch.tensor(number)
    return found
