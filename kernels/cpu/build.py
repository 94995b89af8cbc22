"""Native CPU kernels: a wheel's own library, or one compiled once with the machine's compiler and kept.

The one thing to know: :func:`load` is called by the first ``kbit::`` op that runs on the CPU. It takes the
library that a wheel brought (``PREBUILT``), or compiles one for this machine (under a lock, so that
processes that start together compile once) and moves it into the cache in one step. The library registers
its kernels with the dispatcher, and no Python runs between an op and its kernel from then on. It uses
torch's stable C interface alone, so one file serves every torch from 2.11 on. Without a compiler, or with
``KBITC_CPU=off``, the reference kernels stay.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kbitc.cache import cache_folder, check_private, make_private
from kbitc.errors import BackendUnavailable
from kbitc.system.files import Lock, remove
from kbitc.system.stopping import WorkerPool

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
PREBUILT = FOLDER / "kbit_cpu.so"  # in a wheel
COMMON = ("-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w")
TRAINING = ("-fno-math-errno",)  # roots become vectors; every operation still rounds once
ROWS = ("-ffp-contract=fast", "-fno-math-errno")  # sums of these have no order to keep
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi")
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11's interface, and nothing later


@dataclass(frozen=True)
class BuildRecipe:
    """What to compile: files with their own flags, and how to link them.

    Attributes:
        sources: ``(file, flags)``; the slowest first.
        headers: files that they include.
        flags: for every file.
        link: after the objects, when linking.
    """

    sources: tuple[tuple[Path, tuple[str, ...]], ...]
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = COMMON
    link: tuple[str, ...] = ()

    def key(self, compiler: str) -> str:
        """Changes whenever the library could: files, flags, compiler, machine."""
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        flags = [self.flags, self.link, *(flags for _, flags in self.sources)]
        parts = [platform.machine(), compiler, version.stdout, repr(flags)]
        digest = hashlib.sha256("\0".join(parts).encode())
        for path in (*(path for path, _ in self.sources), *self.headers):  # their folder does not matter
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
        return digest.hexdigest()[:20]


def kernel_recipe(*, for_any: bool = False) -> BuildRecipe:
    """The kernels of this folder, for this machine.

    ``KBITC_SANITIZE`` (for example "address,undefined") adds the compiler's sanitizers.

    Args:
        for_any: for every machine of this one's architecture, not for the sets that this one can run.
    """
    root = Path(torch.__file__).parent
    bindings: tuple[str, ...] = (f"-isystem{root / 'include'}", STABLE, "-O2")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    plain = ("-O2",) if is_x86 else ()  # few run it there
    sets = [
        (FOLDER / "portable.cpp", plain),
        (FOLDER / "rows_portable.cpp", (*ROWS, *plain)),
        (FOLDER / "training_portable.cpp", (*TRAINING, *plain)),
    ]
    if is_x86:
        sets = [*_vector_set("avx2", AVX2), *sets]
        if for_any or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            sets = [*_vector_set("avx512", (*AVX2, *AVX512)), *sets]
            bindings = (*bindings, "-DKBIT_AVX512")
    sources = [(FOLDER / "bindings.cpp", bindings), *sets]
    sanitize = os.environ.get("KBITC_SANITIZE")
    checks = ("-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")
    extra = (f"-fsanitize={sanitize}", *checks) if sanitize else ()
    return BuildRecipe(
        sources=tuple((path, (*flags, *extra)) for path, flags in sources),
        headers=tuple(sorted(FOLDER.glob("*.h"))),
        # No path to it: torch has loaded it before.
        link=(*extra, f"-L{root / 'lib'}", "-ltorch_cpu", "-pthread"),
    )


def _vector_set(name: str, flags: tuple[str, ...]) -> list[tuple[Path, tuple[str, ...]]]:
    """-O3 where loops are for the compiler to vectorize; it takes longer."""
    return [
        (FOLDER / f"{name}.cpp", (*flags, "-O2")),
        (FOLDER / f"{name}_gemv.cpp", (*flags, "-O2")),
        (FOLDER / f"{name}_rounding.cpp", flags),
        (FOLDER / f"rows_{name}.cpp", (*flags, *ROWS)),
        (FOLDER / f"training_{name}.cpp", (*flags, *TRAINING)),
    ]


def find_compiler() -> str:
    """``$CXX``, or the first C++ compiler on the path.

    Raises:
        BackendUnavailable: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        compiler = shutil.which(name)
        if compiler:
            return compiler
    looked = f"$CXX = {wanted}" if wanted else ", ".join(COMPILERS)
    raise BackendUnavailable(
        f"no C++ compiler was found ({looked}); install one (Debian: apt install g++) to get kbitc's fast "
        "CPU kernels"
    )


