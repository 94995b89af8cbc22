"""Text that a model samples itself: right for every cache, and no more memory than the source."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as T  # noqa: N812

from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.dense import dense_model
from kbitc.compiler.calibrator import Calibrator
from kbitc.compiler.sampling import SamplingError, sample_windows
from kbitc.compiler.stored_model import _held, _Unread, stored_model, widened
from kbitc.errors import MemoryShortage, SourceError, UsageError, out_of_memory
from kbitc.graph.example_inputs import InputMaker

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
MIXED = ["linear_attention", "full_attention"]
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16}

MODELS = {
    "qwen3_next": lambda: T.Qwen3NextForCausalLM(
        T.Qwen3NextConfig(
            **SIZES, **HEADS, head_dim=16, layer_types=MIXED, num_experts=2, num_experts_per_tok=1,
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )
    ),
    "bamba": lambda: T.BambaForCausalLM(T.BambaConfig(**SIZES, **HEADS, **MAMBA, attn_layer_indices=[1])),
    "lfm2": lambda: T.Lfm2ForCausalLM(
        T.Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention"])
    ),
    "minimax": lambda: T.MiniMaxForCausalLM(
        T.MiniMaxConfig(**SIZES, **HEADS, head_dim=16, layer_types=MIXED, num_local_experts=2, block_size=32)
    ),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**SIZES, state_size=4)),
    "rwkv": lambda: T.RwkvForCausalLM(T.RwkvConfig(**SIZES, attention_hidden_size=32)),
    "ctrl": lambda: T.CTRLLMHeadModel(
        T.CTRLConfig(vocab_size=101, n_positions=33, n_embd=32, dff=48, n_layer=2, n_head=2)
    ),
}  # fmt: skip


def sharp(model):
    """Of random weights far from zero, and with logits so large that a draw is nearly always the likeliest."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight * 300)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_each_token_follows_from_all_before_it(name):
    torch.manual_seed(0)
    model = sharp(MODELS[name]())
    own = model.generation_config
    ids = sample_windows(model, 16, 4)
    assert ids.shape == (4, 16)
    assert model.generation_config is own
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[:, :-1].argmax(-1)
    assert float((likeliest == ids[:, 1:]).float().mean()) > 0.8


def test_an_end_of_text_does_not_end_a_window(tiny_model):
    model = tiny_model("gpt2")  # 0 is its end of text
    with torch.no_grad():
        model.lm_head.weight[0] *= 40
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[0])
    ids = sample_windows(model, 20, 3)
    assert ids.shape == (3, 20)
    assert int((ids[:, 1:] == 0).sum()) > 10


