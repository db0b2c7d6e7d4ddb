"""What `hooked-vlm patch` shows: a table, a heat map, the strongest head's attention."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hooked_vlm import patching as P
from hooked_vlm.data import Pair
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.inputs import open_images
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import Swept
from hooked_vlm.patching.sweep import Direction
from hooked_vlm.plots import attention_map

LOOKS = 0.01  # a head of a language model with less attention than this on the image reads words


def default_sites(model: HookedVLM) -> str:
    """Every head by which a stack reads the image; of CLIP, whose texts do not, the image's own."""
    if model.task == "clip":
        return "vision.*heads.*.hook_z"
    return f"{_reader(model)}.blocks.*.{_reads_by(model)}.heads.*.hook_z"


def _reader(model: HookedVLM) -> str:
    return next(name for name in model.stacks if name != "vision")


def _reads_by(model: HookedVLM) -> str:
    return "attn" if model.task == "llava" else "cross_attn"


def patch(
    model: HookedVLM,
    pairs: list[Pair],
    sites: str | Sequence[str],
    *,
    metric: str | None,
    direction: Direction,
    first_token: str,
    out: Path,
    top: int,
) -> P.PatchingResult:
    """Runs the sweep, prints its strongest sites, and writes pictures and tables.

    Args:
        model: the model.
        pairs: what to patch between.
        sites: hook names or globs.
        metric: one of `patching.METRICS`; None for the task's own.
        direction: `denoise` or `noise`.
        first_token: as in `HookedVLM.prepare`.
        out: a folder for `heatmap.png`, `attention.png`, `result.csv` and `provenance.json`.
        top: rows of the table.

    Raises:
        ValueError: an unknown metric, pairs whose two runs do not differ, or what
            `patching.activation_patching` raises. Nothing is written then.
    """
    if metric is not None and metric not in P.METRICS:
        raise ValueError(f"--metric {metric!r} is none of {', '.join(P.METRICS)}")
    measured = P.METRICS[metric]() if metric else None
    swept: dict[str, Any] = {"metric": measured, "direction": direction, "first_token": first_token}
    result = P.activation_patching(model, pairs, sites, **swept)
    differing = np.flatnonzero(result.restored.notnull().any(result.restored.dims[1:]).values)
    if not len(differing):
        clean = float(result.clean[0])
        raise ValueError(
            f"{result.provenance['metric']} is {clean:.3f} in the clean and in the corrupt run: "
            "there is nothing to restore; give inputs, or an answer and a foil, that differ more"
        )
    figures = {"heatmap.png": result.plot()}
    looked = _attention(model, pairs[differing[0]], result.top(1)[0], swept)
    if looked is not None:
        figures["attention.png"] = looked
    files = {name: _png(figure) for name, figure in figures.items()}
    files["result.csv"] = result.to_dataframe().to_csv(index=False).encode()
    files["provenance.json"] = (json.dumps(result.provenance, indent=2) + "\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention.png").unlink(missing_ok=True)  # an earlier run's, of another head
    for name, content in files.items():
        (out / name).write_bytes(content)
    console = Console()
    console.print(_table(result, top))
    console.print(
        "wrote", ", ".join(str(out / name) for name in files), soft_wrap=True, markup=False
    )
    return result


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def _table(result: P.PatchingResult, top: int) -> Table:
    how, metric = result.provenance["direction"], result.provenance["metric"]
    clean, corrupt = (
        float(end.mean()) for end in (result.clean, result.corrupt) if end is not None
    )
    table = Table(
        title=f"{metric}: clean {clean:.3f}, corrupt {corrupt:.3f} ({len(result.clean)} pairs)"
    )
    table.add_column("site", no_wrap=True)
    table.add_column(metric, justify="right")
    table.add_column("restored" if how == "denoise" else "destroyed", justify="right")
    data = result.data.mean("pair").values.reshape(len(result.sites), -1)
    share = result.flat().values.reshape(len(result.sites), -1)
    for site in result.top(top):
        index = result.sites.index(site)
        table.add_row(site.name, f"{data[index].max():.3f}", f"{share[index].max():+.3f}")
    return table


def _attention(model: HookedVLM, pair: Pair, site: Swept, swept: dict[str, Any]) -> Figure | None:
    """The strongest head's attention to the image.

    Of cross-attention it is that from the token where the head's patch restores the most, of a
    language model from the one that looks at the image the most; of LLaVA-NeXT to the view of the
    whole. None where the head reads no image.
    """
    if not isinstance(site, Site) or site.head is None or site.stack != _reader(model):
        return None
    part = _reads_by(model)
    if model.task == "clip" or not site.component.startswith(f"{part}."):
        return None
    z = f"{site.stack}.blocks.{site.layer}.{part}.heads.{site.head}.hook_z"
    inputs = model.prepare_prompt(pair.images, pair.texts, first_token=swept["first_token"])
    name = z.replace("hook_z", "hook_pattern")
    _, cache = model.run_with_cache(**inputs, names_filter=name)
    pattern = cache[name][0].float().cpu().numpy()  # [query, key]
    grid = model.cfg.vision.grid
    if part == "attn":  # the image's features stand among the tokens
        places = model.token_map(inputs).query(f"stack == {site.stack!r} and row == 0")
        seen = places[places["tile"] == 0].dropna(subset="patch_row")
        on_image, off = seen["position"].to_numpy(), "other tokens"
        looks = pattern[:, on_image].sum(1)
        looks[places["image"].notna()] = 0  # features of the image itself
        position = int(looks.argmax())
        if looks[position] < LOOKS:
            return None
    else:
        each = P.activation_patching(model, pair, z, positions="each", progress=False, **swept)
        position = int(np.nanargmax(each.restored.values.reshape(-1)))
        on_image, off = np.arange(1, pattern.shape[1]), "the class token"
    weights = pattern[position]
    token = model.to_str_tokens(inputs["input_ids"][0])[position]
    kind = "head" if part == "attn" else "cross-attention head"
    head = f"layer {site.layer}, {kind} {site.head}, from token {position} {token!r}"
    return attention_map(
        open_images(pair.image)[0].crop(tuple(map(round, inputs.geometry[0].crop))),
        weights[on_image].reshape(grid, grid),
        title=f"{head} of {pair.text!r}",
        weight_off_grid=float(np.delete(weights, on_image).sum()),
        off_grid=off,
    )
