"""Decode speed and peak memory of an 8B-shaped LLaMA on a GPU: 16-bit and packed, both compiled.

    python -m benchmarks.gpu_decode [--layers 32] [--spec nf4:64] [--prompt 128] [--new 128] [--runs 5]
        [--steps compiled,replayed] [--only dense|packed] [--dtype bf16|fp16] [--device cuda|cpu]
        [--markdown FILE]

The one thing to know: the weights are random, since speed does not depend on them, and made on the device
one after the other, so that no model is ever there twice. A step is the model with a static cache, and
the argmax, compiled as one graph. *Compiled* steps are called as a user would call them (Inductor's
"reduce-overhead": one CUDA graph a step, guards checked before each); *replayed* ones are captured as a
whole, as serving engines do, so that the host does next to nothing. ``--device cpu`` and small sizes run
the same code where there is no GPU, as a check of this script.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._dynamo.utils import counters

import kbitc
from benchmarks.gpu import DTYPES, Call, Clock, NoDevice, bars_section, device_line, reason, refuse, verdict
from benchmarks.tables import Section, markdown, print_section

Row = dict[str, Any]

WARM_UP = 8  # steps: compiling, warming up, recording the CUDA graph, and some more
STEPS = ("compiled", "replayed")
MODE = "reduce-overhead"  # of Inductor: one CUDA graph a step
TOLERANCE = 0.05  # relative, of logits: rounding to 16 bits adds up over the layers
BAR = 2.0  # times the tokens a second of the 16-bit model
COLUMNS = (
    ("name", "model", ""),
    ("steps", "steps", ""),
    ("decode", "decode tok/s", ".1f"),
    ("ratio", "x 16-bit", ".2f"),
    ("host_ms", "host ms/step", ".3f"),
    ("weights_gb", "weights GB", ".2f"),
    ("build_gb", "peak GB, building", ".2f"),
    ("peak_gb", "peak GB, decoding", ".2f"),
    ("difference", "logits off eager", ".1e"),
    ("graphs", "graphs", "d"),
    ("skips", "CUDA graphs skipped", "d"),
    ("reason", "", ""),
)
SIZES = {
    "layers": 32,
    "hidden": 4096,
    "intermediate": 14336,
    "heads": 32,
    "kv-heads": 8,
    "vocabulary": 128256,
}


class Memory:
    """Peak of the memory that tensors take on the device, in bytes; None on the CPU, which does not tell."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def forget(self) -> None:
        """Start anew."""
        if self._clock.is_cuda:
            torch.cuda.reset_peak_memory_stats(self._clock.device)

    def peak_gb(self) -> float | None:
        """Since then."""
        return torch.cuda.max_memory_allocated(self._clock.device) / 1e9 if self._clock.is_cuda else None