def test_what_stops_sampling_says_what_to_do(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    with pytest.raises(SourceError, match=r"logits of token 2 are not finite.*--calibrate TEXT"):
        sample_windows(model, 8, 2)

    def refuse(**_):
        raise IndexError("list index out of range")

    model.generate = refuse
    with pytest.raises(SourceError, match=r"its 'generate' fails \(IndexError.*--calibrate TEXT"):
        sample_windows(model, 8, 2)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder of float16 weights, most of them too large to be held in float32."""
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=700, hidden_size=256, intermediate_size=700, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("half")
    T.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def in_memory(model):
    """Bytes of a model's parameters, those that lie in the source left out."""
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.mark.parametrize(
    ("held", "kept", "most"),
    [
        (0, 0, 0.01),
        (0, 1 << 40, 1.0),
        (100_000, 400_000, 0.4),
        (100_000, 1 << 40, 1.2),
        (1 << 28, 1 << 40, 2.0),
    ],
)
def test_memory_is_bounded_and_numbers_are_those_of_float32(half, held, kept, most, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.stored_model.HELD", held)
    monkeypatch.setattr("kbitc.compiler.stored_model.KEPT", kept)
    monkeypatch.setattr("kbitc.compiler.stored_model.PIECE", 1 << 12)
    ids = torch.arange(12)[None]
    with open_checkpoint(half) as checkpoint:
        stored = sum(info.nbytes for info in checkpoint.tensors().values())
        model = stored_model(checkpoint)
        assert in_memory(model) <= most * stored
        with torch.no_grad(), widened(model):
            got = model(input_ids=ids).logits
        with torch.no_grad():
            wanted = dense_model(checkpoint, torch.float32)(input_ids=ids).logits
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "mixtral", "llama", "qwen3_next", "mamba"])
def test_what_is_sampled_does_not_depend_on_what_is_held(name, dtype, tiny_model, tmp_path, monkeypatch):
    """Convolutions, experts, tied heads, transposed weights: each is read wherever it is used."""
    torch.manual_seed(0)
    (MODELS[name]() if name in MODELS else tiny_model(name)).to(dtype).save_pretrained(tmp_path)
    monkeypatch.setattr("kbitc.compiler.stored_model.HELD", 0)
    monkeypatch.setattr("kbitc.compiler.stored_model.PIECE", 300)  # some rows
    sampled = []
    for kept in (0, 20_000, 1 << 40):
        monkeypatch.setattr("kbitc.compiler.stored_model.KEPT", kept)
        with open_checkpoint(tmp_path) as checkpoint:
            model = stored_model(checkpoint)
            unread = sum(isinstance(p, _Unread) for p in model.parameters())
            with widened(model):
                sampled.append((unread, sample_windows(model, 9, 3)))
    assert len(list(model.parameters())) == sampled[0][0] > sampled[1][0] > sampled[2][0] == 0
    assert torch.equal(sampled[0][1], sampled[2][1])
    assert torch.equal(sampled[1][1], sampled[2][1])


def test_a_weight_that_was_not_read_gives_no_numbers(half, monkeypatch):
    """Not those of another weight, nor zeros: sampling refuses what is not finite."""
    monkeypatch.setattr("kbitc.compiler.stored_model.KEPT", 0)
    with open_checkpoint(half) as checkpoint:
        model = stored_model(checkpoint)
        weight = model.lm_head.weight
        with widened(model):
            assert weight.shape == (700, 256)
            assert weight.dtype is torch.float16
            assert torch.equal(weight.data.clone(), checkpoint.read("lm_head.weight"))
            assert torch.equal(weight[3], checkpoint.read("lm_head.weight")[3])
            ids, table = torch.tensor([[699, 0], [3, 3]]), model.model.embed_tokens.weight
            wanted = F.embedding(ids, checkpoint.read("model.embed_tokens.weight"), max_norm=0.1)
            assert torch.equal(F.embedding(ids, table, max_norm=0.1), wanted.float())
            assert torch.equal(F.embedding(ids, weight=table, max_norm=0.1), wanted.float())
        with pytest.raises(SamplingError, match="logits of token 2 are not finite"):
            sample_windows(model.float(), 8, 2)  # without `widened`


def test_what_is_held(monkeypatch):
    monkeypatch.setattr("kbitc.compiler.stored_model.HELD", 100)
    monkeypatch.setattr("kbitc.compiler.stored_model.KEPT", 600)
    half, single, whole = (torch.float16, torch.float32, torch.int64)
    sizes = {
        "a": (90, half),
        "b": (20, half),
        "c": (10, half),
        "d": (50, single),
        "e": (30, single),
        "f": (9, whole),
    }
    infos = {name: TensorInfo.of((size,), dtype) for name, (size, dtype) in sizes.items()}
    # 400 bytes of a and c, widened; 40 of b as it is; 120 of e, d has no room. Integers are always held.
    assert _held(infos) == {"a": True, "c": True, "b": False, "e": False, "f": False}


