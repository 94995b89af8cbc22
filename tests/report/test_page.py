"""The frame that every page is in, and what each page of a hostile model keeps to."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError
from markupsafe import Markup
from torch import nn

from kbitc.artifact.plan_file import LeftAlone, PassEntry, PlanFile, WeightEntry
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.plan import Choice
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.pipeline.manager import PassManager
from kbitc.report.artifact_page import artifact_page
from kbitc.report.model_page import model_page
from kbitc.report.module_tree import graph_section
from kbitc.report.page import Cell, Section, page, render, table
from kbitc.report.passes_page import PassesPage
from kbitc.sensitivity.outliers import OutlierFeatures

REPORT = resources.files("kbitc.report")


@pytest.fixture(scope="module")
def pages(evil):
    """Every page of one model, whose modules have a hostile name: by name of the page."""
    model = nn.Sequential()
    model.add_module(evil, nn.Linear(8, 6))
    model.add_module("plain", nn.Linear(6, 4))
    captured = capture(model.requires_grad_(False), (torch.zeros(2, 8),))
    passes = PassesPage(evil)
    program = PassManager(["canonicalize", ApplyPlan({"weights": {"*": "nf4:4"}})], observe=passes).run(
        captured
    )
    features = {name: OutlierFeatures((1, 3), {"magnitude": (2.0, 5.0)}) for name in program.weights}
    plan = PlanFile(
        source=evil,
        source_hash=None,
        parameters=90,
        nbytes=60,
        source_bytes=180,
        weights={
            name: WeightEntry(
                Choice(parse("nf4:4"), evil, 0.1, 4.0),
                weight.shape,
                weight.dtype,
                outlier_features=features[name].to_json(),
            )
            for name, weight in program.weights.items()
        },
        left_alone={name: LeftAlone(evil, rest.shape) for name, rest in program.rest.items()},
        checksums={},
        calibration=evil,
        passes=(PassEntry(evil, 1, 2, evil),),
    )
    graph = graph_section(captured, program)
    return {
        "artifact": artifact_page(plan, sections=[graph]),
        "model": model_page(evil, program, features, [graph]),
        "passes": passes.html(program),
    }


@pytest.mark.parametrize("name", ["artifact", "model", "passes"])
def test_every_page_is_escaped_valid_and_under_the_policy(pages, name, check, evil):
    seen = check(pages[name])
    text = "".join(seen.text)
    assert text.count(f"{evil}.weight") >= 2
    assert seen.tags["script"] == (name != "passes")
    assert seen.tags["title"] > 0
    assert "alert(1)" not in pages[name].replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert "49{% raw" not in text  # not a template of ours
    assert "&amp;lt;" not in pages[name]  # nor escaped twice


def test_only_the_templates_have_markup():
    """What a page's code gives is text: `Markup` is made of templates and of our own files alone."""
    for path in Path(str(REPORT)).glob("*.py"):
        source = path.read_text(encoding="utf-8")
        made = source.count("Markup(") - source.count("Markup()")
        assert made == (2 if path.name == "page.py" else 0), path.name
        assert "html.escape" not in source
    for path in Path(str(REPORT / "templates")).iterdir():
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape", source), path.name


def test_a_section_without_a_body_is_left_out(check):
    seen = check(page("t", "s", {}, [Section("a", Markup("<p>b</p>")), Section("c", Markup())]))
    assert seen.ids == ["s0"]
    assert seen.links == ["#s0"]


def test_a_table_sorts_and_filters_where_it_has_a_name(check):
    rows = [["<b>", Cell("1.5", 1.5)], [Cell("note", code="spec"), Cell(share=0.5)]]
    plain, named = (table(("text", "number"), rows, name=name) for name in ("", "own"))
    for html in (plain, named):
        assert '<td>&lt;b&gt;</td><td class=n data-v="1.5">1.5</td>' in html
        assert "<td class=s><code>spec</code>note</td>" in html
        assert '<rect width="50.0" height=1 />' in html
    assert "button" not in plain
    seen = check(page("t", "s", {}, [Section("a", named), Section("b", plain)]))
    assert (seen.tags["button"], seen.tags["script"]) == (2, 1)
    assert {"own-search", "own-count"} <= set(seen.ids)


def test_a_template_that_asks_for_more_than_it_is_given_fails():
    with pytest.raises(UndefinedError, match="by_reason"):
        render("left_alone")
