"""Accuracies of the harness against a scorer that knows nothing of it, and the model in its own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from kbitc.errors import BackendUnavailable, UsageError
from kbitc.evaluation import harness
from kbitc.evaluation.harness import check_tasks, differences, mean_accuracy, score_tasks
from kbitc.evaluation.opening import Loaded, open_model
from kbitc.evaluation.task_files import FOLDER, task_rows

SHARED = os.environ.get("KBITC_ZERO_SHOT")  # a folder with lambada_openai.jsonl and piqa.jsonl
MODEL = os.environ.get("KBITC_ZERO_SHOT_MODEL", "demo")

FILES = {
    "lambada_openai": [
        {"context": "The function returns a list of all the", "continuation": "names"},
        {"context": "This is a", "continuation": "list"},
        {"context": "If the argument is", "continuation": "not"},
        {"context": "The value of", "continuation": "the"},
        {"context": "A module is", "continuation": "a"},
    ],
    "piqa": [
        {"query": "Question: How do I open a file?\n", "choices": ["Call open().", "Close the window."], "gold": 0},
        {"query": "Question: What is a list?\n", "choices": ["A color", "A sequence of values"], "gold": 1},
        {"query": "Question: Who raises it?\n", "choices": ["a", "the"], "gold": 1},
        {"query": "Question: Why?\n", "choices": ["Because the file is not open", "so"], "gold": 0},
    ],
    "copa": [
        {"query": "The file was missing, because", "choices": ["it was deleted.", "the sun was high."], "gold": 0},
        {"query": "The loop ended, therefore", "choices": ["it rained.", "the function returned."], "gold": 1},
    ],
    "winogrande": [
        {"sentence": "Ann paid Eve because _ had worked.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "The list is in the set since _ is large.", "option1": "the set", "option2": "it", "answer": "1"},
    ],
    "hellaswag": [
        {"activity_label": "Code", "ctx_a": "A man opens a file.", "ctx_b": "he", "endings": ["reads", "flies", "is"], "label": 0},
    ],
}  # fmt: skip
PROMPTS = {"piqa": lambda query: query.strip() + "\nAnswer:"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def demo():
    return open_model("demo", torch.float32)


@torch.inference_mode()
def log_likelihood(loaded, context, continuation):
    """Summed log-probability of a continuation, one text at a time; and whether each of its tokens is first."""
    text = f"{context} {continuation}"
    made = loaded.tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(made["input_ids"])
    places = [i for i, (_, end) in enumerate(made["offset_mapping"]) if end > len(context)]
    logits = loaded.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    total = sum(float(logits[i - 1, ids[i]]) for i in places)
    return total, all(int(logits[i - 1].argmax()) == ids[i] for i in places)


def scored(loaded, name, row):
    """``(log-likelihoods, is right)`` of one example."""
    if "choices" in row:
        prompt = PROMPTS.get(name, str)(row["query"])
        found = [log_likelihood(loaded, prompt, choice)[0] for choice in row["choices"]]
    elif "contexts" in row:
        found = [log_likelihood(loaded, context, row["continuation"])[0] for context in row["contexts"]]
    else:
        total, is_first = log_likelihood(loaded, row["context"], row["continuation"])
        return [total], is_first
    return found, int(np.argmax(found)) == row["gold"]


def check(loaded, folder, score):
    rows = task_rows(score.task, folder)[: len(score.hits)]
    for row, found, hit in zip(rows, score.log_likelihoods, score.hits, strict=True):
        wanted, is_right = scored(loaded, score.task, row)
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-3)
        assert hit == is_right, row


def test_item_by_item(demo, data):
    told = []
    scores = score_tasks(demo, list(FILES), data, batch=3, on_progress=lambda *step: told.append(step))
    assert [score.task for score in scores] == list(FILES)
    for score in scores:
        check(demo, data, score)
        assert len(score.hits) == len(FILES[score.task])
        assert score.metrics["acc"] == pytest.approx(score.accuracy)
    assert {"acc", "acc_norm"} <= set(scores[1].metrics)
    assert 0 < sum(map(sum, (score.hits for score in scores))) < 14  # both outcomes were compared
    assert {name for name, _, _ in told} == set(FILES)
    assert all(done <= total for _, done, total in told)
    assert [score.cut for score in scores] == [0] * len(FILES)


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="KBITC_ZERO_SHOT names no folder of LAMBADA and PIQA")
def test_two_hundred_examples_of_lambada_and_piqa():
    loaded = open_model(MODEL, torch.float32)
    for score in score_tasks(loaded, ["lambada_openai", "piqa"], Path(SHARED), limit=200):
        check(loaded, Path(SHARED), score)
        assert len(score.hits) == 200


def test_limits_and_shots(demo, data, monkeypatch):
    """Each prompt has two solved examples before it, none of them its own, the same for one seed."""
    from kbitc.evaluation.harness_model import KbitLM

    prompts = []

    def answer(_, requests, disable_tqdm=False):
        prompts.append([request.args[0] for request in requests])
        return [(-1.0, False)] * len(requests)

    monkeypatch.setattr(KbitLM, "loglikelihood", answer)
    for seed in (1, 1, 2):
        (score,) = score_tasks(demo, ["piqa"], data, shots=2, limit=3, seed=seed)
        assert len(score.hits) == 3
    assert prompts[0] == prompts[1] != prompts[2]
    solved = [row["query"].strip() + "\nAnswer: " + row["choices"][row["gold"]] for row in FILES["piqa"]]
    for i, prompt in enumerate(prompts[0][::2]):
        *before, last = prompt.split("\n\n")
        assert last == FILES["piqa"][i]["query"].strip() + "\nAnswer:"
        assert len(set(before)) == 2
        assert set(before) <= set(solved) - {solved[i]}


def test_shots_before_each_context(demo, data):
    """Winogrande's text is its choice: both contexts take the shots."""
    (score,) = score_tasks(demo, ["winogrande"], data, shots=1)
    assert len(score.log_likelihoods[0]) == 2


