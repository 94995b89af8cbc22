"""A folder reads, tensor for tensor, what `from_pretrained` loads, or says in one paragraph why not."""

from __future__ import annotations

import gc
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.hf_folder import skeleton_of
from kbitc.checkpoint.room import Room
from kbitc.errors import SourceError

MODELS = Path.home() / ".cache" / "kbitc-models"
DATA = Path(__file__).parents[3] / "shared" / "data"
FAMILIES = ["gpt2", "opt", "bloom", "gpt_neox", "llama", "mixtral", "roberta", "bart", "t5", "clip"]


def check_equal(folder, dtype="auto"):
    """Bit-exact against transformers, tied tensors once, in the model's order. Gives the checkpoint."""
    checkpoint = open_checkpoint(folder)
    skeleton, infos = checkpoint.skeleton(), checkpoint.tensors()
    model = type(skeleton).from_pretrained(folder, dtype=dtype)
    state = model.state_dict(keep_vars=True)
    firsts = list(
        {id(t): n for n, t in reversed(list(model.named_parameters(remove_duplicate=False)))}.values()
    )
    assert set(firsts) <= set(infos)
    assert checkpoint.tensors() is infos  # made once: calibration asks at each read
    assert len({id(t) for t in state.values()}) == len(infos)
    assert list(skeleton.state_dict()) == list(state)
    for name, info in infos.items():
        tensor = checkpoint.read(name)
        assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (info.shape, info.dtype, info.nbytes)
        assert torch.equal(tensor, state[name]), name
    assert all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers()))
    assert not skeleton.training
    return checkpoint


def edit_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    """Rewrite model.safetensors with ``change(state)``."""
    path = folder / "model.safetensors"
    state = change(dict(load_file(path)))
    save_file({name: t.clone() for name, t in state.items()}, path, metadata={"format": "pt"})


@pytest.fixture
def saved(tiny_model, tmp_path):
    def save(family, **options):
        folder = tmp_path / family
        model = tiny_model(family)
        dtype = options.pop("dtype", None)
        (model if dtype is None else model.to(dtype)).save_pretrained(folder, **options)
        return folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_loads(family, saved):
    check_equal(saved(family))


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_shards(family, saved):
    folder = saved(family, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check_equal(folder)


def test_dtype_is_the_source_s_even_if_the_config_says_otherwise(saved):
    folder = saved("llama", dtype=torch.bfloat16)
    edit_config(folder, dtype="float32")
    checkpoint = open_checkpoint(folder)
    assert {info.dtype for info in checkpoint.tensors().values()} == {torch.bfloat16}
    assert {p.dtype for p in checkpoint.skeleton().parameters()} == {torch.bfloat16}


def test_gpt2_as_on_the_hub_without_prefix_and_with_masks(saved):
    """openai-community/gpt2 was saved from the base model, masks included."""
    folder = saved("gpt2")

    def as_on_the_hub(state):
        bare = {name.removeprefix("transformer."): t for name, t in state.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 33, 33) for i in range(2)}
        return bare | masks

    edit_weights(folder, as_on_the_hub)
    checkpoint = check_equal(folder)
    assert checkpoint.ignored() == ["h.0.attn.bias", "h.1.attn.bias"]


def test_base_model_from_a_checkpoint_with_a_head(saved):
    folder = saved("llama")
    edit_config(folder, architectures=["LlamaModel"])
    assert check_equal(folder).ignored() == ["lm_head.weight"]


