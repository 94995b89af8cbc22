"""What wheels hold, and one with kernels installed where there is no compiler."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kbitc.errors import BackendUnavailable
from kbitc.kernels.cpu.build import find_compiler

ROOT = Path(__file__).parent.parent


def make(out: Path, **environment: str) -> Path:
    pytest.importorskip("build")
    pytest.importorskip(
        "setuptools", minversion="77", reason="building without isolation needs setuptools >= 77"
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return make(tmp_path_factory.mktemp("dist"))


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
    assert {
        f"kbitc/{path.relative_to(ROOT / 'kbitc')}" for path in ROOT.glob("kbitc/evaluation/tasks/*")
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


def test_a_wheel_with_kernels_decodes_where_there_is_no_compiler(tmp_path):
    try:
        find_compiler()  # to make it
    except BackendUnavailable as error:
        pytest.skip(str(error))
    made = make(tmp_path / "dist", KBITC_PREBUILD="1")
    assert made.name.split("-")[2:4] == ["py3", "none"]
    assert platform.machine() in made.name
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(made)], check=True)
    alone = {
        "PYTHONPATH": str(site),
        "PATH": str(tmp_path),
        "KBITC_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }

    def kbitc(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kbitc", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=alone)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "ompil" not in done.stderr.replace("kbitc compile", ""), done.stderr
        return done

    found = json.loads(kbitc("build-kernels", "--json").stdout)
    assert found["library"] == str(site / "kbitc/kernels/cpu/kbit_cpu.so")
    kbitc("compile", "demo", "--bits", "4", "-o", "out")
    done = json.loads(kbitc("run", "out", "The function returns", "-n", "8", "--json").stdout)
    assert done["backend"] == "cpu"
    assert not (tmp_path / "cache/kernels").exists()
    kept = [path.suffix for path in (tmp_path / "cache/decode").iterdir()]
    assert kept == [".json"]  # a native step, and no compiled one
