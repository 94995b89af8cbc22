"""Marked nodes of a traced graph to packed matmuls and look-ups.

before:  kbitc::linear(x, planes, bias)
after:   MatMulNBits and what it needs (`OnnxWeight`)

The one thing to know: all marked nodes of one weight share its initializers; the marker's own planes
leave the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from kbitc.backends.onnx_export.emit import MICROSOFT, Emitter, tensor_bytes
from kbitc.backends.onnx_export.initializers import ExportOptions, expert_of
from kbitc.backends.onnx_export.trace import DOMAIN, MarkedGraph
from kbitc.backends.onnx_export.weight import OnnxWeight
from kbitc.errors import SourceError
from kbitc.formats.layout import weight_bytes
from kbitc.tensor.kbit_tensor import KbitTensor

Report = dict[str, dict[str, Any]]


def rewrite(traced: MarkedGraph, options: ExportOptions) -> Report:
    """Replace every marked node, in place.

    Returns:
        For each packed weight by name: spec, shape, uses, container, bytes in the file, and the
        container's error.

    Raises:
        SourceError: names a weight that is used in a way without an ONNX form.
    """
    graph = traced.model.graph
    marked = [node for node in graph if node.domain == DOMAIN]
    uses: dict[str, list[str]] = {}
    for node in marked:
        uses.setdefault(_planes(node), []).append(node.op_type)
    emitter = Emitter(graph)
    lowered: dict[str, list[OnnxWeight]] = {}
    for node in marked:
        key = _planes(node)
        name, weight = traced.weights[key]
        if key not in lowered:
            lowered[key] = _lower(emitter, name, weight, options)
        out = _replacement(emitter, node, name, lowered[key], uses[key])
        ir.convenience.replace_nodes_and_values(graph, node, [node], emitter.take(), [node.outputs[0]], [out])
    for key in traced.weights:
        graph.initializers.pop(key, None)
    _strip(graph)
    traced.model.opset_imports.pop(DOMAIN, None)
    graph.opset_imports[MICROSOFT] = 1
    return {
        traced.weights[key][0]: _report(graph, traced.weights[key], weights, uses[key])
        for key, weights in lowered.items()
    }


def _strip(graph: ir.Graph) -> None:
    """Leave out what ONNX Runtime does not need but keeps in memory: stack traces, names, inner shapes."""
    kept = set(graph.outputs)
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        node.name = ""
        for out in node.outputs:
            if out not in kept:
                out.shape = out.type = None


def _planes(node: ir.Node) -> str:
    planes = node.inputs[1]
    assert planes is not None
    assert planes.name is not None
    return planes.name


def _lower(emitter: Emitter, name: str, weight: KbitTensor, options: ExportOptions) -> list[OnnxWeight]:
    packed = weight.packed.map(lambda t: t.detach().cpu())
    if packed.planes.dim() == 2:
        return [OnnxWeight(emitter, name, packed, options)]
    experts = range(packed.planes.shape[0])
    return [OnnxWeight(emitter, f"{name}.{i}", expert_of(packed, i), options) for i in experts]


def _replacement(
    emitter: Emitter, node: ir.Node, name: str, weights: list[OnnxWeight], uses: list[str]
) -> ir.Value:
    x = node.inputs[0]
    if x is None or x.shape is None:
        raise SourceError(f"{name}: the number of dimensions of what it is multiplied with is not known")
    rank = len(x.shape)
    if node.op_type == "linear":
        return weights[0].linear(x, rank, node.inputs[2] if len(node.inputs) > 2 else None)
    if node.op_type == "embedding":
        return weights[0].embedding(x, rank, is_shared="linear" in uses)
    offsets = node.inputs[2]
    assert offsets is not None
    return _grouped(emitter, x, weights, offsets)


def _grouped(emitter: Emitter, x: ir.Value, weights: list[OnnxWeight], offsets: ir.Value) -> ir.Value:
    """Rows ``offsets[i - 1]`` to ``offsets[i]`` of x times the weight of expert i."""
    e = emitter
    ends = e.op("Cast", offsets, to=ir.DataType.INT64)
    start, parts = e.constant([0]), []
    for i, weight in enumerate(weights):
        end = e.op("Gather", ends, e.constant([i]), axis=0)
        parts.append(weight.linear(e.op("Slice", x, start, end, e.constant([0])), 2, None))
        start = end
    return e.op("Concat", *parts, axis=0)


def _report(
    graph: ir.Graph, named: tuple[str, KbitTensor], weights: list[OnnxWeight], uses: list[str]
) -> dict[str, Any]:
    name, weight = named
    stored = [value for key, value in graph.initializers.items() if key.startswith(f"{name}.")]
    entry: dict[str, Any] = {
        "spec": str(weight.spec),
        "shape": list(weight.shape),
        "uses": sorted(set(uses)),
        "container": "codes",
        "bytes": sum(map(tensor_bytes, stored)),
        "artifact_bytes": weight_bytes(
            weight.spec, tuple(weight.packed.planes.shape[:-1]), weight.packed.in_features
        ),
        "error": 0.0,
        "share_of_quantization_error": 0.0,
    }
    entry["container_bytes"] = entry["bytes"]
    if set(uses) != {"embedding"}:
        containers = [lowered.container for lowered in weights]
        entry["container"] = " or ".join(sorted({container.name for container in containers}))
        entry["error"] = max(container.error for container in containers)
        entry["share_of_quantization_error"] = max(container.share for container in containers)
        entry["container_bytes"] = sum(lowered.container_bytes for lowered in weights)
    return entry


def dense_initializers(graph: ir.Graph, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything else that the file holds: what was left alone, by name."""
    return {
        name: {"shape": list(value.const_value.shape.numpy()), "bytes": tensor_bytes(value)}
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and not name.startswith("kbit.")
        and not any(name.startswith(f"{weight}.") for weight in report)
    }