def hub_mixtral(folder, experts):
    config = transformers.MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=experts,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_mixtral_as_on_the_hub(tmp_path):
    """One tensor an expert on disk; eleven experts, so that their order is not the alphabet's."""
    model = hub_mixtral(tmp_path, 11)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in stored
    checkpoint = check_equal(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert checkpoint.tensors()[name].shape == (11, 40, 16)
    assert torch.equal(checkpoint.read(name), model.state_dict()[name])


def test_a_lost_expert_is_an_error(tmp_path):
    hub_mixtral(tmp_path, 3)
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit_weights(tmp_path, lambda state: {n: t for n, t in state.items() if n != lost})
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        open_checkpoint(tmp_path)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kept", [[EMBED], [HEAD], [EMBED, HEAD]])
def test_tied_from_any_of_its_names(kept, saved):
    folder = saved("llama")
    edit_config(folder, tie_word_embeddings=True)

    def tie(state):
        rest = {name: t for name, t in state.items() if name not in (EMBED, HEAD)}
        return rest | dict.fromkeys(kept, state[EMBED])

    edit_weights(folder, tie)
    checkpoint = check_equal(folder)
    assert EMBED in checkpoint.tensors()
    assert HEAD not in checkpoint.tensors()
    assert checkpoint.skeleton().lm_head.weight is checkpoint.skeleton().model.embed_tokens.weight


def test_tied_in_the_config_but_different_in_the_file(saved, tmp_path):
    """Transformers keeps such weights apart; so do we, and the artifact's config says so."""
    folder = saved("llama")
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = check_equal(folder)
    assert {EMBED, HEAD} <= set(checkpoint.tensors())
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save_companions(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_missing_parameter_is_named(saved):
    folder = saved("llama")
    edit_weights(folder, lambda state: {n: t for n, t in state.items() if n != HEAD})
    with pytest.raises(SourceError, match=r"'lm_head.weight'.*tie_word_embeddings"):
        open_checkpoint(folder)


def test_missing_buffer_has_the_model_s_own_value(saved):
    folder = saved("bart")
    edit_weights(folder, lambda state: {n: t for n, t in state.items() if n != "final_logits_bias"})
    checkpoint = check_equal(folder)
    assert not checkpoint.read("final_logits_bias").any()


@pytest.mark.parametrize("family", ["llama", "roberta", "t5", "gpt2", "clip"])
def test_class_is_found_without_architectures(family, saved, tmp_path):
    folder = saved(family)
    wanted = json.loads((folder / "config.json").read_text())["architectures"]
    edit_config(folder, architectures=None)
    checkpoint = open_checkpoint(folder)
    assert [type(checkpoint.skeleton()).__name__] == wanted
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save_companions(out)
    assert json.loads((out / "config.json").read_text())["architectures"] == wanted


def test_reading_costs_one_tensor_of_memory(tmp_path):
    """512 MB in tensors of 64 MB."""
    size = 64 << 20
    config = transformers.LlamaConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=32768, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    state = {n: torch.empty(p.shape, dtype=torch.float16).fill_(0.5) for n, p in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    del state
    gc.collect()
    checkpoint = open_checkpoint(tmp_path)
    before, most = resident(), 0
    for name in checkpoint.tensors():
        tensor = checkpoint.read(name)
        assert tensor.view(-1)[-1] == 0.5
        most = max(most, resident())
        del tensor
    assert most - before < 1.5 * size
    assert resident() - before < size


def resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


def test_threads_may_read(saved):
    checkpoint = open_checkpoint(saved("mixtral"))
    names = list(checkpoint.tensors()) * 4
    alone = [checkpoint.read(name) for name in names]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, alone, pool.map(checkpoint.read, names)))


def test_read_gives_memory_of_its_own(saved):
    checkpoint = open_checkpoint(saved("llama"))
    before = checkpoint.read(EMBED)
    checkpoint.read(EMBED).zero_()
    assert torch.equal(checkpoint.read(EMBED), before)


def test_companions(saved, tmp_path):
    folder, out = saved("llama"), tmp_path / "out"
    for name in (
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "tok.py",
        "README.md",
    ):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    (folder / "training_args.bin").write_text("x")
    out.mkdir()
    open_checkpoint(folder).save_companions(out)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == [
        "additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "merges.txt", "spiece.model", "tok.py", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_skeleton_of_an_artifact_ignores_its_quantization(saved):
    folder = saved("llama")
    edit_config(folder, quantization_config={"quant_method": "kbit"})
    assert type(skeleton_of(folder, Room(21, 10**5))).__name__ == "LlamaForCausalLM"


def cut(folder, by):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:by])


