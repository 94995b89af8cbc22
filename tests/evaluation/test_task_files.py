"""Examples as published, and what is said of files that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbitc.errors import UsageError
from kbitc.evaluation.task_files import FOLDER, TASKS, harness_dataset, task_path, task_rows

PUBLISHED = {
    "lambada_openai": (
        {"context": "He saw the", "continuation": "cat"},
        {"context": "He saw the", "continuation": "cat"},
    ),
    "piqa": (
        {"query": "Question: how?\n", "choices": ["so", "not so"], "gold": "1"},
        {"query": "Question: how?\n", "choices": ["so", "not so"], "gold": 1},
    ),
    "winogrande": (
        {"sentence": "Ann thanked Eve, as _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {
            "contexts": ["Ann thanked Eve, as Ann", "Ann thanked Eve, as Eve"],
            "continuation": "had helped.",
            "gold": 1,
        },
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man  is seen.",
            "ctx_b": "he",
            "endings": ["[header] eats [title] It", "sleeps"],
            "label": 0,
        },
        {"query": "Baking: A man is seen. He", "choices": ["eats. It", "sleeps"], "gold": 0},
    ),
}


def write(folder, name, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_as_published(name, tmp_path):
    published, wanted = PUBLISHED[name]
    write(tmp_path, name, published, "", published)
    assert [{k: _stripped(v) for k, v in row.items()} for row in task_rows(name, tmp_path)] == [wanted] * 2
    assert harness_dataset(name, str(tmp_path), pretrained="ignored")["test"].num_rows == 2


def _stripped(value):
    return [part.strip() for part in value] if isinstance(value, list) else value


def test_rows_are_those_of_the_harness(tmp_path):
    """Its own functions on the same published rows."""
    theirs = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    from lm_eval.tasks.winogrande import preprocess_winogrande

    row = PUBLISHED["hellaswag"][0]
    write(tmp_path, "hellaswag", row)
    (ours,) = task_rows("hellaswag", tmp_path)
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    assert ours["query"] == theirs.preprocess(row["activity_label"] + ": " + context)
    assert ours["choices"] == [theirs.preprocess(ending) for ending in row["endings"]]
    row = PUBLISHED["winogrande"][0]
    write(tmp_path, "winogrande", row)
    (ours,) = task_rows("winogrande", tmp_path)
    assert ours["contexts"] == preprocess_winogrande.doc_to_choice(row)
    assert ours["continuation"] == preprocess_winogrande.doc_to_target(row)
    assert ours["gold"] == preprocess_winogrande.doc_to_text(row)


def test_other_forms(tmp_path):
    write(tmp_path, "winogrande", {"context_options": ["A a", "A b"], "continuation": " c", "gold": 0})
    assert task_rows("winogrande", tmp_path) == [{"contexts": ["A a", "A b"], "continuation": "c", "gold": 0}]
    write(tmp_path, "openbook_qa", {"query": "q", "choices": ["a", "b"], "gold": 0})
    assert task_path("openbookqa", tmp_path).name == "openbook_qa.jsonl"


def test_each_task_has_its_definition():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TASKS)
    for name in TASKS:
        assert f"task: {name}\n" in (FOLDER / f"{name}.yaml").read_text()


BAD = {
    "not json": "{",
    "no object": "[1]",
    "no 'query'": {"choices": ["a", "b"], "gold": 0},
    "'query' is no text": {"query": 3, "choices": ["a", "b"], "gold": 0},
    "no list of choices": {"query": "q", "choices": ["a"], "gold": 0},
    "no choice 2 among 2": {"query": "q", "choices": ["a", "b"], "gold": 2},
    "no choice -1 among 2": {"query": "q", "choices": ["a", "b"], "gold": -1},
    "no choice True": {"query": "q", "choices": ["a", "b"], "gold": True},
}


@pytest.mark.parametrize("said", BAD)
def test_a_row_of_another_form(said, tmp_path):
    write(tmp_path, "piqa", PUBLISHED["piqa"][0], BAD[said])
    with pytest.raises(UsageError, match=r"piqa\.jsonl, line 2: is no example of piqa") as caught:
        task_rows("piqa", tmp_path)
    assert said.startswith(("not", "no object")) or said in str(caught.value)


@pytest.mark.parametrize("row", [{"sentence": "no gap"}, PUBLISHED["winogrande"][0] | {"answer": "0"}])
def test_a_row_that_is_no_winogrande(row, tmp_path):
    write(tmp_path, "winogrande", PUBLISHED["winogrande"][0] | row)
    with pytest.raises(UsageError, match="line 1: is no example of winogrande"):
        task_rows("winogrande", tmp_path)


def test_missing_names_and_files(tmp_path):
    with pytest.raises(UsageError, match=r"no task 'piqqa'; did you mean 'piqa'.*lm_eval --model kbitc"):
        task_path("piqqa", tmp_path)
    with pytest.raises(UsageError, match="not there: .*/openbookqa.jsonl or .*/openbook_qa.jsonl; put"):
        task_path("openbookqa", tmp_path)
    with pytest.raises(UsageError, match=f"not there: {Path.cwd()}/piqa.jsonl"):
        task_path("piqa", Path())
    write(tmp_path, "piqa", "", "")
    with pytest.raises(UsageError, match="holds no examples"):
        task_rows("piqa", tmp_path)
    with pytest.raises(UsageError, match="--metadata data=DIR"):
        harness_dataset("piqa")
