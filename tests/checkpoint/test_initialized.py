"""Folders whose loading computes tensors, and models whose initialization looks at weights."""

from __future__ import annotations

import pytest
import torch

import kbitc
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.skeletons import default_value
from kbitc.errors import SourceError
from kbitc.tensor.kbit_tensor import KbitTensor


def marian():
    from transformers import MarianConfig, MarianMTModel

    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 33}
    ids = {"pad_token_id": 100, "decoder_start_token_id": 100, "eos_token_id": 0}
    return MarianMTModel(MarianConfig(vocab_size=101, d_model=32, **sizes, **heads, **ids)).eval()


def funnel():
    from transformers import FunnelConfig, FunnelModel

    sizes = {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "num_decoder_layers": 1}
    return FunnelModel(FunnelConfig(vocab_size=101, block_sizes=[1, 1], pad_token_id=0, **sizes)).eval()


def gemma3n():
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=101,
        vocab_size_per_layer_input=101,
        hidden_size_per_layer_input=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )
    return Gemma3nForCausalLM(config).eval()


INPUTS = {"input_ids": torch.arange(10).view(2, 5) + 1, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}


@pytest.mark.parametrize("make", [marian, funnel, gemma3n])
def test_a_folder_compiles_and_loads_as_the_model(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "source")
    inputs = dict(INPUTS)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = INPUTS["input_ids"]
    loaded = kbitc.compile(tmp_path / "source", spec="int8:32")
    for name, weight in model.named_parameters():
        stored = loaded.get_parameter(name)
        if isinstance(stored, KbitTensor):
            torch.testing.assert_close(
                stored.dequantize(), weight, rtol=0, atol=float(weight.abs().max()) / 200
            )
        else:
            torch.testing.assert_close(stored, weight, rtol=1e-3, atol=1e-3, check_dtype=False)
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert (loaded(**inputs)[0] - expected).norm() < 0.05 * expected.norm()


def test_what_transformers_never_saves_is_computed_as_it_does(tmp_path):
    torch.manual_seed(0)
    model = marian()
    model.save_pretrained(tmp_path)
    name = "model.decoder.embed_positions.weight"
    state = torch.random.get_rng_state()
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read(name), model.state_dict()[name])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_lost_norm_is_an_error_though_its_first_value_is_known(tmp_path):
    from safetensors.torch import load_file, save_file

    marian().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.encoder.layers.0.final_layer_norm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 .*final_layer_norm.weight"):
        open_checkpoint(tmp_path)


def test_each_model_in_a_model_initializes_its_own_buffers():
    model = gemma3n()
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for name, value in model.named_buffers():
        if "inv_freq" not in name:
            found = default_value(skeleton, name)
            assert found is not None
            torch.testing.assert_close(found, value)
