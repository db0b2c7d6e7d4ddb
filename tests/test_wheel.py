"""The built wheel holds everything, and works away from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, cwd, **env):
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (file,) = out.glob("*.whl")
    return file


def test_what_the_wheel_holds(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("hooked_vlm", "weights_conversion"):
        sources = [p for p in (ROOT / package).rglob("*.py") if "__pycache__" not in p.parts]
        assert {p.relative_to(ROOT).as_posix() for p in sources} <= held
    assert "hooked_vlm/py.typed" in held
    for task in ("itm", "captioning", "vqa"):
        folder = ROOT / "hooked_vlm" / "toys" / f"toy-blip-{task}"
        assert {p.relative_to(ROOT).as_posix() for p in folder.iterdir()} <= held
    assert not any(name.startswith(("tests/", "docs/")) for name in held)


def test_the_demo_runs_from_the_wheel(wheel, tmp_path):
    """In a new environment that sees the installed dependencies, without a network."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    where = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    )
    site = Path(where.strip())
    # The path alone: .pth files in it, such as that of an editable checkout, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, "--ignore-installed", wheel, cwd=tmp_path)
    code = "import hooked_vlm, weights_conversion as w; print(hooked_vlm.__file__, w.__file__)"
    files = run(python, "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(site) for file in files), files
    run(python.parent / "hooked-vlm", "patch", "--out", "demo", cwd=tmp_path, HF_HUB_OFFLINE="1")
    written = {file.name for file in (tmp_path / "demo").iterdir()}
    assert written == {"heatmap.png", "attention.png", "result.csv", "provenance.json"}
    told = json.loads((tmp_path / "demo" / "provenance.json").read_text())
    assert told["model"] == "toy-blip-itm"
