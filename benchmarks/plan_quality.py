"""What plans are worth: perplexity at equal stored bits, and how well the predicted loss ranks plans.

    python -m benchmarks.plan_quality MODEL --text TEST [--calibrate VALID] [--budgets 4.25,4,3.5,3]
        [--plans 32] [--size BITS] [--context 512] [--limit-tokens 5120] [--seed 0] [--markdown FILE]

First table: for each way to know which errors matter (a text, the model's own text, nothing), the plan of
each budget, and the uniform specs that fit, with the same scales. Second: how well the predicted increase
of the loss ranks random plans, against the measured one: Spearman's rank correlation.
Sizes are what an artifact would store, everything counted.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.tables import Section, markdown, print_section
from kbitc.artifact.pack import checked_plain, packed_weight
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.request import Request, pipeline_of, unmeasured
from kbitc.compiler.source_path import run_passes
from kbitc.evaluation.opening import need_tokenizer, open_model
from kbitc.evaluation.perplexity import perplexity, read_text, windows
from kbitc.formats.spec import Spec, parse
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Program
from kbitc.graph.stored import stored_bytes
from kbitc.pipeline.manager import PassManager
from kbitc.planning.allocation import allocate
from kbitc.sensitivity.score_table import SCORES, Option, ScoreTable

Row = dict[str, Any]

# At every size the blocks that spend it, of the types that are best there.
UNIFORM = (
    *(f"{family}4:{block}" for family in ("nf", "int", "fp", "bof") for block in (32, 64, 128)),
    *(f"{family}3:{block}" for family in ("nf", "int", "fp", "bof") for block in (16, 32, 64, 128)),
    *(f"int{bits}:{block}+zp+dq" for bits in (2, 3, 4) for block in (16, 32, 64)),
    *(f"{family}2:{block}" for family in ("nf", "bof") for block in (16, 32, 64)),
    *(f"nf{bits}:{block}+dq" for bits in (2, 3, 4) for block in (16, 32, 64)),
)
TRIED = 6  # uniform specs a budget, the largest that fit
PLANS = (
    ("calibration", "calibration", ""),
    ("plan", "plan", ""),
    ("bits", "bits/param", ".4f"),
    ("perplexity", "perplexity", ".3f"),
    ("loss", "loss +", ".4f"),
    ("predicted", "predicted +", ".4f"),
    ("share", "of uniform's +", ".2f"),
)
RANKS = (
    ("calibration", "calibration", ""),
    ("count", "random plans", ""),
    ("least", "bits, least", ".2f"),
    ("most", "bits, most", ".2f"),
    ("spearman", "Spearman", ".3f"),
)


@dataclass
class Bench:
    """A dense model whose weights are replaced by what a plan makes of them.

    Attributes:
        model: float32, of transformers.
        ids: ``(windows, context)`` to score.
        dense: the source's weights.
        before: loss of the dense model, nats per token.
    """

    model: nn.Module
    ids: Tensor
    dense: Mapping[str, Tensor]
    before: float = 0.0

    def loss(self, program: Program, specs: Mapping[str, Spec]) -> float:
        """Increase of the loss under a spec for each weight, in nats per token."""
        parameters = dict(self.model.named_parameters())
        program = planned(program, specs)
        for name, spec in specs.items():
            weight = program.weights[name]
            source = self.dense[name]
            if spec.is_left_alone:
                parameters[name].data.copy_(checked_plain(name, source, must_be_finite=True))
                continue
            _, packed = packed_weight(program, name, weight.oriented(source))
            back = torch.ops.kbit.dequantize(*packed.operands(), torch.float32)
            back = back.mT if weight.is_transposed else back
            parameters[name].data.copy_(back.reshape(weight.shape))
        return perplexity(self.model, self.ids).loss - self.before


def scored(source: str, calibrate: str) -> tuple[Program, ScoreTable]:
    """The program of a model with its moments and the table that plans are made from."""
    request = Request(bits=4.0, calibrate=calibrate)
    with open_checkpoint(source) as checkpoint:
        run = run_passes(
            checkpoint,
            PassManager(pipeline_of(request)),
            calibrate,
            is_measured=request.wants_moments(),
            without=lambda: unmeasured(request),
            on_progress=_say,
        )
    return run.program, run.program.known(SCORES)


def _say(what: str, done: int, total: int) -> None:
    del done
    if total == 0:  # a phase
        print(what, file=sys.stderr)


def planned(program: Program, specs: Mapping[str, Spec]) -> Program:
    """The program with a spec for each weight."""
    return replace(program, plan=Plan({name: Choice(spec) for name, spec in specs.items()}))


def bits_of(program: Program, specs: Mapping[str, Spec]) -> float:
    """Stored bits per parameter."""
    return 8 * stored_bytes(planned(program, specs)) / program.parameter_count


def predicted(scores: ScoreTable, specs: Mapping[str, Spec]) -> float:
    """Sum of the costs of a plan, in the table's unit."""
    costs = {name: {option.spec: option.cost for option in own} for name, own in scores.options.items()}
    return sum(costs[name][spec] for name, spec in specs.items())


