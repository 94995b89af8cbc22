"""Which models text can be scored by, and what the others are told."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from kbitc.errors import UsageError
from kbitc.evaluation.causality import check_causal

GPT2 = {"vocab_size": 101, "n_positions": 33, "n_embd": 36, "n_layer": 2, "n_head": 3, "pad_token_id": 0}
BERT = {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 75, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 3, "max_position_embeddings": 40}


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gpt_neox", "llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_language_models_pass(family, dtype, tiny_model):
    check_causal(tiny_model(family).to(dtype), "m")


def made(kind, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


OTHERS = {
    "masked": (lambda: made("BertForMaskedLM", "BertConfig", **BERT), "reads the tokens after"),
    "no decoder": (lambda: made("BertLMHeadModel", "BertConfig", **BERT), "reads the tokens after"),
    "xlnet": (
        lambda: made("XLNetLMHeadModel", "XLNetConfig", vocab_size=101, d_model=36, n_layer=2, n_head=3, d_inner=40),
        "reads the tokens after",
    ),
    "encoder": (lambda: made("BertModel", "BertConfig", **BERT), "gives no logits"),
    "classes": (lambda: made("GPT2ForSequenceClassification", "GPT2Config", **GPT2), "does not give a number"),
    "tags": (lambda: made("GPT2ForTokenClassification", "GPT2Config", **GPT2), "does not give a number"),
    "images": (
        lambda: made(
            "ViTForImageClassification", "ViTConfig",
            hidden_size=36, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, image_size=32,
        ),
        "has no vocabulary",
    ),
    "plain": (lambda: nn.Linear(3, 3), "has no vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_told_what_they_are(name):
    make, reason = OTHERS[name]
    model = make()
    with pytest.raises(UsageError, match=f"^m: is no causal.*{type(model).__name__}, which {reason}"):
        check_causal(model, "m")


@pytest.mark.parametrize(
    ("family", "reason"),
    [("roberta", "after"), ("t5", "writes another"), ("bart", "writes another"), ("clip", "")],
)
def test_families_that_are_not_causal(family, reason, tiny_model):
    with pytest.raises(UsageError, match=reason):
        check_causal(tiny_model(family), "m")


def test_a_masked_model_with_a_decoder_s_mask_is_causal():
    check_causal(made("BertLMHeadModel", "BertConfig", **BERT, is_decoder=True), "m")
    check_causal(
        made("MambaForCausalLM", "MambaConfig", vocab_size=101, hidden_size=24, num_hidden_layers=1), "m"
    )


def with_tokenizer(model, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(101)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_run_refuses_in_one_paragraph(family, tiny_model, tmp_path):
    from typer.testing import CliRunner

    from kbitc.cli.main import app
    from kbitc.compiler.driver import compile_to
    from kbitc.compiler.request import Request

    source = with_tokenizer(tiny_model(family), tmp_path / "source")
    compile_to(source, tmp_path / "out", Request(spec="nf4:64"))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "out"), "w1 w2", "-n", "2", "--json"])
    assert isinstance(done.exception, UsageError)
    assert "is no causal language model" in str(done.exception)
    assert done.stdout == ""


def test_a_reference_of_another_vocabulary(tiny_model):
    from kbitc.evaluation.perplexity import perplexity

    other = made("GPT2LMHeadModel", "GPT2Config", **GPT2 | {"vocab_size": 99})
    with pytest.raises(UsageError, match="has 99 tokens, this one 101"):
        perplexity(tiny_model("gpt2"), torch.arange(16).view(2, 8), reference=other)
