"""`BlockwiseOptimizer`: what the optimizers of this room share: states, steps, and what is refused.

The one thing to know: everything is checked before anything is changed, and ``state_dict()`` holds codes and
scales as plain tensors, the same bytes whether states are paged or not.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kbitc.cache import cache_folder
from kbitc.errors import UsageError
from kbitc.formats.state_levels import StateLevels, state_levels
from kbitc.kernels import training_ops  # noqa: F401  # defines the ops
from kbitc.kernels.training import WHOLE, Rule, StepNumbers
from kbitc.optim.checks import (
    check_gradient,
    check_groups,
    check_moment,
    check_options,
    check_parameter,
    check_step,
)
from kbitc.optim.moments import MARK, Held, Layout, Moment, Paged
from kbitc.optim.pages import PageFile

SCALE = "_scale"
"""What the name of a state's scales ends with in ``state_dict()``."""

PIECE = 1 << 22
"""Numbers of a parameter whose paged states are mapped at a time: 16 MB of AdamW's at 8 bits, twice."""


@dataclass(frozen=True)
class _Move:
    """What a step does to one parameter."""

    param: Tensor
    grad: Tensor
    moments: tuple[Moment, ...]
    count: int  # the step's
    group: dict[str, Any]

    @property
    def layout(self) -> Layout:
        return self.moments[0].layout


@dataclass(frozen=True)
class _Piece:
    """Whole blocks of a parameter, flat."""

    param: Tensor
    grad: Tensor
    states: list[Tensor]


