"""Under torch.compile the numbers are the same, and no hook is ignored."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from zoo import BLIP

member = BLIP[0]
model, inputs = member.model(torch.float32), member.inputs(2, dtype=torch.float32)
plain = model(**inputs)
compiled = torch.compile(model, backend=BACKEND)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


with torch.no_grad():
    assert close(compiled(**inputs), plain)
    seen = []

    def write(x, hook):
        seen.append(hook.name)
        return 2 * x  # no constant: a layer norm would take it out again

    names = ("text.blocks.1.hook_mlp_out", "vision.blocks.0.attn.heads.1.hook_z")
    for name in names:
        expected = model.run_with_hooks(**inputs, fwd_hooks=[(name, write)])
        assert not close(expected, plain), name
        seen.clear()
        model.add_hook(name, write)
        assert close(compiled(**inputs), expected), name
        assert seen == [name]
        model.reset_hooks()
        assert close(compiled(**inputs), plain)
        assert seen == [name]
print("fine")
"""


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_hear_their_hooks(backend, tmp_path):
    """In a process without the jaxtyping hook, which torch.compile cannot trace."""
    result = subprocess.run(
        [sys.executable, "-c", CODE.replace("BACKEND", repr(backend))],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.stdout == "fine\n", result.stderr
