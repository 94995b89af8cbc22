"""A tokenizer of words for the tiny models."""

from __future__ import annotations

import pytest

VOCABULARY = 101


@pytest.fixture
def words():
    """``words(**special)``: w000 ... w100; w002 and w003 frame a text where ``framed``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(*, framed=False, **special):
        tokenizer = Tokenizer(models.WordLevel({f"w{i:03}": i for i in range(VOCABULARY)}, unk_token="w000"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if framed:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="w002 $A w003", special_tokens=[("w002", 2), ("w003", 3)]
            )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w000", **special)

    return make
