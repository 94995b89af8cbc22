"""Adapters over k-bit weights against adapters over the 16-bit model, on a CPU.

    python -m benchmarks.finetune --model DIR --text FILE          # planned at 4.25 and 3.25 bits, 200 steps
    python -m benchmarks.finetune --model demo --text FILE --steps 20 --seeds 0,1,2 --markdown FILE

Every base is trained by the same steps of the same batches, in float32: the source, the artifact of each
budget, and that of the smallest once more with the init "residual". Artifacts, checkpoints and a ledger of
runs lie in --work; what is there already is not done again. Step times compare only as far as the
machine was as busy.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn

from benchmarks.ledger import Ledger
from benchmarks.tables import Section, markdown, print_section
from kbitc.artifact.folders import is_artifact
from kbitc.artifact.loading import load
from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.dense import dense_model, tokenizer_of
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.evaluation.adapters import RECORD, base_of
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.training.examples import Example, held_out, mean_loss, text_examples
from kbitc.training.finetune_recipe import FinetuneRecipe, lora_config
from kbitc.training.finetuning import adapted_model
from kbitc.training.merging import merge_to
from kbitc.training.trainer_steps import train

DENSE = "16-bit source"
GRADIENT_ROWS = 64


def artifact_of(model: str, bits: float, work: Path, calibrate: str) -> Path:
    """The artifact of a budget, compiled if it is not there."""
    out = work / f"{Path(model).name}-{bits:g}"
    if not is_artifact(out):
        compile_to(model, out, Request.of(bits, calibrate=calibrate), is_resumed=True)
    return out


def dense_base(model: str) -> tuple[nn.Module, Any]:
    """The source in float32, and its tokenizer."""
    with open_checkpoint(model) as checkpoint:
        return dense_model(checkpoint, torch.float32), tokenizer_of(checkpoint)


def adapted_base(model: str, out: Path | None, recipe: FinetuneRecipe) -> Any:
    """The source (where ``out`` is None) or an artifact of it, with an adapter, in float32."""
    if out is not None:
        return adapted_model(load(out, dtype=torch.float32), recipe, Artifact.open(out), model)
    base, _ = dense_base(model)
    torch.manual_seed(recipe.seed)
    return get_peft_model(base.requires_grad_(requires_grad=False), lora_config(recipe))


def measure(
    model: str, out: Path | None, recipe: FinetuneRecipe, examples: list[Example], folder: Path
) -> dict[str, Any]:
    """One run: losses and times. The adapter of an artifact stays in ``folder`` to be merged."""
    learned, held = held_out(examples)
    adapted = adapted_base(model, out, recipe)
    before = mean_loss(adapted, held)
    _, seconds = train(adapted, learned, recipe, folder / "steps", lambda *_: None)
    after = mean_loss(adapted, held)
    if out is not None:
        adapted.save_pretrained(folder / "adapter")
        (folder / "adapter" / RECORD).write_text(json.dumps({"base": base_of(Artifact.open(out))}))
    return {"before": before, "after": after, "seconds": seconds, "held": len(held)}


def resident(out: Path) -> float:
    """Bytes of the tensors of a base as it is trained, over those of its file."""
    model = load(out, dtype=torch.float32)
    held: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        inner = tensor.packed.tensors().values() if isinstance(tensor, KbitTensor) else [tensor]
        held |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in inner}
    return sum(held.values()) / Artifact.open(out).payload_bytes


def gradients_apart(out: Path) -> float:
    """The largest relative error of a layer's input gradient, against its dequantized weight."""
    worst, seen = 0.0, set()
    for weight in load(out, dtype=torch.float32).parameters():
        if not isinstance(weight, KbitTensor) or weight.dim() != 2 or id(weight) in seen:
            continue
        seen.add(id(weight))
        rows = torch.randn(GRADIENT_ROWS, weight.packed.planes.shape[0])
        wanted = rows @ torch.ops.kbit.dequantize(*weight.operands(), torch.float32)
        got = torch.ops.kbit.input_grad(rows, *weight.operands())
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    return worst


Kind = tuple[str, Path | None, str]  # name, artifact (None: the source) and init of a run


