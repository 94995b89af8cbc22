"""What ``kbitc eval`` found, on a console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kbitc.cli import console

if TYPE_CHECKING:
    from kbitc.evaluation.embeddings import Agreement
    from kbitc.evaluation.intervals import Difference
    from kbitc.evaluation.opening import Loaded
    from kbitc.evaluation.scoring import Asked, Scored

PAIRED = "(95 %, paired)"


def print_scores(scored: Scored, asked: Asked, loaded: Loaded, against: str | None) -> None:
    """Lines and a table for people.

    Args:
        scored: what came out.
        asked: what was asked for.
        loaded: the model.
        against: as the user named the other model.
    """
    size = f"{loaded.bits_per_param:.4f} bits per parameter, {loaded.nbytes / 1e6:,.2f} MB"
    if scored.text is not None:
        windows = f"{scored.text.tokens:,} tokens (windows of {asked.windows_context})"
        windows += "" if asked.kv is None else f", keys and values as {asked.kv}"
        console.out.print(f"perplexity [bold]{scored.text.perplexity:.4f}[/] over {windows}; {size}")
    if scored.loss is not None:
        loss = _with_error(scored.loss.loss, scored.loss.standard_error, 4)
        what, items = ("target", "pairs") if asked.pairs else ("masked", "windows")
        over = f"{scored.loss.tokens:,} {what} tokens of {len(scored.loss.losses):,} {items}"
        console.out.print(f"loss [bold]{loss}[/] nats per token over {over}; {size}")
    if scored.text is not None and scored.text.divergence is not None:
        console.out.print(
            f"KL divergence from {escape(str(against))}: [bold]{scored.text.divergence:.6f}[/] nats per token"
        )
    if scored.loss_difference is not None:
        difference = escape(str(scored.loss_difference))
        console.out.print(
            f"loss minus that of {escape(str(against))}: [bold]{difference}[/] nats per token {PAIRED}"
        )
    for what, nearest, found in (
        ("texts", _nearest(scored), scored.texts),
        ("images", "text", scored.images),
    ):
        if found is not None:
            _print_agreement(what, nearest, found, against)
    if scored.texts is not None:
        console.out.print(f"{'' if scored.pooling is None else f'pooled by {scored.pooling}; '}{size}")
    if scored.tasks:
        console.out.print(_task_table(scored, asked))
        for task in scored.tasks:
            if task.cut:
                console.out.print(f"{task.task}: {task.cut:,} prompts were cut to the model's positions")
        if scored.text is None:
            console.out.print(size)


def _nearest(scored: Scored) -> str:
    """What is retrieved for a text."""
    return "other text" if scored.images is None else "image"


def _print_agreement(what: str, nearest: str, found: Agreement, against: str | None) -> None:
    data = found.to_json()
    cosine, retrieval = data["cosine"], data["retrieval"]
    alike = _with_error(cosine["mean"], cosine["standard_error"], 6)
    agreed = _with_error(retrieval["agreement"], retrieval["standard_error"], 4)
    console.out.print(
        f"{what}: cosine with those of {escape(str(against))} [bold]{alike}[/], least {cosine['least']:.6f}; "
        f"the same nearest {nearest} for [bold]{agreed}[/] of {retrieval['items']:,}"
    )


def _task_table(scored: Scored, asked: Asked) -> Table:
    """In percent, to fit a terminal of 80 columns."""
    from kbitc.evaluation.harness import mean_accuracy

    shots = f"{asked.shots} shot{'s' if asked.shots != 1 else ''}"
    paired = f"; differences {PAIRED}" if scored.reference_tasks else ""
    table = Table(title=f"accuracy in percent ± standard error, {shots}{paired}", title_justify="left")
    others = ("against", "difference") if scored.reference_tasks else ()
    for column in ("task", "examples", "accuracy", *others):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    differences = scored.task_differences
    for i, task in enumerate(scored.tasks):
        cells = [f"{len(task.hits):,}", _percent(task.accuracy, task.standard_error)]
        if scored.reference_tasks:
            other = scored.reference_tasks[i]
            cells += [_percent(other.accuracy, other.standard_error), _points(differences[task.task])]
        table.add_row(task.task, *cells)
    if len(scored.tasks) > 1:
        table.add_section()
        cells = ["", _percent(*mean_accuracy(scored.tasks))]
        if scored.reference_tasks:
            cells += [_percent(*mean_accuracy(scored.reference_tasks)), _points(differences["mean"])]
        table.add_row("mean", *cells)
    return table


def _percent(share: float, error: float | None) -> str:
    return _with_error(100 * share, None if error is None else 100 * error, 1)


def _points(found: Difference) -> str:
    """A difference of accuracies, in percentage points."""
    return escape(f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]")


def _with_error(value: float, error: float | None, places: int) -> str:
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")
