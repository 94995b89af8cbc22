"""What models are scored as, and which are refused."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from kbitc.errors import UsageError
from kbitc.evaluation.kinds import Kind, kind_of

BERT = {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 75, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 3, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 101, "n_positions": 33, "n_embd": 36, "n_layer": 2, "n_head": 3, "pad_token_id": 0}
T5 = {"vocab_size": 101, "d_model": 36, "d_kv": 10, "d_ff": 75, "num_layers": 2, "num_heads": 3}


def made(kind, config, **options):
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt2", Kind.CAUSAL),
        ("mixtral", Kind.CAUSAL),
        ("roberta", Kind.MASKED),
        ("t5", Kind.ENCODER_DECODER),
        ("bart", Kind.ENCODER_DECODER),
        ("clip", Kind.IMAGE_TEXT),
    ],
)
def test_families(family, kind, tiny_model):
    assert kind_of(tiny_model(family), "m") == kind


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (("BertModel", "BertConfig", BERT), Kind.EMBEDDING),
        (("GPT2Model", "GPT2Config", GPT2), Kind.EMBEDDING),
        (("T5EncoderModel", "T5Config", T5), Kind.EMBEDDING),
        (("BertForMaskedLM", "BertConfig", BERT), Kind.MASKED),
        (("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}), Kind.CAUSAL),
    ],
)
def test_classes(model, kind):
    name, config, options = model
    assert kind_of(made(name, config, **options), "m") == kind


VIT = {
    "hidden_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
}
WHISPER = {
    "vocab_size": 101,
    "d_model": 36,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
}
WHISPER |= {"decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
REFUSED = {
    "classes": (("BertForSequenceClassification", "BertConfig", BERT), "does not give a number for each token"),
    "tags": (("GPT2ForTokenClassification", "GPT2Config", GPT2), "does not give a number for each token"),
    "answers": (("BertForQuestionAnswering", "BertConfig", BERT), "gives no logits"),
    "no mask": (("BertLMHeadModel", "BertConfig", BERT), "reads the tokens after a place too"),
    "no text out": (("T5Model", "T5Config", T5), "reads one text and gives no other"),
    "images": (("ViTForImageClassification", "ViTConfig", VIT), "has no vocabulary"),
    "image features": (("ViTModel", "ViTConfig", VIT), "has no vocabulary"),
    "sounds": (("WhisperForConditionalGeneration", "WhisperConfig", WHISPER), "reads input_features, not text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_in_one_paragraph(name):
    (kind, config, options), reason = REFUSED[name]
    with pytest.raises(
        UsageError, match=rf"^m: nothing .* says anything of a {kind}, which {reason}"
    ) as caught:
        kind_of(made(kind, config, **options), "m")
    assert "load this one with kbitc.load" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_module_is_refused():
    with pytest.raises(UsageError, match="a Linear, which has no vocabulary"):
        kind_of(nn.Linear(3, 3), "m")
