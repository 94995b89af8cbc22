"""A model to a `Program`: its graph of aten calls, traced on fake tensors.

    before:  an nn.Module, on the meta device or in memory
    after:   stage CAPTURED; one placeholder for each parameter, buffer and input

The one thing to know: the trace runs on a copy of the module with fake parameters and buffers. No
weight is read, copied or allocated, and the caller's module and its config stay as they are. Of a model that
cannot be traced the program has no graph, and its weights are those that its modules' classes tell of.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from kbitc.checkpoint.float32_names import float32_names
from kbitc.checkpoint.names import first_names, stored_names
from kbitc.errors import SourceError, UsageError, did_you_mean, first_line
from kbitc.graph.context import Context
from kbitc.graph.example_inputs import UnknownInputError, is_pretrained
from kbitc.graph.example_inputs import example_inputs as make_example_inputs
from kbitc.graph.module_classes import ByClass, ModuleUse, uses_by_class
from kbitc.graph.program import Program, Rest
from kbitc.graph.trace_progress import told_of_modules
from kbitc.graph.tracing import export_program
from kbitc.graph.transforms import other_transform

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.export.graph_signature import InputSpec

NOT_LOOKED_AT = "not looked at yet: the pass 'canonicalize' decides"
TRACEABLE_ATTENTION = ("sdpa", "eager")

_log = logging.getLogger(__name__)
_torch_log = logging.getLogger("torch.fx.experimental.symbolic_shapes")


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    context: Context | None = None,
) -> Program:
    """Trace a model without its weights' data.

    Args:
        model: on the meta device (no memory), or real; not changed.
        example_inputs: positional (tuple) or keyword (mapping) inputs, real or meta; made from the
            config for a transformers model.
        context: that the program carries for later passes, the reader of the source's tensors among it.

    Returns:
        A program whose ``rest`` lists every stored tensor in the model's order, tied ones once; with
        ``untraced``, and without a graph, where torch.export cannot trace the model or an input of it is
        of a kind that cannot be made.

    Raises:
        UsageError: inputs are needed and not given, or the model is already packed.
        SourceError: the model cannot be traced, and no module is of a class that tells of a weight.
    """
    unknown: UnknownInputError | None = None
    if example_inputs is None:
        try:
            example_inputs = make_example_inputs(model)
        except UnknownInputError as error:
            unknown, example_inputs = error, {}
    else:
        _check_fit(model, *_split(example_inputs))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _fake(mode, t), _split(example_inputs))
    traced = _fake_copy(model, mode)
    make_traceable(traced)
    stored, by_class = StoredNames.of(traced), uses_by_class(traced)
    rest, context = stored.as_rest(traced), context or Context()
    try:
        if unknown is not None:
            raise _Untraceable(f"it takes '{unknown.name}', which cannot be made from its config")
        with told_of_modules(traced, context.on_progress):
            exported = _export(traced, args, kwargs)
    except _Untraceable as error:
        if not _is_known(by_class):
            raise unknown or _unknown_model(type(model).__name__, str(error)) from error
        return Program(_empty(), {}, rest=rest, context=context, by_class=by_class, untraced=str(error))
    graph, parameters = _tidy(exported, stored.first)
    return Program(graph, parameters, rest=rest, context=context, by_class=by_class)


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    raise UsageError(
        f"example_inputs is a {type(inputs).__name__}; give a tuple of positional inputs, (x,) for "
        "one, or a dict of keyword inputs"
    )


def _check_fit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what forward does not take, before an error of it looks like a model that cannot be traced."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    # What transformers passes on are switches, no tensors.
    for name in kwargs.keys() - signature.parameters.keys():
        if isinstance(kwargs[name], Tensor) and is_pretrained(model):
            raise UsageError(f"example_inputs: {did_you_mean('input', name, signature.parameters)}")


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    # Devices end up as constants in the graph, and a graph on "meta" could not run: hence the CPU.
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device, requires_grad=False
        )


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy in eval mode with fake parameters and buffers, tied ones still tied."""
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
            raise UsageError(
                f"{name} is a {type(tensor).__name__}, not a plain tensor: the model is already "
                "packed or quantized; compile the model that it was made from"
            )
        fake = _fake(mode, tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    for module in model.modules():
        # Tensors that are neither parameter nor buffer: deepcopy refuses those that have a history.
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo.setdefault(id(value), value)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise SourceError(
            f"{type(model).__name__}: its modules cannot be copied for tracing "
            f"({first_line(error)}); remove what cannot be copied, such as open files or hooks"
        ) from error
    return copied.eval()


def make_traceable(model: nn.Module, experts: str = "grouped_mm") -> None:
    """Options of transformers that decide between equal implementations, on our own copy.

    Args:
        model: changed.
        experts: their implementation; a loop over them depends on the data and cannot be traced.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]  # a cache is state, not a weight
        if not is_pretrained(module):
            continue
        pretrained: Any = module
        if pretrained._can_set_experts_implementation():
            pretrained.set_experts_implementation(experts)
        if pretrained.config._attn_implementation not in TRACEABLE_ATTENTION:
            pretrained.set_attn_implementation("sdpa" if pretrained._supports_sdpa else "eager")


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    model.forward = _failing(model.forward)  # our own copy
    _torch_log.addFilter(_is_of_use)
    try:
        exported = export_program(model, args, kwargs)
    except _Untraceable:
        raise
    except Exception as error:
        raise _Untraceable.of(error) from error
    finally:
        _torch_log.removeFilter(_is_of_use)
    if (transform := other_transform(exported.graph_module)) is not None:
        raise _Untraceable(
            f"it calls {transform}, and kbitc follows no transform of functions but torch.vmap"
        )
    return exported


def _is_of_use(record: logging.LogRecord) -> bool:
    """False for a line that torch writes about symbols of its own, in a failure that we report."""
    return not record.getMessage().startswith("Unable to find user code")


class _Untraceable(Exception):
    """torch.export failed; the message says how."""

    @staticmethod
    def of(error: Exception) -> _Untraceable:
        _log.debug("torch.export failed", exc_info=error)
        return _Untraceable(f"{type(error).__name__}: {first_line(error)}")


def _failing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose errors are ours: of its own, torch.export prints the graph so far to standard error."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            raise _Untraceable.of(error) from error

    return run


def _is_known(by_class: ByClass) -> bool:
    """Whether modules' classes tell of a weight."""
    return any(isinstance(use, ModuleUse) for uses in by_class.values() for use in uses)


def _unknown_model(label: str, error: str) -> SourceError:
    return SourceError(
        f"{label}: torch.export cannot trace it ({error}), and no module of it is of a class that says "
        "which weights it multiplies by (nn.Linear, nn.Embedding, transformers' Conv1D and experts). If "
        "the inputs are to blame, pass example_inputs; if forward branches on tensor values, rewrite "
        "that branch with torch.where or torch.cond"
    )


def _empty() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(())
    return fx.GraphModule(nn.Module(), graph)


@dataclass(frozen=True)
class StoredNames:
    """Names of what a checkpoint of the model holds.

    Attributes:
        first: every parameter and buffer name to the first name of the same tensor.
        stored: first names of the parameters and persistent buffers, in the model's order.
    """

    first: Mapping[str, str]
    stored: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module) -> StoredNames:
        """The names in a model."""
        first = first_names(model)
        stored = dict.fromkeys(first[name] for names in stored_names(model).values() for name in names)
        return StoredNames(first, tuple(stored))

    def as_rest(self, model: nn.Module) -> dict[str, Rest]:
        """All of it as not packable: the state before ``canonicalize``."""
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        aliases: dict[str, list[str]] = {}
        asked = float32_names(model)
        for name, first in self.first.items():
            if name != first:
                aliases.setdefault(first, []).append(name)
        return {
            name: Rest(
                name,
                tuple(tensors[name].shape),
                tensors[name].dtype,
                NOT_LOOKED_AT,
                is_parameter=isinstance(tensors[name], nn.Parameter),
                aliases=tuple(aliases.get(name, ())),
                is_wide=name in asked or not isinstance(tensors[name], nn.Parameter),
            )
            for name in self.stored
        }


