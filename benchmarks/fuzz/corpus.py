"""Good files of every kind that kbitc reads, made once: what mutants are made of.

The one thing to know: everything is of one tiny LLaMA, so that a mutant is quick; an item is a folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
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


def make_corpus(folder: Path) -> None:
    """Write every item: source, GGUF file, artifacts, plans, scores, journal, moments, exported folder."""
    import kbitc

    torch.manual_seed(0)
    source = folder / "source"
    _source(source)
    kbitc.compile(source, plan=json.loads(RULES), out=folder / "whole")
    _sharded(source, folder / "artifact")
    kbitc.compile(source, BITS, out=folder / "scores")
    for name, file in (("plan", "kbit_plan.json"), ("measured", "kbit_scores.json")):
        (folder / name).mkdir()
        shutil.copyfile(folder / "scores" / file, folder / name / file)
    (folder / "rules").mkdir()
    (folder / "rules" / "rules.json").write_text(RULES)
    _evaluations(folder / "evaluations")
    _journal(source, folder / "journal")
    _moments(source, folder / "moments")
    if importlib.util.find_spec("gguf"):
        _gguf(folder / "gguf")
    if has_onnx():
        kbitc.export_onnx(folder / "whole", folder / "onnx")


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


def _evaluations(folder: Path) -> None:
    entry = {
        "model": "m", "text": "t.txt", "perplexity": 2.0, "loss": 0.69, "tokens": 100, "context": 32,
        "bits_per_param": 4.0, "bytes": 1000, "activations": "float", "float_activations": {},
        "reference_loss": 0.5, "kl_divergence": 0.1,
    }  # fmt: skip
    folder.mkdir()
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

    folder.mkdir()
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


def _moments(source: Path, folder: Path) -> None:
    folder.mkdir()
    remember(source, folder)


def _gguf(folder: Path) -> None:
    """A LLaMA in float16 and 8-bit blocks."""
    import gguf

    folder.mkdir()
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
