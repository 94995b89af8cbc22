"""The wheel holds every module of the linked folders and nothing else at its top."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip(
        "setuptools", minversion="77", reason="building without isolation needs setuptools >= 77"
    )
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_contents(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"kbitc"}
    for folder in ("passes", "kernels", "backends"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h"):
                assert f"kbitc/{path.relative_to(ROOT)}" in names
    assert "kbitc/demo_model/model.safetensors" in names
    assert {"kbitc/py.typed", "kbitc/report/page.css", "kbitc/report/page.js"} <= set(names)
    assert {
        f"kbitc/{path.relative_to(ROOT / 'kbitc')}" for path in ROOT.glob("kbitc/report/templates/*")
    } <= set(names)
    (points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    declared = zipfile.ZipFile(wheel).read(points).decode()
    assert "[torch_dynamo_backends]\nkbit = kbitc.backends.dynamo.backend:kbit\n" in declared
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import kbitc, torch; w = kbitc.quantize(torch.ones(2, 64), 'nf4:64'); print(kbitc.__file__, w.dequantize().sum().item());"
        "from kbitc.passes import Canonicalize; from kbitc.checkpoint import demo; print(demo.heldout().is_file())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert str(tmp_path) in done.stdout
    assert "128.0" in done.stdout
    assert "True" in done.stdout
