"""Choose a spec for every weight under a bit budget, by measured weight error.

before:  stage CANONICAL, no plan, a budget of B bits per parameter of the whole model
after:   stage PLANNED, sum of stored bytes <= B * parameters / 8

Each option (data type, bits, block size) is measured on a sample of the weight's own rows. Weights
start at their smallest option; the step with the largest gain in ``importance * n * error^2`` for a
byte, along each weight's convex hull, is taken while it fits; what is left over buys whatever single
change helps most. The sum of relative squared errors is HIGGS' linear model of the loss (2411.17525)
with equal layer factors, but a larger one for the output head, whose error nothing damps.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kbitc import datatypes, scoring
from kbitc.blockwise import dynamic_map, shared_codebook
from kbitc.errors import BudgetError, UsageError
from kbitc.plan import Choice, Plan
from kbitc.program import Program, Stage, Weight
from kbitc.spec import LEFT_ALONE, Spec, parse

# Families per number of bits: NormalFloat and BOF lead at few bits, int catches up at five
# (PAPERS section 7); wide-exponent fp4 is there for weights with outliers.
FAMILIES_BY_BITS: Mapping[int, tuple[str, ...]] = {
    2: ("nf", "bof"),
    3: ("nf", "bof"),
    4: ("nf", "bof", "fp"),
    5: ("nf", "int"),
    6: ("int", "fp"),
    7: ("int",),
    8: ("int",),
}
BLOCKS = (32, 64, 128, 256)
# Nothing after the head damps its error. SmolLM2-135M at 4.0 bits, WikiText-2 test, 10 x 512 tokens:
# perplexity 46.4, 43.7, 42.6, 46.4 at 1, 3, 10, 30 (16 bits: 30.0). Measured sensitivity replaces it.
HEAD_IMPORTANCE = 8.0
# Double quantization stores the same scales in half the bits; its error is part of what is measured.
CANDIDATES = tuple(
    parse(f"{family}{bits}:{block}+dq")
    for bits, families in FAMILIES_BY_BITS.items()
    for family in families
    for block in BLOCKS
)


@dataclass(frozen=True)
class Option:
    """One way to store a weight: its bytes, and its share of the objective."""

    spec: Spec
    nbytes: int
    cost: float
    error: float


@dataclass(frozen=True)
class AllocateBits:
    """Plan under a budget.

    Attributes:
        budget: stored bits per parameter that the whole model must not exceed.
        candidates: specs to choose from; leaving a weight at 16 bits is always one more.
        quantizer: how scales are chosen, see ``kbitc.blockwise``.
        head_importance: factor on the squared error of a weight that gives the logits.
    """

    budget: float = 4.0
    candidates: Sequence[Spec] = CANDIDATES
    quantizer: str = "absmax"
    head_importance: float = HEAD_IMPORTANCE

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program: Program) -> Program:
        """Raises BudgetError when not even the smallest options fit; names the smallest budget."""
        if program.read is None:
            raise UsageError("planning by weight error needs the weights; this program has no source")
        options = self._measure(program, program.read)
        chosen = allocate(options, fixed_bytes(program), self.budget, program.parameter_count)
        choices = {
            name: Choice(
                option.spec,
                reason=f"greedy: {option.nbytes * 8 / program.weights[name].numel:.3f} bits, "
                f"relative error {option.error:.4f}",
                error=option.error,
            )
            for name, option in chosen.items()
        }
        return replace(program, plan=Plan(choices, self.budget), stage=Stage.PLANNED)

    def _measure(self, program: Program, read: Callable[[str], Tensor]) -> dict[str, list[Option]]:
        """The options of every weight. Samples are small, so weights run side by side, one thread each."""
        workers = torch.get_num_threads()
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = pool.map(
                lambda weight: self._options(weight, read(weight.name)), program.weights.values()
            )
            return dict(zip(program.weights, found, strict=True))

    def _options(self, weight: Weight, data: Tensor) -> list[Option]:
        """The options on the lower convex hull of (bytes, cost), smallest first."""
        sample = scoring.take_sample(data.mT if weight.is_transposed else data)
        # A tied head counts as a head: the same numbers give the logits.
        importance = self.head_importance if weight.is_head else 1.0
        found = []
        for spec in (*self.candidates, LEFT_ALONE):
            error = scoring.option_error(sample, spec, self.quantizer)
            nbytes = spec.packed_bytes(weight.rows, weight.in_features)
            found.append(Option(spec, nbytes, importance * weight.numel * error**2, error))
        return found


def fixed_bytes(program: Program) -> int:
    """Bytes that no choice changes: everything that stays unpacked, floats at 16 bits."""
    sizes = (
        rest.numel * (min(2, rest.dtype.itemsize) if rest.dtype.is_floating_point else rest.dtype.itemsize)
        for rest in program.rest.values()
    )
    return sum(sizes)


def allocate(
    options: Mapping[str, Sequence[Option]], fixed: int, budget: float, parameters: int
) -> dict[str, Option]:
    """Greedy choice of one option a weight.

    Args:
        options: by weight name; ties are broken by this order, so runs repeat.
        fixed: bytes beside the weights.
        budget: bits per parameter.
        parameters: of the model.

    Returns:
        The chosen options; with shared codebooks and ``fixed`` they take at most
        ``budget * parameters / 8`` bytes.

    Raises:
        BudgetError: the smallest options are too large.
    """
    room = int(budget * parameters / 8)
    hulls = {name: _hull(found) for name, found in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    size = _Size(fixed, chosen)
    if size.total > room:
        raise BudgetError(
            f"--bits {budget:g} cannot be met: the smallest plan for this model takes "
            f"{8 * size.total / parameters:.4f} bits per parameter ({fixed / 1e6:.2f} MB of it are tensors "
            f"that stay at 16 bits). Ask for --bits {_round_up(8 * size.total / parameters)} or more"
        )
    steps = [_step(order, name, hull, 1) for order, (name, hull) in enumerate(hulls.items()) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, order, level, name = heapq.heappop(steps)
        hull = hulls[name]
        if size.try_swap(chosen, name, hull[level], room) and level + 1 < len(hull):
            heapq.heappush(steps, _step(order, name, hull, level + 1))
    _spend_rest(options, chosen, size, room)
    return chosen


def _spend_rest(
    options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], size: _Size, room: int
) -> None:
    """Single changes that lower the cost and still fit, the largest gain first, until none is left."""
    while True:
        gains = [
            (chosen[name].cost - option.cost, -order, name, option)
            for order, (name, found) in enumerate(options.items())
            for option in found
            if option.cost < chosen[name].cost and size.total + option.nbytes - chosen[name].nbytes <= room
        ]
        gains.sort(key=lambda gain: gain[:2], reverse=True)
        if not any(size.try_swap(chosen, name, option, room) for _, _, name, option in gains):
            return


class _Size:
    """Exact bytes of a choice: weights, what is fixed, and each shared codebook once."""

    def __init__(self, fixed: int, chosen: Mapping[str, Option]) -> None:
        self.users: dict[str, int] = {}
        self.total = fixed
        for option in chosen.values():
            self._add(option, 1)

    def _add(self, option: Option, sign: int) -> None:
        self.total += sign * option.nbytes
        for name, nbytes in _codebooks(option.spec).items():
            before = self.users.get(name, 0)
            self.users[name] = before + sign
            if (before == 0) != (before + sign == 0):
                self.total += sign * nbytes

    def try_swap(self, chosen: dict[str, Option], name: str, option: Option, room: int) -> bool:
        """Replace a choice if the total still fits."""
        old = chosen[name]
        self._add(old, -1)
        self._add(option, 1)
        if self.total <= room:
            chosen[name] = option
            return True
        self._add(option, -1)
        self._add(old, 1)
        return False


@functools.cache
def _codebooks(spec: Spec) -> dict[str, int]:
    """Bytes of the shared codebooks that a spec needs, by name."""
    if spec.is_left_alone:
        return {}
    needed = {"scales": dynamic_map().nbytes} if spec.has_double_quant else {}
    if not datatypes.FAMILIES[spec.family].is_fitted:
        needed[spec.codebook_name] = shared_codebook(spec).nbytes
    return needed


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of (bytes, cost), from the smallest option on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if hull and (option.cost >= hull[-1].cost or option.nbytes == hull[-1].nbytes):
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.cost - a.cost) / (b.nbytes - a.nbytes)


def _step(order: int, name: str, hull: Sequence[Option], level: int) -> tuple[float, int, int, str]:
    return _slope(hull[level - 1], hull[level]), order, level, name


def _round_up(bits: float) -> str:
    return f"{-(-bits * 100 // 1) / 100:.2f}"


PASS = AllocateBits