def build(recipe: BuildRecipe | None = None, *, force: bool = False) -> Path:
    """Compile the kernels, unless the cache holds them; safe when several processes do so at once.

    Args:
        recipe: what to compile; by default the kernels of this folder.
        force: compile even if the cache holds them.

    Returns:
        The shared library.

    Raises:
        BackendUnavailable: no compiler, a compiler error, or a cache that cannot be written, or that
            others can write.
    """
    recipe = recipe or kernel_recipe()
    compiler = find_compiler()
    folder = cache_folder() / "kernels"
    target = folder / f"{recipe.key(compiler)}.so"
    try:
        if target.exists() and not force:
            check_private(folder.parent, folder, target)
            return target
        make_private(folder)
        lock = Lock.take(target.with_suffix(".lock"), waits=True)
        try:
            if not target.exists() or force:
                _compile(recipe, compiler, target)
        finally:
            lock.release()
        check_private(target)
    except OSError as error:
        raise BackendUnavailable(
            f"the kernels cannot be written to {folder} ({error.strerror}); set KBITC_CACHE to another folder"
        ) from error
    return target


def _compile(recipe: BuildRecipe, compiler: str, target: Path) -> None:
    scratch = target.with_name(f".build-{target.stem}")  # of the one who holds this library's lock
    remove(scratch)  # which a kill left
    scratch.mkdir(mode=0o700)
    try:
        commands = [
            [compiler, *recipe.flags, *flags, "-c", str(path), "-o", str(scratch / f"{path.stem}.o")]
            for path, flags in recipe.sources
        ]
        with _progress(len(commands)) as advance, WorkerPool(os.cpu_count() or 1) as pool:
            for _ in pool.map(_run, commands):
                advance()
            objects = [command[-1] for command in commands]
            library = scratch / target.name
            _run([compiler, "-shared", *objects, *recipe.link, "-o", str(library)])
        library.chmod(0o600)
        library.replace(target)
    finally:
        remove(scratch)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BackendUnavailable(f"compiling kbitc's CPU kernels failed: {' | '.join(lines[:3])}")


@contextlib.contextmanager
def _progress(count: int) -> Iterator[functools.partial[None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling the CPU kernels, once (about half a minute)", total=count)
        yield functools.partial(bar.advance, task)


def find_library(*, force: bool = False) -> Path:
    """The library to load: what a wheel brought, or what :func:`build` compiles.

    Args:
        force: compile one even so.
    """
    if PREBUILT.exists() and not force and "KBITC_SANITIZE" not in os.environ:
        return PREBUILT
    return build(force=force)


_SETTING_THREADS = threading.Lock()


def work_alone() -> None:
    """From now on what the calling thread runs shares its work with no other: native kernels and torch.

    For threads of a pool. ``torch.set_num_threads`` alone would hold for every thread that starts later.
    """
    if load():
        torch.ops.kbit.work_alone()
    with _SETTING_THREADS:
        of_process = torch.get_num_threads()  # which a thread takes over at the first look, so look first
        torch.set_num_threads(1)  # of this thread, and of those to come
        other = threading.Thread(target=torch.set_num_threads, args=(of_process,))
        other.start()
        other.join()


@functools.cache
def load() -> bool:
    """Make the native kernels the ones that run; the first call may compile them.

    Returns:
        Whether they are. If not, a warning has said why.
    """
    if os.environ.get("KBITC_CPU") == "off":
        return False
    try:
        library = find_library()
        torch.ops.load_library(str(library))
        torch.ops.kbit.cpu_kernels()  # a wrong KBITC_CPU is an error here, not in the middle of a model
    except (BackendUnavailable, OSError) as error:  # OSError: the library does not load
        warnings.warn(
            f"{error}. Until then packed weights run on slow reference kernels (KBITC_CPU=off hides this)",
            stacklevel=2,
        )
        return False
    return True
