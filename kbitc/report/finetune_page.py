"""The page of an adapter: the loss while it was trained, and of what was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kbitc.report.charts import WIDTH
from kbitc.report.page import Section, page, render

HEIGHT, LEFT, RIGHT, TOP, FLOOR = 320, 60, WIDTH - 20, 30, 275
SMOOTH = 0.1
"""The weight of a step in the moving average that is drawn over single steps."""


@dataclass(frozen=True)
class Losses:
    """Nats per token.

    Attributes:
        curve: of each step, with its number.
        before: held out, of the model without the adapter's training.
        after: with it.
        held: examples held out.
    """

    curve: tuple[tuple[int, float], ...]
    before: float
    after: float
    held: int


def finetune_page(title: str, losses: Losses, facts: Mapping[str, str]) -> str:
    """A whole page.

    Args:
        title: name of the model.
        losses: of training.
        facts: what to see first.
    """
    subtitle = f"an adapter trained over k-bit weights; {losses.held} examples held out"
    return page(f"Fine-tuned {title}", subtitle, facts, [Section("Loss", loss_chart(losses))])


def loss_chart(losses: Losses) -> Markup:
    """A figure: steps to the right, loss upwards; empty for fewer than two steps."""
    if len(losses.curve) < 2:
        return Markup()
    values = [loss for _, loss in losses.curve]
    low, high = min([*values, losses.after]), max([*values, losses.before])
    first, last = losses.curve[0][0], losses.curve[-1][0]

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (RIGHT - LEFT)

    def y(loss: float) -> float:
        return FLOOR - (loss - low) / ((high - low) or 1.0) * (FLOOR - TOP)

    ticks = [low + share * (high - low) for share in (0, 0.25, 0.5, 0.75, 1)]
    steps = sorted({first + round(share * (last - first)) for share in (0, 0.25, 0.5, 0.75, 1)})
    return render(
        "losses",
        box=(WIDTH, HEIGHT),
        edges=(LEFT, RIGHT, FLOOR),
        points=[(x(step), y(loss)) for step, loss in losses.curve],
        path=[(x(step), y(loss)) for step, loss in _smoothed(losses.curve)],
        held=[
            (y(losses.before), f"held out before: {losses.before:.4f}"),
            (y(losses.after), f"held out after: {losses.after:.4f}"),
        ],
        ticks=[(y(tick), f"{tick:.3f}") for tick in ticks],
        steps=[(x(step), str(step)) for step in steps],
    )


def _smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A moving average that forgets, without the pull of its beginning."""
    total, weight, made = 0.0, 0.0, []
    for step, loss in curve:
        total = (1 - SMOOTH) * total + SMOOTH * loss
        weight = (1 - SMOOTH) * weight + SMOOTH
        made.append((step, total / weight))
    return made
