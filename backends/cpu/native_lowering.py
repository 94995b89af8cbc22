"""A traced model's graph, node by node, as operations of a native step.

before:  step(ids, positions) -> logits, of aten, ``kbit::`` calls, `cached` and `attend` (`native_trace`)
after:   a `NativeProgram`: the same values, views gone, norms one operation each

Whatever dtype a model computes in, a native step does in float32.

The one thing to know: what depends on no token is a constant, which torch computes here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kbitc.backends.cpu.native_nodes import BINARY, CONVERSIONS, SAME, UNARY, VIEWS, aten
from kbitc.backends.cpu.native_program import Code, NativeProgram, View
from kbitc.backends.cpu.native_trace import attend, cached
from kbitc.backends.cpu.native_values import TOKENS, Cached, Index, Placing, Rows, Unknown, sizes
from kbitc.formats.packed import NUMBER_FIELDS, TENSOR_FIELDS, Operands
from kbitc.kernels import ops as _ops  # noqa: F401  # registers torch.ops.kbit


def lower(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> NativeProgram:
    """The step of a traced model.

    Args:
        graph: of `export_tokens`, its linears merged or not.
        tensors: of each placeholder but the two inputs.

    Raises:
        Unknown: there is an operation that native steps do not have.
    """
    return _Lowering(tensors).run(graph)


class _Lowering:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.at = Placing()
        self.into = self.at.into
        self.values: dict[fx.Node, Any] = {}
        self.tail = 0

    def run(self, graph: fx.Graph) -> NativeProgram:
        inputs = iter((False, True))
        for node in graph.nodes:
            if node.op == "placeholder":
                if node.name in self.tensors:
                    self.values[node] = self.tensors[node.name].detach()
                else:
                    lies = torch.empty(1, TOKENS, dtype=torch.int64, device="meta")
                    self.values[node] = Index(lies, next(inputs))
            elif node.op == "output":
                return self._finished(node)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
                try:
                    self.values[node] = self._value(node.target, args, kwargs)
                except (ValueError, RuntimeError, IndexError) as error:
                    raise Unknown(f"{node.target}: {error}") from error
            else:
                raise Unknown(f"a node that is {node.op}")
        raise Unknown("a graph without an output")

    def _finished(self, node: fx.Node) -> NativeProgram:
        flat = torch.utils._pytree.tree_leaves(node.args[0])
        logits = self.values[flat[0]] if len(flat) == 1 else None
        if not isinstance(logits, Rows):
            raise Unknown("a step whose output is not its logits")
        return self.into.finished(self.at.whole(logits, logits.lies.shape[-1]).buffer, self.tail)

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        if not any(isinstance(value, (Rows, Index, Cached)) for value in flat):
            return target(*args, **kwargs)  # a constant
        if target is not attend._opoverload and any(isinstance(value, Cached) for value in flat):
            raise Unknown(f"attention by {target}")
        if target is operator.getitem:
            return args[0][args[1]]
        if target in SAME or target in CONVERSIONS:
            return self._converted(target, args, kwargs)
        if target is aten.sym_size.int:
            return args[0].lies.shape[args[1]]
        if isinstance(args[0], Index):
            return self._index(target, args)
        if target in VIEWS:
            return self._viewed(target, args, kwargs)
        if target in UNARY:
            return self.at.unary(UNARY[target], args[0])
        if target in BINARY:
            if kwargs.get("alpha", 1) != 1:
                raise Unknown(f"{target} with alpha")
            return self._binary(BINARY[target], *args)
        handler = _HANDLERS.get(target)
        if handler is None:
            raise Unknown(str(target))
        return handler(self, *args, **kwargs)

    # Kinds of nodes --------------------------------------------------------------------------

    def _converted(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        kinds = [own for own in (*args[1:], *kwargs.values()) if isinstance(own, torch.dtype)]
        wanted = kinds[0] if kinds else None
        if isinstance(value, Index):
            if wanted is None or not wanted.is_floating_point:
                return value
            if not value.is_position or value.shift:
                raise Unknown("tokens as numbers")
            out = self.at.new(value.lies.shape)
            self.into.add(Code.POSITIONS, out.buffer, (), out.buffer)
            return out
        if wanted is not None and not wanted.is_floating_point:
            raise Unknown(f"values as {wanted}")
        return value if isinstance(value, Rows) else target(*args, **kwargs)

    def _index(self, target: Any, args: Any) -> Any:
        value = args[0]
        if target in VIEWS:
            return Index(target(value.lies, *args[1:]), value.is_position, value.shift)
        if target is aten.add.Tensor and isinstance(args[1], int):
            return Index(value.lies, value.is_position, value.shift + args[1])
        handler = _HANDLERS.get(target)
        if target is not torch.ops.kbit.embedding.default or handler is None:
            raise Unknown(f"{target} of tokens")
        return handler(self, *args)

    def _viewed(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        found = target(value.lies, *args[1:], **kwargs)
        if isinstance(found, (list, tuple)):
            return [Rows(part, value.buffer) for part in found]
        if found.untyped_storage()._cdata != value.lies.untyped_storage()._cdata:  # no view, but a copy
            return self._viewed(target, (self.at.copied(value), *args[1:]), kwargs)
        return Rows(found, value.buffer, value.made if found.shape == value.lies.shape else ())

    def _binary(self, kind: str, a: Any, b: Any) -> Rows:
        normed = self._normed(kind, a, b)
        if normed is not None:
            return normed
        shapes = [
            value.lies.shape if isinstance(value, Rows) else torch.as_tensor(value).shape for value in (a, b)
        ]
        out = self.at.new(torch.broadcast_shapes(*shapes))
        shape = out.lies.shape
        self.into.binary(
            kind, sizes(shape), self.at.view(out, shape), self.at.view(a, shape), self.at.view(b, shape)
        )
        out.made = (kind, a, b)
        return out

    def _normed(self, kind: str, a: Any, b: Any) -> Rows | None:
        """``x * rsqrt(mean(x^2) + eps)``, and that times a weight, in one; nobody reads its parts then."""
        if kind != "mul":
            return None
        for x, factor in ((a, b), (b, a)):
            eps = _eps_of(factor, x)
            if eps is not None:
                return self._rms_norm(x, None, eps)
            if isinstance(factor, Rows) and factor.made[:1] == ("rms_norm",) and isinstance(x, Tensor):
                _, source, weight, eps = factor.made
                if weight is None and x.shape == source.lies.shape[-1:]:
                    return self._rms_norm(source, x, eps)
        return None

    def _rms_norm(self, x: Rows, weight: Tensor | None, eps: float) -> Rows:
        out = self._norm(Code.RMS_NORM, x, weight, None, eps)
        out.made = ("rms_norm", x, weight, eps)
        return out

    def _norm(self, code: Code, x: Rows, weight: Tensor | None, bias: Tensor | None, eps: float) -> Rows:
        packed, count, apart, width = self.at.last_packed(x)
        if count > 1 and apart != width:
            packed, count, apart, width = self.at.last_packed(self.at.copied(x))
        out = self.at.new(x.lies.shape)
        view = View(packed.buffer, False, int(packed.lies.storage_offset()))
        constants = [-1 if own is None else self.into.constant(own) for own in (weight, bias)]
        self.into.add(
            code,
            out.buffer,
            (packed.buffer,),
            *(out.buffer, *view.words(), count, width, *constants, self.into.number(eps)),
        )
        return out

    # Handlers --------------------------------------------------------------------------------

    def _power(self, x: Rows, exponent: float) -> Rows:
        if exponent not in (2, 3):
            raise Unknown(f"a power of {exponent}")
        square = self.at.unary("square", x)
        return square if exponent == 2 else self._binary("mul", square, x)

    def _mean(self, x: Rows, dims: Sequence[int], keepdim: bool = False) -> Rows:
        if [dim % x.lies.dim() for dim in dims] != [x.lies.dim() - 1] or not keepdim:
            raise Unknown("a mean of other dimensions than the last")
        packed, count, apart, width = self.at.last_packed(x)
        out = self.at.new((*x.lies.shape[:-1], 1))
        view = View(packed.buffer, False, int(packed.lies.storage_offset()))
        self.into.add(Code.MEAN, out.buffer, (packed.buffer,), out.buffer, *view.words(), count, apart, width)
        out.made = ("mean", x)
        return out

    def _gelu(self, x: Rows, approximate: str = "none") -> Rows:
        return self.at.unary("gelu_tanh" if approximate == "tanh" else "gelu", x)

    def _layer_norm(
        self,
        x: Rows,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Rows:
        if list(shape) != [x.lies.shape[-1]]:
            raise Unknown("a norm over several dimensions")
        return self._norm(Code.LAYER_NORM, x, weight, bias, eps)

    def _joined(self, values: Sequence[Any], dim: int = 0) -> Rows:
        values = [value for value in values if value.lies.shape[dim] != 0]
        shape = list(values[0].lies.shape)
        dim %= len(shape)
        shape[dim] = sum(value.lies.shape[dim] for value in values)
        out, at = self.at.new(shape), 0
        for value in values:
            size = value.lies.shape[dim]
            self.at.copy_into(value, Rows(out.lies.narrow(dim, at, size), out.buffer))
            at += size
        return out

    def _stacked(self, values: Sequence[Rows], dim: int = 0) -> Rows:
        dim %= values[0].lies.dim() + 1
        return self._joined([Rows(value.lies.unsqueeze(dim), value.buffer) for value in values], dim)

    def _repeated(self, x: Rows, count: int, dim: int | None = None, **_: Any) -> Rows:
        if dim is None:
            raise Unknown("repeat_interleave of all dimensions")
        dim %= x.lies.dim()
        lies = x.lies.unsqueeze(dim + 1)
        shape = list(lies.shape)
        shape[dim + 1] = count
        copied = self.at.copied(Rows(lies.expand(shape), x.buffer))
        return Rows(copied.lies.flatten(dim, dim + 1), copied.buffer)

    def _embedding(self, index: Index, *arguments: Any) -> Rows:
        operands, _ = Operands.split(arguments)
        out = self.at.new((*index.lies.shape, operands.in_features))
        words = (out.buffer, int(index.is_position), index.shift, self.into.weight(operands))
        self.into.add(Code.EMBED, out.buffer, (), *words)
        return out

    def _dense_embedding(self, weight: Tensor, index: Index, *_: Any) -> Rows:
        if not isinstance(index, Index):
            raise Unknown("an embedding of anything but tokens and positions")
        out = self.at.new((*index.lies.shape, weight.shape[1]))
        constant = self.into.constant(weight, is_dense=True)
        words = (out.buffer, int(index.is_position), index.shift, constant, *weight.shape)
        self.into.add(Code.EMBED_DENSE, out.buffer, (), *words)
        return out

    def _linear(self, x: Rows, *arguments: Any) -> Rows:
        operands, bias = Operands.split(arguments)
        return self._products(x, [operands], [bias], is_int8=False)

    def _linear_int8(self, x: Rows, *arguments: Any) -> Rows:
        operands, bias = Operands.split(arguments)
        return self._products(x, [operands], [bias], is_int8=True)

    def _linears(
        self, x: Rows, tensors: Sequence[Any], numbers: Sequence[int], biases: Sequence[Tensor | None]
    ) -> Rows:
        wide, short = len(TENSOR_FIELDS), len(NUMBER_FIELDS)
        every = [
            Operands(*tensors[wide * i : wide * (i + 1)], *numbers[short * i : short * (i + 1)])
            for i in range(len(biases))
        ]
        return self._products(x, every, biases, is_int8=False)

    def _products(
        self, x: Rows, weights: Sequence[Operands], biases: Sequence[Tensor | None], *, is_int8: bool
    ) -> Rows:
        given = self.at.whole(x, weights[0].in_features)
        rows = sum(weight.planes.shape[0] for weight in weights)
        out = self.at.new((*x.lies.shape[:-1], rows))
        words = [out.buffer, given.buffer, int(is_int8), len(weights)]
        for weight, bias in zip(weights, biases, strict=True):
            words += [self.into.weight(weight), -1 if bias is None else self.into.constant(bias)]
        self.into.add(Code.LINEAR, out.buffer, (given.buffer,), *words)
        return out

    def _dense_linear(self, x: Rows, weight: Tensor, bias: Tensor | None = None) -> Rows:
        given = self.at.whole(x, weight.shape[1])
        out = self.at.new((*x.lies.shape[:-1], weight.shape[0]))
        constants = [
            self.into.constant(weight, is_dense=True),
            *weight.shape,
            -1 if bias is None else self.into.constant(bias),
        ]
        self.into.add(Code.DENSE, out.buffer, (given.buffer,), out.buffer, given.buffer, *constants)
        return out

    def _cached(self, states: Rows, slot: int) -> Cached:
        return Cached(states, slot)

    def _attend(
        self,
        query: Rows,
        key: Cached,
        value: Cached,
        scale: float,
        window: int,
        cap: float,
    ) -> Rows:
        own = [self._by_head(states) for states in (query, key.states, value.states)]
        heads, size = query.lies.shape[1], query.lies.shape[3]
        key_heads, value_size = key.states.lies.shape[1], value.states.lies.shape[3]
        if heads % key_heads or value.states.lies.shape[1] != key_heads or query.lies.shape[0] != 1:
            raise Unknown(f"attention of {heads} heads to {key_heads}")
        out = self.at.new((1, TOKENS, heads, value_size))
        words = [out.buffer]
        for states in own:
            words += View(
                states.buffer, False, int(states.lies.storage_offset()), (states.lies.stride(1), 0, 0, 0)
            ).words()
        self.into.slots[key.slot], self.into.slots[value.slot] = (key_heads, size), (key_heads, value_size)
        words += [key.slot, value.slot, heads, key_heads, size, value_size, window]
        words += [self.into.number(scale), self.into.number(cap)]
        self.into.add(Code.ATTEND, out.buffer, [states.buffer for states in own], *words)
        self.tail = len(self.into.operations)
        return out

    def _by_head(self, states: Rows) -> Rows:
        """``(1, heads, TOKENS, size)`` with each head's elements side by side."""
        return states if states.lies.stride(3) == 1 else self.at.copied(states)


