from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from kbitc.errors import SourceError, UsageError
from kbitc.graph.capture import NOT_LOOKED_AT, capture
from kbitc.graph.context import Context
from kbitc.graph.example_inputs import example_inputs
from kbitc.graph.program import Stage
from kbitc.passes.canonicalize import Canonicalize

FAMILIES = ("gpt2", "opt", "bloom", "gpt_neox", "llama", "mixtral", "roberta", "bart", "t5", "clip")


def tensors_in(graph):
    return [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_model_is_captured_without_any_data(tiny_model, family):
    model = tiny_model(family, is_meta=True)
    program = capture(model)
    assert program.stage is Stage.CAPTURED
    assert not program.weights
    assert all(type(value).__name__ == "FakeTensor" for value in tensors_in(program.graph))
    assert not [*program.graph.parameters(), *program.graph.buffers()]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert program.parameter_count == sum(parameter.numel() for parameter in model.parameters())
    # The rest lists every stored tensor, in the model's order, tied ones once.
    stored = set(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, _ in model.named_buffers() if name in stored]
    assert list(program.rest) == names
    assert {alias for rest in program.rest.values() for alias in rest.aliases} == stored - set(names)
    assert {rest.reason for rest in program.rest.values()} == {NOT_LOOKED_AT}
    assert set(program.rest) <= set(program.parameters.values())


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5"])
def test_a_real_model_is_not_changed_and_not_copied(tiny_model, family):
    model = tiny_model(family).train()
    model.config.use_cache = True
    if family == "mixtral":
        model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    before = {name: (id(t), t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    program = capture(model)
    assert all(type(value).__name__ == "FakeTensor" for value in tensors_in(program.graph))
    after = model.state_dict(keep_vars=True)
    for name, (identity, address, value) in before.items():
        assert (id(after[name]), after[name].data_ptr()) == (identity, address)
        assert torch.equal(after[name], value)
    assert model.training
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    if family == "mixtral":
        assert model.get_experts_implementation()[""] == "eager"


def test_attention_that_cannot_be_traced_is_replaced_in_the_copy_alone(tiny_model):
    model = tiny_model("llama", is_meta=True)
    model.config._attn_implementation = "flex_attention"
    program = capture(model)
    assert "scaled_dot_product_attention" in program.graph.code
    assert model.config._attn_implementation == "flex_attention"


def test_tied_weights_are_one_placeholder(tiny_model):
    program = capture(tiny_model("gpt2", is_meta=True))
    names = list(program.parameters.values())
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))
    assert program.rest["transformer.wte.weight"].aliases == ("lm_head.weight",)


def test_persistent_buffers_are_stored_and_others_are_not(tiny_model):
    bart = capture(tiny_model("bart", is_meta=True))
    assert not bart.rest["final_logits_bias"].is_parameter
    llama = capture(tiny_model("llama", is_meta=True))
    assert not any("inv_freq" in name for name in llama.rest)
    assert "model.rotary_emb.inv_freq" in llama.parameters.values()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"input_ids"}),
        ("roberta", {"input_ids", "attention_mask"}),
        ("t5", {"input_ids", "decoder_input_ids"}),
        ("clip", {"input_ids", "attention_mask", "pixel_values"}),
    ],
)
def test_inputs_are_made_by_kind_of_model(tiny_model, family, names):
    model = tiny_model(family, is_meta=True)
    inputs = example_inputs(model)
    assert set(inputs) == names
    placeholders = {node.name for node in capture(model).graph.graph.nodes if node.op == "placeholder"}
    assert names <= placeholders


def test_vision_models_and_headless_models_get_inputs():
    from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        vit = ViTModel(ViTConfig(image_size=(14, 21), patch_size=7, num_channels=1, **sizes))
        llama = LlamaModel(LlamaConfig(vocab_size=31, **sizes))
    assert tuple(example_inputs(vit)["pixel_values"].shape) == (2, 1, 14, 21)
    assert capture(vit).parameter_count == sum(p.numel() for p in vit.parameters())
    assert capture(llama).parameter_count == sum(p.numel() for p in llama.parameters())


