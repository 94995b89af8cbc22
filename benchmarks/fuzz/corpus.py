"""Good files of every kind that kbitc reads, made once: what mutants are made of.

The one thing to know: everything is of one tiny LLaMA, so that a mutant is quick; an item is a folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

WORDS = 60
SPEC = "nf4:32+dq"
RULES = '{"weights": {"*mlp*": {"spec": "int3:32+zp"}, "*": {"spec": "nf4:32+dq"}}}'
BITS = 4.5


def has_onnx() -> bool:
    """Whether the packages of the ONNX export are there."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"))


def make_corpus(folder: Path, items: Collection[str]) -> None:
    """Write these items, and those that they or the ways in are made from."""
    import kbitc

    torch.manual_seed(0)
    torch.set_num_threads(1)
    source, whole, priced = (folder / name for name in ("source", "whole", "scores"))
    _source(source)
    kbitc.compile(source, plan=json.loads(RULES), out=whole)
    if {"scores", "measured"} & set(items):
        _priced(priced)
    makers: dict[str, Callable[[Path], object]] = {
        "artifact": lambda out: _sharded(source, out),
        "plan": lambda out: _copied(whole / "kbit_plan.json", out),
        "measured": lambda out: _copied(priced / "kbit_scores.json", out),
        "rules": _rules,
        "evaluations": _evaluations,
        "journal": lambda out: _journal(source, out),
        "moments": lambda out: remember(source, out),
        "gguf": _gguf,
        "onnx": lambda out: kbitc.export_onnx(whole, out),
    }
    for name in sorted(set(items) & makers.keys()):
        if name not in ("artifact", "onnx"):  # which make their folder themselves
            (folder / name).mkdir()
        makers[name](folder / name)


@contextmanager
def cache(folder: Path) -> Iterator[None]:
    """``KBITC_CACHE`` for a while."""
    with mock.patch.dict(os.environ, {"KBITC_CACHE": str(folder)}):
        yield


def _config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=WORDS + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="float16",
    )


def _source(folder: Path) -> None:
    """Two shards, an index, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM(_config()).half()
    model.save_pretrained(folder, max_shard_size="30KB")
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)


def _sharded(source: Path, out: Path) -> None:
    """An artifact of several files and an index, as those of large models are."""
    import kbitc

    with mock.patch("kbitc.artifact.writer.SHARD_BYTES", 8000):
        kbitc.compile(source, plan=json.loads(RULES), out=out)


def _priced(out: Path) -> None:
    """An artifact with a score table; of two linears, since pricing takes longer than all else here."""
    from torch import nn

    import kbitc

    model = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 96))
    inputs = (torch.zeros(1, 96),)
    kbitc.compile(model, BITS, calibrate="none", example_inputs=inputs, out=out)


def _copied(file: Path, folder: Path) -> None:
    shutil.copyfile(file, folder / file.name)


def _rules(folder: Path) -> None:
    (folder / "rules.json").write_text(RULES)


def _evaluations(folder: Path) -> None:
    entry = {
        "model": "m", "text": "t.txt", "perplexity": 2.0, "loss": 0.69, "tokens": 100, "context": 32,
        "bits_per_param": 4.0, "bytes": 1000, "activations": "float", "float_activations": {},
        "reference_loss": 0.5, "kl_divergence": 0.1,
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps([entry, {**entry, "text": "u.txt"}]))


def _journal(source: Path, folder: Path) -> None:
    """What a compilation leaves that was interrupted half-way."""
    from kbitc.artifact.writer import Writer
    from kbitc.compiler.driver import compile_to
    from kbitc.compiler.request import Request

    put, calls = Writer.put, 0

    def stop(self: Writer, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        put(self, *args)

    with mock.patch.object(Writer, "put", stop):
        try:
            compile_to(source, folder / "out", Request.of(spec=SPEC))
        except KeyboardInterrupt:
            return
    raise AssertionError("the compilation was not interrupted")


def measured() -> dict[str, torch.Tensor]:
    """What stands for measured moments: they are kept and read as they are."""
    generator = torch.Generator().manual_seed(3)
    return {f"layer{i}.inputs": torch.rand(32, generator=generator) for i in range(4)}


def remember(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Measured moments through the cache in a folder."""
    from kbitc.checkpoint import open_checkpoint
    from kbitc.compiler.calibrator import Calibrator

    with cache(folder), open_checkpoint(source) as checkpoint:
        return dict(Calibrator(checkpoint, "random").remembered(measured))


def _gguf(folder: Path) -> None:
    """A LLaMA in float16 and 8-bit blocks."""
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    config = _config()
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    shapes = {"token_embd.weight": (config.vocab_size, 32), "output_norm.weight": (32,)}
    shapes["output.weight"] = (config.vocab_size, 32)
    for layer in range(2):
        for name, shape in {
            "attn_norm.weight": (32,), "attn_q.weight": (32, 32), "attn_k.weight": (16, 32),
            "attn_v.weight": (16, 32), "attn_output.weight": (32, 32),
            "ffn_norm.weight": (32,), "ffn_gate.weight": (64, 32),
            "ffn_up.weight": (64, 32), "ffn_down.weight": (32, 64),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        data = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, data)
        elif "attn" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
