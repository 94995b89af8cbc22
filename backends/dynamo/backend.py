"""``torch.compile(model, backend="kbit", options={"bits": 4})``: packed weights in the compiled graphs.

before:  graph of Dynamo, 16-bit parameters among its inputs
after:   the same graph on packed weights, compiled by Inductor; the model's own code and parameters stay

The one thing to know: the plan is made once for each model and request, of the whole model and by the
statements of `kbitc.compile`, so that every graph (of other lengths, between graph breaks) reads the same
packed weights. It is for inference: gradients flow to inputs, never to parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import tracing

from kbitc.backends._compiler import missing_compiler
from kbitc.backends.dynamo.graph import Lowered, is_differentiated, lower_graph, trace
from kbitc.backends.dynamo.options import CompileOptions
from kbitc.backends.dynamo.owner import owner
from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.module import is_freed
from kbitc.compiler.modules import packed_weights, plan_module
from kbitc.errors import UsageError, first_line
from kbitc.formats.layout import operand_slots
from kbitc.graph.capture import StoredNames, capture
from kbitc.graph.context import Context
from kbitc.graph.example_inputs import example_inputs as make_example_inputs
from kbitc.graph.program import Program
from kbitc.graph.transforms import other_transform
from kbitc.passes.canonicalize import NEVER_READ

Compiled = Callable[..., Any]


@dataclass
class PlannedModel:
    """What is kept of a model that is compiled: its plan and packed weights, for all of its graphs.

    Attributes:
        options: of the call that planned it.
        program: planned, without data.
        operands: what is packed, by stored name; codebooks that weights share are there once.
        is_freed: the parameters that are packed hold no data any more.
        warned: what was said already.
    """

    options: CompileOptions
    program: Program
    operands: Mapping[str, Tensor]
    is_freed: bool = False
    warned: set[str] = field(default_factory=set)

    @property
    def packed_names(self) -> list[str]:
        """First names of the weights that are packed."""
        plan = self.program.plan
        assert plan is not None
        return [name for name, choice in plan.weights.items() if not choice.spec.is_left_alone]


_models: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], PlannedModel]] = WeakKeyDictionary()


def models_of(root: nn.Module) -> tuple[PlannedModel, ...]:
    """What is kept of a module that was compiled, one for each request."""
    return tuple(_models.get(root, {}).values())


def kbit(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend "kbit" of torch.compile.

    Weights are read when the first graph is compiled; what is changed in them later has no effect. A model
    in training mode with gradients is compiled as it is, with a warning.

    Args:
        graph: of Dynamo, parameters lifted to inputs.
        inputs: the real ones.
        options: by name, see `CompileOptions`.
        mode: see `CompileOptions`.

    Raises:
        KbitcError: see `CompileOptions.of` and `kbitc.compiler.modules.plan_module`; torch wraps it in
            BackendCompilerFailed.
    """
    settings = CompileOptions.of({**({} if mode is None else {"mode": mode}), **(options or {})})
    parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
    if not parameters:
        return _inner(settings, graph, inputs)
    root = owner(parameters)
    if root is None:
        reason = "its parameters are not of one module; call torch.compile with the module itself"
        return _unquantized(settings, "a function", graph, inputs, reason)
    label = type(root).__name__
    if root.training and torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return _unquantized(settings, label, graph, inputs, "it is in training mode with gradients enabled")
    if (transform := other_transform(graph)) is not None:
        reason = (
            f"it calls {transform}, of which no packed graph is made; call it outside of what is compiled"
        )
        return _unquantized(settings, label, graph, inputs, reason)
    try:
        traced = trace(graph, inputs)
    except Exception as error:  # noqa: BLE001  # whatever a model's operators raise
        reason = f"it cannot be traced on fake tensors: {type(error).__name__}: {first_line(error)}"
        return _unquantized(settings, label, graph, inputs, reason)
    lifted = traced.named(inputs, _names(root))
    with _plain_state(root):
        model = _model_of(root, settings, Program(traced.graph, lifted))
    given = [value for value in inputs if not isinstance(value, nn.Parameter)]
    has_gradients = is_differentiated(given)
    lowered = lower_graph(traced, lifted, model.program, has_gradients=has_gradients)
    _tell(model, lifted.values(), lowered.left)
    compiled = _compiled(settings, model, lowered, has_gradients=has_gradients)
    if settings.free_source and not model.is_freed:
        _free(root, model)
    return compiled


def _compiled(
    settings: CompileOptions, model: PlannedModel, lowered: Lowered, *, has_gradients: bool
) -> Compiled:
    """A function of Dynamo's inputs; those that are packed it does not look at."""
    arguments = [None if isinstance(source, int) else model.operands[source] for source in lowered.sources]
    places = [(at, source) for at, source in enumerate(lowered.sources) if isinstance(source, int)]
    with torch.set_grad_enabled(has_gradients):
        compiled = _inner(settings, lowered.graph, lowered.inputs)

    def call(*inputs: Any) -> Any:
        values: list[Any] = [*arguments]
        for at, source in places:
            values[at] = inputs[source]
        with torch.set_grad_enabled(has_gradients):
            return compiled(*values)

    return call


