"""The pass `canonicalize` on models of transformers: every matmul weight of a family is found, once."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from kbitc.graph.example_inputs import example_inputs
from kbitc.graph.program import CANONICAL, Stage
from kbitc.graph.weight_reads import op_name

# family: packable weights and the rest, of the two-layer models in conftest.py
COUNTS = {
    "gpt2": (10, 18),  # wte (tied), wpe, 2 x (c_attn, c_proj, c_fc, c_proj)
    "opt": (16, 22),  # embed (tied), positions, project_in, project_out, 2 x (q, k, v, out, fc1, fc2)
    "bloom": (9, 20),  # embed (tied), 2 x (qkv, dense, h_to_4h, 4h_to_h)
    "gpt_neox": (10, 18),  # embed_in, embed_out, 2 x 4
    "llama": (16, 5),  # embed, head, 2 x 7
    "mixtral": (16, 5),  # embed, head, 2 x (q, k, v, o, router, gate_up, down)
    "roberta": (16, 26),  # word (tied), position, type, lm_head.dense, 2 x 6
    "bart": (35, 57),  # shared (tied 4 times), 2 positions, 2 x 6 + 2 x 10; final_logits_bias is rest
    "t5": (39, 12),  # shared (tied), 2 position biases, 2 x 7 + 2 x 11
    "clip": (30, 48),  # token, 2 positions, 2 projections, patches, 4 x 6; logit_scale is rest
}
TIED = {
    "gpt2": ("transformer.wte.weight", ("lm_head.weight",)),
    "opt": ("model.decoder.embed_tokens.weight", ("lm_head.weight",)),
    "bloom": ("transformer.word_embeddings.weight", ("lm_head.weight",)),
    "roberta": ("roberta.embeddings.word_embeddings.weight", ("lm_head.decoder.weight",)),
    "bart": (
        "model.shared.weight",
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
    ),
    "t5": ("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")),
}


@pytest.fixture(scope="module")
def family_program(tiny_model, canonicalize):
    """``family_program(family)``: the canonical program of the family's meta model, made once."""
    return functools.cache(lambda family: canonicalize(tiny_model(family, is_meta=True)))


def modules_weights(model):
    """First names of what must be found: Linear, Conv1D, Embedding, patch convolutions, 3-D experts."""
    from transformers.pytorch_utils import Conv1D

    wanted = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d))
        or type(module).__name__.endswith("Router")
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted or (parameter.dim() == 3 and "experts" in name)
    ]


@pytest.mark.parametrize("family", COUNTS)
def test_every_matmul_weight_of_a_family_is_found_once(tiny_model, family_program, family):
    model = tiny_model(family, is_meta=True)
    program = family_program(family)
    assert program.stage is Stage.CANONICAL
    assert list(program.weights) == modules_weights(model)
    assert (len(program.weights), len(program.rest)) == COUNTS[family]
    assert not any(rest.is_matmul for rest in program.rest.values())
    assert program.parameter_count == sum(parameter.numel() for parameter in model.parameters())
    for name, weight in program.weights.items():
        assert weight.shape == tuple(model.get_parameter(name).shape)
        assert {use.kind for use in weight.uses} <= set(CANONICAL.values())


@pytest.mark.parametrize("family", COUNTS)
def test_no_call_with_a_weight_is_left_in_another_form(family_program, family, calls):
    program = family_program(family)
    lifted = {n for n in program.graph.graph.nodes if program.parameters.get(n.name) in program.weights}
    for node in lifted:
        assert {user.target for user in node.users} <= set(CANONICAL)
    uses = [use.node for weight in program.weights.values() for use in weight.uses]
    assert sorted(uses) == sorted(node.name for node in calls(program))
    for node in program.graph.graph.nodes:
        assert op_name(node) not in ("aten.linear", "aten.addmm", "aten.mm", "aten.embedding")
        assert op_name(node) != "aten._assert_tensor_metadata"


@pytest.mark.parametrize("family", COUNTS)
def test_outputs_of_a_family_do_not_change(tiny_model, family, canonicalize, run):
    model = tiny_model(family)
    program = canonicalize(model)
    made = example_inputs(model)
    torch.manual_seed(1)
    inputs = {}
    for name, like in made.items():
        if name == "attention_mask":
            inputs[name] = torch.ones(like.shape, dtype=like.dtype)
        elif like.dtype is torch.int64:
            inputs[name] = torch.randint(3, 100, like.shape)
        else:
            inputs[name] = torch.randn(like.shape, dtype=like.dtype)
    names = [
        n.name
        for n in program.graph.graph.nodes
        if n.op == "placeholder" and n.name not in program.parameters
    ]
    model.config.use_cache = False
    with torch.no_grad():
        got = run(program, model, [inputs[name] for name in names])
        expected = pytree.tree_leaves(model(**inputs, **({} if family == "clip" else {"use_cache": False})))
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_are_one_decision_with_all_uses(family_program, family):
    name, aliases = TIED[family]
    program = family_program(family)
    weight = program.weights[name]
    assert weight.aliases == aliases
    assert weight.kinds == ("embedding", "linear")
    assert not set(aliases) & {*program.weights, *program.rest}
    assert [w.name for w in program.weights.values() if w.is_head] == [name]


def test_heads_are_marked(family_program):
    llama = family_program("llama")
    assert [weight.name for weight in llama.weights.values() if weight.is_head] == ["lm_head.weight"]


def test_reasons_of_the_rest(family_program):
    clip = family_program("clip").rest
    assert clip["logit_scale"].reason == "a scalar"
    assert clip["vision_model.pre_layrnorm.weight"].reason == "1-D: norm weight or bias"
    bart = family_program("bart").rest
    assert bart["final_logits_bias"].reason == "persistent buffer, not a parameter"


def test_experts_are_grouped_and_conv1d_is_transposed(family_program):
    mixtral = family_program("mixtral").weights
    experts = mixtral["model.layers.0.mlp.experts.down_proj"]
    assert (experts.kinds, experts.is_transposed) == (("grouped_linear",), False)
    assert (experts.in_features, experts.rows) == (40, 3 * 48)
    gpt2 = family_program("gpt2").weights
    attention = gpt2["transformer.h.0.attn.c_attn.weight"]
    assert (attention.shape, attention.is_transposed, attention.in_features) == ((36, 108), True, 36)
    assert not gpt2["transformer.wte.weight"].is_transposed


def test_half_precision_models_are_canonical_too(canonicalize):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    program = canonicalize(model)
    assert {weight.dtype for weight in program.weights.values()} == {torch.bfloat16}
    assert sum(weight.kinds == ("grouped_linear",) for weight in program.weights.values()) == 2
