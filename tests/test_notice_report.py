"""The page of a NOTICE run, whatever was patched, of whatever model."""

import re
from dataclasses import replace

import pytest
import torch

from hooked_vlm import HookedVLM, data, planted, runs
from hooked_vlm import patching as P
from hooked_vlm.methods import functions
from hooked_vlm.methods.notice import Settings
from hooked_vlm.methods.universal import universal
from hooked_vlm.runs import notice

HEADS = Settings(kinds=("cross_attn_heads",), positions=("object",))


@pytest.fixture(scope="module")
def choices():
    return data.shapes_choices(4, 0, "color")


def page_of(model, pairs, folder, settings=HEADS, **options):
    notice.run(model, pairs, folder, settings=settings, progress=False, **options)
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_alone_another_role_and_half_precision(choices, dtype, tmp_path):
    model = HookedVLM.from_pretrained("toy-blip-vqa", dtype=dtype)
    pairs, _ = data.semantic_image_pairs(choices)
    page = page_of(model, pairs, tmp_path / "a", Settings(kinds=("resid",)))
    assert page.count("<img") == 1 and "Universal heads" not in page
    page = page_of(model, pairs, tmp_path / "b")
    assert "Image corrupted: cross_attn_heads at object" in page
    assert "Strongest heads at object" in page and "seen from object" in page


def test_open_questions_of_models_without_roles(tmp_path):
    """No word of an answer stands in the question: heads are compared at the last token."""
    model, _ = planted.load("planted-albef-reader")
    settings = Settings(kinds=("mlp", "cross_attn_heads"), corruption_effective=None)
    page = page_of(model, planted.pairs(3, 0), tmp_path / "run", settings)
    assert "Strongest heads at last" in page and "Image corrupted: mlp" in page


def test_captions(tmp_path):
    model = HookedVLM.from_pretrained("toy-blip-captioning")
    pairs = data.shapes_pairs(3, 0, "captioning", "color")
    page = page_of(model, pairs, tmp_path / "run", Settings(kinds=("mlp", "cross_attn_heads")))
    assert "3 of 3 pairs" in page


def test_tasks_with_pairs_of_one_name_are_kept_apart(choices, tmp_path):
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    pairs, _ = data.semantic_image_pairs(choices)
    others, _ = data.semantic_image_pairs(data.shapes_choices(4, 1, "color"))
    wrong = replace(others[0], answer=others[0].foil, foil=others[0].answer)
    masks = {f"a/{one.name}": one.mask for one in choices}
    given = {"a": pairs, "b": [wrong, *others[1:]]}
    page = page_of(model, given, tmp_path / "run", masks=masks)
    assert "on 7 clean images" in page
    shown = re.findall(r"Layer (\d), head (\d): ", page)  # universal, then the strongest
    table = runs.load(tmp_path / "run").table
    strongest = table.groupby(["layer", "head"])["logit_diff"].mean().abs().nlargest(12).index
    first = universal(table, role="object").heads[["layer", "head"]].itertuples(index=False)
    order = list(dict.fromkeys([*map(tuple, first), *strongest]))
    assert list(dict.fromkeys(shown)) == [tuple(map(str, one)) for one in order[:3]]
    assert "Answered correctly of a: 100.0% of 4" in page
    assert "Answered correctly of b: 75.0% of 4" in page
    with pytest.raises(ValueError, match="2 pairs of task 'a' have the name '0: color'"):
        notice.run(model, {"a": [*pairs, pairs[0]]}, tmp_path / "twice", progress=False)


def test_what_is_not_filtered_is_counted_all_the_same(choices, tmp_path):
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    pairs, _ = data.semantic_image_pairs(choices)
    wrong = replace(pairs[0], answer=pairs[0].foil, foil=pairs[0].answer)
    every = replace(HEADS, clean_correct=False, corruption_effective=None)
    page = page_of(model, [wrong, *pairs[1:]], tmp_path / "run", every)
    assert "4 of 4 pairs" in page and "Answered correctly: 75.0% of 4 that ran" in page


def test_ctrl_c_in_the_report_is_not_taken_for_its_end(choices, tmp_path, monkeypatch):
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    pairs, _ = data.semantic_image_pairs(choices)
    ablate = P.ablate

    def stopped(*arguments, **options):
        result = ablate(*arguments, **options)
        return replace(result, provenance=result.provenance | {"complete": False})

    monkeypatch.setattr(functions.P, "ablate", stopped)
    with pytest.raises(KeyboardInterrupt):
        notice.run(model, pairs, tmp_path / "run", settings=HEADS, progress=False)
    assert not (tmp_path / "run" / "report.html").exists()
    monkeypatch.undo()
    assert "What heads look at" in page_of(model, pairs, tmp_path / "run")
