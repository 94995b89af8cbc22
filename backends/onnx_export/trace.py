"""A model with packed weights to an ONNX graph in which each use of one is a single marked node.

before:  model(input_ids=..., past_key_values=cache)
after:   ONNX nodes of PyTorch's exporter, and kbitc::linear(x, planes, bias), kbitc::embedding(ids, planes),
         kbitc::grouped_linear(x, planes, offsets)

The one thing to know: ``planes`` tells which weight a marked node means; nothing else of the weight is in
the graph, and the caller replaces the node.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kbitc.backends._decoding.decoder import layer_count, why_not
from kbitc.backends._decoding.lifted import LiftedModel
from kbitc.errors import SourceError, UsageError
from kbitc.formats.packed import Operands
from kbitc.graph.tracing import export_program, without_stacks
from kbitc.tensor.functions import grouped_mm
from kbitc.tensor.kbit_tensor import FUNCTIONS, KbitTensor

DOMAIN = "kbitc"
OPSET = 21
BATCH, TOKENS, PAST = 2, 5, 3  # of the trace; every one of them is dynamic
KINDS = ("linear", "embedding", "grouped_linear")


@dataclass(frozen=True)
class Signature:
    """Names and example values of a graph's inputs, and names of its outputs.

    Attributes:
        kind: "decoder" (keys and values in and out), "seq2seq", "encoder" or "module".
        inputs: by name, in order.
        dynamic: names of the dynamic dimensions of each input, by position.
        outputs: names, in order.
    """

    kind: str
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


class _FlatModel(LiftedModel):
    """Takes the inputs of a `Signature` flat, gives its outputs flat."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__(model)
        self.signature = signature

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        signature = self.signature
        named = dict(zip(signature.inputs, given, strict=True))
        with self.shown():
            if signature.kind == "decoder":
                return _decode(self.model, named)
            if signature.kind == "module":
                made = self.model(*given)
                return (made,) if isinstance(made, Tensor) else tuple(made)
            flags = {"use_cache": False} if signature.kind == "seq2seq" else {}
            out = self.model(**named, **flags)
            return tuple(out[name] for name in signature.outputs)


def _decode(model: nn.Module, named: dict[str, Tensor]) -> tuple[Tensor, ...]:
    past = [named.pop(name) for name in list(named) if name.startswith("past_key_values.")]
    cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
    out = model(**named, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    states = [state for layer in layers for state in (layer.keys, layer.values)]
    return (out.logits, *states)


def describe(model: nn.Module, example_inputs: Any = None) -> Signature:
    """What the graph of a model takes and gives.

    Args:
        model: packed, in float32.
        example_inputs: a tuple of positional tensors, for a module that transformers does not know;
            their first dimension is dynamic.

    Raises:
        UsageError: no example inputs where they are needed.
    """
    config: Any = getattr(model, "config", None)
    if example_inputs is not None or config is None:
        return _describe_module(model, example_inputs)
    accepted = inspect.signature(model.forward).parameters
    ids = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    if getattr(config, "is_encoder_decoder", False):
        # Tensors of their own: torch.export takes one tensor for one input.
        inputs = {
            "input_ids": ids,
            "attention_mask": ids.clone(),
            "decoder_input_ids": ids[:, : TOKENS - 1].clone(),
        }
        dynamic = {
            name: {0: "batch", 1: "decoder_tokens" if "decoder" in name else "tokens"} for name in inputs
        }
        return Signature("seq2seq", inputs, dynamic, _tensor_outputs(model, inputs, {"use_cache": False}))
    if getattr(model, "can_generate", lambda: False)():
        return _describe_decoder(model, accepted)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(
            f"{type(model).__name__} takes '{model.main_input_name}'; give example_inputs, a tuple of its "
            "positional inputs"
        )
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
    inputs = {name: torch.zeros_like(ids) if name == "token_type_ids" else ids.clone() for name in names}
    dynamic = {name: {0: "batch", 1: "tokens"} for name in names}
    return Signature("encoder", inputs, dynamic, _tensor_outputs(model, inputs, {}))


def _describe_module(model: nn.Module, example_inputs: Any) -> Signature:
    if not isinstance(example_inputs, tuple) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise UsageError(
            f"{type(model).__name__}: give example_inputs=(tensor, ...), its positional inputs; their first "
            "dimension becomes dynamic"
        )
    inputs = {f"input_{i}": x for i, x in enumerate(example_inputs)}
    with torch.no_grad():
        made = model(*example_inputs)
    outputs = ("output",) if isinstance(made, Tensor) else tuple(f"output_{i}" for i in range(len(made)))
    return Signature("module", inputs, {name: {0: "batch"} for name in inputs}, outputs)


def _tensor_outputs(
    model: nn.Module, inputs: Mapping[str, Tensor], flags: Mapping[str, Any]
) -> tuple[str, ...]:
    try:
        with torch.no_grad():
            made = model(**inputs, **flags)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__}: does not run on {', '.join(inputs)} alone ({error}); give "
            "example_inputs, a tuple of its positional inputs"
        ) from error
    return tuple(name for name, value in made.items() if isinstance(value, Tensor))


