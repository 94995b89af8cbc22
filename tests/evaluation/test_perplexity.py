"""Perplexity by its definition."""

from __future__ import annotations

import math

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.evaluation.perplexity import perplexity, read_text, windows


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(c) % 100 for c in text]])}


def test_perplexity_is_the_definition(tiny_model):
    model = tiny_model("llama")
    ids = windows(model, Letters(), "the quick brown fox jumps", 8, None)
    assert ids.shape == (3, 8)  # 25 letters: the last one is dropped
    total = 0.0
    for window in ids:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for i in range(7):
            total -= float(logits[i].log_softmax(-1)[window[i + 1]])
    score = perplexity(model, ids, reference=model)
    assert score.tokens == 21
    assert score.perplexity == pytest.approx(math.exp(total / 21), rel=1e-5)
    assert score.divergence == pytest.approx(0, abs=1e-6)


def test_each_window_is_told(tiny_model):
    told = []
    perplexity(tiny_model("llama"), torch.arange(24).view(3, 8), on_progress=lambda *step: told.append(step))
    assert told == [("scoring", 1, 3), ("scoring", 2, 3), ("scoring", 3, 3)]


def test_divergence_is_positive_between_models(tiny_model):
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight *= 2
    ids = torch.arange(16).view(2, 8)
    assert perplexity(other, ids, reference=model).divergence > 1e-4


def test_bad_windows(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="fewer than one window"):
        windows(model, Letters(), "abc", 8, None)
    with pytest.raises(UsageError, match="takes 2 to"):
        windows(model, Letters(), "abc" * 99, 10**9, None)


def test_windows_end_where_positions_do(tiny_model):
    """RoBERTa's table has rows that number nothing; a stated length of -1 is no limit."""
    model = tiny_model("roberta")
    assert windows(model, Letters(), "abc" * 99, 33, None).shape == (9, 33)
    with pytest.raises(UsageError, match="2 to 33 tokens"):
        windows(model, Letters(), "abc" * 99, 34, None)
    model.config.max_position_embeddings = -1
    assert windows(model, Letters(), "abc" * 99, 34, None).shape == (8, 34)
    with pytest.raises(UsageError, match="2 tokens or more"):
        windows(model, Letters(), "abc" * 99, 1, None)


def test_text_errors(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path / "none")
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(tmp_path / "x")
    (tmp_path / "y").write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        read_text(tmp_path / "y")
