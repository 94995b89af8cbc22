"""The whole pipeline on tiny models: compile, load, compare; every family; every kind of source."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

import kbitc
from kbitc.artifact import pack
from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import BudgetError, KbitcError, SourceError, UsageError
from kbitc.evaluation.opening import open_model
from kbitc.graph.stored import stored_bytes
from kbitc.planning.replanning import replan
from kbitc.tensor.kbit_tensor import KbitTensor


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small random LLaMA folder: sharded, tied, FFN 172 (not a multiple of 32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).half()
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def planned(llama, tmp_path_factory):
    """The same model at 4 bits per parameter, with its score table: pricing every option takes seconds."""
    out = tmp_path_factory.mktemp("artifacts") / "planned"
    compile_to(str(llama), out, Request(bits=4))
    return out


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 77, 2]])


def dense_logits(folder: Path, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the source model with every packed weight replaced by its dequantized values."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, tensor in state.items():
        if isinstance(tensor, KbitTensor):
            model.get_parameter(name).data.copy_(tensor.dequantize(torch.float32))
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("spec", ["nf4:64", "int3:50+zp", "bof5:32+dq", "learned4:64+out2%", "int8:64"])
def test_logits_equal_those_of_the_dequantized_model(llama, tmp_path, spec):
    compile_to(str(llama), tmp_path / "out", Request(spec=spec))
    loaded = kbitc.load(tmp_path / "out")
    assert sum(isinstance(p, KbitTensor) for p in loaded.parameters()) == 22
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        got = loaded(IDS).logits
    wanted = dense_logits(llama, Artifact.open(tmp_path / "out").state())
    # The native kernels round activations to 14 bits: 1e-4 of the logits here; a wrong weight is 1e-2.
    assert (got - wanted).norm() <= 5e-4 * wanted.norm()


def test_from_pretrained_loads_an_artifact_and_generates(planned):
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(planned).dtype == torch.float16
    model = AutoModelForCausalLM.from_pretrained(planned, dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, KbitTensor)
    made = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    again = kbitc.load(planned).generate(
        IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made.shape == (1, IDS.shape[1] + 5)
    assert torch.equal(made, again)
    dense = model.dequantize()
    assert not any(isinstance(p, KbitTensor) for p in dense.parameters())


@pytest.mark.parametrize(
    "budget", [2.5, 3.5, 4.5, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 4, 5, 6))]
)
def test_budget_is_exact(llama, planned, tmp_path, budget):
    plan = replan(planned, budget)
    result = compile_to(str(llama), tmp_path / "out", Request(plan=plan))
    artifact = Artifact.open(tmp_path / "out")
    stored = sum(tensor.nbytes for _, tensor in artifact.tensors())
    assert stored == result.payload_bytes == artifact.payload_bytes == stored_bytes(result.program)
    assert 8 * stored <= budget * result.program.parameter_count
    assert plan["bits_per_param"] == pytest.approx(8 * stored / result.program.parameter_count)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert stored < on_disk < stored + 40_000  # headers


def test_an_impossible_budget_writes_nothing(llama, tmp_path):
    with pytest.raises(BudgetError, match="Ask for --bits"):
        compile_to(str(llama), tmp_path / "out", Request(bits=2))
    assert list(tmp_path.iterdir()) == []


def test_the_same_input_gives_the_same_bytes(llama, planned, tmp_path):
    compile_to(str(llama), tmp_path / "again", Request(bits=4))
    assert digest(tmp_path / "again") == digest(planned)


def test_a_plan_can_be_edited_and_given_back(llama, planned, tmp_path):
    path = planned / "kbit_plan.json"
    compile_to(str(llama), tmp_path / "same", Request(plan=path))
    same = Artifact.open(tmp_path / "same")
    assert same.specs == Artifact.open(planned).specs
    plan = json.loads(path.read_text())
    plan["weights"]["model.layers.1.mlp.up_proj.weight"] = {"spec": "fp16", "reason": "mine"}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(plan))
    compile_to(str(llama), tmp_path / "b", Request(plan=edited))
    model = kbitc.load(tmp_path / "b")
    assert not isinstance(model.model.layers[1].mlp.up_proj.weight, KbitTensor)
    assert isinstance(model.model.layers[1].mlp.gate_proj.weight, KbitTensor)


def test_dry_run_writes_nothing(llama, tmp_path):
    result = compile_to(str(llama), tmp_path / "out", Request(spec="int3:64"), is_dry=True)
    assert result.out is None
    assert result.bits_per_param <= 4
    assert list(tmp_path.iterdir()) == []


def test_interrupt_then_resume_gives_the_same_bytes(llama, tmp_path, monkeypatch):
    compile_to(str(llama), tmp_path / "whole", Request(spec="nf4:64"))
    seen = []

    def stop(name, done, total):
        if name.startswith("packing "):
            seen.append(name)
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"), on_progress=stop)
    assert not (tmp_path / "out").exists()
    packed = []
    real = pack._convert
    monkeypatch.setattr(
        pack, "_convert", lambda p, piece, source: packed.append(piece.entry.name) or real(p, piece, source)
    )
    compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"), is_resumed=True)
    assert 0 < len(packed) < 25  # some were done already
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_kill_9_leaves_no_half_artifact_and_resume_finishes(llama, tmp_path):
    compile_to(str(llama), tmp_path / "whole", Request(spec="nf4:64"))
    # The process stops itself hard in the middle of packing: no handler, no clean-up runs. It is a fork.
    child = os.fork()
    if child == 0:
        seen = []

        def event(name, done, total):
            seen.append(name)
            if len(seen) == 14:
                os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"), on_progress=event)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists()
    compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"), is_resumed=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_a_run_without_resume_starts_over(llama, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("junk")
    compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"))
    assert not partial.exists()


def test_nan_weights_are_named_and_nothing_is_written(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    file = sorted(source.glob("*.safetensors"))[0]
    state = load_file(file)
    name = next(key for key, tensor in state.items() if tensor.dim() == 2)
    state[name][0, 3] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{name}: row 0 holds a NaN"):
        compile_to(str(source), tmp_path / "out", Request(spec="nf4:64"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "between 2 and 8"),
        ({"bits": 9}, "between 2 and 8"),
        ({"spec": "nf4:0"}, "block size 0"),
        ({"spec": "nope4"}, "no data type 'nope'"),
        ({"bits": 4, "spec": "nf4:64"}, "exactly one"),
        ({}, "exactly one"),
    ],
)
def test_bad_requests(llama, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        compile_to(str(llama), tmp_path / "out", Request(**options))
    assert list(tmp_path.iterdir()) == []


def test_strict_names_what_would_be_left(llama, tmp_path):
    plan = {"weights": {"*.v_proj.weight": "fp16", "*": "nf4:64"}}
    with pytest.raises(UsageError, match=r"--strict: 3 matmul weights.*v_proj"):
        compile_to(str(llama), tmp_path / "out", Request(plan=plan, is_strict=True))
    compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64", is_strict=True))


MORE = ("opt", "bloom", "gpt_neox", "roberta", "bart")
FAMILIES = [
    "gpt2", "llama", "mixtral", "t5", "clip", *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles_from_a_folder_and_in_memory(family, tiny_model, tmp_path):
    from kbitc.graph.example_inputs import example_inputs

    model = tiny_model(family)
    inputs = {
        name: torch.zeros(t.shape, dtype=t.dtype)
        if t.is_floating_point()
        else torch.ones(t.shape, dtype=t.dtype)
        for name, t in example_inputs(model).items()
        if isinstance(t, torch.Tensor)
    }
    model.save_pretrained(tmp_path / "source")
    compile_to(str(tmp_path / "source"), tmp_path / "out", Request(spec="int8:32"))
    loaded = kbitc.load(tmp_path / "out", dtype=torch.float32)
    in_memory = kbitc.compile(model, spec="int8:32")
    assert not any(isinstance(p, KbitTensor) for p in model.parameters())
    with torch.no_grad():
        wanted, got, same = (outputs(m(**inputs)) for m in (model, loaded, in_memory))
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert (got - same).norm() < 0.01 * wanted.norm()  # the folder's norms and biases are at 16 bits
    packed = {name for name, p in loaded.named_parameters() if isinstance(p, KbitTensor)}
    assert packed == {name for name, p in in_memory.named_parameters() if isinstance(p, KbitTensor)}


def outputs(result):
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    raise AssertionError(result.keys())


def test_in_memory_module_with_example_inputs(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 20), torch.nn.GELU(), torch.nn.Linear(20, 3))
    x = torch.randn(4, 50)
    packed = kbitc.compile(model, spec="int8:16", example_inputs=(x,), out=tmp_path / "out")
    assert isinstance(packed[0].weight, KbitTensor)
    assert (packed(x) - model(x)).norm() < 0.02 * model(x).norm()
    loaded = kbitc.load_into(
        torch.nn.Sequential(torch.nn.Linear(50, 20), torch.nn.GELU(), torch.nn.Linear(20, 3)),
        tmp_path / "out",
    )
    assert (loaded.float()(x) - packed(x)).norm() < 0.01 * model(x).norm()
    with pytest.raises(UsageError, match="example_inputs"):
        kbitc.compile(model, spec="int8:16")


def test_an_artifact_is_not_compiled_twice(llama, tmp_path):
    compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"))
    with pytest.raises(SourceError, match="compiled already"):
        compile_to(str(tmp_path / "out"), tmp_path / "again", Request(spec="nf4:64"))


def test_compiled_model_runs_under_torch_compile(planned):
    model = kbitc.load(planned)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(
            compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, atol=1e-4
        )


def test_compiled_model_exports(planned):
    model = kbitc.load(planned)
    exported = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("kbit.linear.default") == 22
    assert targets.count("kbit.embedding.default") == 1


def test_sources_that_are_none(llama, tmp_path):
    for source in (tmp_path / "missing", tmp_path):
        with pytest.raises(KbitcError):
            compile_to(str(source), tmp_path / "out", Request(bits=4))


def test_a_sharded_artifact_loads(llama, tmp_path, monkeypatch):
    compile_to(str(llama), tmp_path / "whole", Request(spec="nf4:64"))
    monkeypatch.setattr("kbitc.artifact.writer.SHARD_BYTES", 30_000)
    compile_to(str(llama), tmp_path / "out", Request(spec="nf4:64"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    with torch.no_grad():
        whole, parts = (kbitc.load(tmp_path / name)(IDS).logits for name in ("whole", "out"))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_the_dense_model_of_a_source_opens_for_comparison(family, tiny_model, tmp_path):

    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    loaded = open_model(str(tmp_path / "source"))
    assert loaded.bits_per_param == pytest.approx(32, rel=0.02)
    with torch.no_grad():
        assert torch.allclose(loaded.model(IDS % 20).logits, model(IDS % 20).logits, atol=1e-5)
