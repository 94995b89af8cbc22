"""A contraction as nodes: the canonical call of the whole parameter, and what moves its operands.

The one thing to know: the input's dimensions are brought to ``(groups, rest, columns)``, columns that the
view leaves out are zeros, and of the result the rows that it has are kept and put in the old call's order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kbitc.graph import program
from kbitc.graph.contraction import Contraction, varying
from kbitc.graph.rewriting import call
from kbitc.graph.weight_reads import value_of
from kbitc.graph.weight_views import scale_of

aten = torch.ops.aten


@dataclass
class _Named:
    """A node and the names of its dimensions."""

    node: fx.Node
    names: str
    do: Callable[..., fx.Node]

    def select(self, name: str) -> None:
        """Leave out a dimension of one element."""
        self.node = self.do(aten.select.int, self.node, self.names.index(name), 0)
        self.names = self.names.replace(name, "")

    def sum(self, name: str) -> None:
        """Add up a dimension."""
        self.node = self.do(aten.sum.dim_IntList, self.node, [self.names.index(name)])
        self.names = self.names.replace(name, "")

    def permute(self, names: str) -> None:
        """Bring the dimensions into an order."""
        if names != self.names:
            self.node = self.do(aten.permute.default, self.node, [self.names.index(name) for name in names])
            self.names = names

    def times(self, factor: fx.Node, names: str) -> None:
        """Multiply by a factor of the weight's shape that varies along dimensions that are here."""
        by = _Named(factor, names, self.do)
        moving = varying(names, value_of(factor))
        for name in names:
            if name not in moving:
                by.select(name)
        by.permute("".join(name for name in self.names if name in moving))
        for at, name in enumerate(self.names):
            if name not in moving:
                by.node = self.do(aten.unsqueeze.default, by.node, at)
        by.node = _cast(by.node, value_of(self.node).dtype, self.do)
        self.node = self.do(aten.mul.Tensor, self.node, by.node)


