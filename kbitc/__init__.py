"""kbitc: a compiler that rewrites PyTorch models to k-bit weights, k = 2 to 8.

    import kbitc
    model = kbitc.compile("path/to/model", bits=4)         # plan, pack, load
    weight = kbitc.quantize(tensor, "nf4:64")              # one tensor
    model = kbitc.load("path/to/artifact")

Names are imported when they are first used, so that ``import kbitc`` and ``kbitc --help`` are quick.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from kbitc.transformers_hook import register_when_imported
from kbitc.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from kbitc.artifact.loading import load, load_into
    from kbitc.artifact.reader import Artifact
    from kbitc.compiler.saving import save
    from kbitc.compiler.transformers_client import KbitConfig
    from kbitc.formats.spec import Spec
    from kbitc.formats.spec import parse as parse_spec
    from kbitc.pipeline.registry import Pass
    from kbitc.quantizers import quantize
    from kbitc.tensor.kbit_tensor import KbitTensor
    from kbitc.tensor.unpacking import dequantized
    from kbitc.training.adapting import prepare_for_training

__all__ = [
    "Artifact",
    "KbitConfig",
    "KbitTensor",
    "Spec",
    "compile",
    "dequantized",
    "export_onnx",
    "load",
    "load_into",
    "parse_spec",
    "prepare_for_training",
    "quantize",
    "save",
    "tune",
]

_HOME = {
    "Artifact": ("kbitc.artifact.reader", "Artifact"),
    "KbitConfig": ("kbitc.compiler.transformers_client", "KbitConfig"),
    "KbitTensor": ("kbitc.tensor.kbit_tensor", "KbitTensor"),
    "Spec": ("kbitc.formats.spec", "Spec"),
    "dequantized": ("kbitc.tensor.unpacking", "dequantized"),
    "load": ("kbitc.artifact.loading", "load"),
    "load_into": ("kbitc.artifact.loading", "load_into"),
    "parse_spec": ("kbitc.formats.spec", "parse"),
    "prepare_for_training": ("kbitc.training.adapting", "prepare_for_training"),
    "quantize": ("kbitc.quantizers", "quantize"),
    "save": ("kbitc.compiler.saving", "save"),
}


_ROOMS = ("nn", "optim", "training")
"""Packages whose names users reach through this one."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"kbitc.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'kbitc' has no attribute '{name}'")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})


