"""Loss of models that are not causal: masked ones at masked tokens, encoder-decoders on pairs of texts.

The one thing to know: both are means over predicted tokens, in nats, and both models of a comparison see the
same masks or pairs, so that their difference is taken item by item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.dense import token_ids
from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.errors import UsageError, foreign
from kbitc.evaluation.intervals import Difference, paired, standard_error
from kbitc.evaluation.perplexity import check_context, cut, read_text
from kbitc.graph.context import Progress, silent
from kbitc.graph.positions import usable_positions

MASKED_SHARE = 0.15
"""Of the tokens of a window, as in BERT's training; each is replaced by the mask token."""


@dataclass(frozen=True)
class LossScore:
    """Losses item by item.

    Attributes:
        losses: mean negative log-likelihood of each item's predicted tokens, nats per token.
        counts: predicted tokens of each item.
        reference_losses: the reference model's, of the same items; empty without one.
    """

    losses: tuple[float, ...]
    counts: tuple[int, ...]
    reference_losses: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """That were predicted."""
        return sum(self.counts)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return _mean(self.losses, self.counts)

    @property
    def standard_error(self) -> float | None:
        """Of the loss, over items."""
        return standard_error(self.losses, self.counts)

    @property
    def reference_loss(self) -> float | None:
        """The reference model's, nats per token."""
        return _mean(self.reference_losses, self.counts) if self.reference_losses else None

    @property
    def difference(self) -> Difference | None:
        """The loss minus the reference model's, paired."""
        if not self.reference_losses:
            return None
        return paired(self.losses, self.reference_losses, weights=self.counts)


def _mean(losses: Sequence[float], counts: Sequence[int]) -> float:
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


@dataclass(frozen=True)
class Masked:
    """One window with some of its tokens masked.

    Attributes:
        ids: ``(tokens,)``, with the mask token in place of those at ``places``.
        places: of the masked tokens, sorted.
        targets: what stood there.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor


def masked_windows(
    model: nn.Module, tokenizer: Any, text: str, *, context: int, limit: int | None, seed: int
) -> list[Masked]:
    """Non-overlapping windows of a text, each framed as the tokenizer frames texts; a partial one is dropped.

    Args:
        model: that is to read them.
        tokenizer: with a mask token.
        text: to cut.
        context: tokens a window, its frame included.
        limit: tokens of the text that are taken.
        seed: of the masks.

    Raises:
        UsageError: no mask token, or a context or text that is too short or too long.
        SourceError: the tokenizer fails, or is not the model's.
    """
    if tokenizer.mask_token_id is None:
        raise UsageError("this masked language model's tokenizer has no mask token; add it to its files")
    before, after = _frame(tokenizer)
    framing = len(before) + len(after)
    check_context(model, context, least=framing + 2)
    inner = context - framing
    random = torch.Generator().manual_seed(seed)
    made = []
    for window in cut(token_ids(tokenizer, text, model, is_bare=True)[:limit], inner, context):
        chosen = torch.randperm(inner, generator=random)[: max(1, round(MASKED_SHARE * inner))].sort().values
        whole = torch.cat([before, window, after])
        places = chosen + len(before)
        targets = whole[places]
        whole[places] = tokenizer.mask_token_id
        made.append(Masked(whole, places, targets))
    return made


def _frame(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens that a tokenizer puts before and after a text."""
    bare, whole = (token_ids(tokenizer, "a", is_bare=is_bare) for is_bare in (True, False))
    extra = len(whole) - len(bare)
    starts = [i for i in range(extra + 1) if torch.equal(whole[i : i + len(bare)], bare)]
    start = starts[0] if starts else 0
    return whole[:start], whole[start + len(bare) :] if starts else whole[:0]


@torch.inference_mode()
def masked_loss(
    model: nn.Module,
    items: Sequence[Masked],
    *,
    reference: nn.Module | None = None,
    on_progress: Progress = silent,
) -> LossScore:
    """Loss at masked tokens.

    Args:
        model: masked language model.
        items: of `masked_windows`.
        reference: scored on the same masks.
        on_progress: told of each window.
    """

    def loss(scored: nn.Module, item: Masked) -> float:
        logits = scored(input_ids=item.ids[None]).logits[0, item.places]
        return _nll(logits, item.targets)

    return _scored(loss, model, items, [len(item.targets) for item in items], reference, on_progress)