def build_contraction(
    graph: fx.Graph, old: fx.Node, form: Contraction, weight: fx.Node, new: Callable[[fx.Node], fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """The canonical call of a contraction; arguments and results as for `kbitc.graph.rewriting.build`."""

    def do(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(graph, old, target, *args, **kwargs)

    product, rows = form.product, form.rows
    scale = scale_of(form.read, do, new)
    x = _Named(new(product.x), product.of_x, do)
    for factor, meets_input in zip(scale.factors, form.meets_input, strict=True):
        if meets_input:
            x.times(factor, product.of_weight)
    groups, rest = _bring(x, form)
    bias = _bias(form, scale.number) if not any(not meets for meets in form.meets_input) else None
    canonical = _canonical(x, form, weight, None if bias is None else new(bias))
    out = _Named(canonical, "", do)
    if form.groups is not None:
        sizes = dict(zip(x.names, _sizes(x), strict=False))
        shape = [*(sizes[name] for name in groups + rest), rows.total]
        out.node = do(aten.reshape.default, canonical, shape)
    if rows.length != rows.total:
        out.node = do(aten.slice.Tensor, out.node, -1, rows.start, rows.start + rows.length)
    if not rows.names:
        out.node = do(aten.select.int, out.node, -1, 0)
    elif len(rows.names) > 1:
        out.node = do(aten.unflatten.int, out.node, -1, list(rows.names.values()))
    out.names = groups + rest + "".join(rows.names)
    _finish(out, old, form, bias is None, scale, new)
    return out.node, canonical


def _bring(x: _Named, form: Contraction) -> tuple[str, str]:
    """``(groups, rest, columns)``, the columns as one dimension; the names of the first two."""
    groups = "" if form.groups is None else "".join(form.groups.names)
    columns = "".join(form.columns.names)
    for name in x.names:
        if name in form.repeated and name not in form.product.of_out:
            x.sum(name)
        elif name in form.rows.names:  # one element, that the view's many meet
            x.select(name)
    rest = "".join(name for name in x.names if name not in groups + columns)
    # In the order of the output, so that as a rule nothing has to be moved back.
    rest = "".join(sorted(rest, key=form.product.of_out.index))
    x.permute(groups + rest + columns)
    if not columns:
        x.node = x.do(aten.unsqueeze.default, x.node, -1)
    elif len(columns) > 1:
        x.node = x.do(aten.flatten.using_ints, x.node, -len(columns), -1)
    span = form.columns
    if span.length != span.total:
        ends = [span.start, span.total - span.start - span.length]
        x.node = x.do(aten.constant_pad_nd.default, x.node, ends)
    x.names = groups + rest
    return groups, rest


def _bias(form: Contraction, number: float) -> fx.Node | None:
    """The addend, if the canonical call can add it."""
    product = form.product
    if product.addend is None or form.kind != "linear" or (product.alpha, product.beta, number) != (1, 1, 1):
        return None
    is_last = "".join(form.rows.names) == product.of_out[-1:]
    is_whole = value_of(product.addend).shape == (form.rows.total,)
    return product.addend if is_last and is_whole else None


def _canonical(x: _Named, form: Contraction, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    flags: dict[str, Any] = {"is_transposed": True} if form.is_transposed else {}
    if form.matrix != tuple(value_of(weight).shape):
        flags["matrix"] = form.matrix
    like, graph = form.read.node, x.node.graph
    if form.groups is None:
        operands = (x.node, weight) if bias is None else (x.node, weight, bias)
        out = graph.call_function(program.linear, operands, flags)
    else:
        if len(form.groups.names) == 0:
            x.node = x.do(aten.unsqueeze.default, x.node, 0)
        flat, offsets = _grouped(x, form)
        out = graph.call_function(program.grouped_linear, (flat, weight, offsets), flags)
        x_value = value_of(flat)
        out.meta = {**like.meta, "val": x_value.new_empty(x_value.shape[0], form.rows.total)}
        if len(form.groups.names) == 0:
            x.node = x.do(aten.select.int, x.node, 0, 0)
        return out
    value = value_of(x.node)
    out.meta = {**like.meta, "val": value.new_empty(*value.shape[:-1], form.rows.total)}
    return out


def _sizes(x: _Named) -> list[int | fx.Node]:
    """Of the dimensions; a node for one that depends on data."""
    return [
        size if isinstance(size, int) else x.do(aten.sym_size.int, x.node, at)
        for at, size in enumerate(value_of(x.node).shape)
    ]


def _grouped(x: _Named, form: Contraction) -> tuple[fx.Node, fx.Node]:
    """Rows of all groups one after the other, and where each group ends."""
    assert form.groups is not None
    count, value = form.groups.length, value_of(x.node)
    tokens = value[..., 0].numel() // count
    if isinstance(tokens, int):
        flat = x.do(aten.reshape.default, x.node, [count * tokens, value.shape[-1]])
        return flat, _offsets(x, form, tokens)
    flat = x.do(aten.reshape.default, x.node, [-1, value.shape[-1]])
    start, total = form.groups.start, form.groups.total
    options = {"dtype": torch.int32, "device": value.device}
    ends = x.do(aten.arange.start, 1 - start, 1 - start + total, **options)
    ends = x.do(aten.clamp.default, ends, 0, count)
    rows = x.do(operator.floordiv, x.do(aten.sym_size.int, flat, 0), count)
    return flat, x.do(aten.mul.Tensor, ends, rows)


def _offsets(x: _Named, form: Contraction, tokens: int) -> fx.Node:
    """Where each group ends: those that the view does not have are empty."""
    assert form.groups is not None
    count, start, total = form.groups.length, form.groups.start, form.groups.total
    options = {"dtype": torch.int32, "device": value_of(x.node).device}
    ends = x.do(aten.arange.start_step, tokens, count * tokens + 1, tokens, **options)
    if start:
        ends = x.do(aten.constant_pad_nd.default, ends, [start, 0])
    if total > start + count:
        ends = x.do(aten.constant_pad_nd.default, ends, [0, total - start - count], count * tokens)
    return ends


def _finish(
    out: _Named,
    old: fx.Node,
    form: Contraction,
    is_added: bool,
    scale: Any,
    new: Callable[[fx.Node], fx.Node],
) -> None:
    """The order and sizes of the old call's result, its scales and its addend."""
    product, do = form.product, out.do
    number = scale.number * product.alpha
    if number != 1:
        out.node = do(aten.mul.Tensor, out.node, number)
    out.permute("".join(name for name in product.of_out if name in out.names))
    for at, name in enumerate(product.of_out):
        if name not in out.names:
            out.node = do(aten.unsqueeze.default, out.node, at)
            out.names = out.names[:at] + name + out.names[at:]
    value = value_of(old)
    if tuple(value_of(out.node).shape) != tuple(value.shape):
        out.node = do(aten.expand.default, out.node, list(value.shape))
    for factor, meets_input in zip(scale.factors, form.meets_input, strict=True):
        if not meets_input:
            out.times(factor, product.of_weight)
    if is_added and product.addend is not None:
        addend = new(product.addend)
        addend = addend if product.beta == 1 else do(aten.mul.Tensor, addend, product.beta)
        out.node = do(aten.add.Tensor, addend, out.node)
    out.node = _cast(out.node, value.dtype, do)


def _cast(node: fx.Node, dtype: torch.dtype, do: Callable[..., fx.Node]) -> fx.Node:
    return node if value_of(node).dtype == dtype else do(aten.to.dtype, node, dtype)
