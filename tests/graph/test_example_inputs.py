"""Inputs of every modality: the model runs on them, and every part of it does."""

from __future__ import annotations

import pytest
import torch
import transformers as T  # noqa: N812
from torch import nn

from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.example_inputs import InputMaker, example_inputs, tokens_of_media
from kbitc.graph.given_inputs import drawn_like, named_inputs, read_inputs
from kbitc.passes.canonicalize import Canonicalize

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 101, "num_key_value_heads": 2}
SPEECH = {"vocab_size": 101, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
SPEECH |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
SPEECH |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "bos_token_id": 1, "eos_token_id": 2}
SERIES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3], "num_time_features": 2}
SERIES |= {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "decoder_layers": 1,
}


def image(size=28, **more):
    return {"image_size": size, "patch_size": 14, **SIZES, **more}


def sound(name):
    sizes = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = getattr(T, f"{name}Config")(**SIZES, vocab_size=40, **sizes)
    return getattr(T, f"{name}ForCTC")(config)


def whisper():
    return T.WhisperForConditionalGeneration(
        T.WhisperConfig(**SPEECH, num_mel_bins=16, max_source_positions=50, max_target_positions=24)
    )


def speech_to_text():
    return T.Speech2TextForConditionalGeneration(
        T.Speech2TextConfig(**SPEECH, input_feat_per_channel=16, conv_channels=32, max_target_positions=24)
    )


def parakeet():
    conv = {"subsampling_conv_channels": 8, "conv_kernel_size": 3}
    encoder = {**SIZES, "num_key_value_heads": 2, "num_mel_bins": 16, **conv}
    return T.ParakeetForCTC(T.ParakeetCTCConfig(encoder_config=encoder, vocab_size=40, pad_token_id=0))


def patchtst():
    sizes = {"patch_length": 8, "patch_stride": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return T.PatchTSTForPrediction(
        T.PatchTSTConfig(num_input_channels=3, context_length=32, d_model=32, ffn_dim=48, **sizes)
    )


def perceiver(name="PerceiverModel", **more):
    sizes = {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
    }
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    return getattr(T, name)(T.PerceiverConfig(**sizes, **heads, **more))


def videomae():
    return T.VideoMAEForVideoClassification(T.VideoMAEConfig(**image(), num_frames=4))


def captioner():
    gpt2 = T.GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    pair = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(T.ViTConfig(**image()), gpt2)
    return T.VisionEncoderDecoderModel(pair)


def llava():
    vision = T.CLIPVisionConfig(**{**image(), "num_hidden_layers": 2})
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=T.LlamaConfig(**TEXT), vision_config=vision, image_token_index=7)
    )


def paligemma():
    text = {"model_type": "gemma", **TEXT, "head_dim": 16}
    vision = {"model_type": "siglip_vision_model", **image(), "projection_dim": 32}
    config = T.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=7, projection_dim=32)
    return T.PaliGemmaForConditionalGeneration(config)


def gemma3():
    around = {"image_token_index": 7, "boi_token_index": 8, "eoi_token_index": 9}
    return T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(
            text_config={**TEXT, "head_dim": 16}, vision_config=image(56), mm_tokens_per_image=4, **around
        )
    )


def idefics3(name="Idefics3"):
    config = getattr(T, f"{name}Config")(
        text_config=T.LlamaConfig(**TEXT), vision_config=image(56), image_token_id=7, scale_factor=2
    )
    return getattr(T, f"{name}ForConditionalGeneration")(config)


def qwen2_vl():
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    around = {"vision_start_token_id": 9, "vision_end_token_id": 10, "video_token_id": 8}
    return T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=7, **around)
    )


def voxtral():
    audio = {
        **SIZES,
        "vocab_size": 101,
        "intermediate_size": 128,
        "num_mel_bins": 16,
        "max_source_positions": 32,
    }
    return T.VoxtralForConditionalGeneration(
        T.VoxtralConfig(text_config=T.LlamaConfig(**TEXT), audio_config=audio, audio_token_id=7)
    )


def clap():
    """Two towers: neither text nor sound stands among the other."""
    sizes = {
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "num_attention_heads": [1, 2],
        "depths": [1, 1],
    }
    audio = {**sizes, "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "projection_dim": 16}
    text = {**TEXT, "max_position_embeddings": 24, "projection_dim": 16}
    return T.ClapModel(T.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))