_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    aten.pow.Tensor_Scalar: _Lowering._power,
    aten.mean.dim: _Lowering._mean,
    aten.gelu.default: _Lowering._gelu,
    aten.layer_norm.default: _Lowering._layer_norm,
    aten.cat.default: _Lowering._joined,
    aten.stack.default: _Lowering._stacked,
    aten.repeat_interleave.self_int: _Lowering._repeated,
    aten.linear.default: _Lowering._dense_linear,
    aten.embedding.default: _Lowering._dense_embedding,
    torch.ops.kbit.embedding.default: _Lowering._embedding,
    torch.ops.kbit.linear.default: _Lowering._linear,
    torch.ops.kbit.linears.default: _Lowering._linears,
    torch.ops.kbit.linear_int8.default: _Lowering._linear_int8,
    cached._opoverload: _Lowering._cached,
    attend._opoverload: _Lowering._attend,
}


def _eps_of(factor: Any, x: Any) -> float | None:
    """Eps where ``factor`` is ``rsqrt(mean(x^2) + eps)`` over the last dimension."""
    if not isinstance(factor, Rows) or not isinstance(x, Rows) or factor.made[:1] != ("rsqrt",):
        return None
    added = factor.made[1]
    if added.made[:1] != ("add",) or not isinstance(added.made[2], float):
        return None
    mean, eps = added.made[1:]
    if not isinstance(mean, Rows) or mean.made[:1] != ("mean",):
        return None
    square = mean.made[1]
    return eps if square.made[:1] == ("square",) and square.made[1] is x else None