def make_config(options: argparse.Namespace) -> Any:
    """The shape of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def build(config: Any, dtype: torch.dtype, device: torch.device, spec: str | None) -> Any:
    """The model, its weights made on the device one after the other.

    Args:
        config: of a transformers LLaMA.
        dtype: of everything that is not packed.
        spec: of every linear layer; None: none is packed. The dense weights are the same either way.

    Raises:
        RuntimeError: a tensor of the model was not made.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).eval()
        model.to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            weight = _random(parameter, generator)
            if spec is not None and isinstance(module, nn.Linear):
                weight = kbitc.quantize(weight, spec, name=f"{name}.{key}")
            setattr(module, key, nn.Parameter(weight, requires_grad=False))
            del weight
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are computed, not stored
    tensors = (*model.named_parameters(), *model.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise RuntimeError(f"these tensors were not made: {', '.join(missing)}")
    return model


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Ones for a norm, otherwise Gaussian of the standard deviation 0.02."""
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=generator.device)
    return torch.empty(like.shape, dtype=like.dtype, device=generator.device).normal_(
        0, 0.02, generator=generator
    )


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters as they are stored."""
    packed = (kbitc.KbitTensor,)
    return sum(p.packed.nbytes() if isinstance(p, packed) else p.nbytes for p in model.parameters())


class StaticCacheDecoder:
    """Greedy decoding at batch 1 with a static cache, the step compiled.

    Args:
        model: a causal language model of transformers.
        prompt: int64 (1, tokens), read at once and eagerly.
        length: tokens that the cache holds.
        inner: backend of torch.compile.
        mode: of torch.compile.
    """

    def __init__(self, model: Any, prompt: Tensor, length: int, inner: str, mode: str | None) -> None:
        from transformers import StaticCache

        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._compiled = torch.compile(self._step, backend=inner, mode=mode, fullgraph=True, dynamic=False)
        # Eager: the cache is made here, and its addresses stay.
        self._logits, self._token = self._step(prompt)
        self._run: Call = self._run_compiled
        self._tokens = [prompt, self._token.clone()]

    @property
    def ids(self) -> Tensor:
        """What was read and decoded, int64 (1, tokens)."""
        return torch.cat(self._tokens, 1)

    def decode(self, count: int) -> None:
        """So many steps; on a GPU they may still run afterwards."""
        for _ in range(count):
            self._run()
            self._tokens.append(self._token.clone())

    def replay(self, clock: Clock) -> None:
        """From now on replay a step that is captured here, after some that were not."""
        self._run = clock.capture(self._run_compiled)

    def difference(self) -> float:
        """Of the last logits, relative, from those of the whole text in one eager call without a cache."""
        found = self._logits.float()
        out = self._model(input_ids=self.ids[:, :-1], use_cache=False, logits_to_keep=1)
        exact = out.logits[:, -1].float()
        return float((found - exact).norm() / exact.norm())

    def _run_compiled(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self._logits, token = self._compiled(self._token)
        self._token.copy_(token)  # the address stays: a captured step reads where it wrote

    def _step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
        return logits, logits.argmax(-1, keepdim=True)


@torch.no_grad()
def measure(clock: Clock, options: argparse.Namespace, steps: str, spec: str | None) -> Row:
    """One model with one kind of steps: built, compiled, timed and gone."""
    torch.compiler.reset()
    counters.clear()
    memory = Memory(clock)
    memory.forget()
    model = build(make_config(options), DTYPES[options.dtype], clock.device, spec)
    row: Row = {"weights_gb": weight_bytes(model) / 1e9, "build_gb": memory.peak_gb()}
    memory.forget()
    generator = torch.Generator(clock.device).manual_seed(1)
    shape = (1, options.prompt)
    prompt = torch.randint(options.vocabulary, shape, generator=generator, device=clock.device)
    length = options.prompt + 2 * WARM_UP + options.runs * options.new
    mode = MODE if options.inner == "inductor" and steps == "compiled" else None
    decoder = StaticCacheDecoder(model, prompt, length, options.inner, mode)
    decoder.decode(WARM_UP)
    if steps == "replayed":
        decoder.replay(clock)
        decoder.decode(WARM_UP)
    row["difference"] = decoder.difference()
    timed = [_timed(clock, decoder, options.new) for _ in range(options.runs)]
    row["decode"] = options.new / median(whole for whole, _ in timed)
    row["host_ms"] = 1e3 * median(host for _, host in timed) / options.new
    row["peak_gb"] = memory.peak_gb()
    row["graphs"] = counters["stats"]["unique_graphs"]
    row["skips"] = counters["inductor"]["cudagraph_skips"] if clock.is_cuda else None
    return row


def _timed(clock: Clock, decoder: StaticCacheDecoder, count: int) -> tuple[float, float]:
    """Seconds of so many steps, and seconds until this process had asked for all of them."""
    clock.wait()
    start = time.perf_counter()
    decoder.decode(count)
    asked = time.perf_counter()
    clock.wait()
    return time.perf_counter() - start, asked - start


def make_rows(clock: Clock, options: argparse.Namespace) -> list[Row]:
    """The models in turn with each kind of steps; a row that fails says why."""
    specs = {"dense": None, "packed": options.spec}
    rows = []
    for steps in options.steps:
        found = [
            _tried(clock, options, steps, kind, spec)
            for kind, spec in specs.items()
            if options.only in (None, kind)
        ]
        if "decode" in found[0] and "decode" in found[-1] and len(found) == 2:
            found[1]["ratio"] = found[1]["decode"] / found[0]["decode"]
        rows += found
    return rows


def _tried(clock: Clock, options: argparse.Namespace, steps: str, kind: str, spec: str | None) -> Row:
    name = f"torch {options.dtype}" if spec is None else f"kbitc {spec}"
    sys.stderr.write(f"measuring {name}, {steps}\n")
    row: Row = {"name": name, "steps": steps, "kind": kind}
    try:
        row |= measure(clock, options, steps, spec)
    except Exception as error:  # noqa: BLE001  # whatever it is becomes the row's reason
        sys.stderr.write(traceback.format_exc())
        row["reason"] = reason(error)
    gc.collect()
    if clock.is_cuda:
        torch.cuda.empty_cache()
    return row


def find_bars(rows: Sequence[Row]) -> list[Row]:
    """The bars of decoding, each with its figure; what was not measured says so."""
    bars = []
    for row in rows:
        if row["kind"] == "packed":
            speedup, off = row.get("ratio"), row.get("difference")
            name = f"{row['name']}, {row['steps']}"
            is_fast = None if speedup is None else speedup >= BAR
            is_right = None if off is None else off <= TOLERANCE
            bars += [
                _bar(f"{name}: tokens a second", f">= {BAR:g} x 16-bit", speedup, is_met=is_fast),
                _bar(f"{name}: logits off eager", f"<= {TOLERANCE:g}", off, is_met=is_right),
            ]
    return bars


def _bar(name: str, wanted: str, figure: float | None, *, is_met: bool | None) -> Row:
    return {"name": name, "wanted": wanted, "figure": figure, "met": verdict(is_met)}


def describe(options: argparse.Namespace) -> str:
    """What was run, for the head of the table."""
    return (
        f"LLaMA of random weights: hidden {options.hidden}, {options.layers} layers, intermediate "
        f"{options.intermediate}, {options.heads} heads, {options.kv_heads} KV heads, vocabulary "
        f"{options.vocabulary}; every linear layer is packed, the output layer too, the embedding is not. "
        f"Batch 1, greedy, prompt of {options.prompt} tokens, medians of {options.runs} runs of "
        f"{options.new} steps, static cache, torch.compile(backend={options.inner!r}, fullgraph=True); "
        f"compiled: with Inductor's mode {MODE!r}; replayed: the compiled step captured in a CUDA graph. "
        f"host: until a step was asked for. logits off eager: the last ones, relative, from one eager call "
        f"over the whole text without a cache."
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", default="nf4:64", help="of the packed model")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens to read first")
    parser.add_argument("--new", type=int, default=128, help="steps of a run")
    parser.add_argument("--runs", type=int, default=5, help="the median is of so many")
    parser.add_argument("--steps", type=_steps, default=list(STEPS), help=",".join(STEPS))
    parser.add_argument("--only", choices=("dense", "packed"), help="one model alone")
    parser.add_argument("--inner", default="inductor", help="backend of torch.compile")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="of the model")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    return parser.parse_args(arguments)


def _steps(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(STEPS):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(STEPS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 if a model could not be measured, 2 without the device."""
    options = parse_options(arguments)
    try:
        clock = Clock(options.device)
    except NoDevice as error:
        return refuse(error)
    rows = make_rows(clock, options)
    head = (device_line(clock, ("transformers",)), describe(options))
    sections = [Section("Decoding", COLUMNS, rows), bars_section(find_bars(rows), is_judged=clock.is_cuda)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(*head, sep="\n", highlight=False)
    for section in sections:
        print_section(console, section)
    if options.markdown:
        title = "# Decoding on a GPU"
        options.markdown.write_text(markdown((title, *head), sections), encoding="utf-8")
    return int(any("reason" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
