"""Generation that equals transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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


class Scripted:
    """A decoder that says what it was told to."""

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=12, n_layer=1, n_head=1, vocab_size=300)
    )

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, ids, new_tokens, ends=()):
        yield from self.tokens[:new_tokens]


def sentence_pieces():
    """Words with the space before them, and bytes, as in Llama's: decoding drops the first space of a text."""
    words = [
        "<s>",
        "<unk>",
        "\u2581Lily",
        "\u2581and",
        "\u2581Tom",
        ".",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_tokens(words[2:5])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return words, transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=True
    )


class Ids:
    """A tokenizer whose prompts are ids already."""

    def __init__(self, tokenizer, ids):
        self.ids, self.decode = ids, tokenizer.decode

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([self.ids])}


@pytest.mark.parametrize(
    ("prompt", "tokens", "pieces"),
    [
        (["<s>", "\u2581Lily"], ["\u2581and", "\u2581Tom"], [" and", " Tom"]),
        (["\u2581Lily", "\u2581and"], ["\u2581Tom", "."], [" Tom", "."]),
        (
            ["\u2581Lily"],
            ["<0xE2>", "<0x82>", "<0xAC>", "."],
            ["", "", "\u20ac", "."],
        ),  # one character of three bytes
        (["\u2581Lily"], ["<s>", "\u2581and"], ["", " and"]),  # a special token is no text
        (["\u2581Lily"], ["<0x20>", "."], [" ", "."]),  # not cleaned up to "Lily."
    ],
)
def test_spaces_and_characters_come_whole(prompt, tokens, pieces):
    words, tokenizer = sentence_pieces()
    made = [words.index(token) for token in tokens]
    ids = Ids(tokenizer, [words.index(token) for token in prompt])
    assert list(generate(Scripted(made), ids, "Lily", 9)) == pieces