def _describe_decoder(model: nn.Module, accepted: Mapping[str, Any]) -> Signature:
    reason = why_not(model)
    if reason is not None:
        raise UsageError(f"{reason}, so it cannot be exported with keys and values as inputs")
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    if len(cache.layers) != layer_count(model):
        raise UsageError(f"{type(model).__name__}: layers share keys and values")
    inputs = {
        "input_ids": torch.ones(BATCH, TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + TOKENS, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + TOKENS).repeat(BATCH, 1),
    }
    dynamic = {
        "input_ids": {0: "batch", 1: "tokens"},
        "attention_mask": {0: "batch", 1: "all_tokens"},
        "position_ids": {0: "batch", 1: "tokens"},
    }
    if "position_ids" not in accepted:
        del inputs["position_ids"], dynamic["position_ids"]
    outputs = ["logits"]
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        for field, state in (("key", layer.keys), ("value", layer.values)):
            assert isinstance(state, Tensor)
            name = f"past_key_values.{i}.{field}"
            inputs[name] = torch.zeros(BATCH, state.shape[1], PAST, state.shape[3])
            dynamic[name] = {0: "batch", 2: "past_tokens"}
            outputs.append(f"present.{i}.{field}")
    return Signature("decoder", inputs, dynamic, tuple(outputs))


@dataclass(frozen=True)
class MarkedGraph:
    """Result of :func:`trace`.

    Attributes:
        model: ONNX, with marked nodes.
        weights: name and packed tensor by the name of the planes in the graph.
    """

    model: ir.Model
    weights: dict[str, tuple[str, KbitTensor]]


def trace(model: nn.Module, signature: Signature) -> MarkedGraph:
    """Export a model with packed weights, each use of one a marked node.

    Args:
        model: in float32, in eval mode; as before when this returns.
        signature: of :func:`describe`.

    Raises:
        SourceError: PyTorch cannot trace the model, or an operation has no ONNX form.
    """
    _take_grouped_fallback()
    lifted = _FlatModel(model, signature)
    names = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=True)}
    weights = {f"{fields['planes']}": (names[id(weight)], weight) for _, _, weight, fields in lifted.places}
    shapes = tuple(
        dict.fromkeys(signature.dynamic[name], torch.export.Dim.DYNAMIC) for name in signature.inputs
    )
    try:
        with lifted.hidden(), torch.no_grad(), without_stacks(), _quiet():
            exported = export_program(lifted, tuple(signature.inputs.values()), dynamic_shapes=(shapes,))
            program = torch.onnx.export(
                exported,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # optimize_for_ort does the same again
                verbose=False,
                custom_translation_table=_table(),
            )
    except Exception as error:
        raise SourceError(_explain(model, error)) from error
    assert program is not None
    with _quiet():
        optimized, _ = optimize_for_ort(program.model)
    _name_dimensions(optimized, signature)
    return MarkedGraph(optimized, weights)


def _take_grouped_fallback() -> None:
    """Let packed experts take transformers' own grouped matmul, which it calls while tracing."""
    from transformers.integrations import moe  # noqa: F401  # defines the operation

    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        FUNCTIONS.setdefault(fallback, grouped_mm)


def _explain(model: nn.Module, error: Exception) -> str:
    lines = [line.strip() for part in _causes(error) for line in str(part).splitlines() if line.strip()]
    telling = [line for line in lines if "No ONNX function" in line or "kbit." in line or "aten" in line]
    what = (telling or lines or [type(error).__name__])[0]
    return (
        f"{type(model).__name__}: cannot be exported to ONNX: {what}. Weights that such an operation reads "
        "must be left alone (spec fp16), or the operation replaced in the model"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    yield from reversed(chain)


def _name_dimensions(model: ir.Model, signature: Signature) -> None:
    """Dynamic dimensions under the names of the signature, in place of the exporter's symbols."""
    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        for at, name in signature.dynamic[value.name].items():
            renamed[str(value.shape[at])] = name
            value.shape[at] = name
    for value in model.graph.outputs:
        for at, size in enumerate(value.shape or ()):
            if str(size) in renamed:
                assert value.shape is not None
                value.shape[at] = renamed[str(size)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and warnings about what is replaced afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _table() -> dict[Any, Any]:
    """How the exporter writes ``kbit::`` operations: as marked nodes."""
    ops = torch.ops.kbit
    return {
        ops.linear.default: _marked("linear", ("bias",), is_optional=True),
        ops.linear_int8.default: _marked("linear", ("bias",), is_optional=True),
        ops.embedding.default: _marked("embedding", ("dtype",)),
        ops.grouped_linear.default: _marked("grouped_linear", ("offsets",)),
    }


def _marked(kind: str, after: tuple[str, ...], *, is_optional: bool = False) -> Callable[..., Any]:
    """Writes a marked node of an operation on x, a weight's operands, and what comes ``after`` them."""
    mark = values.Op(values.Opset(DOMAIN, 1), kind, _schema(kind))

    def write(x: Any, *others: Any, **named: Any) -> Any:
        weight, last = Operands.split(others)
        last = named.get(after[0]) if last is None else last
        has_last = last is not None and kind != "embedding"
        return mark(x, weight.planes, last) if has_last else mark(x, weight.planes)

    # The exporter matches arguments by the names in a function's signature.
    parameter, either = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["x", *Operands._fields, *after]
    given = [parameter(name, either, annotation=Any) for name in names]
    if is_optional:
        given[-1] = given[-1].replace(default=None)
    write.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]  # as inspect reads it
    return write


def _schema(kind: str) -> onnx.defs.OpSchema:
    parameter = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    inputs = [parameter("x", "I"), parameter("planes", "B")]
    if kind != "embedding":
        inputs.append(
            parameter("bias", "T", param_option=optional) if kind == "linear" else parameter("offsets", "O")
        )
    return onnx.defs.OpSchema(
        kind,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[parameter("out", "T")],
        type_constraints=[
            ("I", ["tensor(float)", "tensor(int64)", "tensor(int32)"], "activations or ids"),
            ("B", ["tensor(uint8)"], "planes"),
            ("T", ["tensor(float)"], "results"),
            ("O", ["tensor(int32)", "tensor(int64)"], "offsets"),
        ],
    )
