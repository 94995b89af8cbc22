"""The text files of an artifact: plan, report, and the config's quantization entry.

The one thing to know: they hold no times and no paths, so that equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kbitc.artifact import FORMAT, PLAN_FILE
from kbitc.huggingface import quantization_config
from kbitc.page import Section
from kbitc.plan import Choice
from kbitc.report import render
from kbitc.scores import SCORES_FILE, Scores
from kbitc.version import VERSION


def weight_entry(
    choice: Choice,
    shape: Sequence[int],
    dtype: torch.dtype,
    aliases: Sequence[str],
    *,
    is_transposed: bool,
) -> dict[str, Any]:
    """What the plan file says of one weight: the choice, and what loading needs."""
    return choice.to_json() | {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "is_transposed": is_transposed,
        "aliases": list(aliases),
    }


def documents(
    facts: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Any]],
    left_alone: Mapping[str, Mapping[str, Any]],
    checksums: Mapping[str, str],
    config: dict[str, Any] | None,
    scores: Scores | None = None,
    sections: Sequence[Section] = (),
) -> dict[str, str]:
    """File names to contents.

    Args:
        facts: source, budget, calibration, prediction, passes, parameters, bytes, source_bytes, fusions.
        weights: :func:`weight_entry` by name.
        left_alone: shape and reason of everything else, by name.
        checksums: SHA-256 by stored name.
        config: the model's ``config.json``, if it has one.
        scores: the table that the plan was made from, if it was.
        sections: of the report, beside those that follow from the above.
    """
    plan: dict[str, Any] = {
        "format": FORMAT,
        "kbitc": VERSION,
        **facts,
        "bits_per_param": 8 * facts["bytes"] / facts["parameters"],
        "weights": dict(weights),
        "left_alone": dict(left_alone),
        "checksums": dict(sorted(checksums.items())),
    }
    files = {PLAN_FILE: json.dumps(plan, indent=1) + "\n", "report.html": render(plan, scores, (), sections)}
    if scores is not None:
        files[SCORES_FILE] = json.dumps(scores.to_json()) + "\n"
    if config is not None:
        entry = {"quantization_config": quantization_config(plan)}
        files["config.json"] = json.dumps(config | entry, indent=2) + "\n"
    return files
