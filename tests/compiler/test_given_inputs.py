"""Inputs that a user gives are what a model is traced and measured on, whatever it is read from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import kbitc
from kbitc.cli.main import app
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import UsageError
from kbitc.sensitivity.moments import CALIBRATION, MOMENTS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path / "cache")


def planned(source, tmp_path, inputs=None, **options):
    request = Request.of(**{"spec": "int4:32", "calibrate": "random", **options})
    return compile_to(source, tmp_path / "out", request, is_dry=True, example_inputs=inputs).program


def shapes(program):
    inputs = [node for node in program.graph.graph.nodes if node.op == "placeholder"]
    return {n.name: tuple(n.meta["val"].shape) for n in inputs if n.name not in program.parameters}


class Gated(nn.Module):
    """Of a module in memory nobody but its user knows the inputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 60), nn.Linear(60, 20, bias=False)

    def forward(self, x, gate, *, flip=False):
        return self.down(self.up(-x if flip else x) * gate)


def test_a_module_is_measured_on_inputs_like_the_given_ones(tmp_path):
    torch.manual_seed(0)
    model = Gated()
    gate = torch.zeros(60)
    gate[:7] = 3.0
    program = planned(model, tmp_path, {"x": torch.zeros(4, 40), "gate": gate, "flip": True})
    assert program.get(CALIBRATION) == "2 random inputs like the given ones"
    (factor,) = program.get(MOMENTS)["down.weight"].factors
    # Noise stands for x, and the gate is what was given: what it shuts out costs nothing.
    assert factor.columns[:7].min() > 0
    assert factor.columns[7:].max() == 0
    with pytest.raises(UsageError, match=r"Gated.*give example_inputs="):
        planned(model, tmp_path, {"x": torch.zeros(4, 40), "gate": gate, "wrong": gate})


def test_other_inputs_are_measured_anew(tmp_path):
    torch.manual_seed(0)
    model = Gated()
    x, gate = torch.zeros(4, 40), torch.rand(60)
    first, other = (planned(model, tmp_path, (x, each)).get(MOMENTS) for each in (gate, gate.flip(0)))
    assert not torch.equal(first["down.weight"].factors[0].columns, other["down.weight"].factors[0].columns)


def test_a_folder_is_traced_on_what_is_given(tiny_model, tmp_path):
    tiny_model("roberta").save_pretrained(tmp_path / "model")
    inputs = {"input_ids": torch.full((3, 5), 7)}
    program = planned(tmp_path / "model", tmp_path, inputs)
    assert shapes(program) == {"input_ids": (3, 5)}
    assert program.get(CALIBRATION) == "2 random inputs like the given ones"
    packed = kbitc.compile(tmp_path / "model", spec="int4:32", example_inputs=inputs)
    assert isinstance(packed.roberta.encoder.layer[0].output.dense.weight, kbitc.KbitTensor)


def test_text_is_no_calibration_for_other_inputs(tiny_model, tmp_path):
    ids = torch.full((1, 5), 7)
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="given other inputs than tokens.*--calibrate random"):
        planned(model, tmp_path, {"inputs_embeds": torch.randn(1, 5, 48)}, calibrate="self")
    program = planned(model, tmp_path, {"input_ids": ids}, calibrate="self")
    assert "that the model sampled itself" in program.get(CALIBRATION)


def test_the_command_reads_a_file(tiny_model, tmp_path):
    tiny_model("roberta").save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.full((3, 5), 7)}, tmp_path / "x.safetensors")
    command = ["compile", str(tmp_path / "model"), "--spec", "int4:32", "--dry-run", "--json"]
    done = CliRunner().invoke(app, [*command, "--example-inputs", str(tmp_path / "x.safetensors")])
    assert done.exit_code == 0, done.output
    save_file({"no_such_input": torch.ones(2)}, tmp_path / "x.safetensors")
    failed = CliRunner().invoke(app, [*command, "--example-inputs", str(tmp_path / "x.safetensors")])
    assert failed.exit_code != 0
    assert "no input 'no_such_input'" in str(failed.exception)


def ctrl():
    from transformers import CTRLConfig, CTRLLMHeadModel

    return CTRLLMHeadModel(CTRLConfig(vocab_size=101, n_positions=33, n_embd=32, dff=48, n_layer=1, n_head=2))


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, vocab_size=40))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **sizes)
    text = LlamaConfig(vocab_size=101, **sizes)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=7, vision_feature_layer=-1)
    )


@pytest.mark.parametrize(("build", "calibrate"), [(ctrl, "self"), (wav2vec2, "random"), (llava, "self")])
def test_every_weight_is_measured(build, calibrate, tmp_path):
    """In-place embeddings, sound, and text after an image."""
    torch.manual_seed(0)
    program = planned(build().eval(), tmp_path, calibrate=calibrate)
    moments = program.get(MOMENTS)
    assert set(moments) == set(program.weights)
    assert all(bool(f.rows.isfinite().all()) for own in moments.values() for f in own.factors)
    assert all(any(float(f.columns.sum()) > 0 for f in own.factors) for own in moments.values())


def test_full_windows_of_a_model_whose_positions_begin_after_its_padding(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.LENGTH", 256)
    program = planned(tiny_model("roberta"), tmp_path)
    assert program.get(CALIBRATION) == "2 random inputs of up to 33 tokens"