def test_prompts_that_are_cut_are_counted(demo, tmp_path):
    long = {"context": "The list of the files is " * 100 + "a", "continuation": "list"}
    (tmp_path / "lambada_openai.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (*FILES["lambada_openai"], long))
    )
    (score,) = score_tasks(demo, ["lambada_openai"], tmp_path)
    assert score.cut == 1
    assert score.to_json()["cut"] == 1


def test_what_is_asked_is_checked_first(data, monkeypatch):
    check_tasks(["piqa", "copa"], data, 1)
    with pytest.raises(UsageError, match="--shots 2: .*copa.jsonl has 2 examples"):
        check_tasks(["piqa", "copa"], data, 2)
    with pytest.raises(UsageError, match="names no task; known are lambada_openai"):
        check_tasks([], data, 0)
    with pytest.raises(UsageError, match="names piqa twice"):
        check_tasks(["piqa", "copa", "piqa"], data, 0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendUnavailable, match=r"kbitc\[eval\]"):
        check_tasks(["piqa"], data, 0)


def made(task, hits):
    return harness.TaskScore(task, hits, tuple((0.0,) for _ in hits), {}, 0, 1.0, "")


def test_means_and_differences():
    ours = [made("a", (1, 1, 0, 1) * 10), made("b", (0, 1) * 10)]
    theirs = [made("a", (1, 0, 0, 1) * 10), made("b", (0, 1) * 10)]
    mean, error = mean_accuracy(ours)
    assert mean == pytest.approx((0.75 + 0.5) / 2)
    a, b = (np.std(score.hits, ddof=1) / np.sqrt(len(score.hits)) for score in ours)
    assert error == pytest.approx(np.hypot(a, b) / 2)
    found = differences(ours, theirs)
    assert found["a"].mean == 0.25
    assert 0 < found["a"].low < 0.25 < found["a"].high
    assert (found["b"].low, found["b"].high) == (0, 0)
    assert found["mean"].mean == pytest.approx(0.125)
    assert found["mean"].high == pytest.approx(found["a"].high / 2, abs=0.01)
    assert mean_accuracy([made("a", (1,))]) == (1, None)


def test_models_that_the_harness_cannot_run(tiny_model, demo):
    from kbitc.evaluation.harness_model import KbitLM

    with pytest.raises(UsageError, match="is no causal language model"):
        KbitLM.of(Loaded(tiny_model("roberta"), 0, 0.0, demo.tokenizer))
    with pytest.raises(UsageError, match="no option of the model kbitc 'pefd'"):
        KbitLM.of(demo, pefd="x")
    with pytest.raises(UsageError, match="is not run"):
        KbitLM.of(demo, trust_remote_code=True)
    KbitLM.of(demo, trust_remote_code=False, batch_size=2)
    with pytest.raises(UsageError, match="no model of transformers"):
        KbitLM.of(Loaded(torch.nn.Linear(2, 2), 0, 0.0, demo.tokenizer))


def test_the_harness_finds_the_model_without_an_import(data, installed, tmp_path):
    """Its own command in a fresh process: a task of ours from files, text that the model generates."""
    (tmp_path / "generated.yaml").write_text(
        "task: generated\ncustom_dataset: !function kbitc.evaluation.task_files.harness_dataset\n"
        "dataset_kwargs: {task: lambada_openai}\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: context\ndoc_to_target: continuation\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    command = "import sys; from lm_eval.__main__ import cli_evaluate; assert 'kbitc' not in sys.modules; cli_evaluate()"
    arguments = [
        "--model", "kbitc", "--model_args", "pretrained=demo,dtype=float32", "--include_path", str(FOLDER),
        "--metadata", f"data={data}", "--tasks", f"copa,{tmp_path / 'generated.yaml'}", "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": installed, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())["results"]
    wanted = [scored(open_model("demo", torch.float32), "copa", row)[1] for row in FILES["copa"]]
    assert found["copa"]["acc,none"] == pytest.approx(np.mean(wanted))
    assert 0 <= found["generated"]["exact_match,none"] <= 1
