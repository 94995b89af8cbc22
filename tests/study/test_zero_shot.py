"""Accuracies of a study: those of the evaluation, in columns of their own, compared where examples agree."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.harness import score_tasks
from kbitc.evaluation.opening import open_model
from kbitc.evaluation.perplexity import read_text
from kbitc.study.advise import advise
from kbitc.study.claims import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, correlation, judged, reference_of
from kbitc.study.curves import ACCURACY, best_precision, families
from kbitc.study.grid import Grid
from kbitc.study.ledger import FORMAT_KEY, Ledger, read_table, write_table
from kbitc.study.page import study_page
from kbitc.study.sweep import Study, sweep
from kbitc.study.zero_shot import Tasks, mean_accuracy, parse_tasks

COPA = [
    {
        "query": "The file was missing, because",
        "choices": ["it was deleted.", "the sun was high."],
        "gold": 0,
    },
    {"query": "The loop ended, therefore", "choices": ["it rained.", "the function returned."], "gold": 1},
    {"query": "The list was empty, so", "choices": ["its length was zero.", "the cat slept."], "gold": 1},
]
LAMBADA = [
    {"context": "The function returns a list of all the", "continuation": "names"},
    {"context": "If the argument is", "continuation": "not"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("copa", COPA), ("lambada_openai", LAMBADA)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study(text, tasks, grid=None):
    return Study(
        grid or Grid([3], ["int"], [64]), read_text(text), text.name, context=64, limit=256, tasks=tasks
    )


@pytest.fixture(scope="module")
def swept(text, data, tmp_path_factory):
    table = tmp_path_factory.mktemp("sweep") / "r.parquet"
    sweep(["demo"], study(text, None), table)
    tasks = Tasks(["lambada_openai", "copa"], data)
    return table, tasks, sweep(["demo"], study(text, tasks), table)


def test_accuracies_are_those_of_the_evaluation(swept, data):
    table, tasks, outcome = swept
    assert (outcome.ran, outcome.known, len(outcome.rows)) == (2, 0, 4), "tasks make other jobs"
    (row,) = [row for row in outcome.rows if row.bits == 16 and row.tasks]
    scores = score_tasks(open_model("demo", torch.float32), ["lambada_openai", "copa"], data)
    assert {score.task: list(score.hits) for score in scores} == row.hits
    assert (row.accuracy, row.accuracy_error) == mean_accuracy(row.hits)
    assert row.tasks == tasks.label
    assert row.tasks.startswith("lambada_openai[2] copa[3], 0 shots, ")
    plain = next(row for row in outcome.rows if row.bits == 16 and not row.tasks)
    assert (plain.accuracy, plain.accuracy_error, plain.hits) == (None, None, {})
    assert plain.loss == row.loss


def test_a_column_a_task(swept):
    from pyarrow import parquet

    table, _, outcome = swept
    columns = parquet.read_table(table).to_pylist()
    own = next(row for row in columns if row["bits"] == 16 and row["tasks"])
    hits = np.array(own["hits_copa"])
    assert own["accuracy_copa"] == pytest.approx(hits.mean())
    assert own["accuracy_copa_error"] == pytest.approx(hits.std(ddof=1) / np.sqrt(3))
    assert own["accuracy"] == pytest.approx((own["accuracy_copa"] + own["accuracy_lambada_openai"]) / 2)
    assert list(map(asdict, read_table(table))) == list(map(asdict, outcome.rows))


def test_tables_of_before_there_were_tasks_are_read(swept, tmp_path):
    """Their accuracies are not measured; whatever else they say is as it was."""
    from pyarrow import parquet

    table, _, outcome = swept
    plain = [row for row in outcome.rows if not row.tasks]
    write_table(tmp_path / "new.parquet", plain)
    new = parquet.read_table(tmp_path / "new.parquet")
    old = new.drop_columns(["tasks", "accuracy", "accuracy_error", "lm_eval"])
    parquet.write_table(old.replace_schema_metadata({FORMAT_KEY: b"1"}), tmp_path / "old.parquet")
    assert read_table(tmp_path / "old.parquet") == plain
    short = old.drop_columns(["loss"]).replace_schema_metadata({FORMAT_KEY: b"1"})
    parquet.write_table(short, tmp_path / "short.parquet")
    with pytest.raises(SourceError, match="not those of a sweep"):
        read_table(tmp_path / "short.parquet")


def test_jobs_of_before_there_were_tasks_are_read(tmp_path, make_row):
    ledger = Ledger(tmp_path / "t.parquet")
    with ledger.held():
        ledger.add(make_row(100_000, 4))
    (path,) = ledger.folder.glob("*.json")
    kept = json.loads(path.read_text())
    for name in ("tasks", "accuracy", "accuracy_error", "hits", "lm_eval"):
        del kept[name]
    path.write_text(json.dumps(kept))
    assert ledger.rows() == [make_row(100_000, 4)]


def test_what_decides_an_accuracy_is_in_the_hash(text, data, tmp_path):
    plain = study(text, None)
    treatment = plain.grid.treatments()[1]
    keys = [study(text, tasks).key("f", treatment) for tasks in (
        None, Tasks(["copa"], data), Tasks(["copa"], data, limit=2), Tasks(["copa"], data, shots=1),
        Tasks(["copa", "lambada_openai"], data),
    )]  # fmt: skip
    assert len(set(keys)) == 5
    assert study(text, Tasks(["lambada_openai", "copa"], data)).key("f", treatment) == keys[-1]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in COPA[::-1]))
    assert study(text, Tasks(["copa"], tmp_path)).key("f", treatment) not in keys


def test_bad_tasks_are_said_before_a_model_is_opened(text, data, tmp_path):
    for tasks, said in (
        (Tasks(["copaa"], data), "did you mean 'copa'"),
        (Tasks(["piqa"], data), r"piqa.jsonl"),
        (Tasks(["copa"], data, shots=3), "--shots 3"),
    ):
        with pytest.raises(UsageError, match=said):
            sweep([str(tmp_path / "nowhere")], study(text, tasks), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="--limit: is of zero-shot tasks"):
        parse_tasks("", data, 0, 5)
    with pytest.raises(UsageError, match="--shots: is of zero-shot tasks"):
        parse_tasks("", data, 1, None)


def test_a_model_of_no_finite_loss_has_no_accuracy(text, data, tmp_path, monkeypatch):
    from kbitc.study.subject import Scored, Subject

    monkeypatch.setattr(Subject, "score", lambda _: Scored((), None, None))
    (row,) = sweep(
        ["demo"], study(text, Tasks(["copa"], data), Grid([], [], [])), tmp_path / "t.parquet"
    ).rows
    assert (row.loss, row.accuracy, row.hits, row.tasks) == (None, None, {}, "")


def with_hits(rows, chance, tasks="a[200] b[200], 0 shots, 0", count=200):
    """Rows whose examples are right with a chance; each example is as hard for all of them."""
    hard = np.random.default_rng(0).random((2, count))
    made = []
    for row in rows:
        hits = {name: (hard[i] < chance(row)).astype(int).tolist() for i, name in enumerate("ab")}
        accuracy, error = mean_accuracy(hits)
        own = {"accuracy": accuracy, "accuracy_error": error, "hits": hits, "tasks": tasks}
        made.append(replace(row, **own, key=row.key + tasks))
    return made


def zero_shot(rows):
    (family,) = families(rows).values()
    return next(claim for claim in judged(family, reference_of(family)) if "zero-shot" in claim.text)


def test_whether_loss_and_accuracy_agree(rows):
    few = [row for row in rows if row.block in (0, 64)]
    agree = zero_shot(with_hits(few, lambda row: 1.2 - row.loss / 6))
    assert agree.verdict == REPRODUCED
    assert "a[200] b[200]" in agree.evidence
    assert "by accuracy" in agree.evidence
    assert zero_shot(with_hits(few, lambda row: row.loss / 7)).verdict == NOT_REPRODUCED
    assert zero_shot(with_hits(few, lambda row: 0.5)).verdict == NOT_TESTABLE
    assert zero_shot(few).verdict == NOT_TESTABLE


def test_the_correlation_is_pearsons(rows):
    scored = families(with_hits([r for r in rows if r.type == "int"], lambda row: 1.2 - row.loss / 6))
    (family,) = scored.values()
    own = correlation(family.by_accuracy())
    expected = np.corrcoef([r.loss for r in family.rows], [r.accuracy for r in family.rows])[0, 1]
    assert own.value == pytest.approx(expected)
    assert own.low <= own.value <= own.high < 0


def test_the_best_precision_by_accuracy(rows):
    """Curves of accuracies interpolate what was measured, and the most accurate precision wins."""
    own = [row for row in rows if row.type == "fp+paper" and row.block == 64]
    chance = {3: 0.3, 4: 0.8, 5: 0.4, 6: 0.4, 7: 0.4, 8: 0.4}
    (family,) = families(with_hits(own, lambda row: chance[row.bits])).values()
    scored = family.by_accuracy()
    assert scored.measure == ACCURACY
    curve = scored.curves(reference_of(scored))[4]
    accuracy = next(row.accuracy for row in scored.rows if row.bits == 4)
    assert scored.shown(curve.samples)[0] == pytest.approx(accuracy)
    low, high = np.quantile(scored.shown(curve.samples)[1:, 0], (0.025, 0.975))
    error = next(row.accuracy_error for row in scored.rows if row.bits == 4)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert best_precision(scored.curves(reference_of(scored))).shares[4].value > 0.9


def test_rows_that_another_sweep_made_again_count_once(rows):
    few = [row for row in rows if row.type in ("fp16", "int")]
    twice = [*few, *with_hits(few, lambda row: 0.5)]
    (family,) = families(twice).values()
    assert len(family.rows) == len(few)
    assert all(row.tasks for row in family.rows)


def test_the_page_draws_accuracies(rows):
    few = [row for row in rows if row.block in (0, 64) and row.parameters <= 400_000]  # too few to be fitted
    html, plots, _ = study_page(with_hits(few, lambda row: 1.2 - row.loss / 6))
    assert "total-accuracy" in plots.drawn
    assert "Best precision by accuracy and total bits" in html
    (axes,) = plots.drawn["total-accuracy"].axes
    assert axes.get_ylabel() == "mean zero-shot accuracy"
    assert 0 <= axes.get_ylim()[0] < axes.get_ylim()[1] <= 1.1
    assert "frontier" in axes.get_legend_handles_labels()[1]
    html, plots, _ = study_page(few)
    assert "total-accuracy" not in plots.drawn
    assert "kbitc sweep --tasks" in html


def test_advice_by_accuracy(rows):
    few = [row for row in rows if row.type in ("fp16", "int")]
    worse = with_hits(few, lambda row: row.loss / 7)  # where loss and accuracy disagree
    by_loss, by_accuracy = (advise(worse, 10**9, by=by) for by in ("loss", "accuracy"))
    assert by_accuracy[0].row.accuracy == max(row.accuracy for row in worse)
    assert by_loss[0].row.loss == min(row.loss for row in worse)
    low, high = by_accuracy[0].interval
    assert low < by_accuracy[0].value == by_accuracy[0].row.accuracy < high
    other = replace(worse[0], family="gpt2-1", key="x", fingerprint="x")
    assert advise([*worse, other], 10**9, by="accuracy"), "all models answered the same examples"


def test_advice_that_cannot_be_given_by_accuracy(rows):
    few = rows[:8]
    with pytest.raises(UsageError, match="no zero-shot accuracies"):
        advise(few, 10**9, by="accuracy")
    two = [*with_hits(few, lambda row: 0.5), *with_hits(few, lambda row: 0.5, "c[1], 0 shots, 1")]
    with pytest.raises(UsageError, match="2 sets of examples"):
        advise(two, 10**9, by="accuracy")
    assert advise(two, 10**9, by="accuracy", tasks="c[1]")[0].row.tasks == "c[1], 0 shots, 1"
    with pytest.raises(UsageError, match="known: a"):
        advise(two, 10**9, by="accuracy", tasks="piqa")
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        advise(two, 10**9, by="acuracy")
    with pytest.raises(UsageError, match="add --by accuracy"):
        advise(two, 10**9, tasks="c")
