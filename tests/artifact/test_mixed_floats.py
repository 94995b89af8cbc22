"""Tensors at 32 bits in an artifact: which, counted, loaded as they are, and running among 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.graph.stored import stored_bytes

IDS = torch.tensor([[1, 5, 9, 100, 7]])
X = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
NARROW = (torch.float16, torch.bfloat16)


def tiny_scales(model, factor):
    """Scales of norms that float16 cannot hold, and biases of their size, so that outputs stay those of the scale."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.mul_(factor)
    return model


def unpacked(folder):
    return {name: t for name, t in Artifact.open(folder).state().items() if type(t) is torch.Tensor}


def difference(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_tiny_scales_survive_and_every_dtype_runs(family, tiny_model, tmp_path):
    model = tiny_scales(tiny_model(family), 1e-9)
    model.save_pretrained(tmp_path / "source")
    result = compile_to(tmp_path / "source", tmp_path / "out", Request(spec="int8:64"))
    state = unpacked(tmp_path / "out")
    scales = {name: t for name, t in state.items() if ("norm" in name or "ln_" in name) and "weight" in name}
    assert scales
    for name, scale in scales.items():
        assert scale.dtype == torch.float32
        assert torch.equal(scale, model.state_dict()[name])
    on_disk = sum(tensor.nbytes for _, tensor in Artifact.open(tmp_path / "out").tensors())
    assert on_disk == result.payload_bytes == stored_bytes(result.program)
    with torch.no_grad():
        wanted = model(IDS).logits
        for dtype in (None, *NARROW):
            loaded = kbitc.load(tmp_path / "out", dtype=dtype)
            for name, scale in scales.items():
                assert loaded.state_dict()[name].dtype == torch.float32
                assert torch.equal(loaded.state_dict()[name], scale)
            got = loaded(IDS).logits
            assert difference(got, wanted) < 0.05
            assert torch.equal(copy.deepcopy(loaded)(IDS).logits, got)
            loaded.generate(IDS, max_new_tokens=2, do_sample=False)


def test_through_transformers_too(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e-9
    kbitc.compile(model, spec="nf4:64", out=tmp_path / "out")
    for dtype in NARROW:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=dtype)
        assert loaded.model.norm.weight.dtype == torch.float32
        assert loaded.model.layers[0].input_layernorm.weight.dtype == dtype
        assert loaded(IDS).logits.dtype == dtype
        compiled = torch.compile(loaded, backend="eager", fullgraph=True)
        assert torch.equal(compiled(IDS).logits, loaded(IDS).logits)


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 40, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8}
    dims = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "vocab_size": 101}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes, **heads, **dims, **experts, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_routes_experts_is_not_rounded(dtype, tmp_path):
    model = deepseek().to(dtype)
    bias = torch.tensor([12.0019, 12.0, 12.001, 11.99])
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = bias  # float32 in checkpoints, whatever the rest is
    model.save_pretrained(tmp_path / "source")
    kbitc.compile(tmp_path / "source", spec="int8:64", out=tmp_path / "out")
    for wanted in (None, *NARROW):
        loaded = kbitc.load(tmp_path / "out", dtype=wanted)
        assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)
        loaded(IDS)


def test_what_the_model_keeps_in_float32(tiny_model, tmp_path):
    model = tiny_model("t5")
    plan = {"weights": {"encoder.*.wo.weight": "int8:64", "*": "fp16"}}
    kbitc.compile(model, plan=plan, out=tmp_path / "out")
    loaded = kbitc.load(tmp_path / "out", dtype=torch.float16)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters() if name.endswith("wo.weight")}
    assert set(dtypes.values()) == {torch.float32}  # packed or not
    loaded(input_ids=IDS, decoder_input_ids=IDS)


def test_buffers_exponents_and_what_a_16_bit_source_keeps_wide(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8).half()
            self.slope = nn.Parameter(torch.linspace(0.1, 2.7, 8))
            self.gain = nn.Parameter(torch.linspace(0.1, 2.7, 8))
            self.register_buffer("mean", torch.linspace(0.1, 2.7, 8))
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, x):
            return self.linear((x * self.slope.exp() * self.gain - self.mean).half())

    model = Model().requires_grad_(False)
    kbitc.compile(model, spec="nf4:64", out=tmp_path / "out", example_inputs=(torch.ones(2, 8),))
    state = unpacked(tmp_path / "out")
    wanted = {"slope": torch.float32, "gain": torch.float16, "mean": torch.float32, "steps": torch.int64}
    assert {name: state[name].dtype for name in wanted} == wanted
    reasons = Artifact.open(tmp_path / "out").plan.left_alone
    assert "kept at 32 bits" in reasons["slope"].reason
    assert "kept at 32 bits" not in reasons["gain"].reason


def test_a_pass_that_changes_a_tensor_changes_what_it_is_stored_in(tiny_model, tmp_path):
    model = tiny_scales(tiny_model("llama"), 1e-9)
    passes = ["canonicalize", "fold_norms", "apply_plan"]
    result = compile_to(model, tmp_path / "out", Request(spec="int8:64", passes=passes))
    state = unpacked(tmp_path / "out")
    assert {t.dtype for name, t in state.items() if "layernorm" in name} == {torch.float16}  # ones now
    assert stored_bytes(result.program) == sum(t.nbytes for _, t in Artifact.open(tmp_path / "out").tensors())


def test_saving_what_was_loaded_keeps_it(tiny_model, tmp_path):
    model = tiny_scales(tiny_model("llama"), 1e-9)
    kbitc.compile(model, spec="int8:64", out=tmp_path / "out")
    kbitc.save(kbitc.load(tmp_path / "out"), tmp_path / "saved")
    assert Artifact.open(tmp_path / "saved").plan.checksums == Artifact.open(tmp_path / "out").plan.checksums


class Plain(nn.Module):
    """One of each layer that refuses two dtypes."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(6, 64))
        self.conv = nn.Conv1d(8, 64, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(64)
        self.norm = nn.LayerNorm(64)
        self.embed = nn.Embedding(50, 64)
        self.linear = nn.Linear(64, 33)

    def forward(self, ids, x):
        h = self.batch_norm(self.conv(x)).mT + self.position
        return self.linear(self.norm(h + self.embed(ids)))


def plain():
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad():
        model.position.normal_()
        model.position[0, 0] = model.norm.weight[3] = 1e-9
        model.batch_norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("source", [torch.float32, *NARROW])
def test_load_into_keeps_the_module_s_dtypes(source, tmp_path):
    model, ids = plain(), torch.arange(12).view(2, 6)
    wanted = model(ids, X)
    compiled = copy.deepcopy(model).to(source)
    kbitc.compile(compiled, spec="int8:64", out=tmp_path / "out", example_inputs=(ids, X.to(source)))
    for dtype in (torch.float32, *NARROW):
        module = kbitc.load_into(Plain().to(dtype).eval(), tmp_path / "out")
        got = module(ids, X.to(dtype))
        assert got.dtype == dtype
        assert difference(got, wanted) < 0.02
        dtypes = {name: t.dtype for name, t in module.state_dict().items() if t.is_floating_point()}
        if dtype == torch.float32 or source != torch.float32:
            assert set(dtypes.values()) == {dtype}
        else:
            assert (
                dtypes["norm.weight"]
                == dtypes["position"]
                == dtypes["batch_norm.running_var"]
                == torch.float32
            )
            assert dtypes["conv.weight"] == dtypes["embed.weight"] == dtype
    with torch.device("meta"):
        module = Plain().eval()
    assert difference(kbitc.load_into(module, tmp_path / "out")(ids, X), wanted) < 0.02
