"""Text and chats as what a language model is trained on: token ids, and which of them count.

The one thing to know: of a text every token counts, of a chat what the assistant says; the last examples of a
file are held out and never learned from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.dense import token_ids
from kbitc.errors import UsageError, first_line
from kbitc.evaluation.perplexity import cut, read_text

IGNORED = -100
"""The label of a token that does not count."""

Example = dict[str, list[int]]
"""``input_ids`` and ``labels``, equally long."""

HELD_SHARE, MOST_HELD = 0.1, 64
"""Of examples at the end that are held out: a tenth, and no more than say it to a hundredth of a nat."""


def text_examples(tokenizer: Any, model: nn.Module, path: Path, context: int) -> list[Example]:
    """A text as windows of tokens.

    Raises:
        UsageError: it cannot be read, or has fewer tokens than two windows.
        SourceError: the tokenizer fails.
    """
    rows = cut(token_ids(tokenizer, read_text(path), model), context, context).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def chat_examples(tokenizer: Any, path: Path, context: int) -> list[Example]:
    """Chats, one a line: ``{"messages": [{"role": "user", "content": "..."}, ...]}``.

    They are written by the tokenizer's chat template and cut to ``context`` tokens; those of which nothing of
    the assistant's is left are left out.

    Raises:
        UsageError: a line that is no chat (its number), no template, or nothing left.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(f"--chat {path}: this model's tokenizer has no chat template; train on --text")
    made = []
    for number, line in enumerate(read_text(path, "--chat").splitlines(), 1):
        if not line.strip():
            continue
        messages = _messages(line, f"--chat {path}: line {number}")
        try:
            example = _chat(tokenizer, messages)
        except Exception as error:  # a template is code of the model's
            raise UsageError(f"--chat {path}: line {number}: {first_line(error)}") from error
        short = {name: values[:context] for name, values in example.items()}
        if any(label != IGNORED for label in short["labels"]):
            made.append(short)
    if not made:
        raise UsageError(f"--chat {path}: nothing that an assistant says within {context} tokens")
    return made


def _messages(line: str, where: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(line)["messages"]
        if not all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
            raise TypeError("roles and contents are texts")
    except (ValueError, KeyError, TypeError) as error:
        wanted = '{"messages": [{"role": "user", "content": "..."}, ...]}'
        raise UsageError(f"{where}: is no chat ({first_line(error)}); expected {wanted}") from error
    return list(messages)


def _chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Example:
    """The whole chat, with labels on what follows each prompt of the assistant."""
    ids = _templated(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(_templated(tokenizer, messages[:i], add_generation_prompt=True)) if i else 0
        until = _templated(tokenizer, messages[: i + 1])
        if ids[: len(until)] != until:
            raise ValueError("the chat template writes earlier messages otherwise once others follow")
        labels[start : len(until)] = until[start:]
    return {"input_ids": ids, "labels": labels}


def _templated(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> list[int]:
    written = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    return list(written["input_ids"])


def held_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those to learn from, and those at the end that are held out.

    Raises:
        UsageError: fewer than two.
    """
    count = min(MOST_HELD, max(1, round(HELD_SHARE * len(examples))))
    if len(examples) < 2:
        raise UsageError("one example is too few: some are held out; give more text, or a smaller --context")
    return list(examples[:-count]), list(examples[-count:])


def collated(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch ``(examples, longest)``, padded at the end by tokens that count nowhere."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    ids = [padded(example["input_ids"], 0) for example in examples]
    masks = [padded([1] * len(example["input_ids"]), 0) for example in examples]
    labels = [padded(example["labels"], IGNORED) for example in examples]
    made = {"input_ids": ids, "attention_mask": masks, "labels": labels}
    return {name: torch.tensor(values) for name, values in made.items()}


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], batch: int = 8) -> float:
    """Nats per token that counts, in eval mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), batch):
        given = collated(examples[start : start + batch])
        labels = given.pop("labels")[:, 1:].flatten()
        logits = model(**given, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total += float(
            torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        )
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / count