def _tidy(exported: ExportedProgram, first: Mapping[str, str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """The exported graph with one placeholder a tensor, and nothing but tensors as inputs.

    before:  p_embed, p_head (tied), c_half, x, use_cache=False   placeholders
    after:   p_embed, x                                           placeholders; half is a get_attr
    """
    module = exported.graph_module
    nodes = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    parameters: dict[str, str] = {}
    placeholder_of: dict[str, fx.Node] = {}
    for spec in exported.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            name = first[spec.target]
            kept = placeholder_of.setdefault(name, node)
            if kept is node:
                parameters[node.name] = name
            else:
                _replace(node, kept)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            _inline_constant(module, node, spec, exported.constants)
        elif not isinstance(spec.arg, TensorArgument) and not node.users:
            module.graph.erase_node(node)
    _drop_mutations(module, exported)
    module.graph.lint()
    module.recompile()
    return module, parameters


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _inline_constant(
    module: fx.GraphModule, node: fx.Node, spec: InputSpec, constants: Mapping[str, Any]
) -> None:
    assert spec.target is not None
    attribute = node.name
    module.register_buffer(attribute, constants[spec.target], persistent=False)
    after_inputs = next(n for n in module.graph.nodes if n.op != "placeholder")
    with module.graph.inserting_before(after_inputs):
        constant = module.graph.get_attr(attribute)
    constant.meta = dict(node.meta)
    _replace(node, constant)


def _drop_mutations(module: fx.GraphModule, exported: ExportedProgram) -> None:
    """Keep the model's own outputs; buffers that it updates in place are not among them."""
    output = module.graph.output_node()
    specs = exported.graph_signature.output_specs
    kept = [
        value
        for value, spec in zip(output.args[0], specs, strict=True)  # type: ignore[arg-type]
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    output.args = (tuple(kept),)