def read_pairs(path: Path, limit: int | None) -> list[tuple[str, str]]:
    """Sources and targets: JSON lines with ``source`` and ``target``, or two columns with a tab between.

    Args:
        path: of a UTF-8 file; its name ends with .jsonl or .tsv.
        limit: the first pairs only.

    Raises:
        UsageError: missing, of another form, or without a pair; says which line.
    """
    read = {".jsonl": _json_pair, ".tsv": _tab_pair}.get(path.suffix)
    if read is None:
        raise UsageError(
            f"--pairs {path}: is neither .jsonl (source and target a line) nor .tsv (two columns)"
        )
    pairs = []
    for number, line in enumerate(read_text(path, "--pairs").split("\n"), 1):
        if not line.strip():
            continue
        try:
            source, target = (part.strip() for part in read(line))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"--pairs {path}, line {number}: is no pair of source and target ({error}); a line is "
                '{"source": "...", "target": "..."} in .jsonl, two columns with a tab between in .tsv'
            ) from error
        if not source or not target:
            raise UsageError(f"--pairs {path}, line {number}: has an empty source or target; remove the line")
        pairs.append((source, target))
    return pairs[:limit]


def _json_pair(line: str) -> tuple[str, str]:
    row = json.loads(line)
    return row["source"], row["target"]


def _tab_pair(line: str) -> list[str]:
    return line.rstrip("\r").split("\t")


@torch.inference_mode()
def pairs_loss(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    reference: nn.Module | None = None,
    on_progress: Progress = silent,
) -> LossScore:
    """Teacher-forced loss of targets, the end that the tokenizer adds included.

    Args:
        model: encoder-decoder of text.
        tokenizer: of both sides.
        pairs: of sources and targets.
        reference: scored on the same pairs.
        on_progress: told of each pair.

    Raises:
        UsageError: a pair is longer than the model's positions.
        SourceError: the tokenizer fails, or is not the model's.
    """
    items = list(_encoded(model, tokenizer, pairs))

    def loss(scored: nn.Module, item: tuple[Tensor, Tensor]) -> float:
        source, target = item
        with foreign("the model cannot be given pairs of texts"):
            logits = scored(input_ids=source[None], labels=target[None], use_cache=False).logits[0]
        return _nll(logits, target)

    return _scored(loss, model, items, [len(target) for _, target in items], reference, on_progress)


def _encoded(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[Tensor, Tensor]]:
    longest, known = usable_positions(model), vocabulary_size(model)
    for number, (source, target) in enumerate(pairs, 1):
        read = token_ids(tokenizer, source, model)
        with foreign("its tokenizer cannot read the target"):
            written = tokenizer(text_target=target, return_tensors="pt", verbose=False)["input_ids"][0]
        if known is not None and len(written) and int(written.max()) >= known:
            raise UsageError(f"--pairs, pair {number}: the tokenizer gives tokens that the model has not")
        most = max(len(read), len(written))
        if not len(written) or (longest is not None and most > longest):
            raise UsageError(
                f"--pairs, pair {number}: has {most} tokens on one side, and this model takes 1 to "
                f"{longest or 'any number'}; shorten it"
            )
        yield read, written.to(torch.int64)


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood of targets ``(n,)`` under logits ``(n, vocabulary)``, of float64 sums."""
    log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None])
    return -float(log_probs.double().mean())


def _scored(
    loss: Callable[[nn.Module, Any], float],
    model: nn.Module,
    items: Sequence[Any],
    counts: Sequence[int],
    reference: nn.Module | None,
    on_progress: Progress,
) -> LossScore:
    ours, theirs = [], []
    for i, item in enumerate(items):
        ours.append(loss(model, item))
        if reference is not None:
            theirs.append(loss(reference, item))
        on_progress("scoring", i + 1, len(items))
    return LossScore(tuple(ours), tuple(counts), tuple(theirs))
