"""What a tokenizer that nobody vouches for does to a text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from kbitc.backends import make_decoder
from kbitc.checkpoint import demo, open_checkpoint
from kbitc.checkpoint.dense import text_of, token_ids, tokenizer_in
from kbitc.compiler.calibrator import Calibrator
from kbitc.errors import SourceError
from kbitc.evaluation.generation import generate
from kbitc.evaluation.perplexity import windows


class Letters:
    """Tokens of an alphabet of 128; its decoder fails."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    def decode(self, ids, **_):
        raise TypeError("no text")


@pytest.fixture
def source(tiny_model, tmp_path):
    """A model of 101 tokens, with the tokenizer of the demo model."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for path in demo.folder().glob("tokenizer*.json"):
        shutil.copy(path, tmp_path / "model")
    return tmp_path / "model"


def test_tokens_of_a_text(tiny_model):
    assert token_ids(Letters(), "AB", tiny_model("llama")).tolist() == [65, 66]
    assert token_ids(Letters(), "xyz").tolist() == [120, 121, 122]


def test_a_tokenizer_of_another_model(tiny_model, source, tmp_path):
    """Whoever reads a text says so, before the model meets tokens that it has no rows for."""
    model, theirs = tiny_model("llama"), "the tokenizer gives token .*, but the model has 101"
    (tmp_path / "text").write_text(demo.heldout().read_text())
    ways = [
        lambda: list(generate(make_decoder(model, "eager"), Letters(), "xyz", 2)),
        lambda: windows(model, Letters(), "xyz", 2, None),
        lambda: Calibrator(open_checkpoint(source), tmp_path / "text").windows(),
    ]
    for way in ways:
        with pytest.raises(SourceError, match=theirs):
            way()


@pytest.mark.parametrize("limit", [{}, "x"])
def test_a_damaged_tokenizer_config(tiny_model, source, limit):
    """transformers takes it, and fails at the first text."""
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
    tokenizer = tokenizer_in(source)
    with pytest.raises(SourceError, match="its tokenizer cannot read the text: TypeError"):
        list(generate(make_decoder(tiny_model("llama"), "eager"), tokenizer, "xyz", 2))


def test_a_tokenizer_that_cannot_write():
    with pytest.raises(SourceError, match="its tokenizer cannot write text: TypeError: no text"):
        text_of(Letters(), [1])
