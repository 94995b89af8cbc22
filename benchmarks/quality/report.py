"""The tables: figures of every row, and below them kbitc minus each peer, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from benchmarks.quality.comparison import Pair
from benchmarks.quality.peer_runs import Outcome
from benchmarks.quality.settings import LINEARS, SHIPPED
from benchmarks.tables import Columns, Section

Row = dict[str, Any]

EXPLAINED = {
    SHIPPED: "Each peer as it comes, what it leaves at 16 bits counted; kbitc at the same stored bits, free "
    "to choose every format.",
    LINEARS: "The embedding at 16 bits for all: kbitc's is pinned there, and its linears get what is left of "
    "the peer's bytes.",
}
INTERVALS = "Mean over windows and 95 % interval of a paired bootstrap; below zero kbitc is better."


def sections(found: Sequence[Pair], texts: Sequence[str]) -> list[Section]:
    """Two tables for each comparison."""
    made = []
    for view, group in groupby(found, key=lambda pair: pair.view):
        own = list(group)
        notes = [EXPLAINED[view]] if view in EXPLAINED else []
        made.append(Section(view, _columns(texts), list(_rows(own)), notes))
        differences = [row for pair in own if (row := _difference(pair, texts))]
        if differences:
            title = f"{view}: kbitc minus the peer, nats per token"
            if view.startswith("ablation"):
                title = f"{view}: minus {own[0].base.label}, nats per token"
            made.append(Section(title, _difference_columns(texts), differences, [INTERVALS]))
    return made


def _columns(texts: Sequence[str]) -> Columns:
    scores = [
        column
        for text in texts
        for column in ((f"{text} perplexity", text, ".3f"), (f"{text} KL", "KL", ".4f"))
    ]
    ends = (("minutes", "minutes", ".1f"), ("peak", "peak GB", ".2f"), ("reason", "", ""))
    return (("name", "", ""), ("bits", "bits/param", ".4f"), *scores, *ends)


def _rows(own: Sequence[Pair]) -> Iterator[Row]:
    for pair in own:
        # In the ablation every pair has the same base, which has a row of its own.
        if pair.ours is None or not pair.view.startswith("ablation"):
            yield _row(pair.base)
        if pair.ours is not None:
            yield _row(pair.ours)


def _row(outcome: Outcome) -> Row:
    if outcome.scores is None:
        return {"name": outcome.label, "reason": outcome.reason}
    row: Row = {"name": outcome.label, "bits": outcome.bits, "reason": "; ".join(outcome.notes)}
    for text, scores in outcome.scores.items():
        row |= {f"{text} perplexity": scores.perplexity, f"{text} KL": scores.mean_divergence}
    return row | {"minutes": outcome.seconds / 60, "peak": outcome.peak_bytes / 1e9}


def _difference_columns(texts: Sequence[str]) -> Columns:
    parts = [
        column
        for text in texts
        for column in (
            (f"{text} loss", f"{text} loss", ""),
            (f"{text} loss verdict", "", ""),
            (f"{text} KL", "KL", ""),
            (f"{text} KL verdict", "", ""),
        )
    ]
    return (("name", "", ""), *parts)


def _difference(pair: Pair, texts: Sequence[str]) -> Row | None:
    if pair.ours is None:
        return None
    row: Row = {"name": pair.ours.label if pair.view.startswith("ablation") else pair.base.label}
    for text in texts:
        both = pair.differences(text)
        if both is None:
            return None
        for what, difference in zip(("loss", "KL"), both, strict=True):
            row |= {f"{text} {what}": str(difference), f"{text} {what} verdict": difference.verdict}
    return row


def summary(found: Sequence[Pair], texts: Sequence[str]) -> list[str]:
    """How often kbitc is lower, even or higher, in loss and KL, one line a comparison and text."""
    lines = []
    for view, group in groupby(found, key=lambda pair: pair.view):
        if view.startswith("ablation"):
            continue
        own = [pair for pair in group if pair.ours is not None]
        for text in texts:
            both = [difference for pair in own if (difference := pair.differences(text))]
            for what, at in (("loss", 0), ("KL", 1)):
                verdicts = [pair[at].verdict for pair in both]
                counts = ", ".join(f"{name} {verdicts.count(name)}" for name in ("lower", "even", "higher"))
                lines.append(f"{view}, {text}, {what} of kbitc against {len(both)} peers: {counts}.")
    return lines
