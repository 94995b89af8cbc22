"""The text files of an artifact: plan, report, score table, and the config's quantization entry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kbitc.artifact.folders import PLAN_FILE, REPORT_FILE
from kbitc.artifact.plan_file import PlanFile
from kbitc.artifact.transformers_quantizer import quantization_config
from kbitc.report.artifact_page import artifact_page
from kbitc.report.page import Section
from kbitc.sensitivity.score_table import SCORES_FILE, ScoreTable
from kbitc.system.checksums import digest, sealed


def documents(
    plan: PlanFile,
    config: dict[str, Any] | None,
    scores: ScoreTable | None = None,
    sections: Sequence[Section] = (),
    digests: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """File names to contents.

    Args:
        plan: what the artifact holds, and why.
        config: the model's ``config.json``, if it has one.
        scores: the table that the plan was made from, if it was.
        sections: of the report, beside those that follow from the above.
        digests: of every other file of the artifact; the plan then names them and these.
    """
    files = {REPORT_FILE: artifact_page(plan, scores, (), sections)}
    if scores is not None:
        files[SCORES_FILE] = json.dumps(scores.to_json()) + "\n"
    if config is not None:
        entry = {"quantization_config": quantization_config(plan)}
        files["config.json"] = json.dumps(config | entry, indent=2) + "\n"
    own = {name: digest(text.encode()) for name, text in files.items()}
    whole = replace(plan, files={**(digests or {}), **own})
    return files | {PLAN_FILE: json.dumps(sealed(whole.to_json()), indent=1) + "\n"}