class BlockwiseOptimizer(torch.optim.Optimizer):
    """An optimizer whose moments are `Moment`.

    Subclasses name their rule and its states, and say what numbers a step computes with.
    """

    RULE: ClassVar[Rule]
    FIELDS: ClassVar[tuple[str, ...]]
    IS_CLIPPED: ClassVar[bool] = False
    _pages: PageFile | None = None

    def __init__(
        self,
        params: Any,
        options: dict[str, Any],
        *,
        bits: int,
        block: int,
        min_size: int,
        paged: bool | str | Path,
    ) -> None:
        if paged:
            self._pages = PageFile(cache_folder() / "optimizer" if paged is True else Path(paged))
        super().__init__(params, {**options, "bits": bits, "block": block, "min_size": min_size})

    def numbers(self, group: dict[str, Any], count: int, clip: float = 1.0) -> StepNumbers:
        """What a step computes with.

        Args:
            group: the parameter's.
            count: which step of the parameter it is, from 1.
            clip: what the learning rate is divided by.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.

        Raises:
            UsageError: an option is out of range, or a parameter is none that can be moved.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            for index, param in enumerate(group["params"]):
                if param.requires_grad:
                    check_parameter(param, _name(group, index))
        except UsageError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss and gradients again.

        Returns:
            What it gave.

        Raises:
            UsageError: a sparse gradient, or one of another dtype or shape; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves = [
            self._move(group, index)
            for group in self.param_groups
            for index, param in enumerate(group["params"])
            if self._has_gradient(group, index, param)
        ]
        if self._pages is None:
            self._step_at_once(moves)
        else:
            self._step_paged(moves)
        for move in moves:
            self.state[move.param]["step"] += 1
        torch.autograd.graph.increment_version([move.param for move in moves])
        return loss

    @staticmethod
    def _has_gradient(group: dict[str, Any], index: int, param: Tensor) -> bool:
        if param.grad is None:
            return False
        check_gradient(param, param.grad, _name(group, index))
        return True

    def _move(self, group: dict[str, Any], index: int) -> _Move:
        param: Any = group["params"][index]
        state = self.state[param]
        if not state:
            check_parameter(param, _name(group, index))
            layout = _layout(group, index)
            state.update({field: self._zeros(layout, param.device) for field in self.FIELDS})
            state["step"] = torch.tensor(0.0)
        moments = tuple(state[field] for field in self.FIELDS)
        return _Move(param, param.grad, moments, int(state["step"]) + 1, group)

    def _zeros(self, layout: Layout, device: torch.device) -> Moment:
        if self._pages is None:
            return Held.zeros(layout, device)
        if device.type != "cpu":
            raise UsageError(f"paged states are of parameters on the CPU, not on {device}; leave out paged")
        return Paged.zeros(layout, self._pages)

    def _numbers(self, move: _Move, pieces: Callable[[], Iterator[_Piece]]) -> StepNumbers:
        numbers = self.numbers(move.group, move.count)
        if not self.IS_CLIPPED or move.param.numel() == 0:
            return numbers
        layout = move.layout
        total = sum(
            torch.ops.kbit.update_squares(
                *_maps(layout.bits, move.param.device),
                piece.grad,
                *piece.states[2:],
                numbers,
                layout.bits,
                layout.block,
            ).item()
            for piece in pieces()
        )
        size = math.sqrt(total / move.param.numel())
        return self.numbers(move.group, move.count, max(1.0, size))

    def _step_at_once(self, moves: list[_Move]) -> None:
        """All parameters of one layout in one call."""
        calls: dict[tuple[Any, ...], list[tuple[_Move, _Piece]]] = defaultdict(list)
        for move in moves:
            tensors = [t for moment in move.moments for t in moment.tensors()]
            piece = _Piece(move.param.contiguous(), move.grad.contiguous(), tensors)
            calls[move.layout.bits, move.layout.block, move.param.device].append((move, piece))
        for (bits, block, device), each in calls.items():
            numbers = [self._numbers(move, functools.partial(iter, [piece])) for move, piece in each]
            self._call([piece for _, piece in each], numbers, bits, block, device)
            for move, piece in each:
                if piece.param is not move.param:  # it was not contiguous
                    move.param.copy_(piece.param)

    def _step_paged(self, moves: list[_Move]) -> None:
        """One piece after another, the next one's states on their way meanwhile."""
        for move, after in zip(moves, [*moves[1:], None], strict=True):
            layout = move.layout
            param = move.param.contiguous()
            cut = functools.partial(_pieces, move, param, after)
            numbers = self._numbers(move, cut)
            for piece in cut():
                self._call([piece], [numbers], layout.bits, layout.block, param.device)
            if param is not move.param:
                move.param.copy_(param)

    def _call(
        self,
        pieces: list[_Piece],
        numbers: list[StepNumbers],
        bits: int,
        block: int,
        device: torch.device,
    ) -> None:
        torch.ops.kbit.optimizer_step(
            *_maps(bits, device),
            [piece.param for piece in pieces],
            [piece.grad for piece in pieces],
            [state for piece in pieces for state in piece.states],
            [number for own in numbers for number in own],
            int(self.RULE),
            bits,
            block,
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch's: for each parameter ``step``, and codes and scales of each state.

        Codes are named as torch names the state, ``exp_avg``, and scales end in ``_scale``; paged ones are
        parts of the file, and change as steps are made, as all states do.
        """
        packed = super().state_dict()
        return {**packed, "state": {key: self._plain(own) for key, own in packed["state"].items()}}

    def _plain(self, state: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, Held | Paged):
                plain[key], plain[f"{key}{SCALE}"] = value.tensors()
            else:
                plain[key] = value
        return plain

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a copy of what ``state_dict()`` gave, byte for byte, paged or not.

        Raises:
            UsageError: states of other bits, blocks or sizes, of another optimizer, or other groups of
                parameters; names the first that does not fit, and nothing was changed.
        """
        check_groups(self.param_groups, state_dict["param_groups"])
        states = {}
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        places = [(g, i) for g in self.param_groups for i in range(len(g["params"]))]
        for key, (group, index) in zip(ids, places, strict=True):
            if key in state_dict["state"]:
                states[group["params"][index]] = self._checked(state_dict["state"][key], group, index)
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update({param: self._own(param, state) for param, state in states.items()})

    def _checked(self, state: dict[str, Any], group: dict[str, Any], index: int) -> dict[str, Any]:
        """A saved state as `Held`, its tensors as they are."""
        name, layout = _name(group, index), _layout(group, index)
        fields = {"step", *self.FIELDS, *(f"{field}{SCALE}" for field in self.FIELDS)}
        check_step(state, fields, name, type(self).__name__)
        moments = {f: Held(layout, state[f], state[f"{f}{SCALE}"]) for f in self.FIELDS}
        for field, held in moments.items():
            check_moment(layout, held, f"{name}: {field}")
        return {"step": state["step"], **moments}

    def _own(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {"step": torch.as_tensor(state["step"], dtype=torch.float32).clone().cpu()}
        for field in self.FIELDS:
            own[field] = self._zeros(state[field].layout, param.device)
            for target, source in zip(own[field].tensors(), state[field].tensors(), strict=True):
                target.copy_(source)
        return own

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled.

        Raises:
            TypeError: states are paged.
        """
        if self._pages is not None:
            self._pages.__reduce__()
        return super().__getstate__()


def _pieces(move: _Move, param: Tensor, after: _Move | None) -> Iterator[_Piece]:
    """The pieces of a parameter, each with the next one's states, or the next parameter's, fetched ahead."""
    grad = move.grad.contiguous().view(-1)
    flat, layout = param.view(-1), move.layout
    step = max(1, PIECE // layout.block) * layout.block
    for begin in range(0, layout.count, step):
        end = begin + step
        following = (move, end) if end < layout.count else (after, 0)
        if following[0] is not None:
            for moment in following[0].moments:
                _of_file(moment).prefetch(following[1], following[1] + step)
        parts = [t for moment in move.moments for t in _of_file(moment).part(begin, end)]
        yield _Piece(flat[begin:end], grad[begin:end], parts)


def _of_file(moment: Moment) -> Paged:
    assert isinstance(moment, Paged)
    return moment


def _layout(group: dict[str, Any], index: int) -> Layout:
    param = group["params"][index]
    bits = getattr(param, MARK, None)
    if bits is None:
        bits = WHOLE if param.numel() < group["min_size"] else group["bits"]
    return Layout(param.numel(), bits, group["block"])


def _name(group: dict[str, Any], index: int) -> str:
    """How errors call a parameter."""
    names = group.get("param_names")
    return f"parameter '{names[index]}'" if names else f"parameter {index} of its group"


@functools.cache
def _maps(bits: int, device: torch.device) -> StateLevels:
    maps = state_levels(8 if bits == WHOLE else bits)
    return StateLevels(*(tensor.to(device) for tensor in maps))