def _inner(settings: CompileOptions, graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    if settings.inner == "inductor":
        options = torch._inductor.list_mode_options(settings.mode) if settings.mode else None
        compiled: Compiled = torch._inductor.compile(graph, list(inputs), options)
    else:
        compiled = lookup_backend(settings.inner)(graph, list(inputs))
    return compiled


def _unquantized(
    settings: CompileOptions, label: str, graph: fx.GraphModule, inputs: Sequence[Any], reason: str
) -> Compiled:
    """The graph as it is, if there are weights to run it on.

    Raises:
        UsageError: they were freed.
    """
    if any(is_freed(value) for value in inputs if type(value) is nn.Parameter):
        raise UsageError(
            f"{label} cannot run on packed weights: {reason}; and its 16-bit weights were freed: compile "
            "without free_source"
        )
    _warn(f"{label} stays unquantized: {reason}")
    return _inner(settings, graph, inputs)


def _model_of(root: nn.Module, settings: CompileOptions, piece: Program) -> PlannedModel:
    """The plan and packed weights of a model, made the first time.

    Args:
        root: the model.
        settings: of the call.
        piece: the graph that Dynamo found.

    Raises:
        KbitcError: they cannot be made.
    """
    known = _models.setdefault(root, {})
    first = next(root.parameters())
    key = (*settings.key(), first.device, first.dtype)  # a model that was moved is packed anew
    if key not in known:

        def captured(source: Checkpoint, context: Context) -> Program:
            return _captured(source, context, settings.example_inputs, root, piece)

        program = plan_module(root, settings.request(), captured, settings.example_inputs)
        operands = _packed(root, program)
        bare = replace(program, facts={}, context=Context(), changes=(), packed={})
        known[key] = PlannedModel(settings, bare, operands)
    return known[key]


def _captured(source: Checkpoint, context: Context, inputs: Any, root: nn.Module, piece: Program) -> Program:
    """The whole model where its inputs are known; else what Dynamo found of it."""
    if inputs is None:
        try:
            inputs = make_example_inputs(source.skeleton())
        except UsageError:
            return replace(piece, rest=StoredNames.of(root).as_rest(root), context=context)
    return capture(source.skeleton(), inputs, context=context)


def _packed(root: nn.Module, program: Program) -> dict[str, Tensor]:
    """The tensors of all packed weights by stored name."""
    operands: dict[str, Tensor] = {}
    for name, packed in packed_weights(root, program):
        weight = program.weights[name]
        slots = operand_slots(name, packed.spec, weight.oriented_shape[:-1], weight.in_features)
        for part, (stored, _) in slots.items():
            operands.setdefault(stored, getattr(packed.packed, part))
    devices = {str(tensor.device) for tensor in operands.values()}
    if len(devices) > 1:
        raise UsageError(
            f"{type(root).__name__}: its weights are on {' and '.join(sorted(devices))}; the backend 'kbit' "
            "of torch.compile runs models that are on one device"
        )
    return operands


def _names(root: nn.Module) -> dict[int, str]:
    """First names of the parameters and buffers of a module, by ``id``."""
    return {id(tensor): name for name, tensor in (*root.named_buffers(), *root.named_parameters())}


def _free(root: nn.Module, model: PlannedModel) -> None:
    """Leave packed parameters their shapes, which guards look at, and no data.

    A storage is replaced and not emptied: other tensors may share it. What another request of the same
    model left at 16 bits stays.
    """
    parameters = dict(root.named_parameters())
    others = models_of(root)
    for name in model.packed_names:
        source = parameters[name]
        if is_freed(source) or not all(name in other.packed_names for other in others):
            continue
        husk = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=source.device)
        husk.untyped_storage().resize_(0)
        source.data = husk
    model.is_freed = True
    label = type(root).__name__

    def refuse(*_: object) -> None:
        raise UsageError(
            f"{label}: the 16-bit weights were freed (free_source), there is nothing to save or copy; "
            "load the model again, or compile without free_source"
        )

    # A call that is not compiled is an error of torch, which says that the storage is empty.
    root.register_state_dict_pre_hook(refuse)
    root.__deepcopy__ = refuse  # type: ignore[assignment]


@contextmanager
def _plain_state(root: nn.Module) -> Iterator[None]:
    """As if nothing was being compiled: a plan does not depend on where torch.compile is called."""
    device = next(root.parameters()).device.type
    with ExitStack() as stack:
        stack.enter_context(tracing(None))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _tell(model: PlannedModel, names: Iterable[str], left: Mapping[str, str]) -> None:
    """Warn once of each weight of a matmul that a graph reads at 16 bits or dequantizes."""
    rest = model.program.rest
    dense = {name: rest[name] for name in names if name in rest}
    reasons = {name: tensor.reason for name, tensor in dense.items() if tensor.is_matmul}
    reasons |= {
        name: f"{NEVER_READ} that the plan is made of; give the option 'example_inputs'"
        for name, tensor in dense.items()
        if tensor.reason == NEVER_READ and len(tensor.shape) > 1
    }
    reasons |= {name: f"dequantized in each call: {reason}" for name, reason in left.items()}
    fresh = {name: reason for name, reason in reasons.items() if name not in model.warned}
    if fresh:
        model.warned.update(fresh)
        first, reason = next(iter(fresh.items()))
        more = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
        _warn(f"weights that are not read packed: '{first}' ({reason}){more}")


def _warn(message: str) -> None:
    warnings.warn(f"torch.compile, backend 'kbit': {message}", RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class Dynamo:
    """The same to kbitc's own registry: it compiles, where torch asks it to, and decodes nothing."""

    def missing(self) -> str | None:
        """What Inductor needs: a C++ compiler."""
        return missing_compiler()


BACKEND = Dynamo
