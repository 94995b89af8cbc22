"""The page of a run of passes: layers once, every spec, diffs that end."""

from __future__ import annotations

import re

import pytest

from kbitc.graph.capture import capture
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.pipeline.manager import PassManager
from kbitc.report import passes_page
from kbitc.report.passes_page import PassesPage


def page_of(model, rules):
    page = PassesPage("a <model>")
    manager = PassManager(["canonicalize", ApplyPlan({"weights": rules})], observe=page, is_checked=True)
    return page.html(manager.run(capture(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_the_page_draws_layers_once_and_names_every_spec(tiny_model, family, check):
    html = page_of(tiny_model(family, is_meta=True), {"*.1.*": "int3:32", "*": "nf4:64"})
    check(html)
    assert "a &lt;model&gt;" in html
    assert "<model>" not in html
    for tag in ("details", "pre", "table", "summary", "ins", "del", "code"):
        assert html.count(f"<{tag}>") + html.count(f"<{tag} ") == html.count(f"</{tag}>"), tag
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    if family != "t5":  # its first layer alone has position biases
        assert "<code>0 … 1 (2 alike)</code>" in html
        assert "<b>1 × nf4:64, 1 × int3:32</b>" in html


def test_a_long_diff_is_cut(tiny_model, monkeypatch):
    monkeypatch.setattr(passes_page, "MOST_LINES", 10)
    html = page_of(tiny_model("llama", is_meta=True), {"*": "nf4:64"})
    assert re.search(r"\.\.\. and \d+ lines more", html)


def test_a_diff_keeps_its_lines_and_marks_what_came_and_went(tiny_model):
    html = page_of(tiny_model("llama", is_meta=True), {"*": "nf4:64"})
    lines = html.partition("changes of <code>apply_plan</code></summary><pre>\n")[2].partition("</pre>")[0]
    kinds = {
        re.sub(r"^(<ins>\+|<del>-|@@| ).*?(</ins>|</del>|)$", r"\1\2", line) for line in lines.splitlines()
    }
    assert kinds == {"<ins>+</ins>", "<del>-</del>", "@@", " "}


def test_a_pass_that_changed_nothing_says_so(tiny_model):
    page = PassesPage("model")
    manager = PassManager(["canonicalize"], observe=page)
    program = manager.run(capture(tiny_model("llama", is_meta=True)))
    page.runs = [(step, "") for step, _ in page.runs]
    assert "<pre>\nthe program's text is the same\n</pre>" in page.html(program)
