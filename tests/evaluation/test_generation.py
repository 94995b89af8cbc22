"""Generation that equals transformers' own."""

from __future__ import annotations

import torch

from kbitc.backends import make_decoder
from kbitc.evaluation.generation import generate


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(c) % 100 for c in text]])}

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)


def test_generation_equals_transformers(tiny_model):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    pieces = list(generate(make_decoder(model, "eager"), Letters(), "hello", 9))
    ids = Letters()("hello")["input_ids"]
    made = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert "".join(pieces) == Letters().decode(made[0, 5:].tolist())
