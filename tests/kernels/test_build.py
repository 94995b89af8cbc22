"""Compiling the native kernels: the cache, processes side by side, and machines that cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kbitc.errors import BackendUnavailable
from kbitc.kernels.cpu.build import BuildRecipe, build, find_compiler

ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def compiler():
    try:
        return find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KBITC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def recipe(folder: Path, text: str = ANSWER, **more) -> BuildRecipe:
    folder.mkdir(exist_ok=True)
    source = folder / "answer.cpp"
    source.write_text(text)
    return BuildRecipe(sources=((source, ()),), flags=("-fPIC", "-O0"), **more)


def run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_compiles_once(compiler, cache, tmp_path):
    first = build(recipe(tmp_path))
    written = first.stat().st_mtime_ns
    assert build(recipe(tmp_path)) == first
    assert first.stat().st_mtime_ns == written
    assert build(recipe(tmp_path), force=True) == first
    assert first.stat().st_mtime_ns > written
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


def test_key_follows_content_and_flags_not_the_folder(compiler, tmp_path):
    key = recipe(tmp_path / "a").key(compiler)
    assert recipe(tmp_path / "b").key(compiler) == key
    assert recipe(tmp_path / "b", text=ANSWER + "\n").key(compiler) != key
    assert recipe(tmp_path / "a", link=("-lm",)).key(compiler) != key
    (tmp_path / "x.h").write_text("")
    assert recipe(tmp_path / "a", headers=(tmp_path / "x.h",)).key(compiler) != key


def test_processes_side_by_side_compile_once(compiler, cache, tmp_path):
    """The compiler is a script that counts its calls; four processes start together."""
    made = recipe(tmp_path)
    script = tmp_path / "counting-c++"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo x >> {tmp_path}/calls; sleep 0.5;; esac\nexec {compiler} "$@"\n'
    )
    script.chmod(0o755)
    code = f"""
        import ctypes
        from pathlib import Path
        from kbitc.kernels.cpu import build
        made = build.BuildRecipe(sources=((Path({str(made.sources[0][0])!r}), ()),), flags={made.flags!r})
        print(ctypes.CDLL(str(build.build(made))).answer())
    """
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: run(code, CXX=str(script)), range(4)))
    assert [process.stdout for process in done] == ["42\n"] * 4, done[0].stderr
    assert (tmp_path / "calls").read_text() == "x\n"


def test_compiler_error_leaves_nothing(compiler, cache, tmp_path):
    with pytest.raises(BackendUnavailable, match=r"failed: .*answer\.cpp:1.*error"):
        build(recipe(tmp_path, text="int answer( {\n"))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_cache_that_cannot_be_written(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KBITC_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendUnavailable, match="set KBITC_CACHE to another folder"):
        build(recipe(tmp_path))


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler was found \(\$CXX = no-such-compiler\)"):
        find_compiler()


def test_without_a_compiler_one_warning_and_the_right_answer(cache):
    done = run(
        """
        import torch, warnings
        from kbitc.quantizers import quantize
        weight = quantize(torch.randn(33, 70), "nf4:64+dq")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            x = torch.randn(2, 70)
            for _ in range(2):
                y = torch.nn.functional.linear(x, weight)
            torch.testing.assert_close(y, x @ weight.dequantize().T)
        print([str(w.message) for w in seen if "kbitc" in str(w.message)])
        """,
        CXX="no-such-compiler",
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("no C++ compiler was found") + done.stdout.count("no C++ compiler was found") == 1
    )


def test_the_library_asks_torch_for_c_functions_alone(compiler):
    """So that one file serves every torch from 2.11 on: what C++ mangles may change with each."""
    if shutil.which("nm") is None:
        pytest.skip("nm, of binutils, lists what a library asks for")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(build())], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)", name)] == []


def test_library_that_does_not_load(compiler, cache):
    done = run(
        """
        import torch
        from kbitc.kernels.cpu import build
        library = build.cache_folder() / "kernels" / (build.kernel_recipe().key(build.find_compiler()) + ".so")
        library.parent.mkdir(parents=True)
        library.write_text("damaged")
        from kbitc.quantizers import quantize
        weight = quantize(torch.randn(4, 70), "nf4:64")
        print(torch.nn.functional.linear(torch.ones(70), weight).shape)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "slow reference kernels" in done.stderr
    assert "torch.Size([4])" in done.stdout


def test_switched_off_every_op_runs_on_the_reference(cache):
    """Torch's own checks of each op, on the kernels of machines that have no others."""
    done = run(
        """
        import torch
        from torch.library import opcheck
        from kbitc.quantizers import quantize
        weight, experts = quantize(torch.randn(6, 70), "nf4:64+zp"), quantize(torch.randn(2, 6, 70), "int3:32+dq")
        w, e = weight.operands(), experts.operands()
        x = torch.randn(3, 70, requires_grad=True)
        offsets = torch.tensor([1, 3], dtype=torch.int32)
        ops = torch.ops.kbit
        opcheck(ops.linear.default, (x, *w, torch.randn(6, requires_grad=True)))
        opcheck(ops.linears.default, (x, [*w.tensors], [*w.numbers], [None]))
        opcheck(ops.input_grad.default, (torch.randn(3, 6), *w))
        opcheck(ops.embedding.default, (torch.tensor([[1, 2]]), *w, torch.bfloat16))
        opcheck(ops.grouped_linear.default, (x, *e, offsets))
        opcheck(ops.grouped_input_grad.default, (torch.randn(3, 6), *e, offsets))
        opcheck(ops.dequantize.default, (*e, torch.float16))
        opcheck(ops.encode.default, (torch.randn(6, 70), w.scales.float(), w.zeros.float(), w.codebook, None, 4, 64))
        levels = (torch.tensor([0, -1, 1]), *torch.rand(3, 2, 5), w.codebook, w.codebook[1:], torch.float16)
        opcheck(ops.feed_back_strip.default, (torch.randn(3, 5), torch.ones(3, 3), *levels))
        opcheck(ops.descend_strip.default, (*torch.randn(2, 3, 5), torch.ones(3, 3), *levels))
        print("checked")
        """,
        KBITC_CPU="off",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "checked\n"
    assert done.stderr == ""
    assert not cache.exists()


def test_wrong_setting_is_an_error(compiler):
    done = run(
        """
        import torch
        from kbitc.quantizers import quantize
        quantize(torch.randn(4, 70), "nf4:64").dequantize()
        """,
        KBITC_CPU="avx1024",
    )
    assert done.returncode != 0
    assert "KBITC_CPU" in done.stderr


def test_command(compiler):
    done = subprocess.run(
        [sys.executable, "-m", "kbitc", "build-kernels", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["library"]).is_file()
    assert found["kernels"] in ("avx512", "avx2", "portable")


def test_command_without_a_compiler():
    done = subprocess.run(
        [sys.executable, "-m", "kbitc", "build-kernels"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CXX": "no-such-compiler"},
    )
    assert done.returncode == 1
    assert "no C++ compiler was found" in done.stderr
    assert "Traceback" not in done.stderr