def run(options: argparse.Namespace, console: Console) -> list[Section]:
    """Everything that the ledger lacks, and the tables of it."""
    options.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(options.work / "runs.json")
    base, tokenizer = dense_base(options.model)
    examples = text_examples(tokenizer, base, options.text, options.context)
    del base
    outs = {b: artifact_of(options.model, b, options.work, options.calibrate) for b in options.bits}
    kinds: list[Kind] = [(DENSE, None, "plain")]
    kinds += [(f"{bits:g} bits", out, "plain") for bits, out in outs.items()]
    lowest = min(options.bits)
    kinds.append((f"{lowest:g} bits, residual", outs[lowest], "residual"))
    for seed in options.seeds:
        for kind in kinds:
            one_run(options, ledger, kind, seed, examples)
            row = ledger.rows[key_of(options, kind, seed)]
            losses = f"{row['before']:.4f} -> {row['after']:.4f}"
            console.print(f"{kind[0]}, seed {seed}: {losses}, {row['seconds']:.2f} s a step")
    for bits, out in outs.items():
        key = json.dumps(["base", options.model, bits])
        if key not in ledger.rows:
            about = {"resident": resident(out), "gradient": gradients_apart(out)}
            ledger.put(key, {"base": f"{bits:g} bits", **about})
    rows = [ledger.rows[key_of(options, kind, seed)] for seed in options.seeds for kind in kinds]
    bases = [ledger.rows[json.dumps(["base", options.model, bits])] for bits in outs]
    return sections(options, rows, bases)


def recipe_of(options: argparse.Namespace, kind: Kind, seed: int) -> FinetuneRecipe:
    """How a run is trained."""
    return FinetuneRecipe(
        rank=options.rank, steps=options.steps, batch=options.batch, context=options.context,
        rate=options.rate, seed=seed, init=kind[2], save_every=25,
    )  # fmt: skip


def key_of(options: argparse.Namespace, kind: Kind, seed: int) -> str:
    """What a run is known by."""
    return json.dumps([options.model, kind[0], asdict(recipe_of(options, kind, seed))])


def one_run(
    options: argparse.Namespace, ledger: Ledger, kind: Kind, seed: int, examples: list[Example]
) -> None:
    """Train and merge, unless the ledger has it."""
    name, out, _ = kind
    key = key_of(options, kind, seed)
    if key in ledger.rows:
        return
    folder = options.work / f"{name.replace(' ', '-').replace(',', '')}-{options.steps}-{seed}"
    row = measure(options.model, out, recipe_of(options, kind, seed), examples, folder)
    if out is not None:
        made = merge_to(
            out, folder / "adapter", folder / "merged",
            text=options.text, context=options.context, is_forced=True,
        )  # fmt: skip
        row |= {"beside": made.before, "merged": made.after}
    ledger.put(key, {"name": name, "seed": seed, **row})
    gc.collect()


def sections(
    options: argparse.Namespace, rows: Sequence[dict[str, Any]], bases: Sequence[dict[str, Any]]
) -> list[Section]:
    """The tables: means over seeds."""
    runs = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        fields = [field for field in ("before", "after", "seconds", "beside", "merged") if field in own[0]]
        means = {field: statistics.fmean(row[field] for row in own) for field in fields}
        runs.append({"name": name, "seeds": len(own), **means})
    dense = runs[0]
    for row in runs:
        row["apart"], row["ratio"] = row["after"] - dense["after"], row["seconds"] / dense["seconds"]
        if "merged" in row:
            row["cost"] = row["merged"] - row["beside"]
    losses = [
        ("name", "base", ""), ("seeds", "seeds", "d"), ("before", "held out before", ".4f"),
        ("after", "after", ".4f"), ("apart", "against 16 bits", "+.4f"), ("merged", "merged", ".4f"),
        ("cost", "cost of merging", "+.4f"), ("seconds", "s a step", ".2f"), ("ratio", "ratio", ".2f"),
    ]  # fmt: skip
    about = [
        ("base", "base", ""), ("resident", "resident bytes / payload", ".4f"),
        ("gradient", "worst input gradient, relative", ".1e"),
    ]  # fmt: skip
    title = f"Held-out loss, nats per token, {options.steps} steps of {options.batch} x {options.context}"
    return [Section(title, losses, runs), Section("Bases", about, list(bases))]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--bits", type=lambda given: [float(each) for each in given.split(",")], default=[4.25, 3.25]
    )
    parser.add_argument("--seeds", type=lambda given: [int(each) for each in given.split(",")], default=[0])
    recipe = FinetuneRecipe()
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--context", type=int, default=recipe.context)
    parser.add_argument("--rank", type=int, default=recipe.rank)
    parser.add_argument("--rate", type=float, default=recipe.rate)
    parser.add_argument("--calibrate", default="self")
    parser.add_argument("--work", type=Path, default=Path("finetune-work"))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(argv)
    console = Console()
    tables = run(options, console)
    for section in tables:
        print_section(console, section)
    if options.markdown is not None:
        about = f"`{Path(options.model).name}`, {options.text.name}, torch {torch.__version__}"
        options.markdown.write_text(markdown(["# Fine-tuning", about], tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
