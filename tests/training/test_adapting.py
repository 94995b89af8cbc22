"""Adapters over packed weights: what PEFT, transformers' Trainer and TRL do with a model that kbitc packed."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

import kbitc
from kbitc.errors import UsageError
from kbitc.tensor.kbit_tensor import KbitTensor

IDS = (torch.arange(64).view(2, 32) * 7) % 101


def mixtral():
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 101}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


@pytest.fixture(scope="module")
def packed(tiny_model):
    made = {}

    def make(kind):
        if kind not in made:
            source = mixtral() if kind == "mixtral" else tiny_model(kind)
            made[kind] = kbitc.compile(source, spec="nf4:32")
        return copy.deepcopy(made[kind])

    return make


@pytest.fixture(scope="module")
def artifact(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapting") / "llama"
    kbitc.compile(tiny_model("llama"), spec="int4:32", out=folder)
    return folder


def gradients(model, config, *, checkpointing=False, dtype=None):
    """Of every adapter, and of the embeddings' output."""
    torch.manual_seed(1)
    model = get_peft_model(model, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda *given: given[-1].retain_grad() or seen.append(given[-1])
    )
    torch.manual_seed(2)  # of dropout
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    own = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {**own, "input": seen[0].grad}


def apart(got, wanted):
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


LORA = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "lora": ("llama", LoraConfig(**LORA, target_modules="all-linear")),
    "head": ("llama", LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head"])),
    "dora": ("llama", LoraConfig(**LORA, target_modules="all-linear", use_dora=True)),
    "vera": ("llama", VeraConfig(r=4, target_modules=["q_proj", "o_proj"])),
    "conv1d": ("gpt2", LoraConfig(**LORA, target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
    "conv1d-vera": ("gpt2", VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    "experts": ("mixtral", LoraConfig(**LORA, target_modules=["q_proj"], target_parameters=EXPERTS)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_gradients_are_those_over_the_dequantized_base(packed, case):
    kind, config = CONFIGS[case]
    model = packed(kind)
    wanted = gradients(kbitc.dequantized(copy.deepcopy(model)), copy.deepcopy(config))
    got = gradients(model, copy.deepcopy(config))
    assert set(got) == set(wanted)
    assert apart(got["input"], wanted["input"]) < 1e-3  # the forward product rounds its input to integers
    assert all(apart(got[name], wanted[name]) < 1e-3 for name in got)


@pytest.mark.parametrize("spec", ["nf4:64", "int3:32+zp", "fp4e2:64+dq", "int8:64+out1%"])
def test_the_input_gradient_of_a_layer(spec):
    """To 1e-4 of the dequantized layer's."""
    generator = torch.Generator().manual_seed(0)
    weight = kbitc.quantize(torch.randn(75, 130, generator=generator), spec)
    x = torch.randn(33, 130, generator=generator, requires_grad=True)
    given = torch.randn(33, 75, generator=generator)
    (got,) = torch.autograd.grad(torch.nn.functional.linear(x, weight), x, given)
    assert apart(got, given @ weight.dequantize()) < 1e-4


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"dtype": torch.bfloat16}])
def test_checkpointing_and_autocast(packed, options):
    wanted = gradients(packed("llama"), copy.deepcopy(CONFIGS["lora"][1]))
    got = gradients(packed("llama"), copy.deepcopy(CONFIGS["lora"][1]), **options)
    assert all(apart(got[name], wanted[name]) < (0.1 if "dtype" in options else 1e-5) for name in got)


class Largest(TorchDispatchMode):
    """Notes every dense float that an operation makes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if (
                isinstance(value, torch.Tensor)
                and not isinstance(value, KbitTensor)
                and value.is_floating_point()
            ):
                self.shapes.add(tuple(value.shape))
        return out

    def __enter__(self):
        self.shapes = set()
        return super().__enter__()


def test_no_weight_is_made_dense(packed):
    """Forward, backward and the gradients of the adapters make no tensor of a weight's shape."""
    model = packed("llama")
    shapes = {tuple(weight.shape) for weight in model.parameters() if isinstance(weight, KbitTensor)}
    model = get_peft_model(kbitc.prepare_for_training(model), copy.deepcopy(CONFIGS["lora"][1])).train()
    with Largest() as seen:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert seen.shapes
    either = shapes | {shape[::-1] for shape in shapes}
    assert not either & seen.shapes


def test_prepared_for_training(artifact):
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    planes = {
        name: weight.packed.planes
        for name, weight in model.named_parameters()
        if isinstance(weight, KbitTensor)
    }
    assert planes
    assert kbitc.prepare_for_training(model) is model
    assert model.hf_quantizer.is_trainable
    assert model.is_gradient_checkpointing
    for name, weight in model.named_parameters():
        assert not weight.requires_grad
        assert weight.dtype == torch.float32
        if isinstance(weight, KbitTensor):
            assert weight.packed.planes is planes[name]
    assert model(input_ids=IDS).logits.requires_grad  # through the embeddings, for checkpointing
    with pytest.raises(UsageError, match="nothing in this model is packed"):
        kbitc.prepare_for_training(nn.Linear(3, 4))


def test_dora_of_what_peft_makes_a_parameter_of(packed):
    config = LoraConfig(r=4, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    with pytest.raises(UsageError, match="take LoRA or VeRA there"):
        get_peft_model(packed("gpt2"), config)


def dataset():
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS] * 8


def test_trainer_as_its_documentation_has_it(artifact, tmp_path):
    """Their example with the model swapped: adapters, Trainer, save, load."""
    model = AutoModelForCausalLM.from_pretrained(artifact)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(artifact), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_trainer_wants_adapters(artifact, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(artifact)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    kbitc.compile("demo", spec="nf4:64", out=tmp_path / "demo")
    trainer = SFTTrainer(
        model=str(tmp_path / "demo"),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=32, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": ["The house of the king is by the river."] * 8}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    assert any(isinstance(weight, KbitTensor) for weight in trainer.model.parameters())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