def plan_rows(
    bench: Bench, label: str, program: Program, scores: ScoreTable, budgets: Sequence[float]
) -> Iterator[Row]:
    """The plan of each budget beside the best uniform spec that fits."""
    bits = {spec: bits_of(program, dict.fromkeys(program.weights, spec)) for spec in map(parse, UNIFORM)}
    known = {option.spec for option in next(iter(scores.options.values()))}
    measured: dict[Spec, float] = {}
    for budget in budgets:
        fitting = sorted((spec for spec in bits if bits[spec] <= budget), key=lambda spec: -bits[spec])
        best: Spec | None = None
        for spec in fitting[:TRIED]:
            if spec not in measured:
                measured[spec] = bench.loss(program, dict.fromkeys(program.weights, spec))
                print(f"{label}: {spec} {bits[spec]:.4f} +{measured[spec]:.4f}", file=sys.stderr)
            if best is None or measured[spec] < measured[best]:
                best = spec
        if best is not None:
            row = _row(bench, label, f"{best} everywhere", bits[best], measured[best])
            if best in known:
                row["predicted"] = predicted(scores, dict.fromkeys(program.weights, best))
            yield row
        plan, solution = allocate(scores, budget)
        specs = {name: choice.spec for name, choice in plan.weights.items()}
        loss = bench.loss(program, specs)
        row = _row(bench, label, f"planned for {budget:g}", bits_of(program, specs), loss)
        share = None if best is None else loss / measured[best]
        yield row | {"predicted": solution.cost, "share": share}


def _row(bench: Bench, label: str, plan: str, bits: float, loss: float) -> Row:
    perplexity = math.exp(bench.before + loss)
    row = {"calibration": label, "plan": plan, "bits": bits, "perplexity": perplexity, "loss": loss}
    print(row, file=sys.stderr)
    return row


def random_plans(scores: ScoreTable, count: int, seed: int, size: float | None) -> Iterator[dict[str, Spec]]:
    """Plans that draw each weight's option from those within one bit of the plan's own level.

    Args:
        scores: what there is to choose from.
        count: plans.
        seed: of the draws.
        size: the level, in bits a parameter; by default another for each plan, from 2.75 to 6.
    """
    draw = random.Random(seed)  # no secrets here
    for _ in range(count):
        level = draw.uniform(2.75, 6.0) if size is None else size

        def near(option: Option, name: str, level: float = level) -> bool:
            return abs(8 * option.nbytes / scores.numel[name] - level) <= 1

        yield {
            name: draw.choice([option for option in own if near(option, name)]).spec
            for name, own in scores.options.items()
        }


def rank_row(
    bench: Bench, label: str, program: Program, scores: ScoreTable, plans: Sequence[dict[str, Spec]]
) -> Row:
    """How well predicted losses rank measured ones."""
    costs = [predicted(scores, specs) for specs in plans]
    losses = [bench.loss(program, specs) for specs in track(plans, f"random plans, {label}")]
    bits = [bits_of(program, specs) for specs in plans]
    for row in zip(bits, costs, losses, strict=True):
        print("bits {:.4f} predicted {:.5f} measured {:.5f}".format(*row), file=sys.stderr)
    return {
        "calibration": label,
        "count": len(plans),
        "least": min(bits),
        "most": max(bits),
        "spearman": float(spearmanr(costs, losses).statistic),
    }


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a language model: folder, GGUF file or hub id")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--calibrate", nargs="+", default=["self", "none"], help="texts, self, none")
    parser.add_argument("--budgets", default="4.25,4,3.5,3", help="stored bits per parameter")
    parser.add_argument("--plans", type=int, default=32, help="random plans; 0 for none")
    parser.add_argument("--size", type=float, help="their bits per parameter; by default of all sizes")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--limit-tokens", type=int, default=5120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    options = parse_options()
    loaded = open_model(options.model, torch.float32)
    tokenizer = need_tokenizer(loaded, options.model)
    text = read_text(options.text)
    ids = windows(loaded.model, tokenizer, text, options.context, options.limit_tokens)
    budgets = [float(budget) for budget in options.budgets.split(",") if budget]
    bench: Bench | None = None
    plans: list[Row] = []
    ranks: list[Row] = []
    for calibrate in options.calibrate:
        label = calibrate if calibrate in {"self", "none"} else Path(calibrate).name
        program, scores = scored(options.model, calibrate)
        if bench is None:
            dense = {
                name: parameter.detach().clone()
                for name, parameter in loaded.model.named_parameters()
                if name in program.weights
            }
            bench = Bench(loaded.model, ids, dense)
            bench.before = perplexity(loaded.model, ids).loss
        plans += plan_rows(bench, label, program, scores, budgets)
        if options.plans:
            drawn = list(random_plans(scores, options.plans, options.seed, options.size))
            ranks.append(rank_row(bench, label, program, scores, drawn))
    assert bench is not None
    head = (
        f"{Path(options.model).name}, {ids.shape[0]} x {ids.shape[1]} tokens of {options.text.name}; "
        f"16 bits: perplexity {math.exp(bench.before):.3f}"
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    sections = [Section(head, PLANS, plans), Section("Predicted against measured loss", RANKS, ranks)]
    for section in sections:
        print_section(console, section)
    if options.markdown:
        options.markdown.write_text(markdown(["# What plans are worth"], sections), encoding="utf-8")


if __name__ == "__main__":
    main()
