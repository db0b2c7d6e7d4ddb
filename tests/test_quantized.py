"""Weights of eight and four bits."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TorchAoConfig
from typer.testing import CliRunner
from zoo import error
from zoo_llava import LlavaMember

from hooked_vlm import HookedLlava
from hooked_vlm.cli import app
from hooked_vlm.models import quantized

torchao = pytest.importorskip(
    "torchao.quantization", reason="NOT TESTED, no torchao: pip install hooked-vlm[quantized]"
)
MEMBER = LlavaMember(vision=(32, 3, 2), text=(64, 2, 4, 2, 16))
each = pytest.mark.parametrize("bits", quantized.NAMED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MEMBER.reference().save_pretrained(folder, max_shard_size="100KB")
    return folder


def opened(folder, bits, **how):
    return HookedLlava.from_pretrained(folder, quantization_config=quantized.named(bits), **how)


def rounded(weight, bits):
    """Symmetric rounding by hand: int8 by rows, int4 by groups of 32."""
    groups = weight.unflatten(1, (-1, 32)) if bits == "int4" else weight[:, None]
    low, high = {"int8": (-128, 127), "int4": (-8, 7)}[bits]
    scale = groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    return ((groups / scale).round().clamp(low, high) * scale).flatten(1)


@each
def test_linear_layers_of_text_blocks_are_rounded_and_nothing_else(folder, bits):
    plain, few = HookedLlava.from_pretrained(folder), opened(folder, bits)
    theirs = dict(plain.named_parameters())
    layers = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc_gate", "mlp.fc_in", "mlp.fc_out")
    expected = {f"text.blocks.{b}.{layer}.weight" for b in range(2) for layer in layers}
    assert quantized.names(plain) == expected
    for name, weight in few.named_parameters():
        assert type(weight).__name__.startswith("Int") == (name in expected), name
        if name in expected:
            found, wanted = weight.dequantize(), rounded(theirs[name], bits)
            step = theirs[name].abs().max() / {"int8": 127, "int4": 7}[bits]
            # Ties and the exact scale are torchao's: a few numbers may fall to the next step.
            assert (found - wanted).abs().max() <= 1.1 * step, name
            assert (found - wanted).abs().mean() <= 0.05 * step, name
            assert 0 < (found - theirs[name]).abs().max() <= 1.1 * step
        else:
            assert torch.equal(weight, theirs[name]), name


@each
def test_weights_by_head_are_copies_and_everything_runs(folder, bits):
    few, same = opened(folder, bits), HookedLlava.from_pretrained(folder)
    for name, parameter in few.named_parameters():  # a plain model of the rounded numbers
        if name in quantized.names(few):
            path, _, leaf = name.rpartition(".")
            setattr(same.get_submodule(path), leaf, nn.Parameter(parameter.dequantize(), False))
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_O", "W_in", "W_out"):
        assert torch.equal(getattr(few.text, name), getattr(same.text, name)), name
    inputs = MEMBER.inputs(dtype=torch.float32)
    site = "text.blocks.0.attn.heads.1.hook_z"

    def zero(z, hook):
        return z * 0

    def metric(logits):
        return logits[:, -1].square().sum()

    found, wanted = {}, {}
    for model, numbers in ((few, found), (same, wanted)):
        names = ["text.blocks.*.hook_*", "text.blocks.*.attn.hook_result", "hook_logits"]
        numbers |= model.run_with_cache(**inputs, names_filter=names)[1]
        numbers["patched"] = model.run_with_hooks(**inputs, fwd_hooks=[(site, zero)])
        base = model.base_run(**inputs)
        numbers["resumed"] = model.resume(base, site, fwd_hooks=[(site, zero)])
        numbers |= model.run_with_cache(
            **inputs, names_filter="text.blocks.*.hook_mlp_in", incl_bwd=True, metric=metric
        )[1]
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert error(value, wanted[name]) < 1e-4, name
    assert error(found["resumed"], found["patched"]) < 1e-5


def test_a_base_knows_when_quantised_weights_change(folder):
    few = opened(folder, "int8")
    base = few.base_run(**MEMBER.inputs(dtype=torch.float32))
    few.resume(base, "text.blocks.0.hook_resid_post")
    with torch.no_grad():
        few.text.blocks[1].attn.q.weight.scale.mul_(2)
    with pytest.raises(ValueError, match="have changed since base_run"):
        few.resume(base, "text.blocks.0.hook_resid_post")


@each
def test_bfloat16_is_quantised_in_bfloat16(folder, bits):
    few = opened(folder, bits, dtype=torch.bfloat16)
    assert few.dtype == few.text.W_Q.dtype == torch.bfloat16
    assert few(**MEMBER.inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "Config" in few.provenance["quantization"]


def test_what_is_refused(folder, tmp_path):
    few = opened(folder, "int8")
    with pytest.raises(ValueError, match="quantised weights are not saved"):
        few.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = torchao.Int8WeightOnlyConfig()
    for given, says in (
        (config, "is a Int8WeightOnlyConfig; give a transformers.TorchAoConfig"),
        (TorchAoConfig(config, modules_to_not_convert=["x"]), "leave out modules_to_not_convert"),
        (TorchAoConfig(torchao.Int4WeightOnlyConfig()), r"cannot quantise a weight .* on 'cpu'"),
    ):
        with pytest.raises(ValueError, match=says):
            HookedLlava.from_pretrained(folder, quantization_config=given)
    with pytest.raises(ValueError, match="give device=, no device_map="):
        opened(folder, "int8", device_map="auto")
    with pytest.raises(ValueError, match="'int2' is none of int8, int4"):
        quantized.named("int2")


def test_a_width_that_groups_do_not_divide(tmp_path):
    LlavaMember().reference().save_pretrained(tmp_path)  # 16 wide
    with pytest.raises(ValueError, match=r"cannot quantise a weight .*divisible by"):
        opened(tmp_path, "int4")


def test_without_torchao_the_extra_is_named(folder, monkeypatch):
    config = quantized.named("int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install hooked-vlm\[quantized\]"):
        HookedLlava.from_pretrained(folder, quantization_config=config)
    result = CliRunner().invoke(app, ["check", "--quantization", "int8"])
    assert result.exit_code == 2 and "hooked-vlm[quantized]" in result.stderr


@each
def test_check_reports_numbers_per_stack(bits):
    result = CliRunner().invoke(app, ["check", "--quantization", bits])
    assert result.exit_code == 0, result.stderr
    assert "worst error" in result.stdout and "differs" not in result.stdout
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    worst = {row[1].strip(): float(row[3]) for row in rows if row[1].strip()}
    assert worst["vision"] == 0 < worst["text"] and worst["logits"] > 0
    for name, limit in (("int8", 0.1), ("int4", 2.0)):
        assert bits != name or worst["text"] < limit


def test_quantised_layers_compute_what_their_weights_say(folder):
    few = opened(folder, "int8")
    layer, x = few.text.blocks[0].mlp.fc_in, torch.randn(2, 3, 64)
    assert error(layer(x), F.linear(x, layer.weight.dequantize())) < 1e-5