def test_a_plain_module_needs_example_inputs():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(UsageError, match=r"Sequential is not a transformers model.*pass example_inputs="):
        capture(model)
    with pytest.raises(UsageError, match=r"example_inputs is a Tensor; give a tuple"):
        capture(model, torch.zeros(2, 7))
    program = capture(model, (torch.zeros(2, 7),))
    assert list(program.rest) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_model_with_other_inputs_says_which():
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    with torch.device("meta"):
        model = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=8))
    with pytest.raises(UsageError, match=r"SpeechT5HifiGan takes 'spectrogram'.*pass example_inputs="):
        capture(model)


def test_a_model_with_an_unknown_input_and_known_modules_has_no_graph_and_its_weights():
    from transformers import LlamaConfig, LlamaModel

    class Robot(LlamaModel):
        main_input_name = "state"

        def forward(self, state):
            return super().forward(inputs_embeds=state)

    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = Robot(LlamaConfig(vocab_size=31, **sizes))
    program = capture(model)
    assert program.untraced == "it takes 'state', which cannot be made from its config"
    assert "layers.0.mlp.up_proj.weight" in Canonicalize().run(program).weights
    with pytest.raises(UsageError, match=r"Robot takes 'state'"):
        example_inputs(model)


def test_keyword_inputs_constants_and_buffers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 7))
            self.table = torch.arange(7.0)  # neither parameter nor buffer
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x, scale=1.0, *, flag=True):
            self.steps.add_(1)
            return {"y": x @ self.weight * torch.tensor(0.5) + self.table if flag else x * scale}

    model = Model()
    program = capture(model, {"x": torch.randn(2, 5), "flag": True})
    inputs = [
        n.name
        for n in program.graph.graph.nodes
        if n.op == "placeholder" and n.name not in program.parameters
    ]
    assert inputs == ["x"]
    assert model.steps == 0
    x = torch.randn(2, 5)
    state = {"weight": model.weight, "steps": torch.zeros(1)}
    arguments = [
        state[program.parameters[n.name]] if n.name in program.parameters else x
        for n in program.graph.graph.nodes
        if n.op == "placeholder"
    ]
    torch.testing.assert_close(program.graph(*arguments)[0], model(x)["y"])


def test_what_cannot_be_traced_is_a_source_error():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(SourceError, match=r"Branching: torch.export cannot trace it .*pass example_inputs"):
        capture(Branching(), (torch.zeros(2, 7),))


def test_experts_are_traced_as_grouped_matmuls_also_where_a_model_prefers_its_loop():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 64}
    heads |= {"pad_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 2}
    config = transformers.OpenAIPrivacyFilterConfig(**sizes, **heads)
    with torch.device("meta"):
        model = transformers.OpenAIPrivacyFilterModel(config)
    program = Canonicalize().run(capture(model))
    assert program.untraced == ""
    assert {"layers.0.mlp.router.weight", "layers.0.mlp.experts.gate_up_proj"} <= set(program.weights)
    assert not [name for name, rest in program.rest.items() if rest.is_matmul]


def test_a_packed_model_is_refused():
    from kbitc.quantizers import quantize

    model = nn.Linear(32, 8, bias=False)
    model.weight = nn.Parameter(quantize(model.weight.detach(), "int4:32"), requires_grad=False)
    with pytest.raises(UsageError, match=r"weight is a KbitTensor.*already packed"):
        capture(model, (torch.zeros(2, 32),))


def test_the_reader_is_kept(tiny_model):
    def read(name):
        raise AssertionError(name)

    assert capture(tiny_model("llama", is_meta=True), context=Context(read)).read is read


def test_of_transforms_of_functions_a_graph_has_vmap_alone():
    """Gradients are traced to plain calls; `torch.func.jvp` would leave levels that no pass knows."""

    class Transformed(nn.Linear):
        transform = torch.vmap(torch.sin)

        def forward(self, x):
            return super().forward(x) + type(self).transform(x)

    class Graded(Transformed):
        transform = torch.func.grad(lambda x: x.sin().sum())

    class Pushed(Transformed):
        transform = lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1]  # noqa: E731

    x = torch.randn(3, 4)
    for owner in (Transformed, Graded):
        program = capture(owner(4, 4), (x,))
        assert program.untraced == ""
    program = capture(nn.Sequential(nn.Linear(4, 4), Pushed(4, 4)), (x,))
    assert program.untraced.startswith("it calls torch.func.jvp, ")
    assert Canonicalize().run(program).weights.keys() == {"0.weight", "1.weight"}
