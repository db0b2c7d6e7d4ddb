"""A released file as a folder of safetensors and `config.json`, whatever family it is of."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_conversion import families
from weights_conversion.files import Checkpoint, save, widened
from weights_conversion.rules import ConversionError, plan, revert


def convert_file(
    source: Path,
    out: Path,
    task: str | None,
    processor: str | None,
    overrides: Mapping[str, Mapping[str, Any]],
) -> tuple[families.Family, Any, dict[str, Any]]:
    """Writes a bare file as a folder; returns its family, our configuration, the `config.json`.

    Args:
        source: the file.
        out: the folder.
        task: as in `from_pretrained`.
        processor: where the tokenizer is, None for the family's own on the Hub.
        overrides: as `config=` in `from_pretrained`.

    Raises:
        ConversionError: no checkpoint of the zoo's, or tensors that do not fit.
        FileNotFoundError: no tokenizer.
    """
    checkpoint = Checkpoint([source])
    kind = families.family(checkpoint.shapes, None)
    if kind is None:
        raise ConversionError(
            f"{source} is of no family of the zoo, {', '.join(families.CLASSES)}: it holds "
            f"{', '.join(sorted(checkpoint.shapes)[:6])}, …"
        )
    layout = importlib.import_module(f"weights_conversion.{kind}")
    cfg, rules = layout.read(checkpoint, None, task, overrides)
    steps = plan(checkpoint.shapes, rules, layout.shapes(cfg), checkpoint.same)
    made, cfg = layout.find_processor(processor, None, cfg)
    tensors = checkpoint.read(step.source for step in steps)
    ours = {name: part for step in steps for name, part in step.apply(tensors[step.source]).items()}
    ours = widened(ours)
    config, table = layout.write(cfg)
    save(out, ours if table is None else revert(ours, table), config, made)
    return kind, cfg, config
