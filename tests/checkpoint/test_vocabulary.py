"""How many tokens a model knows, as its config states it and as its table has rows."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers
from torch import nn

from kbitc.checkpoint.vocabulary import vocabulary_size


def of(name, **options):
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def test_what_the_config_states_and_no_more_than_there_are_rows(tiny_model):
    model = tiny_model("llama")
    assert vocabulary_size(model) == 101
    model.model.embed_tokens = nn.Embedding(110, 36)  # padded
    assert vocabulary_size(model) == 101
    model.model.embed_tokens = nn.Embedding(90, 36)
    assert vocabulary_size(model) == 90
    assert vocabulary_size(SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(90, 36))) == 90


def test_rows_of_prompts_are_no_tokens():
    sizes = {"vocab_size": 96, "prompt_types": 2, "prompt_length": 4, "hidden_size": 32}
    model = of("CpmAnt", **sizes, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=1)
    assert model.get_input_embeddings().weight.shape[0] == 96 + 2 * 4
    assert vocabulary_size(model) == 96


def test_models_without_tokens():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    vision = of("CLIPVision", **sizes)
    assert isinstance(vision.get_input_embeddings(), nn.Conv2d)  # it cuts the image
    assert vocabulary_size(vision) is None
    assert vocabulary_size(nn.Linear(2, 2)) is None
