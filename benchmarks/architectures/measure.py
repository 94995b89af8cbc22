"""One class from its config to the outputs of its loaded artifact; runs in a process of its own.

The one thing to know: which weights are matmul weights is found here without kbitc: parameters of
``nn.Linear`` and its kind, and whatever the dense model's forward hands to a matmul: as it is, as a view, or
as what it computes of parameters and constants alone (rows of a table that no input chooses).
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.architectures.classes import SPECIAL, ModelClass
from benchmarks.architectures.inputs import inputs_for
from benchmarks.architectures.report import ERROR
from benchmarks.architectures.selections import Selections
from benchmarks.architectures.shrink import shrink

# Eight bits leave a tiny random model nearly as it was built, and kernels do not round levels of integers.
# Fewer bits make a few models so sharp that they blow up what rounding inputs to 15 bits loses.
SPEC = "int8:32"
MOST_PARAMETERS = 20_000_000
NOISE = 0.02

Record = dict[str, Any]


def measure(
    each: ModelClass, tell: Callable[[Record], None], *, spec: str = SPEC, bits: float | None = 4
) -> None:
    """Try one class; ``tell`` is called after every stage with all that is known.

    A record has ``stage``: where it ended ("build", "compile", "compare", "bits", or "done").
    """
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record: Record = {"class": each.name, "model_type": each.model_type, "kind": each.kind, "stage": "build"}
    tell(record)
    with tempfile.TemporaryDirectory(prefix="kbitc-architecture-") as folder:
        source = Path(folder) / each.model_type
        try:
            model, label, feed = _build(each)
            model.save_pretrained(source)
        except Exception as error:  # noqa: BLE001  # the harness', not kbitc's
            tell({**record, "message": said(error)})
            return
        out = Path(folder) / "out"
        reference = _Reference(out, feed)
        matmuls = matmul_weights(model, feed)
        record |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "inputs": label,
            "matmul_weights": len(matmuls),
        }
        _try(record, tell, "compile", lambda: _compile(source, out, spec, record, matmuls))
        if record.get("compiles"):
            _try(record, tell, "compare", lambda: _compare(each, source, out, feed, reference, record))
        if bits is not None:
            _try(record, tell, "bits", lambda: _compile_bits(source, Path(folder) / "bits", bits, record))
        tell({**record, "stage": "done"})


def said(error: BaseException) -> str:
    """The kind of an error and its first line."""
    from kbitc.errors import KbitcError

    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if isinstance(error, KbitcError) else f"{type(error).__name__}: {line}"


def _try(record: Record, tell: Callable[[Record], None], stage: str, step: Callable[[], None]) -> None:
    record["stage"] = stage
    tell(record)
    started = time.perf_counter()
    try:
        step()
    except Exception as error:  # noqa: BLE001  # this is what the campaign looks for
        from kbitc.errors import KbitcError

        record.setdefault("errors", {})[stage] = said(error)
        if not isinstance(error, KbitcError):
            record.setdefault("raw", []).append(stage)
    record.setdefault("seconds", {})[stage] = round(time.perf_counter() - started, 1)


def _build(each: ModelClass) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """The tiny model, and inputs that it takes."""
    import transformers

    model_class = getattr(transformers, each.name)
    config_class = model_class.config_class
    data = shrink(config_class().to_dict(), SPECIAL.get(each.model_type))
    config = config_class.from_dict(data)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class._from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"the shrunk model has {count:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():  # what begins at zero would hide a weight at the wrong place
                parameter.add_(NOISE * torch.randn_like(parameter))
    label, feed = inputs_for(model)
    outputs = run(model, feed)
    if not outputs or not all(output.isfinite().any() for output in outputs):
        raise ValueError("the dense model's outputs are not finite")
    return model, label, feed


def run(model: nn.Module, feed: Mapping[str, Tensor]) -> list[Tensor]:
    """All floating tensors of a model's outputs; what it draws, it draws from one seed."""
    torch.manual_seed(1)
    with torch.no_grad():
        return [tensor for tensor in _flat(model(**feed)) if tensor.is_floating_point()]


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _flat(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)