def test_states_of_many_windows_are_bounded(monkeypatch):
    """Each window follows from its own tokens, however many are sampled at once."""
    torch.manual_seed(0)
    model = sharp(T.LlamaForCausalLM(T.LlamaConfig(**SIZES, **HEADS)))
    whole = sample_windows(model, 16, 7)
    own, batches = model.generate, []

    def generate(input_ids, **options):
        batches.append(len(input_ids))
        return own(input_ids=input_ids, **options)

    model.generate = generate
    window = 2 * 2 * 32 * 16 * 4  # keys and values of two layers of 32 values in float32
    monkeypatch.setattr("kbitc.compiler.sampling.TOGETHER", 2)
    monkeypatch.setattr("kbitc.compiler.sampling.STATES", 3 * window)
    ids = sample_windows(model, 16, 7)
    assert batches[-3:] == [3, 3, 1]
    assert torch.equal(ids[:, 0], whole[:, 0])
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[:, :-1].argmax(-1)
    assert float((likeliest == ids[:, 1:]).float().mean()) > 0.8
    monkeypatch.setattr("kbitc.compiler.sampling.TOGETHER", 7)
    assert torch.equal(sample_windows(model, 16, 7), whole)


def test_a_module_in_memory_is_not_copied(tiny_model):
    model = tiny_model("llama")
    with open_checkpoint(model) as checkpoint:
        shared = stored_model(checkpoint)
    own = dict(model.named_parameters())
    assert all(p.data_ptr() == own[name].data_ptr() for name, p in shared.named_parameters())


def test_a_weight_that_is_not_held_is_checked_too(tiny_model, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.stored_model.KEPT", 0)
    monkeypatch.setattr("kbitc.compiler.stored_model.PIECE", 100)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, 5] = float("inf")
    with open_checkpoint(model) as checkpoint:
        with pytest.raises(UsageError, match=r"^model.layers.1.mlp.up_proj.weight: holds a NaN or infinite"):
            stored_model(checkpoint)


@pytest.mark.parametrize("source", ["self", "random", torch.zeros(1, 8, dtype=torch.int64)])
def test_a_weight_that_is_not_a_number_is_named(source, tiny_model):
    import kbitc

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(UsageError, match=r"^model.layers.1.mlp.up_proj.weight: holds a NaN"):
        kbitc.compile(model, bits=6, calibrate=source)


def test_memory_that_ends_is_one_error_that_says_what_to_do(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(MemoryShortage, match=r"memory ended while dreaming \(.*\); wake up"):
        with out_of_memory("dreaming", "wake up"):
            torch.empty(1 << 58)
    with pytest.raises(RuntimeError, match="other"), out_of_memory("dreaming", "wake up"):
        raise RuntimeError("other")

    def no_room(*_, **__):
        torch.empty(1 << 58)

    model = tiny_model("llama")
    model.generate = no_room
    with pytest.raises(RuntimeError, match="memory"):  # not that the model cannot generate
        sample_windows(model, 8, 2)
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("kbitc.compiler.calibrator.stored_model", no_room)
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        with pytest.raises(MemoryShortage, match=r"sampling text from the model.*--calibrate none"):
            Calibrator(checkpoint).windows()


def test_no_token_that_stands_for_an_image_is_sampled():
    """A model counts them: more than it has features for is an error in its forward."""
    image = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 48}
    vision = T.CLIPVisionConfig(**image, num_hidden_layers=1, num_attention_heads=2)
    text = T.LlamaConfig(**{**SIZES, "vocab_size": 16}, **HEADS)
    config = T.LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    torch.manual_seed(0)
    model = T.LlavaForConditionalGeneration(config).eval()
    ids = sample_windows(model, 48, 8)
    assert set(ids.unique().tolist()) == set(range(16)) - {7}
    feed = InputMaker.of(model, 48).draw(torch.Generator().manual_seed(0), ids[:1])
    assert (feed["input_ids"] == 7).sum() == 4
    ids[0, 5] = 7
    with pytest.raises(UsageError, match="the text holds token 7, which stands for a piece of an image"):
        InputMaker.of(model, 48).draw(torch.Generator().manual_seed(0), ids[:1])
