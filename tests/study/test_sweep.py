"""Jobs: measured as the evaluation measures, each once, whatever kills the sweep."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.opening import open_model
from kbitc.evaluation.perplexity import perplexity, read_text, window_losses, windows
from kbitc.study.grid import ALL, Grid
from kbitc.study.ledger import Ledger, read_table, write_table
from kbitc.study.sweep import Study, sweep

BUSY = {"seconds", "peak_bytes"}


def study(text, grid=None, **options):
    small = {"context": 64, "limit": 512} | options
    return Study(grid or Grid([3, 4], ["int", "nf"], [64]), read_text(text), text.name, **small)


def figures(rows):
    return [{key: value for key, value in asdict(row).items() if key not in BUSY} for row in rows]


@pytest.fixture(scope="module")
def swept(text, tmp_path_factory):
    table = tmp_path_factory.mktemp("sweep") / "results.parquet"
    return table, sweep(["demo"], study(text), table)


def test_a_row_a_job(swept):
    table, outcome = swept
    assert (outcome.ran, outcome.known, len(outcome.rows)) == (5, 0, 5)
    assert figures(read_table(table)) == figures(outcome.rows)
    by_format = {row.format: row for row in outcome.rows}
    assert by_format["fp16"].loss < by_format["nf4:64"].loss < by_format["nf3:64"].loss
    for row in outcome.rows:
        assert row.loss == pytest.approx(sum(row.losses) / len(row.losses))
        assert 0 < row.loss_error < 1
        assert row.tokens == len(row.losses) * 63
        assert row.kept == ["model.embed_tokens.weight"]
        assert row.peak_bytes > 10**7


def test_jobs_that_are_done_do_not_run_again(swept, text):
    table, first = swept
    again = sweep(["demo", "demo"], study(text), table)
    assert (again.ran, again.known) == (0, 5)
    assert [asdict(row) for row in again.rows] == [asdict(row) for row in first.rows]


def test_other_settings_are_other_jobs(swept, text, tmp_path):
    own = study(text)
    key = own.key("f", own.grid.treatments()[1])
    for other in (study(text, context=32), study(text, limit=256), study(text, scope=ALL)):
        assert other.key("f", own.grid.treatments()[1]) != key
    assert own.key("g", own.grid.treatments()[1]) != key


@pytest.mark.parametrize("scope", [pytest.param("linear", marks=pytest.mark.slow), "all"])
def test_losses_and_bits_are_those_of_the_artifact(scope, text, tmp_path):
    """A job's loss is what evaluating the compiled model gives, and its bits are the bytes that lie there."""
    import kbitc

    grid = Grid([3], ["quantile"], [32])
    outcome = sweep(["demo"], study(text, grid, scope=scope), tmp_path / "t.parquet")
    (row,) = [row for row in outcome.rows if row.bits == 3]
    plan = {"weights": dict.fromkeys(row.kept, "fp16") | {"*": "quantile3:32"}}
    kbitc.compile("demo", plan=plan, quantizer="absmax", calibrate="none", out=tmp_path / "out")
    opened = open_model(str(tmp_path / "out"), torch.float32)
    ids = windows(opened.model, opened.tokenizer, read_text(text), 64, 512)
    assert row.loss == pytest.approx(perplexity(opened.model, ids).loss, abs=2e-5)
    assert row.total_bits == 8 * opened.nbytes


def test_windows_together_are_windows_alone():
    opened = open_model("demo", torch.float32)
    ids = torch.randint(0, 2048, (9, 31), generator=torch.Generator().manual_seed(0))
    losses = window_losses(opened.model, ids)
    assert float(losses.mean()) == pytest.approx(perplexity(opened.model, ids).loss, abs=1e-6)
    alone = torch.stack([window_losses(opened.model, one[None])[0] for one in ids])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=0)


def test_quantizers_with_evidence_and_outliers(text, tmp_path):
    grid = Grid([3], ["int"], [64], ["absmax", "weighted"], outliers=[2.0])
    ids = tmp_path / "calibration.txt"
    ids.write_text(read_text(text)[:3000], "utf-8")
    outcome = sweep(["demo"], study(text, grid, calibrate=str(ids)), tmp_path / "t.parquet")
    losses = {(row.format, row.quantizer): row.loss for row in outcome.rows}
    assert losses["int3:64", "weighted"] < losses["int3:64", "absmax"]
    assert len(losses) == 5
    assert {row.calibrate for row in outcome.rows} == {"", str(ids)}


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sweep import study, sweep
text, table = map(Path, sys.argv[1:])
sweep(["demo"], study(text), table, on_row=lambda row: print(row.format, flush=True))
"""


def test_killed_at_any_moment_the_table_is_the_same(swept, text, tmp_path):
    """SIGKILL again and again, each time some jobs later; no job runs twice, and no row differs."""
    table, whole = swept
    own = tmp_path / "killed.parquet"
    code, ran = KILLED.format(tests=os.path.dirname(__file__)), []
    chance = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, text, own], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for line in process.stdout:
            ran.append(line)
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                break
        ran += process.stdout.readlines()
        process.wait()
    outcome = sweep(["demo"], study(text), own)
    assert figures(outcome.rows) == figures(whole.rows)
    assert len(ran) == len(set(ran)), "a job that was told of is kept"
    assert len(list(Ledger(own).folder.glob("*.json"))) == 5
    assert not list(Ledger(own).folder.glob(".*partial"))


def test_two_sweeps_do_not_write_one_table(swept, text):
    with Ledger(swept[0]).held(), pytest.raises(UsageError, match="another sweep"):
        sweep(["demo"], study(text), swept[0])


def test_models_and_texts_that_cannot_be_scored(text, tmp_path):
    with pytest.raises(UsageError, match="fewer than one window"):
        sweep(["demo"], study(text, limit=10), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="nowhere"):
        sweep([str(tmp_path / "nowhere")], study(text), tmp_path / "t.parquet")


def test_masked_models_are_refused(text, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="no causal language model"):
        sweep([str(tmp_path / "bert")], study(text), tmp_path / "t.parquet")


def test_tables_of_other_kinds_are_refused(swept, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    with pytest.raises(UsageError, match="no such file"):
        read_table(tmp_path / "none.parquet")
    junk = tmp_path / "junk.parquet"
    junk.write_bytes(b"PAR1 no table")
    with pytest.raises(SourceError, match="Parquet"):
        read_table(junk)
    parquet.write_table(pa.table({"loss": [1.0]}), junk)
    with pytest.raises(SourceError, match="of no sweep"):
        read_table(junk)
    table = parquet.read_table(swept[0]).replace_schema_metadata({"kbitc_sweep_format": "99"})
    parquet.write_table(table, junk)
    with pytest.raises(SourceError, match="format 99, and this kbitc reads 2"):
        read_table(junk)


def test_a_damaged_job_is_named(swept, tmp_path, make_row):
    ledger = Ledger(tmp_path / "t.parquet")
    with ledger.held():
        ledger.add(make_row(100_000, 4))
    (path,) = ledger.folder.glob("*.json")
    path.write_text(json.dumps({"key": "x"}))
    with pytest.raises(SourceError, match=path.name):
        ledger.rows()


def test_losses_that_are_not_finite_stay_in_the_table(tmp_path, make_row):
    from dataclasses import replace

    broken = replace(make_row(100_000, 3), loss=None, loss_error=None, losses=[])
    write_table(tmp_path / "t.parquet", [broken])
    (back,) = read_table(tmp_path / "t.parquet")
    assert back.loss is None