class _Matmuls(TorchDispatchMode):
    """Notes the storages that matmuls read as factors; of two that no input changes the one on the right.

    An addend is no factor, and what meets the weight of a linear, or is on the left of another parameter, is
    an input, learned or not. Convolutions count where they are a matmul: kernels of one place, or that do not
    overlap. A factor that is computed of parameters counts for those, up to another matmul.
    """

    names = (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_grouped_mm",
        "mv",
        "addmv",
        "dot",
        "matmul",
        "linear",
        "lstm",
        "gru",
    )

    def __init__(self, model: nn.Module, linears: set[int]) -> None:
        super().__init__()
        self.linears = linears
        self.read: set[int] = set()
        self.stored = {_place(parameter) for parameter in model.parameters()}
        vectors = {_place(p) for p in model.parameters() if sum(size > 1 for size in p.shape) < 2}
        self.made_of = {place: {place} - vectors for place in self.stored}
        self.made_of |= {_place(buffer): set() for buffer in model.buffers()}
        self.held: list[Any] = []  # so that no other tensor comes to lie where they do

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_matmul = name in self.names or (name == "convolution" and _is_matmul(args))
        if is_matmul:
            self._note(name, list(_flat(list(args))))
        out = func(*args, **(kwargs or {}))
        given = [self.made_of.get(_place(tensor)) for tensor in _flat([*args, *(kwargs or {}).values()])]
        self._follow(given, list(_flat(out)), is_matmul=is_matmul)
        return out

    def _note(self, name: str, factors: list[Tensor]) -> None:
        if name in ("addmm", "baddbmm", "addmv"):
            factors = factors[1:]
        read = [_place(factor) for factor in factors]
        is_query = name in ("mm", "addmm", "bmm", "baddbmm") and self.made_of.keys() >= set(read)
        operands = {place for place in (read[1:] if is_query else read) if place in self.stored}
        if not is_query:
            operands = operands.union(*(self.made_of.get(place, ()) for place in read))
        self.read |= operands & self.linears or operands

    def _follow(self, given: list[set[int] | None], results: list[Tensor], *, is_matmul: bool) -> None:
        """Note what is computed of stored tensors and constants alone, and of which."""
        for result in results:
            place = _place(result)
            if any(made_of is None for made_of in given):
                self.made_of.pop(place, None)  # written in place
            elif place not in self.stored:
                of = set() if is_matmul else set().union(*(each or () for each in given))
                self.made_of[place] = of | self.made_of.get(place, set())
                self.held.append(result.untyped_storage())


def _place(tensor: Tensor) -> int:
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


def _is_matmul(args: Any) -> bool:
    weight, stride, padding, is_transposed, groups = args[1], args[3], args[4], args[6], args[8]
    kernel = list(weight.shape[2:])
    is_apart = all(k == s for k, s in zip(kernel, list(stride) * len(kernel), strict=False))
    return not is_transposed and groups == 1 and not any(padding) and (is_apart or set(kernel) == {1})


def matmul_weights(model: nn.Module, feed: Mapping[str, Tensor]) -> dict[str, int]:
    """First names of the matmul weights, and how many parameters each has."""
    from transformers.pytorch_utils import Conv1D

    by_class = {
        _place(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, (nn.Linear, Conv1D, nn.MultiheadAttention, nn.LSTM, nn.GRU))
        and parameter.ndim > 1
        and not name.startswith("bias")
    }
    mode = _Matmuls(model, by_class)
    with mode:
        run(model, feed)
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.is_floating_point() and _place(parameter) in by_class | mode.read
    }


def _compile(source: Path, out: Path, spec: str, record: Record, matmuls: Mapping[str, int]) -> None:
    """Under --strict; where that refuses, without."""
    from kbitc.artifact.reader import Artifact
    from kbitc.compiler.driver import compile_to
    from kbitc.compiler.request import Request
    from kbitc.errors import UsageError

    record |= {"compiles": False, "strict": True}
    try:
        compile_to(source, out, Request.of(spec=spec, is_strict=True))
    except UsageError as error:
        if not str(error).startswith("--strict"):
            raise
        record |= {"strict": False, "strict_says": said(error)}
        compile_to(source, out, Request.of(spec=spec))
    record["compiles"] = True
    plan = Artifact.open(out).plan
    packed = {name for first, entry in plan.packed.items() for name in (first, *entry.aliases)}
    left = {name: count for name, count in matmuls.items() if name not in packed}
    total = sum(matmuls.values())
    record["packed_share"] = 1.0 if not total else 1 - sum(left.values()) / total
    reasons = {name: rest.reason for name, rest in plan.left_alone.items()}
    record["unpacked"] = [
        f"{name}: {reasons.get(name, 'not in the artifact')}"
        for name in sorted(left, key=lambda name: -left[name])[:4]
    ]
    record["unpacked_count"] = len(left)


