"""Packed weights among other libraries: saved, pickled, copied, offloaded, and found without an import of kbitc."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import accelerate
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.errors import UsageError
from kbitc.quantizers import quantize
from kbitc.tensor.kbit_tensor import KbitTensor

IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(tiny_model):
    return kbitc.compile(tiny_model("llama"), spec="nf4:32")


@pytest.fixture(scope="module")
def artifact(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "llama"
    compiled.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_save_pretrained_writes_an_artifact(artifact, compiled, tmp_path):
    Artifact.open(artifact).verify()
    loaded = AutoModelForCausalLM.from_pretrained(artifact)
    assert torch.allclose(logits(loaded), logits(compiled), atol=2e-3)  # norms were stored at 16 bits
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    loaded.generation_config.max_new_tokens = 17
    loaded.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    again = kbitc.load(tmp_path)
    assert torch.equal(logits(again), logits(loaded))
    assert again.generation_config.max_new_tokens == 17
    with pytest.raises(UsageError, match="upload_folder"):
        loaded.save_pretrained(tmp_path, push_to_hub=True)


def test_weights_that_are_loaded_share_their_codebook(artifact):
    """Defect: each had a copy, and a decode step of a loaded model was another than that of a compiled one."""
    weights = [w for w in kbitc.load(artifact).parameters() if isinstance(w, KbitTensor)]
    assert len(weights) == 16
    assert len({weight.packed.codebook.data_ptr() for weight in weights}) == 1


@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_copy_is_a_model_of_its_own(artifact, tmp_path, again):
    model = kbitc.load(artifact)
    other = again(model)
    assert torch.equal(logits(other), logits(model))
    with torch.no_grad():
        other.model.norm.weight.zero_()
    other.save_pretrained(tmp_path)
    assert logits(kbitc.load(tmp_path)).abs().max() == 0
    assert logits(model).abs().max() > 0


def test_views_of_a_packed_weight_pickle(tmp_path):
    weight = quantize(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), "int4:8")
    views = {
        "rows": weight[3:9],
        "turned": weight.T,
        "seen": weight.view(4, 6, 40),
        "scaled": weight * torch.arange(24.0)[:, None],
    }
    torch.save(views, tmp_path / "views.pt")
    for other in (torch.load(tmp_path / "views.pt", weights_only=True), pickle.loads(pickle.dumps(views))):
        for name, view in views.items():
            assert isinstance(other[name], KbitTensor)
            assert torch.equal(other[name].dequantize(), view.dequantize())


def test_state_dict_by_torch_save(compiled, tmp_path):
    torch.save(compiled.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert any(isinstance(value, KbitTensor) for value in state.values())
    other = copy.deepcopy(compiled)
    other.load_state_dict(state, assign=True)
    assert torch.equal(logits(other), logits(compiled))


def test_a_state_dict_is_no_file_of_safetensors(compiled, tmp_path):
    for write in (
        lambda: safetensors.torch.save_file(compiled.state_dict(), tmp_path / "x.safetensors"),
        lambda: safetensors.torch.save_model(compiled, str(tmp_path / "x.safetensors")),
    ):
        with pytest.raises(UsageError, match=r"kbitc\.save\(model, folder\)"):
            write()


def test_offload(artifact, tmp_path):
    expected = logits(kbitc.load(artifact))
    for place in ({"": "cpu"}, "auto"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(artifact, device_map=place)), expected)
    hooked = accelerate.cpu_offload(kbitc.load(artifact), execution_device=torch.device("cpu"))
    assert torch.equal(logits(hooked), expected)
    with pytest.raises(UsageError, match="cannot be left on a disk"):
        accelerate.disk_offload(kbitc.load(artifact), str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(UsageError, match="cannot be left on a disk"):
        AutoModelForCausalLM.from_pretrained(
            artifact, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=str(tmp_path)
        )


def test_the_footprint_is_of_what_is_stored(compiled):
    packed = [weight for weight in compiled.parameters() if isinstance(weight, KbitTensor)]
    rest = [weight for weight in compiled.parameters() if not isinstance(weight, KbitTensor)]
    buffers = list(compiled.buffers())
    stored = sum(weight.packed.nbytes() for weight in packed) + sum(t.nbytes for t in (*rest, *buffers))
    assert compiled.get_memory_footprint() == pytest.approx(stored)
    assert sum(weight.nbytes for weight in packed) == sum(weight.packed.nbytes() for weight in packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(
            model.lm_head.weight, "data", model.lm_head.weight.data + 1
        ),  # PEFT: safe_merge
        lambda model: model.lm_head.weight.data.add_(1),  # PEFT: merge_and_unload
        lambda model: model.resize_token_embeddings(110),
        lambda model: model.resize_token_embeddings(110, mean_resizing=False),
        lambda model: model.lm_head.weight.index_copy(0, torch.tensor([1]), torch.ones(1, 48)),
    ],
)
def test_changes_say_what_to_do(compiled, change):
    with pytest.raises(NotImplementedError, match=r"kbitc\.dequantized\(model\)"):
        change(copy.deepcopy(compiled))


@pytest.mark.parametrize(
    "train",
    [
        lambda model: copy.deepcopy(model.lm_head).requires_grad_(True),  # PEFT: modules_to_save
        lambda model: nn.Parameter(model.lm_head.weight.detach()),
        lambda model: setattr(model.lm_head.weight, "requires_grad", True),
    ],
)
def test_what_never_gets_a_gradient_cannot_be_marked_trainable(compiled, train):
    with pytest.raises(UsageError, match="Train adapters over it"):
        train(compiled)
    assert not compiled.lm_head.weight.requires_grad
    compiled.requires_grad_(False)


@pytest.fixture
def alone():
    """One process of torch.distributed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_trains_adapters(compiled, alone):
    """It sends the first process' values to all, which have them; another model's are refused."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    model = get_peft_model(copy.deepcopy(compiled), config)
    DistributedDataParallel(model)(input_ids=IDS, labels=IDS).loss.backward()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(adapters) == 8
    assert all(weight.grad.abs().sum() > 0 for name, weight in adapters.items() if "lora_B" in name)
    head = model.lm_head.weight
    values = head.dequantize()
    head.detach().copy_(values)
    with pytest.raises(NotImplementedError, match="frozen"):
        head.detach().copy_(values + 1)


def test_what_cuts_weights_says_what_to_do(compiled, alone):
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(NotImplementedError, match="take models whose weights are dense"):
        fully_shard(copy.deepcopy(compiled), mesh=mesh)
    with pytest.raises(NotImplementedError, match="take models whose weights are dense"):
        parallelize_module(copy.deepcopy(compiled), mesh, {"lm_head": ColwiseParallel()})
    dense = kbitc.dequantized(copy.deepcopy(compiled))
    expected = logits(dense)
    assert torch.equal(logits(fully_shard(dense, mesh=mesh)), expected)


def test_dequantized(compiled):
    for dense in (copy.deepcopy(compiled).dequantize(), kbitc.dequantized(copy.deepcopy(compiled))):
        assert not any(isinstance(weight, KbitTensor) for weight in dense.parameters())
        assert torch.allclose(logits(dense), logits(compiled), atol=1e-3)
        dense.lm_head.requires_grad_(True)
    pair = nn.ModuleList([nn.Linear(40, 24), nn.Linear(40, 24)])
    pair[0].weight = pair[1].weight = nn.Parameter(
        quantize(torch.randn(24, 40), "int4:8"), requires_grad=False
    )
    kbitc.dequantized(pair, torch.bfloat16)
    assert pair[0].weight is pair[1].weight
    assert pair[0].weight.dtype == torch.bfloat16


def test_compiled_while_it_is_loaded(source, compiled, tmp_path):
    config = kbitc.KbitConfig(spec="nf4:32")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    wanted = {name: weight for name, weight in compiled.named_parameters() if isinstance(weight, KbitTensor)}
    assert {n for n, w in model.named_parameters() if isinstance(w, KbitTensor)} == set(wanted)
    for name, weight in wanted.items():
        assert torch.equal(model.get_parameter(name).packed.planes, weight.packed.planes)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    budget = kbitc.KbitConfig(bits=6, calibrate="none")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=budget)
    assert model.config.quantization_config.bits_per_param <= 6
    with pytest.raises(UsageError, match="compile it first"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": "disk"})


def test_a_base_model_of_an_artifact(artifact):
    """As sentence-transformers loads it."""
    whole, base = kbitc.load(artifact), AutoModel.from_pretrained(artifact)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    assert isinstance(base.layers[0].mlp.up_proj.weight, KbitTensor)


def test_a_base_model_with_the_kernel_of_a_convolution(tmp_path):
    """Defect: which matrix a kernel is a view of stood under the name in the model with a head alone."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path / "source")
    whole = kbitc.compile(tmp_path / "source", spec="nf4:32", out=tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(base(images).last_hidden_state, whole.vit(images).last_hidden_state)
    kernel = base.embeddings.patch_embeddings.projection.weight
    assert isinstance(kernel, KbitTensor)
    stored = base.hf_quantizer.param_element_size(
        base, "embeddings.patch_embeddings.projection.weight", kernel
    )
    assert stored * kernel.numel() == kernel.nbytes


@pytest.mark.parametrize(
    "first",
    ["import transformers.quantizers.auto", "import transformers.quantizers.auto, kbitc", "import kbitc"],
)
def test_whatever_is_imported_first(first, artifact, installed, tmp_path):
    """Defect: transformers' quantizers import torch, which then found them half loaded."""
    code = f"""{first}
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "kbit" in AUTO_QUANTIZER_MAPPING
model = AutoModelForCausalLM.from_pretrained({str(artifact)!r})
print(type(model.lm_head.weight).__name__)"""
    env = {**os.environ, "PYTHONPATH": installed}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "KbitTensor", done.stderr


def test_transformers_finds_artifacts_without_an_import(artifact, tmp_path, installed):
    """By the entry point."""
    code = f"""
        import sys, torch
        assert "kbitc.transformers_hook" in sys.modules
        heavy = {{"transformers", "kbitc.tensor", "kbitc.kernels", "kbitc.artifact", "scipy", "networkx"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(artifact)!r})
        waiting = [f.target for f in sys.meta_path if f.__class__.__name__ == "_AfterImport"]
        print(type(model.lm_head.weight).__name__, *waiting)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": installed},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == ["KbitTensor", "lm_eval.models"], done.stderr
