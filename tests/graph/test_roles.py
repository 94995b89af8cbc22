"""Which weights stand at one place of every layer, by families' names."""

from __future__ import annotations

import pytest

from kbitc.graph.roles import by_role, repeated, role_of


def test_the_first_number_that_is_a_whole_part_counts_layers():
    names = [
        "embed.weight",
        "enc.0.q.weight",
        "enc.1.q.weight",
        "enc.1.block.7.k.weight",
        "fc.2",
        "12.weight",
    ]
    layers_of = {(role.stack, role.name): layers for role, layers in by_role(names).items()}
    assert layers_of == {
        ("", "embed"): {0: "embed.weight"},
        ("enc", "q"): {0: "enc.0.q.weight", 1: "enc.1.q.weight"},
        ("enc", "block.7.k"): {1: "enc.1.block.7.k.weight"},
        ("", "fc.2"): {0: "fc.2"},
        ("", "12"): {0: "12.weight"},
    }
    assert not role_of("12.weight")[0].has_layers


@pytest.mark.parametrize(
    ("name", "pattern", "layer"),
    [
        ("h.0.attn.c_attn.weight", "h.*.attn.c_attn.weight", 0),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.*.mlp.c_fc.weight", 11),
        (
            "encoder.block.3.layer.1.DenseReluDense.wi_0.weight",
            "encoder.block.*.layer.1.DenseReluDense.wi_0.weight",
            3,
        ),
        (
            "model.layers.3.block_sparse_moe.experts.5.w1.weight",
            "model.layers.*.block_sparse_moe.experts.5.w1.weight",
            3,
        ),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.gate_up_proj", 3),
        ("lm_head.weight", "lm_head.weight", 0),
        ("conv1.weight", "conv1.weight", 0),
    ],
)
def test_patterns_of_families(name, pattern, layer):
    role, number = role_of(name)
    assert (role.pattern, number) == (pattern, layer)


def test_one_weight_of_each_layer_has_a_role():
    names = {
        f"layers.{layer}.experts.{expert}.{part}.weight": (8, 8)
        for layer in range(3)
        for expert in range(2)
        for part in ("w1", "w3")
    }
    assert repeated(names) == [
        tuple(f"layers.{layer}.experts.{expert}.{part}.weight" for layer in range(3))
        for expert in range(2)
        for part in ("w1", "w3")
    ]


def test_stacks_and_shapes_stay_apart():
    shapes = {
        "encoder.layers.0.q": (4, 4),
        "encoder.layers.1.q": (4, 4),
        "encoder.layers.2.q": (4, 8),
        "decoder.layers.0.q": (4, 4),
        "decoder.layers.1.q": (4, 4),
        "head.q": (4, 4),
    }
    assert repeated(shapes) == [
        ("encoder.layers.0.q", "encoder.layers.1.q"),
        ("decoder.layers.0.q", "decoder.layers.1.q"),
    ]
    assert repeated({}) == []


def test_where_stages_differ_in_shape_their_blocks_are_the_layers():
    shapes = {
        f"swin.layers.{stage}.blocks.{block}.{part}": (8 << stage, 8 << stage)
        for stage in range(3)
        for block in range(2)
        for part in ("query", "key")
    } | {f"swin.layers.{stage}.downsample": (16 << stage, 32 << stage) for stage in range(2)}
    assert repeated(shapes) == [
        tuple(f"swin.layers.{stage}.blocks.{block}.{part}" for block in range(2))
        for stage in range(3)
        for part in ("query", "key")
    ]