def _compare(
    each: ModelClass,
    source: Path,
    out: Path,
    feed: Mapping[str, Tensor],
    reference: _Reference,
    record: Record,
) -> None:
    """The loaded artifact against the dense model of its dequantized weights."""
    import transformers

    import kbitc
    from kbitc.artifact.reader import Artifact
    from kbitc.tensor.kbit_tensor import KbitTensor

    dense = getattr(transformers, each.name).from_pretrained(source, dtype=torch.float32).eval()
    dense.requires_grad_(False)  # as packed weights are: torch multiplies by others in another order (matmul)
    artifact = Artifact.open(out)
    state = artifact.state()
    for names in (artifact.plan.weights, artifact.plan.left_alone):
        for name, entry in names.items():
            state |= dict.fromkeys(entry.aliases, state[name])
    tensors = {
        **dict(dense.named_buffers(remove_duplicate=False)),
        **dict(dense.named_parameters(remove_duplicate=False)),
    }
    missing = [name for name, _ in dense.named_parameters() if name not in state]
    if missing:
        record["not_in_artifact"] = missing[:4]
    for name, stored in state.items():
        if name in tensors:
            value = stored.dequantize(torch.float32) if isinstance(stored, KbitTensor) else stored
            # In memory of its own: in a mapped file it lies at any address, and BLAS's order of sums differs.
            tensors[name].data = torch.empty_like(tensors[name]).copy_(value)
    with Selections() as chosen:
        expected = run(dense, feed)
    model = kbitc.load(out)
    record["error"] = difference(run(model, feed), expected)
    if record["error"] > ERROR and chosen.made:
        with Selections(chosen.made) as held:
            error = difference(run(model, feed), expected)
        record["selects"] = {"error": record["error"], "gap": held.gap}
        record["error"] = max(error, held.gap)
    off = reference.outputs()
    record["bit_equal"] = len(off) == len(expected) and all(
        torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        for ours, theirs in zip(off, expected, strict=True)
    )
    record["error_off"] = difference(off, expected)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of one output, in its largest value; infinite for other shapes."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not b.numel() or torch.equal(a, b):
            continue
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf")
        scale = b[finite].abs().max().item() if finite.any() else 0.0
        apart = (a - b)[finite].abs().max().item() if finite.any() else 0.0
        worst = max(worst, apart / max(scale, 1e-6))
    return worst


def _compile_bits(source: Path, out: Path, bits: float, record: Record) -> None:
    """With default calibration.

    A budget that cannot be met is an answer, not a failure, where only what is no matmul weight stays
    unpacked: in a tiny model that weighs more than in a real one.
    """
    from kbitc.artifact.reader import Artifact
    from kbitc.compiler.driver import compile_to
    from kbitc.compiler.request import Request
    from kbitc.errors import BudgetError

    record["bits"] = False
    try:
        compile_to(source, out, Request.of(bits))
    except BudgetError as error:
        record["budget"] = said(error)
        record["bits"] = record.get("unpacked_count") == 0
        return
    record["bits"] = True
    record["bits_per_param"] = Artifact.open(out).bits_per_param


class _Reference:
    """A forked process that runs the artifact on the reference kernels: KBITC_CPU=off is read only once."""

    def __init__(self, out: Path, feed: Mapping[str, Tensor]) -> None:
        self.file = out.parent / "reference.pt"
        read, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(read)
            return
        try:
            os.close(self.go)
            if os.read(read, 1):
                import kbitc

                os.environ["KBITC_CPU"] = "off"
                torch.save(run(kbitc.load(out), feed), self.file)
        finally:
            os._exit(0)

    def outputs(self) -> list[Tensor]:
        """Once the artifact is there."""
        os.write(self.go, b"1")
        os.waitpid(self.pid, 0)
        outputs: list[Tensor] = torch.load(self.file, weights_only=True)
        return outputs