def compile(  # noqa: A001  # kbitc.compile, as torch.compile
    model: str | Path | nn.Module,
    bits: float | None = None,
    *,
    spec: str | None = None,
    plan: Path | dict[str, Any] | None = None,
    out: str | Path | None = None,
    strict: bool = False,
    passes: Sequence[Pass | str] | None = None,
    force: bool = False,
    calibrate: str | Path | Tensor = "auto",
    agree: str = "",
    quantizer: str = "auto",
    equalize: str = "off",
    rotate: str = "off",
    target: str = "cpu",
    types: Sequence[str] = (),
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> nn.Module:
    """Compile a model to k-bit weights.

    Args:
        model: a module in memory, a Hugging Face folder, a GGUF file, a hub id, or "demo".
        bits: budget in stored bits per parameter over the whole model; 4 if nothing else is given.
        spec: instead of a budget, one format for every weight, for example "nf4:64".
        plan: instead of a budget, a plan file or its parsed contents.
        out: also write the artifact there; needed to keep what was compiled from a path.
        strict: fail when the weight of a matmul would be left unquantized.
        passes: what to run between capture and pack instead, as names or values of your own:
            ``["canonicalize", "allocate_bits", MyPass()]``.
        force: replace an existing ``out``.
        calibrate: what says which errors matter: "auto" (with ``bits`` "self" for a causal language model
            and "random" for another model of transformers or one with ``example_inputs``, otherwise
            "none"), "self" (text that the model samples), "random" (random inputs), "none", a UTF-8 text
            file, or int64 token ids of shape (windows, length).
        agree: weights that a budget's plan gives one spec: "input" for those that read one value (queries,
            keys and values; gate and up), "role" for those at one place of every layer.
        quantizer: what chooses scales and codes: a name (``kbitc.quantizers``), or "auto": what the plan
            says, and "weighted" where something was measured, "absmax" elsewhere.
        equalize: scale features between weights, a change of weights that leaves the function as it is:
            "off", "on", or "auto": if inputs that are held out say that it helps.
        rotate: the same of turning the residual stream.
        target: what will hold the weights: "cpu", "triton" (kbitc's kernels, which hold every format), or
            "onnx" or "vllm": then ``bits`` are bytes of the exported file.
        types: data types that ``bits`` chooses from, for example ``["int", "nf"]``; all by default.
        example_inputs: positional (tuple) or keyword (dict) inputs, for a module that transformers
            does not know, or in place of those that are made from a config. Where they are more than text,
            errors are measured on them: noise stands for floats of one value throughout, as of
            ``torch.zeros``, and everything else is taken as it is.

    Returns:
        The model with packed weights. A module in memory is copied, never changed.

    Raises:
        kbitc.errors.KbitcError: see ``kbitc.compiler.driver.compile_to``.

    Warns:
        kbitc.errors.UntracedWarning: torch.export cannot trace the model; what that leaves out.
    """
    import tempfile
    from pathlib import Path as LocalPath

    from torch import nn as torch_nn

    from kbitc.artifact.loading import load as load_artifact
    from kbitc.backends import find_target
    from kbitc.compiler.checks import warn_untraced
    from kbitc.compiler.driver import compile_module, compile_to
    from kbitc.compiler.request import Request

    request = Request.of(
        bits,
        spec,
        plan,
        is_strict=strict,
        passes=passes,
        calibrate=calibrate,
        agree=agree,
        quantizer=quantizer,
        equalize=equalize,
        rotate=rotate,
        target=find_target(target),
        types=types,
    )
    folder = None if out is None else LocalPath(out)
    if isinstance(model, torch_nn.Module):
        packed = compile_module(model, request, example_inputs, out=folder, is_forced=force)
        if "transformers" not in sys.modules:
            return packed
        from kbitc.compiler.transformers_client import as_loaded

        return as_loaded(packed)
    if folder is not None:
        result = compile_to(model, folder, request, is_forced=force, example_inputs=example_inputs)
        warn_untraced(result.source, result.program)
        return load_artifact(folder, verify=False)
    with tempfile.TemporaryDirectory(prefix="kbitc-") as temporary:
        scratch = LocalPath(temporary) / "model"
        result = compile_to(model, scratch, request, example_inputs=example_inputs)
        warn_untraced(result.source, result.program)
        return load_artifact(scratch, verify=False)


def export_onnx(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    storage: str = "direct",
    activations: str = "fp32",
    example_inputs: tuple[Any, ...] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a packed model as ONNX; see ``kbitc.backends.onnx_export.export.export_onnx``.

    Raises:
        kbitc.errors.BackendUnavailable: onnx, onnxscript or onnxruntime is not installed.
    """
    from kbitc.backends import find_backend

    exporter = find_backend("onnx_export")()
    report: dict[str, Any] = exporter.export(
        model,
        folder,
        storage=storage,
        activations=activations,
        example_inputs=example_inputs,
        force=force,
    )
    return report


def tune(
    artifact: str | Path,
    source: str | Path | nn.Module | None = None,
    *,
    out: str | Path | None = None,
    calibrate: str | Path | Tensor = "auto",
    windows: int | None = None,
    steps: int | None = None,
    flips: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Make a compiled model better at the same size: tune its scales, zero points, codebooks and norms.

    They are moved towards the outputs of the model that it was compiled from. Windows that are held out judge
    it: where they say that nothing was gained, the artifact stays as it is.

    Args:
        artifact: folder of the compiled model.
        source: what it was compiled from; by default what the artifact recorded, if it is to be found.
        out: folder to write; by default the artifact's own.
        calibrate: what to tune on: "auto" ("self" for a causal language model, else "random"), "self",
            "random", a UTF-8 text file, or int64 token ids of shape (windows, length).
        windows: to learn from; eight more are held out.
        steps: of the optimiser, of two windows each.
        flips: whether single codes are moved by one level, too; it takes as long again, and much text.
        force: replace an existing ``out``.

    Returns:
        What ``kbitc tune --json`` prints: divergences before and after, in nats, and what was tuned.

    Raises:
        kbitc.errors.KbitcError: see ``kbitc.training.tuning.tune_to``.
    """
    from pathlib import Path as LocalPath

    from kbitc.training.distilling import ROUNDS, recipe
    from kbitc.training.tuning import tune_to

    target = None if out is None else LocalPath(out)
    asked = recipe(windows=windows, steps=steps, flips=ROUNDS if flips else 0)
    result = tune_to(artifact, source, out=target, calibrate=calibrate, recipe=asked, is_forced=force)
    return result.to_json()


register_when_imported()