def put(folder, name, text="{}"):
    (folder / name).write_text(text)


def only(folder, *names):
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def retype(folder, dtype):
    edit_weights(folder, lambda state: {n: t.to(dtype) if "q_proj" in n else t for n, t in state.items()})


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda f: cut(f, -1), "is truncated, .* bytes"),
        (lambda f: cut(f, 100), "is not a safetensors file, or cut off"),
        (lambda f: cut(f, 3), "is not a safetensors file, or cut off"),
        (lambda f: cut(f, 0), "is not a safetensors file, or cut off"),
        (
            lambda f: put(f, "model.safetensors", "version https://git-lfs.github.com/spec/v1"),
            "is not a safetensors file, or cut off",
        ),
        (lambda f: put(f, "config.json", "{"), "is not valid JSON"),
        (lambda f: edit_config(f, hidden_size=64), "do not belong together"),
        (lambda f: edit_config(f, model_type="wololo"), "cannot read the model's config"),
        (lambda f: edit_config(f, architectures=["LlamaForCasualLM"]), "did you mean 'LlamaForCausalLM'"),
        (
            lambda f: edit_config(f, architectures=["MyLM"], auto_map={"AutoModel": "my.MyLM"}),
            "code that comes with the model",
        ),
        (lambda f: edit_config(f, architectures=["AutoModel"]), "no model class 'AutoModel'"),
        (
            lambda f: edit_config(f, architectures=[], model_type="clap_text_model"),
            "transformers has none for the model_type 'clap_text_model'",
        ),
        (lambda f: edit_config(f, quantization_config={"quant_method": "kbit"}), "compiled already"),
        (lambda f: put(f, "kbit_plan.json"), "compiled already"),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "awq"}),
            "quantized already, by 'awq'",
        ),
        (lambda f: edit_config(f, text_config={"quantization_config": {"quant_method": "fp8"}}), "by 'fp8'"),
        (lambda f: retype(f, torch.int8), "stored as int8: the checkpoint is quantized already"),
        (lambda f: retype(f, torch.float8_e4m3fn), "stored as float8_e4m3fn"),
        (
            lambda f: (only(f, "config.json"), put(f, "pytorch_model.bin")),
            "pickle can run code.*save_pretrained",
        ),
        (lambda f: only(f, "config.json"), "has config.json but no weights"),
        (
            lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors"),
            "rename it to model.safetensors",
        ),
        (lambda f: only(f), "the folder is empty"),
        (lambda f: (only(f), put(f, "adapter_config.json")), "merge it into its base model"),
        (lambda f: (only(f), put(f, "a.gguf")), "give one of them, such as .*a.gguf"),
    ],
)
def test_what_is_wrong_is_said_in_one_paragraph(breaks, message, saved):
    folder = saved("llama")
    breaks(folder)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    assert len(text) < 600


def test_index_and_shards_that_do_not_fit(saved):
    folder = saved("llama", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.extra.weight"] = first
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="says that .* holds 'model.extra.weight', but it does not"):
        open_checkpoint(folder)
    (folder / first).unlink()
    with pytest.raises(SourceError, match=f"shards are missing, the first is '{first}'"):
        open_checkpoint(folder)


def test_a_file_cut_after_opening(saved):
    folder = saved("llama")
    checkpoint = open_checkpoint(folder)
    cut(folder, 5000)
    with pytest.raises(SourceError, match="changed while it was being read"):
        for name in checkpoint.tensors():
            checkpoint.read(name)


def test_a_folder_of_models_names_them(saved):
    folder = saved("llama")
    with pytest.raises(SourceError, match=f"did you mean one of its folders.*{folder.name}"):
        open_checkpoint(folder.parent)


@pytest.mark.parametrize(
    "folder",
    [MODELS / "smollm2-135m", MODELS / "minilm-l6", DATA / "stories260K"],
    ids=lambda path: path.name,
)
def test_real_models(folder):
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    check_equal(folder)
