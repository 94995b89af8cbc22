"""Run a model itself on real data, forward and backward, one weight in memory at a time: without a graph.

The one thing to know: it does what `kbitc.sensitivity.streaming` does, for models that cannot be traced.
Weights stand in the model as tensors that are read when a matmul or a look-up wants them, then dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kbitc.checkpoint.names import first_names
from kbitc.graph.capture import make_traceable
from kbitc.graph.context import ReadTensor
from kbitc.graph.program import Program, Weight
from kbitc.sensitivity.streaming import LinearOnLoad, Seen, apply


class EagerStreamed:
    """A model whose parameters lie in a checkpoint.

    Args:
        program: canonical; its weights are streamed, everything else is read at once, in float32.
        skeleton: the model on the meta device, in float32; it is changed.
        read: a tensor by name.
        seen: called for each use of a weight whose direction is that of the program; see `watched_by`.
    """

    def __init__(
        self, program: Program, skeleton: nn.Module, read: ReadTensor, seen: Seen = lambda *_: None
    ) -> None:
        make_traceable(skeleton, experts="eager")
        self.seen = seen
        first = first_names(skeleton)

        def load(name: str) -> Tensor:
            tensor = read(name)
            return tensor.float() if tensor.is_floating_point() else tensor

        for path, module in skeleton.named_modules():
            for leaf in [leaf for leaf, tensor in module._parameters.items() if tensor is not None]:
                name = first[f"{path}.{leaf}".lstrip(".")]
                weight = program.weights.get(name)
                value: Any = (
                    nn.Parameter(load(name), requires_grad=False)
                    if weight is None
                    else StreamedWeight(weight, weight.shape, partial(load, name), self._tell)
                )
                module._parameters[leaf] = value
            for leaf in [leaf for leaf, tensor in module._buffers.items() if tensor is not None]:
                module._buffers[leaf] = load(first[f"{path}.{leaf}".lstrip(".")])
        self.model = skeleton.eval()

    def watched_by(self, seen: Seen) -> EagerStreamed:
        """This model, from now on with another one to be told of its weights' uses."""
        self.seen = seen
        return self

    def _tell(self, name: str, kind: str, given: Any, out: Tensor) -> None:
        self.seen(name, kind, given, out)

    def call(self, **inputs: Tensor) -> list[Tensor]:
        """The model's outputs, flat."""
        return [leaf for leaf in pytree.tree_leaves(self.model(**inputs)) if isinstance(leaf, Tensor)]


class StreamedWeight(Tensor):
    """A weight that is read when something is computed with it.

    Attributes:
        weight: which one.
        load: reads it, as this view of it has it.
        is_turned: the view has its last two dimensions swapped.
        expert: which one of a 3-D weight's the view is.
    """

    weight: Weight
    load: Callable[[], Tensor]
    seen: Seen
    is_turned: bool
    expert: int | None

    @staticmethod
    def __new__(
        cls: type[StreamedWeight],
        weight: Weight,
        shape: Iterable[int],
        load: Callable[[], Tensor],
        seen: Seen,
        *,
        is_turned: bool = False,
        expert: int | None = None,
    ) -> StreamedWeight:
        """A view of ``weight`` of that shape, in float32 on the CPU."""
        made: Any = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)  # type: ignore[attr-defined]
        made.weight, made.load, made.seen = weight, load, seen
        made.is_turned, made.expert = is_turned, expert
        view: StreamedWeight = made
        return view

    def turned(self) -> StreamedWeight:
        """The last two dimensions swapped."""
        *lead, rows, columns = self.shape
        load, weight = self.load, self.weight
        return StreamedWeight(
            weight,
            (*lead, columns, rows),
            lambda: load().mT,
            self.seen,
            is_turned=not self.is_turned,
            expert=self.expert,
        )

    def of_expert(self, expert: int) -> StreamedWeight:
        """One matrix of a 3-D weight."""
        load = self.load
        return StreamedWeight(
            self.weight,
            self.shape[1:],
            lambda: load()[expert],
            self.seen,
            is_turned=self.is_turned,
            expert=expert,
        )

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ self.T + bias``, told to who looks on."""
        y = apply(LinearOnLoad, x, self.load, bias)
        if self.is_turned != self.weight.is_transposed:
            return y  # read in another direction than it will be packed in
        if self.expert is None:
            return self._told("linear", x, y)
        offsets = torch.zeros(self.weight.shape[0], dtype=torch.int32)
        offsets[self.expert :] = x.shape[:-1].numel()
        return self._told("grouped_linear", (x.flatten(0, -2), offsets), y)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows, told to who looks on."""
        return self._told("embedding", ids, F.embedding(ids, self.load()))

    def _told(self, kind: str, given: Any, y: Tensor) -> Tensor:
        is_first = torch.is_grad_enabled() and not y.requires_grad
        if is_first:
            y.requires_grad_()
        self.seen(self.weight.name, kind, given, y)
        return y.clone() if is_first else y  # a leaf could not be changed in place

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        served = _SERVED[func](*args, **kwargs) if func in _SERVED else NotImplemented
        if served is not NotImplemented:
            return served
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub forgets that it is a class method
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = pytree.tree_map_only(
            StreamedWeight, lambda weight: weight.load(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(x, StreamedWeight) or isinstance(bias, StreamedWeight) or weight.dim() != 2:
        return NotImplemented
    return weight.product(x, bias)


def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(x, StreamedWeight) or weight.dim() != 2:
        return NotImplemented
    return weight.turned().product(x)


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    is_linear = (beta, alpha) == (1, 1) and isinstance(weight, StreamedWeight) and bias.dim() == 1
    return (
        weight.turned().product(x, bias)
        if is_linear and not isinstance(x, StreamedWeight)
        else NotImplemented
    )


def _embedding(ids: Any, weight: Any, *_: Any, **__: Any) -> Any:
    return NotImplemented if weight.is_turned or weight.dim() != 2 else weight.look_up(ids)


def _getitem(weight: Any, at: Any) -> Any:
    is_index = isinstance(at, int) or (isinstance(at, Tensor) and at.dim() == 0 and at.dtype == torch.int64)
    return weight.of_expert(int(at)) if is_index and weight.dim() == 3 else NotImplemented


def _transpose(weight: Any, *dims: int) -> Any:
    last = {weight.dim() - 2, weight.dim() - 1}
    is_turn = not dims or {dim % weight.dim() for dim in dims} == last
    return weight.turned() if is_turn and weight.dim() > 1 else NotImplemented


_SERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__getitem__: _getitem,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    torch.t: _transpose,
    Tensor.t: _transpose,
    Tensor.T.__get__: lambda weight: _transpose(weight) if weight.dim() == 2 else NotImplemented,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
}
# What is known without reading.
_ABOUT = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point),
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.requires_grad.__get__, Tensor.layout.__get__, Tensor.is_cuda.__get__),  # type: ignore[attr-defined]
}