def decision_transformer():
    sizes = {"hidden_size": 32, "n_head": 2, "n_layer": 1, "n_inner": 48, "max_ep_len": 40}
    return T.DecisionTransformerModel(T.DecisionTransformerConfig(state_dim=5, act_dim=3, **sizes))


def lxmert():
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12}
    return T.LxmertModel(T.LxmertConfig(**{**SIZES, "vocab_size": 101}, **layers))


def lightglue():
    detector = {"encoder_hidden_sizes": [8, 16], "decoder_hidden_size": 16, "keypoint_decoder_dim": 65}
    sizes = {"descriptor_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = T.LightGlueConfig(
        keypoint_detector_config=T.SuperPointConfig(**detector, descriptor_decoder_dim=16), **sizes
    )
    return T.LightGlueForKeypointMatching(config)


MODELS = {
    "decision_transformer": (
        decision_transformer,
        {"states": (2, 8, 5), "actions": (2, 8, 3), "returns_to_go": (2, 8, 1), "timesteps": (2, 8)},
    ),
    "lxmert": (lxmert, {"input_ids": (2, 8), "visual_feats": (2, 8, 12), "visual_pos": (2, 8, 4)}),
    "whisper": (whisper, {"input_features": (2, 16, 100), "decoder_input_ids": (2, 7)}),
    "speech_to_text": (speech_to_text, {"input_features": (2, 64, 16), "decoder_input_ids": (2, 7)}),
    "wav2vec2": (lambda: sound("Wav2Vec2"), {"input_values": (2, 20480)}),
    "hubert": (lambda: sound("Hubert"), {"input_values": (2, 20480)}),
    "parakeet": (parakeet, {"input_features": (2, 64, 16)}),
    "patchtst": (patchtst, {"past_values": (2, 32, 3)}),
    "time_series": (
        lambda: T.TimeSeriesTransformerForPrediction(T.TimeSeriesTransformerConfig(**SERIES)),
        {"past_values": (2, 15), "past_time_features": (2, 15, 2), "future_values": (2, 4)},
    ),
    "perceiver": (perceiver, {"inputs": (2, 8, 32)}),
    "perceiver_of_text": (
        lambda: perceiver("PerceiverForMaskedLM", vocab_size=101, qk_channels=16, v_channels=32),
        {"input_ids": (2, 8)},
    ),
    "videomae": (videomae, {"pixel_values": (2, 4, 3, 28, 28)}),
    "captioner": (captioner, {"pixel_values": (2, 3, 28, 28), "decoder_input_ids": (2, 7)}),
    "llava": (llava, {"input_ids": (2, 4 + 8), "pixel_values": (2, 3, 28, 28)}),
    "paligemma": (paligemma, {"input_ids": (2, 4 + 8), "token_type_ids": (2, 4 + 8)}),
    "gemma3": (gemma3, {"input_ids": (2, 1 + 4 + 1 + 8), "pixel_values": (2, 3, 56, 56)}),
    "idefics3": (idefics3, {"input_ids": (2, 4 + 8), "pixel_values": (2, 1, 3, 56, 56)}),
    "smolvlm": (lambda: idefics3("SmolVLM"), {"input_ids": (2, 4 + 8), "pixel_values": (2, 1, 3, 56, 56)}),
    "qwen2_vl": (
        qwen2_vl,
        {"input_ids": (2, 1 + 4 + 1 + 8), "pixel_values": (32, 1176), "image_grid_thw": (2, 3)},
    ),
    "clap": (clap, {"input_ids": (2, 8), "input_features": (2, 1, 64, 16)}),
    "voxtral": (voxtral, {"input_ids": (2, 8 + 8), "input_features": (2, 16, 64)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_runs_on_them_and_every_linear_does(name):
    build, shapes = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    state = torch.get_rng_state()
    inputs = example_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: tuple(inputs[key].shape) for key in shapes} == shapes
    seen = set()
    linears = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    for key, module in linears.items():
        module.register_forward_pre_hook(lambda *_, key=key: seen.add(key))
    with torch.no_grad():
        model(**inputs)
    # torch's own attention reads a linear's weight without calling it.
    assert {key for key in set(linears) - seen if "head.attention" not in key} == set()


def test_a_model_that_matches_images_gets_pairs_though_no_run_without_data_ends():
    with torch.device("meta"):
        assert example_inputs(lightglue())["pixel_values"].shape == (2, 2, 3, 224, 224)


def test_a_sound_is_of_whole_tokens():
    sizes = {"num_hidden_layers": 2, "hidden_sizes": [8, 8], "patch_sizes": [6, 5], "depths": [1, 1]}
    with torch.device("meta"):
        model = T.MuseSparkAudioModel(T.MuseSparkAudioConfig(**sizes, out_hidden_size=16)).eval()
    assert example_inputs(model)["input_values"].shape[1] % model.config.samples_per_token == 0


def test_an_encoder_that_makes_the_features_of_images_counts_them():
    text = {**TEXT, "head_dim": 16, "vocab_size": 101}
    encoder = {
        "text_config": text,
        "vision_config": image(56),
        "mm_tokens_per_image": 4,
        "image_token_index": 7,
    }
    config = T.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=7)
    with torch.device("meta"):
        model = T.T5Gemma2ForConditionalGeneration(config)
    inputs = example_inputs(model)
    assert inputs["pixel_values"].shape == (2, 3, 56, 56)
    assert (inputs["input_ids"] == 7).sum() == 2 * 4


def test_a_multimodal_model_is_traced_with_its_images():
    with torch.device("meta"):
        model = llava().eval()
    program = Canonicalize().run(capture(model))
    assert [name for name, rest in program.rest.items() if rest.is_matmul] == []
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in program.weights
    assert sum("vision" in name for name in program.weights) > 5


def test_drawn_text_holds_no_image_token_and_a_given_one_comes_after_them():
    with torch.device("meta"):
        model = llava().eval()
    assert tokens_of_media(model) == [7]
    maker = InputMaker.of(model, 400)
    drawn = maker.draw(torch.Generator().manual_seed(0))["input_ids"]
    assert drawn.shape == (1, 404)
    assert drawn[0, :4].tolist() == [7] * 4
    assert 7 not in drawn[0, 4:]
    text = torch.arange(10, 20)[None]
    assert InputMaker.of(model, 10).draw(torch.Generator(), text)["input_ids"].tolist() == [
        [7] * 4 + [*range(10, 20)]
    ]


def test_given_inputs_by_name():
    class Model(nn.Module):
        def forward(self, x, scale=1.0, *rest, mask=None): ...

    x = torch.ones(2)
    assert named_inputs(Model(), None) is None
    assert named_inputs(Model(), (x, 2.0)) == {"x": x, "scale": 2.0}
    assert named_inputs(Model(), {"x": x, "mask": None}) == {"x": x, "mask": None}
    for unnamed in ((x, 2.0, x), {"x": [x]}, {"y": x}):
        assert named_inputs(Model(), unnamed) is None


def test_noise_stands_for_inputs_that_say_nothing():
    given = {
        "a": torch.zeros(3, 4),
        "b": torch.tensor([1.0, 2.0]).half(),
        "ids": torch.tensor([5, 5]),
        "on": True,
    }
    drawn = drawn_like({**given, "c": torch.empty(2, device="meta")}, torch.Generator().manual_seed(0))
    assert drawn["a"].std() > 0.3
    assert drawn["c"].std() > 0
    assert drawn["b"].dtype is torch.float32
    assert drawn["b"].tolist() == [1.0, 2.0]
    assert drawn["ids"].tolist() == [5, 5]
    assert drawn["on"] is True
    with pytest.raises(UsageError, match=r"example_inputs\['ids'\] is on the meta device"):
        drawn_like({"ids": torch.empty(2, dtype=torch.int64, device="meta")}, torch.Generator())


def test_a_file_that_holds_no_inputs_says_so(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    for name in ("x.safetensors", "absent.safetensors"):
        with pytest.raises(UsageError, match="cannot be read as a safetensors file"):
            read_inputs(tmp_path / name)


def test_patches_of_a_grid_may_come_as_small_images():
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = T.Kimi_K25VisionConfig(**sizes, hidden_size=32, patch_size=4, pos_emb_height=8, pos_emb_width=8)
    model = T.Kimi_K25VisionModel(vision).eval()
    inputs = example_inputs(model)
    assert inputs["pixel_values"].shape == (32, 3, 4, 4)
    assert inputs["grid_thw"].tolist() == [[1, 4, 4]] * 2
    with torch.no_grad():
        model(**inputs)
