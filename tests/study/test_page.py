"""The page of a study: valid, self-contained, with every plot beside it; few sizes, hostile names."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kbitc.errors import UsageError
from kbitc.study.page import findings_of, study_page

REPORT = Path(__file__).parent.parent / "report" / "conftest.py"


@pytest.fixture(scope="module")
def check():
    """What every page is held against."""
    spec = importlib.util.spec_from_file_location("report_checks", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check_page


@pytest.fixture(scope="module")
def made(rows):
    reference = [row for row in rows if row.type in ("fp+paper", "fp16") or row.block == 64]
    return study_page(reference)


def test_the_page_is_valid_and_loads_nothing(made, check):
    html, plots, _ = made
    seen = check(html)
    assert html.count("<svg class=plot") == len(plots.drawn) == 5
    assert sum(link.startswith("#total-precision-") for link in seen.links) > 10, (
        "marks are drawn by reference"
    )


def test_every_plot_draws_something(made):
    html, _, _ = made
    for drawn in re.findall(r"<svg class=plot.*?</svg>", html, re.DOTALL):
        assert drawn.count("<path") > 20
        assert "bits of a code" in drawn
        assert "style=" not in drawn


def test_plots_lie_beside_as_png(made, tmp_path):
    _, plots, _ = made
    paths = plots.write_beside(tmp_path / "report.html")
    assert len(paths) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert all(path.name.startswith("report-") for path in paths)


def test_what_the_page_says(made):
    html, _, found = made
    for text in ("The paper", "(Mis)Fitting checklist", "Every job", "best precision at a budget", "α", "δ"):
        assert text in html, text
    for question in ("Which objective?", "How are parameters counted?", "Does it extrapolate?"):
        assert question in html, question
    assert found.joint.parameters["α"].value == pytest.approx(0.3, rel=0.1)
    assert found.joint.parameters["γ"].value == pytest.approx(1.1, rel=0.1)


def test_fewer_than_four_sizes_are_no_fit_but_a_table(rows, check):
    few = [row for row in rows if row.parameters <= 400_000 and row.type in ("int", "fp16")]
    html, plots, found = study_page(few)
    check(html)
    assert "3 models; a fit takes 4 sizes or more" in html
    assert "Every job" in html
    assert set(plots.drawn) == {"total-precision", "paper-precision", "types"}
    assert found.joint.reason


def test_one_model_is_a_table(rows, check):
    html, _, _ = study_page([row for row in rows if row.parameters == 100_000 and row.block in (0, 64)])
    check(html)
    assert "there is no curve over sizes" in html


def test_names_cannot_end_a_tag(rows, check):
    evil = "<script>alert(1)</script>'\"{{7*7}}"
    few = [replace(row, model=evil, text=evil) for row in rows if row.parameters <= 200_000]
    html, _, _ = study_page([row for row in few if row.type in ("int", "fp16")])
    check(html)
    assert "<script>alert" not in html


def test_tables_that_say_nothing(rows):
    with pytest.raises(UsageError, match="no job with a finite loss"):
        findings_of([replace(rows[0], loss=None)])
    with pytest.raises(UsageError, match="16-bit models alone"):
        findings_of(rows[:1])
    with pytest.raises(UsageError, match="--family"):
        findings_of(rows, family="gpt2")
