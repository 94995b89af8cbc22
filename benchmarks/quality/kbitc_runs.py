"""kbitc: compiled to a peer's bits, dequantized, and scored by the same evaluator.

The one thing to know: for the comparison of linears alone the embedding (and a head that is not tied to it)
is pinned at 16 bits: its other options are struck from the score table of an artifact of these settings,
the allocator spends the peer's total bytes on what is left, and ``kbitc compile --plan`` gets the plan.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kbitc
from benchmarks.peers import last_line
from benchmarks.quality.campaign import Campaign, digest, digest_of_files, run, whole, write_json
from benchmarks.quality.counting import embeddings
from benchmarks.quality.peer_runs import Outcome, remembered
from benchmarks.quality.settings import LINEARS, SHIPPED
from kbitc.artifact.loading import load
from kbitc.errors import KbitcError, UsageError
from kbitc.evaluation.opening import open_model
from kbitc.planning.allocation import allocate
from kbitc.sensitivity.score_table import ScoreTable
from kbitc.system.json_file import read_json

TABLE_BITS = 4.0  # of the artifact whose score table pinned plans are made from
SOURCES = ("*.py", "*.cpp", "*.h")
DIGITS = 6  # of a budget, rounded down

Setting = tuple[str, Sequence[str]]
"""A label, and arguments of ``kbitc compile``."""


def shipped_outcome(campaign: Campaign, setting: Setting, bits: float) -> Outcome:
    """Of kbitc at a budget, free to choose every weight's format."""
    budget = f"{math.floor(bits * 10**DIGITS) / 10**DIGITS:.{DIGITS}f}"
    what = [SHIPPED, list(setting[1]), budget, code_digest()]
    return remembered(campaign, what, lambda: _outcome(campaign, setting, ["--bits", budget]))


def linears_outcome(campaign: Campaign, setting: Setting, bits: float) -> Outcome:
    """Of kbitc at a total budget with the embedding at 16 bits."""
    what = [LINEARS, list(setting[1]), bits, code_digest()]
    return remembered(campaign, what, lambda: _linears_outcome(campaign, setting, bits))


def _linears_outcome(campaign: Campaign, setting: Setting, bits: float) -> Outcome:
    try:
        table = _compiled(campaign, setting, ["--bits", str(TABLE_BITS)])
        names = embeddings(open_model(str(campaign.model), torch.float32).model)
        plan = pinned_plan(ScoreTable.open(table / "artifact"), names, bits)
    except (OSError, RuntimeError, ValueError, KbitcError) as error:
        return Outcome(setting[0], reason=last_line(error))
    file = campaign.work / f"plan-{digest(plan)}.json"
    write_json(file, plan)
    return _outcome(campaign, setting, ["--plan", str(file)])


def pinned_plan(scores: ScoreTable, names: Sequence[str], bits: float) -> dict[str, Any]:
    """The best plan in which some weights stay at 16 bits.

    Args:
        scores: options of every weight.
        names: of the weights to leave alone.
        bits: stored bits per parameter of the whole model, those weights included.

    Raises:
        UsageError: the table has no such option for one of them.
        BudgetError: no plan meets the budget.
    """
    options = dict(scores.options)
    for name in names:
        options[name] = tuple(option for option in options.get(name, ()) if option.spec.is_left_alone)
        if not options[name]:
            raise UsageError(f"{name}: the score table has no 16-bit option, so it cannot be pinned")
    plan, _ = allocate(replace(scores, options=options), bits)
    return plan.to_json()


def _outcome(campaign: Campaign, setting: Setting, goal: Sequence[str]) -> Outcome:
    label, arguments = setting
    try:
        folder = _compiled(campaign, setting, goal)
        scores = campaign.scores(folder, lambda: dense_artifact(folder / "artifact"))
    except (OSError, RuntimeError, ValueError, KbitcError) as error:
        return Outcome(label, reason=last_line(error))
    result = read_json(folder / "result.json")
    return Outcome(
        label,
        result["bits_per_param"],
        scores,
        result["seconds"],
        result["peak_bytes"],
        (" ".join(arguments),),
    )


def _compiled(campaign: Campaign, setting: Setting, goal: Sequence[str]) -> Path:
    """The folder with ``artifact`` and ``result.json``, of this source of kbitc; made if need be."""
    _, arguments = setting
    folder = campaign.kept("kbitc", [list(arguments), list(goal), code_digest()])
    if folder.exists():
        return folder
    with whole(folder) as partial:
        partial.mkdir()
        peak = partial / "peak"
        command = [sys.executable, "-m", "benchmarks.quality.measured", str(peak)]
        command += ["compile", str(campaign.model), *goal, *arguments]
        command += ["--calibrate", str(campaign.calibration), "-o", str(partial / "artifact"), "--json"]
        ran = run(command, {"OMP_NUM_THREADS": str(campaign.threads)})
        said = json.loads(ran.out)
        result = {"bits_per_param": said["bits_per_param"], "seconds": ran.seconds}
        write_json(partial / "result.json", {**result, "peak_bytes": int(peak.read_text(encoding="ascii"))})
    return folder


def code_digest() -> str:
    """Of kbitc's own source: another one compiles anew."""
    root = Path(kbitc.__file__).parent
    folders = (root, *(root / name for name in ("passes", "kernels", "backends")))
    return digest([digest_of_files(folder.resolve(), SOURCES) for folder in folders])


def dense_artifact(folder: Path) -> Mapping[str, Tensor]:
    """Every parameter of an artifact, dequantized to float32."""
    model: Any = load(folder, dtype=torch.float32)
    return {name: own.detach() for name, own in model.dequantize(torch.float32).named_parameters()}
