"""Peak memory and throughput of compiling a large model.

Makes a synthetic fp16 LLaMA folder (random weights, by default 1.1 B parameters, 2.2 GB) and compiles
it in a process of its own.

    python -m benchmarks.compile_memory [--spec nf4:64] [--layers 22] [--keep FOLDER]
    python -m benchmarks.compile_memory --bits 4 --quantizer feedback --calibrate TEXT
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}


def make_folder(folder: Path, layers: int) -> int:
    """Write config, the demo's tokenizer and a shard for each layer; returns the bytes of all tensors."""
    from transformers import LlamaConfig

    from kbitc.checkpoint import demo

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=32000, dtype="float16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.folder() / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    hidden, wide, key_value = 2048, 5632, 256
    rows = {"q_proj": hidden, "k_proj": key_value, "v_proj": key_value, "o_proj": hidden}
    shards: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (32000, hidden),
            "lm_head.weight": (32000, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shard = {f"{prefix}self_attn.{name}.weight": (count, hidden) for name, count in rows.items()}
        shard |= {f"{prefix}mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        shard |= {f"{prefix}mlp.down_proj.weight": (hidden, wide)}
        shard |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shards.append(shard)
    index, total = {}, 0
    for number, shard in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        made = {
            key: torch.randn(shape, generator=generator).mul_(0.02).half() for key, shape in shard.items()
        }
        save_file(made, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(made, name))
        total += sum(tensor.nbytes for tensor in made.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def main() -> None:
    """Make, compile, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", default="nf4:64")
    parser.add_argument("--bits", help="plan under a budget instead of --spec")
    parser.add_argument("--quantizer", default="auto")
    parser.add_argument("--calibrate", default="auto", help="a text file, self, random or none")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--keep", type=Path, help="keep the folder here and use it again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary) / "llama-1.1b"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"made {make_folder(folder, options.layers) / 1e9:.2f} GB of fp16 weights")
        choice = ["--bits", options.bits] if options.bits else ["--spec", options.spec]
        out = Path(temporary) / "out"
        choice += ["--quantizer", options.quantizer, "--calibrate", options.calibrate]
        command = [sys.executable, "-m", "kbitc", "compile", str(folder), *choice, "-o", str(out), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        megabytes = result["source_bytes"] / 1e6
        print(f"{result['parameters']:,} parameters, {' '.join(choice)}: {result['bits_per_param']:.4f} bits")
        print(f"peak resident memory {peak / 1e9:.3f} GB for {megabytes / 1e3:.2f} GB of weights")
        for phase, seconds in result["seconds"].items():
            print(f"  {phase:>8} {seconds:7.2f} s")
        print(f"pack: {megabytes / result['seconds']['pack']:.0f} MB/s of source weights")


if __name__ == "__main__":
    main()
