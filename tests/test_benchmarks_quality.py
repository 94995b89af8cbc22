"""The comparison with peers, without peers: evaluator, bytes, bootstrap, plans, what is kept, tables."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kbitc
from benchmarks.quality import campaign as campaigns
from benchmarks.quality import comparison, kbitc_runs, peer_runs
from benchmarks.quality.campaign import Sizes, first_tokens, open_campaign, whole
from benchmarks.quality.comparison import ablation, pairs, to_json
from benchmarks.quality.counting import bits_per_param, embeddings, stored_bytes
from benchmarks.quality.evaluator import Evaluator, Scores, put_weights
from benchmarks.quality.kbitc_runs import dense_artifact, linears_outcome, pinned_plan, shipped_outcome
from benchmarks.quality.peer_runs import Outcome, peer_outcome
from benchmarks.quality.report import sections, summary
from benchmarks.quality.settings import LINEARS, PEERS, SHIPPED, TOOLS, Peer
from benchmarks.quality.workers.common import linears
from kbitc.artifact.reader import Artifact
from kbitc.errors import BudgetError, UsageError
from kbitc.evaluation.intervals import paired
from kbitc.evaluation.opening import open_model
from kbitc.evaluation.perplexity import perplexity
from kbitc.formats.spec import parse
from kbitc.sensitivity.score_table import Option, ScoreTable

DEMO = Path(kbitc.__file__).parent / "demo_model"
TEXT = DEMO / "heldout.txt"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def demo():
    return open_model("demo", torch.float32).model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 2048, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evaluator(ids, tmp_path):
    return Evaluator("demo", {"text": ids}, tmp_path, {"text": "key"})


@pytest.fixture
def campaign(tmp_path):
    sizes = Sizes(calibration=2, test=2, context=16)
    return open_campaign(DEMO, tmp_path / "work", TEXT, {"a": TEXT}, sizes, 1)


def outcome(label, *losses, bits=4.0):
    return Outcome(label, bits, {"a": Scores(list(losses), [loss / 10 for loss in losses])}, 60.0, 10**9)


def test_the_model_itself_diverges_by_nothing(evaluator, demo, ids):
    scores = evaluator.score({}, ["text"])["text"]
    assert max(map(abs, scores.divergence)) < 1e-6
    assert np.mean(scores.loss) == pytest.approx(perplexity(demo, ids).loss, rel=1e-6)


def test_scores_are_those_of_kbitc_eval(evaluator, demo, ids):
    weights = {QUERY: torch.zeros_like(dict(demo.named_parameters())[QUERY])}
    other = open_model("demo", torch.float32).model
    put_weights(other, weights)
    expected = perplexity(other, ids, reference=demo)
    scores = evaluator.score(weights, ["text"])["text"]
    assert len(scores.loss) == len(scores.divergence) == len(ids)
    assert np.mean(scores.loss) == pytest.approx(expected.loss, rel=1e-6)
    assert scores.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert scores.mean_divergence == pytest.approx(expected.divergence, rel=1e-5)
    assert scores.mean_divergence > 1e-3


def test_a_reference_is_computed_once(evaluator, monkeypatch):
    first = np.array(evaluator.reference("text"))
    assert [file.name for file in evaluator.folder.iterdir()] == ["reference-key.npy"]
    monkeypatch.setattr("benchmarks.quality.evaluator.open_model", None)
    again = Evaluator("demo", evaluator.texts, evaluator.folder, evaluator.keys)
    assert np.array_equal(again.reference("text"), first)


@pytest.mark.parametrize(
    ("name", "weight", "said"),
    [
        ("nobody", torch.zeros(2), "no such parameter"),
        (QUERY, torch.zeros(2, 3), r"expected shape \(256, 256\), got \(2, 3\)"),
        (QUERY, torch.full((256, 256), torch.nan), "not finite"),
    ],
)
def test_weights_that_do_not_fit(demo, name, weight, said):
    with pytest.raises(UsageError, match=said):
        put_weights(demo, {name: weight})


def test_bytes_of_the_rest_are_counted_once(demo):
    tied = 2 * sum(own.numel() for own in demo.parameters())
    assert stored_bytes(demo, {}) == tied
    assert bits_per_param(demo, {}) == 16
    assert stored_bytes(demo, {QUERY: 1000}) == tied - 2 * 256 * 256 + 1000
    assert embeddings(demo) == [EMBEDDING]
    with pytest.raises(ValueError, match="nobody"):
        stored_bytes(demo, {"nobody": 1})


def test_bytes_are_those_that_kbitc_counts_and_weights_those_that_it_runs(demo, tmp_path, evaluator, ids):
    kbitc.compile("demo", spec="int3:32", calibrate="none", out=tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "kbit_plan.json").read_text())["weights"]
    artifact = Artifact.open(tmp_path / "out")
    sizes = dict(demo.named_parameters())
    nbytes = {name: round(entry["bits"] * sizes[name].numel() / 8) for name, entry in plan.items()}
    assert 0 <= artifact.payload_bytes - stored_bytes(demo, nbytes) <= 64  # one codebook
    scores = evaluator.score(dense_artifact(tmp_path / "out"), ["text"])["text"]
    packed = perplexity(open_model(str(tmp_path / "out"), torch.float32).model, ids)
    assert np.mean(scores.loss) == pytest.approx(packed.loss, rel=1e-4)


def test_linears_of_a_worker_leave_the_head_out(demo):
    names = [name for name, _ in linears(demo)]
    assert len(names) == 6 * 7
    assert {QUERY, "lm_head.weight"} & set(names) == {QUERY}


def test_bootstrap_of_three_windows_is_that_of_all_resamples():
    ours, theirs = [1.0, 2.5, 0.25], [1.5, 2.0, 2.0]
    found = paired(ours, theirs, draws=200_000)
    differences = np.subtract(ours, theirs)
    means = [np.mean(rows) for rows in itertools.product(differences, repeat=3)]
    assert found.mean == pytest.approx(np.mean(differences))
    low, high = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found == paired(ours, theirs, draws=200_000)


def test_what_an_interval_says():
    assert paired([1.0, 2.0], [2.0, 3.0]).verdict == "lower"
    assert paired([2.0, 3.0], [1.0, 2.0]).verdict == "higher"
    assert paired([1.0, 2.0], [2.0, 1.0]).verdict == "even"
    assert str(paired([1.0, 2.0], [2.0, 3.0])) == "-1.0000 [-1.0000, -1.0000]"
    with pytest.raises(ValueError, match="1 and 2 windows"):
        paired([1.0], [1.0, 2.0])


def table_of_scores(**options):
    made = {
        name: tuple(Option(parse(spec), nbytes, cost, 0.1) for spec, nbytes, cost in own)
        for name, own in options.items()
    }
    return ScoreTable(made, dict.fromkeys(made, 10_000), 20, 20_000, "error", "relative")


def test_a_pinned_weight_stays_and_the_other_gets_the_rest():
    four, eight, whole_ = ("int4:32", 6000, 2.0), ("int8:32", 10_000, 1.0), ("fp16", 20_000, 0.0)
    scores = table_of_scores(embed=[four, eight, whole_], linear=[four, eight, whole_])

    def specs(bits):
        return {
            name: entry["spec"] for name, entry in pinned_plan(scores, ["embed"], bits)["weights"].items()
        }

    # The shared codebook of eight bits takes 1024 bytes at most.
    assert specs(13.0) == {"embed": "fp16", "linear": "int8:32"}
    assert specs(11.9) == {"embed": "fp16", "linear": "int4:32"}
    with pytest.raises(BudgetError):
        specs(10.0)


def test_a_weight_without_a_16_bit_option_cannot_be_pinned():
    with pytest.raises(UsageError, match="embed: .* cannot be pinned"):
        pinned_plan(table_of_scores(embed=[("int4:32", 60, 2.0)]), ["embed"], 8.0)


def test_the_first_tokens_of_a_text_are_its_first_tokens(campaign):
    tokenizer = open_model("demo", torch.float32).tokenizer
    text = TEXT.read_text(encoding="utf-8")
    every = tokenizer(text)["input_ids"]
    cut = first_tokens(tokenizer, text, 40)
    assert text.startswith(cut)
    assert tokenizer(cut)["input_ids"][:32] == every[:32]
    assert first_tokens(tokenizer, "two words", 40) == "two words"
    ids = load_file(campaign.tokens)["ids"]
    assert ids.shape == (2, 16)
    assert ids.flatten().tolist() == every[:32]


def test_scores_are_kept(campaign):
    folder = campaign.work / "result"
    folder.mkdir()
    first = campaign.scores(folder, dict)
    assert campaign.scores(folder, None) == first  # not asked for weights again


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), whole(tmp_path / "folder") as partial:
        partial.mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole(tmp_path / "file") as partial:
        partial.write_text("x")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_process_that_fails_says_its_last_line():
    ran = campaigns.run([sys.executable, "-c", "import os; print(os.environ['A'])"], {"A": "b"})
    assert ran.out == "b\n"
    with pytest.raises(RuntimeError, match=r"^ValueError: no$"):
        campaigns.run([sys.executable, "-c", "raise ValueError('no')"], {})


def test_a_peer_that_cannot_be_had_says_why_and_is_not_tried_again(campaign, monkeypatch):
    tries = []

    def refuse(*_, **options):
        tries.append(options["pins"])
        raise RuntimeError("building\nno compiler")

    monkeypatch.setattr(peer_runs, "environment", refuse)
    peer = Peer("x", "hqq", {"bits": 4})
    assert [peer_outcome(campaign, peer, None).reason for _ in range(2)] == ["no compiler"] * 2
    assert tries == [TOOLS["hqq"].pins]
    peer_outcome(campaign, peer, None, is_retried=True)
    assert len(tries) == 2


def test_a_peer_runs_once_and_is_counted(campaign, monkeypatch, demo):
    jobs = []

    def work(command, variables):
        job, out = Path(command[-2]), Path(command[-1])
        jobs.append(json.loads(job.read_text()))
        assert (Path(variables["PYTHONPATH"]) / "workers" / f"peer_{jobs[-1]['tool']}.py").exists()
        save_file({QUERY: torch.zeros(256, 256)}, out / "weights.safetensors")
        result = {
            "nbytes": {QUERY: 10},
            "seconds": 3.0,
            "peak_bytes": 5,
            "notes": ["n"],
            "versions": {"t": "1"},
        }
        (out / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(peer_runs, "environment", lambda *_, **__: Path("python"))
    monkeypatch.setattr(peer_runs, "run", work)
    peer = Peer("x", "hqq", {"bits": 4})
    first = peer_outcome(campaign, peer, None)
    assert peer_outcome(campaign, peer, None) == first
    assert [job["options"] for job in jobs] == [{"bits": 4}]
    assert first.bits == bits_per_param(demo, {QUERY: 10})
    assert first.scores["a"].mean_divergence > 1e-3
    assert first.notes == ("n", "t 1")


def test_kbitc_runs_once_with_a_budget_rounded_down_and_a_pinned_plan(campaign, monkeypatch, demo):
    commands = []

    def value(command, option):
        return command[command.index(option) + 1]

    def compile_demo(command, variables):
        commands.append(command)
        peak, out = Path(command[3]), Path(value(command, "-o"))
        peak.write_text("7")
        goal = {"plan": Path(value(command, "--plan"))} if "--plan" in command else {"spec": "int4:32"}
        kbitc.compile("demo", **goal, quantizer=value(command, "--quantizer"), calibrate="none", out=out)
        return campaigns.Ran(json.dumps({"bits_per_param": Artifact.open(out).bits_per_param}), 1.0)

    def table(folder):
        assert (folder / "kbit_plan.json").exists()
        sizes = {name: own.numel() for name, own in demo.named_parameters() if own.ndim > 1}
        options = {
            name: (
                Option(parse("int4:32"), size * 9 // 16, 1.0, 0.1),
                Option(parse("fp16"), 2 * size, 0.0, 0.0),
            )
            for name, size in sizes.items()
        }
        return ScoreTable(options, sizes, 0, sum(sizes.values()), "error", "relative")

    monkeypatch.setattr(kbitc_runs, "run", compile_demo)
    monkeypatch.setattr(kbitc_runs.ScoreTable, "open", table)
    setting = ("ours", ("--quantizer", "absmax"))
    free = shipped_outcome(campaign, setting, 7.12345678)
    assert value(commands[0], "--bits") == "7.123456"
    assert value(commands[0], "--calibrate") == str(campaign.calibration)
    assert (free.reason, free.seconds, free.peak_bytes, free.notes) == ("", 1.0, 7, ("--quantizer absmax",))
    pinned = linears_outcome(campaign, setting, 7.12345678)
    plan = json.loads(Path(value(commands[-1], "--plan")).read_text())
    assert plan["weights"][EMBEDDING]["spec"] == "fp16"
    assert plan["weights"][QUERY]["spec"] == "int4:32"
    assert pinned.reason == ""
    assert 0 < pinned.scores["a"].mean_divergence < free.scores["a"].mean_divergence
    assert len(commands) == 3  # a budget, the one whose table plans are made from, a plan
    assert shipped_outcome(campaign, setting, 7.12345678) == free
    assert linears_outcome(campaign, setting, 7.12345678) == pinned
    assert len(commands) == 3
    assert "cannot be met" in linears_outcome(campaign, setting, 4.0).reason


def test_each_peer_is_paired_at_its_own_bits(monkeypatch):
    asked = []

    def ours(view):
        def make(campaign, setting, bits):
            asked.append((view, bits))
            return outcome("kbitc", 1.0, 2.0, bits=bits)

        return make

    monkeypatch.setattr(comparison, "shipped_outcome", ours(SHIPPED))
    monkeypatch.setattr(comparison, "linears_outcome", ours(LINEARS))
    made = {
        "both": outcome("both", 2.0, 3.0, bits=5.0),
        "one": outcome("one", 0.5, 1.0, bits=3.0),
        "none": Outcome("none", reason="not here"),
    }
    peers = [Peer("both", "hqq"), Peer("one", "hqq", views=(LINEARS,)), Peer("none", "hqq", views=(SHIPPED,))]
    found = list(pairs(None, peers, lambda peer: made[peer.label], ("kbitc", ())))
    assert asked == [(SHIPPED, 5.0), (LINEARS, 5.0), (LINEARS, 3.0)]
    assert [(pair.view, pair.base.label, pair.ours is None) for pair in found] == [
        (SHIPPED, "both", False),
        (SHIPPED, "none", True),
        (LINEARS, "both", False),
        (LINEARS, "one", False),
    ]
    tables = sections(found, ["a"])
    assert [table.title for table in tables[::2]] == [SHIPPED, LINEARS]
    assert [row["name"] for row in tables[0].rows] == ["both", "kbitc", "none"]
    assert tables[0].rows[2] == {"name": "none", "reason": "not here"}
    assert [(row["name"], row["a loss verdict"]) for row in tables[3].rows] == [
        ("both", "lower"),
        ("one", "higher"),
    ]
    assert f"{LINEARS}, a, loss of kbitc against 2 peers: lower 1, even 0, higher 1." in summary(found, ["a"])
    written = json.loads(json.dumps([to_json(pair, ["a"]) for pair in found]))
    assert written[0]["differences"]["a"]["loss"]["mean"] == -1.0
    assert written[1]["differences"]["a"] is None


def test_ablation_holds_every_setting_against_the_first(monkeypatch):
    def made(campaign, setting, bits):
        return outcome(setting[0], bits if setting[0] == "full" else bits + 1)

    monkeypatch.setattr(comparison, "shipped_outcome", made)
    found = list(ablation(None, [("full", ()), ("less", ("--x",))], [4.0, 3.0]))
    tables = sections(found, ["a"])
    assert [row["name"] for row in tables[0].rows] == ["full", "less"]
    assert [row["a loss"] for row in tables[3].rows] == ["+1.0000 [+1.0000, +1.0000]"]
    assert summary(found, ["a"]) == []


def test_every_peer_has_a_worker_and_a_label_of_its_own():
    workers = Path(peer_runs.__file__).parent / "workers"
    assert all((workers / f"peer_{name}.py").exists() for name in TOOLS)
    assert {peer.tool for peer in PEERS} == set(TOOLS)
    assert len({peer.label for peer in PEERS}) == len(PEERS)
    # An environment of the wrong torch would be gigabytes of CUDA.
    assert not any(pin.startswith("torch") for tool in TOOLS.values() for pin in tool.pins)
