"""The page of an artifact: complete, valid, escaped, self-contained, and small."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from kbitc.report.measured_losses import Measured, keep_record, of_artifact

from kbitc.compiler import inspection
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import UsageError
from kbitc.formats.spec import parse
from kbitc.report.artifact_page import artifact_page
from kbitc.report.page import Section
from kbitc.sensitivity.score_table import Option, ScoreTable

VOID = {"meta", "input", "br"}
EVIL = "<script>alert(1)</script>'\"{0}.weight"


class Checker(HTMLParser):
    """Fails on tags that do not nest; gathers text, ids and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.tags = [], [], [], [], Counter()
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for key, value in attrs:
            assert not key.startswith("on"), (tag, key)
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def check(html):
    """A valid page that fetches nothing."""
    page = Checker(html)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|//|@import|url\(", html.partition("</style>")[2].partition("<script>")[0])
    assert "http" not in html.replace("http-equiv", "")
    return page


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "demo-4bit"
    # Without text: the page is the same, and no model runs.
    compile_to("demo", out, Request(bits=4.0, calibrate="none"))
    return out


def test_every_artifact_has_a_whole_page(artifact):
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
    assert page.tags["svg"] == 3
    assert [step["name"] for step in plan["passes"]] == list(
        ("canonicalize", "score_sensitivity", "allocate_bits")
    )
    assert f"+{plan['predicted']['cost']:.4g}" in text
    assert plan["predicted"]["gap"] < 1e-3
    assert "before the passes, as captured" in text


def test_inspect_writes_the_page_again_with_measured_losses(artifact, tmp_path):
    entry = {
        "model": "uniform", "text": "t.txt", "context": 8, "tokens": 7, "bits_per_param": 4.5, "loss": 3.25,
        "reference_loss": 3.0, "kl_divergence": 0.2,
    }  # fmt: skip
    other = tmp_path / "other.json"
    other.write_text(json.dumps(entry))
    found = inspection.inspect(str(artifact), with_graph=True, measured=[other])
    page = check(found.html())
    assert {"+0.25000", "25.7903", "0.200000"} <= set(page.text)
    (artifact / "kbit_scores.json").rename(tmp_path / "scores.json")
    try:
        without = inspection.inspect(str(artifact)).html()
    finally:
        (tmp_path / "scores.json").rename(artifact / "kbit_scores.json")
    assert check(without).tags["svg"] == 2
    with pytest.raises(UsageError, match=r"--measured: demo is not compiled"):
        inspection.inspect("demo", measured=[other])


def test_a_model_has_a_page_before_it_is_compiled():
    found = inspection.inspect("demo")
    html = found.html()
    page = check(html)
    assert all(name in html for name in found.program.weights)
    assert "nf4:64+dq" in page.text


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


def plan_of(names, **facts):
    entry = {"spec": "int4:64", "bits": 4.0, "error": 0.1, "reason": "why", "shape": [80, 100]}
    return {
        "kbitc": "1",
        "source": {"name": "model"},
        "budget": 4.0,
        "parameters": 8000 * len(names),
        "bytes": 4000 * len(names),
        "source_bytes": 16000 * len(names),
        "bits_per_param": 4.0,
        "weights": {name: dict(entry) for name in names},
        "left_alone": {},
        **facts,
    }


def test_hostile_names_are_escaped():
    plan = plan_of(
        [EVIL],
        source={"name": EVIL},
        calibration=EVIL,
        left_alone={EVIL: {"reason": EVIL, "shape": [1]}},
        passes=[{"name": EVIL, "nodes_before": 1, "nodes_after": 1, "changes": EVIL}],
        predicted={"cost": 0.1, "unit": EVIL, "gap": 0.0},
    )
    plan["weights"][EVIL]["reason"] = EVIL
    losses = [Measured(EVIL, EVIL, 8, 7, 4.0, 3.0, 2.9, 0.1)]
    page = check(artifact_page(plan, scores_of([EVIL], unit=EVIL), losses))
    assert page.tags["script"] == 1  # our own
    assert "".join(page.text).count(EVIL) >= 8


def test_a_model_of_211_weights_stays_below_a_megabyte():
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(30) for part in parts]
    plan = plan_of(names)
    html = artifact_page(plan, scores_of(names))
    assert len(html) < 1_000_000
    check(html)


def test_sections_of_others_have_their_place():
    from markupsafe import Markup

    section = Section("A & B", Markup("<figure><svg role=img></svg></figure>"))
    html = artifact_page(plan_of(["w"]), sections=[section, Section("empty", Markup())])
    page = check(html)
    assert "A & B" in page.text
    assert "empty" not in page.text


def test_a_plan_without_a_score_table_or_weights():
    check(artifact_page(plan_of(["a.0.w"])))
    plan = plan_of(["w"]) | {"weights": {}}
    check(artifact_page(plan))


def test_records_replace_those_of_the_same_text(tmp_path):
    entry = {"model": "m", "text": "t", "context": 8, "tokens": 7, "bits_per_param": 4.0, "loss": 3.0}
    keep_record(tmp_path, entry)
    keep_record(tmp_path, entry | {"loss": 2.0})
    keep_record(tmp_path, entry | {"text": "u"})
    found = of_artifact(tmp_path)
    assert [(m.text, m.loss) for m in found] == [("t", 2.0), ("u", 3.0)]
    assert found[0].increase is None
    (tmp_path / "kbit_eval.json").write_text('{"model": 1}')
    with pytest.raises(UsageError, match=r"not a result of 'kbitc eval --json' \(KeyError: 'context'\)"):
        of_artifact(tmp_path)
