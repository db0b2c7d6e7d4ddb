"""Weights of eight or four bits, through torchao.

Only linear layers inside the blocks of text stacks are quantised, as they are read. Activations,
embeddings, the image encoder, projections and the unembedding stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hooked_vlm.components.stack import TokenStack

NAMED = ("int8", "int4")


def named(name: str) -> Any:
    """A TorchAoConfig by a short name, of weights alone, that runs on the CPU, too.

    `int8` has one scale for each row, `int4` one for every 32 numbers of it; torchao keeps the
    latter in bytes, so that it has the numbers of four bits, but not their size.

    Raises:
        ImportError: torchao is not installed.
        ValueError: another name.
    """
    torchao = _torchao()
    if name not in NAMED:
        raise ValueError(f"quantization {name!r} is none of {', '.join(NAMED)}")
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    group = torchao.PerGroup(32)
    return TorchAoConfig(
        torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009 (no stub knows it)
            granularity=group,
        )
    )


def method(config: Any) -> Any:
    """What torchao shall do, of a `transformers.TorchAoConfig`.

    Raises:
        ImportError: torchao is not installed.
        ValueError: something else, or options that say which layers are meant.
    """
    _torchao()
    from transformers import TorchAoConfig

    if not isinstance(config, TorchAoConfig):
        raise ValueError(
            f"quantization_config is a {type(config).__name__}; give a transformers.TorchAoConfig, "
            "such as TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())"
        )
    if config.modules_to_not_convert or config.include_input_output_embeddings:
        raise ValueError(
            "which layers are quantised is not a choice: the linear ones inside the blocks of text "
            "stacks; leave out modules_to_not_convert and include_input_output_embeddings"
        )
    return config.quant_type


def names(model: nn.Module) -> set[str]:
    """The parameters that are quantised."""
    return {
        f"{path}.weight"
        for stack, module in model.named_children()
        if isinstance(module, TokenStack)
        for path, layer in module.named_modules(prefix=stack)
        if isinstance(layer, nn.Linear) and path.startswith(f"{stack}.blocks.")
    }


def quantized(weight: Tensor, how: Any) -> Tensor:
    """A linear layer's weight, quantised.

    Raises:
        ValueError: torchao cannot, on this device or of this shape.
    """
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], False, device="meta"))
    layer: Any = holder[0]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    why = "it left the weight as it was; its groups must divide the width"
    try:
        _torchao().quantize_(holder, how)
        made: Tensor = layer.weight
        if is_traceable_wrapper_subclass(made):
            return made
    except (ImportError, NotImplementedError, ValueError, RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"torchao's {type(how).__name__} cannot quantise a weight {list(weight.shape)} of "
        f"{weight.dtype} on {weight.device.type!r} ({why}); on a CPU, Int8WeightOnlyConfig and "
        "IntxWeightOnlyConfig can"
    )


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError(
            "quantised weights need torchao: pip install hooked-vlm[quantized]"
        ) from error
    return torchao.quantization
