"""A decode step compiled by AOTInductor, as a package that is kept and found again."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc import cache
from kbitc.backends._compiler import missing_compiler
from kbitc.backends._decoding import decode_step, decoder
from kbitc.backends._decoding.decode_step import TracedStep, export_step
from kbitc.backends.cpu.step_key import kept_folder, step_key
from kbitc.errors import BackendUnavailable, SourceError, UsageError, first_line
from kbitc.pipeline import Pass
from kbitc.system.checksums import digests_in
from kbitc.system.json_file import read_json

PACKAGE = "step.pt2"
CONSTANTS = "constants.safetensors"
FUSIONS = "fusions.json"
SUMS = "checksums.json"  # of the other files

OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # What surrounds the matmuls of one token is too little work to share between threads.
    "cpp.threads": 1,
}


def kept_packages() -> list[Path]:
    """The packages that are there, of any model."""
    folders = (file.parent for file in kept_folder().glob(f"*/{PACKAGE}"))
    return sorted(folder for folder in folders if not folder.name.startswith("."))  # those are not complete


def package_key(model: Any, step: TracedStep, state: dict[str, Tensor], passes: Sequence[Pass]) -> str:
    """A name for everything that a package depends on."""
    ops = [str(torch.ops.kbit.linears.default._schema), str(torch.ops.kbit.linear.default._schema)]
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    files = [decode_step.__file__, decoder.__file__, __file__]
    return step_key(model, step, state, passes, files, ops=ops, machine=machine, options=OPTIONS)


def _cpu_flags() -> str:
    """The instruction sets that -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compile_package(
    model: nn.Module, root: Path, target: Path, state: dict[str, Tensor], passes: Sequence[Pass]
) -> None:
    """Export, compile, and put the package in place at once, complete or not at all."""
    missing = missing_compiler()
    if missing is not None:
        raise BackendUnavailable(f"the decode step cannot be compiled: {missing}")
    try:
        cache.make_private(root)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    except OSError as error:
        raise BackendUnavailable(
            f"{root}: compiled code cannot be written there: {error.strerror}; name a folder in KBITC_CACHE"
        ) from error
    try:
        with _shown("compiling the decode step, once"):
            _build(model, made, state, passes)
        for file in made.iterdir():
            file.chmod(0o600)
        if target.exists() and not is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
        try:
            made.rename(target)
        except OSError:
            if not is_whole(target):  # else another process was faster
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _build(model: nn.Module, folder: Path, state: dict[str, Tensor], passes: Sequence[Pass]) -> None:
    from safetensors.torch import save_file

    options = dict(OPTIONS)
    if getattr(model, "dtype", torch.float32) != torch.float32:
        options["emulate_precision_casts"] = True  # round between fused steps as the eager model does
    name = type(model).__name__
    # Inductor calls ops on fake tensors, and kbit::linears has no gradient.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported, fusions = export_step(model, passes)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{name}: torch.export cannot trace the decode step: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        try:
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(folder / PACKAGE), inductor_configs=options
            )
        except Exception as error:
            raise BackendUnavailable(
                f"{name}: AOTInductor cannot compile it: {type(error).__name__}: {first_line(error)}"
            ) from error
    made = {
        name: value.contiguous()
        for name, value in exported.constants.items()
        if isinstance(value, Tensor) and name not in state
    }
    save_file(made, folder / CONSTANTS)
    record = {name: fired.to_json() for name, fired in fusions.items()}
    (folder / FUSIONS).write_text(json.dumps(record), encoding="utf-8")
    (folder / SUMS).write_text(json.dumps(digests_in(folder)), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a package is there, as it was made."""
    try:
        return read_json(folder / SUMS) == digests_in(folder, [SUMS])
    except SourceError:
        return False


def load_package(folder: Path, state: dict[str, Tensor]) -> Any:
    """The function ``[ids, rows, ...] -> [logits]`` of a package, on these weights.

    Raises:
        BackendUnavailable: others than this user could have written the package.
    """
    from safetensors.torch import load_file

    cache.check_private(folder.parent.parent, folder.parent, folder, *folder.iterdir())
    runner = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    known = {**load_file(folder / CONSTANTS), **state}
    needed = runner.get_constant_fqns()
    runner.load_constants({name: known[name] for name in needed}, check_full_update=True, user_managed=True)
    run = runner.loader.boxed_run  # type: ignore[attr-defined]

    def call(inputs: list[Tensor], _kept: Any = (runner, known)) -> Any:
        return run(inputs)

    return call


@contextmanager
def _shown(what: str) -> Iterator[None]:
    """A line on standard error with the seconds so far; a plain one where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} (about a minute; kept for the next start)", highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield
