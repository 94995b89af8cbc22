"""The page of an artifact: complete, valid, escaped, self-contained, and small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from markupsafe import Markup

from kbitc.artifact.evaluations import Evaluation
from kbitc.artifact.plan_file import PlanFile
from kbitc.compiler import inspection
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import SourceError, UsageError
from kbitc.formats.spec import parse
from kbitc.report.artifact_page import artifact_page
from kbitc.report.page import Section
from kbitc.sensitivity.score_table import Option, ScoreTable


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "demo-4bit"
    # Without text: the page is the same, and no model runs.
    compile_to("demo", out, Request(bits=4.0, calibrate="none"))
    return out


def test_every_artifact_has_a_whole_page(artifact, check):
    html = (artifact / "report.html").read_text()
    page = check(html)
    assert len(html) < 400_000
    plan = json.loads((artifact / "kbit_plan.json").read_text())
    text = "".join(page.text)
    for name, entry in plan["weights"].items():
        assert text.count(name) >= 2, name  # a cell's title and the table's row at least
        assert entry["reason"] in text
    for name in plan["left_alone"]:
        assert name in text
    assert page.tags["figure"] == 3
    assert [step["name"] for step in plan["passes"]] == list(
        ("canonicalize", "score_sensitivity", "allocate_bits")
    )
    assert f"+{plan['predicted']['cost']:.4g}" in text
    assert plan["predicted"]["gap"] < 1e-3
    assert "before the passes, as captured" in text


def test_inspect_writes_the_page_again_with_measured_losses(artifact, tmp_path, check):
    entry = {
        "model": "uniform", "text": "t.txt", "context": 8, "tokens": 7, "bits_per_param": 4.5, "loss": 3.25,
        "reference_loss": 3.0, "kl_divergence": 0.2,
    }  # fmt: skip
    other = tmp_path / "other.json"
    other.write_text(json.dumps(entry))
    page = check(inspection.inspect(str(artifact), with_graph=True, measured=[other]).html())
    assert {"+0.25000", "25.7903", "0.200000"} <= set(page.text)
    (artifact / "kbit_scores.json").rename(tmp_path / "scores.json")
    try:
        without = inspection.inspect(str(artifact)).html()
    finally:
        (tmp_path / "scores.json").rename(artifact / "kbit_scores.json")
    assert check(without).tags["figure"] == 2
    with pytest.raises(UsageError, match=r"--measured: demo is not compiled"):
        inspection.inspect("demo", measured=[other])


def scores_of(names, *, unit="nats per token"):
    """Three sizes each; costs fall with bytes."""
    options = {
        name: tuple(
            Option(parse(spec), 1000 * bits, (i + 1) * 10.0**-bits, 0.5**bits)
            for spec, bits in (("int2:64", 2), ("int4:64", 4), ("int8:64", 8), ("fp16", 16))
        )
        for i, name in enumerate(names)
    }
    return ScoreTable(options, dict.fromkeys(names, 8000), 100, 8000 * len(names) + 50, "fisher", unit)


def plan_of(names, *, reason="why", **facts):
    entry = {"spec": "int4:64", "bits": 4.0, "error": 0.1, "reason": reason, "shape": [80, 100]}
    entry |= {"dtype": "float16", "is_transposed": False, "aliases": []}
    data = {
        "format": 1,
        "kbitc": "1",
        "source": {"name": "model", "sha256": None},
        "budget": 4.0,
        "parameters": 8000 * max(1, len(names)),
        "bytes": 4000 * max(1, len(names)),
        "source_bytes": 16000 * len(names),
        "bits_per_param": 4.0,
        "weights": {name: dict(entry) for name in names},
        "left_alone": {},
        "checksums": {},
        **facts,
    }
    return PlanFile.from_json(data, Path("kbit_plan.json"))


def test_hostile_names_are_escaped(check, evil):
    plan = plan_of(
        [evil],
        reason=evil,
        source={"name": evil, "sha256": None},
        calibration=evil,
        left_alone={evil: {"reason": evil, "shape": [1], "aliases": []}},
        passes=[{"name": evil, "nodes_before": 1, "nodes_after": 1, "changes": evil}],
        fusions={evil: {"groups": [[evil]], "left": {evil: evil}}},
        predicted={"cost": 0.1, "unit": evil, "gap": 0.0},
    )
    losses = [Evaluation(evil, evil, 8, 7, 4.0, 3.0, reference_loss=2.9, divergence=0.1)]
    page = check(artifact_page(plan, scores_of([evil], unit=evil), losses))
    assert page.tags["script"] == 1  # our own
    assert "".join(page.text).count(evil) >= 8
    nats = check(artifact_page(plan, scores_of([evil]), losses))
    assert any(f"{evil} on {evil}: 4.000 bits" in text for text in nats.text)


def test_a_model_of_211_weights_stays_below_a_megabyte(check):
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(30) for part in parts]
    plan = plan_of(names)
    html = artifact_page(plan, scores_of(names))
    assert len(html) < 1_000_000
    check(html)


def test_sections_of_others_have_their_place(check):
    section = Section("A & B", Markup("<figure><svg role=img></svg></figure>"))
    html = artifact_page(plan_of(["w"]), sections=[section, Section("empty", Markup())])
    page = check(html)
    assert "A & B" in page.text
    assert "empty" not in page.text


def test_a_plan_without_a_score_table_or_weights(check):
    check(artifact_page(plan_of(["a.0.w"])))
    check(artifact_page(plan_of([])))


ALTERED = [
    {"index": ["<script>alert(1)</script>"], "magnitude": [1.0], "reason": ""},
    {"index": [1], "magnitude": ["<script>alert(1)</script>"], "reason": ""},
    {"index": [1], "magnitude": [1.0, 2.0], "reason": ""},
    {"index": [1], "kept": "<script>", "reason": ""},
    {"reason": ""},
    [1],
]


@pytest.mark.parametrize("features", ALTERED, ids=range(len(ALTERED)))
def test_no_script_of_an_altered_plan_gets_into_its_page(artifact, features, tmp_path):
    """Outlier features are numbers, or the plan is damaged."""
    folder = shutil.copytree(artifact, tmp_path / "out")
    plan = json.loads((folder / "kbit_plan.json").read_text())
    next(iter(plan["weights"].values()))["outlier_features"] = features
    (folder / "kbit_plan.json").write_text(json.dumps(plan))
    with pytest.raises(SourceError, match=r"kbit_plan\.json: damaged"):
        inspection.inspect(str(folder))


def test_text_of_an_altered_plan_is_escaped(artifact, check, evil, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "out")
    plan = json.loads((folder / "kbit_plan.json").read_text())
    first = next(iter(plan["weights"].values()))
    first |= {"reason": evil, "aliases": [evil], "quantizer": evil}
    first["outlier_features"] = {"index": [1], "magnitude": [2.0], "reason": evil, "kept": 1}
    plan |= {
        "calibration": evil,
        "kbitc": evil,
        "fusions": {evil: {"groups": [[evil]], "left": {evil: evil}}},
    }
    plan["passes"] = [{"name": evil, "nodes_before": 1, "nodes_after": 1, "changes": evil}]
    plan["source"]["name"] = evil
    (folder / "kbit_plan.json").write_text(json.dumps(plan))
    html = inspection.inspect(str(folder)).html()
    check(html)
    assert "alert(1)" not in html.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
