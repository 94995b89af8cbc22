"""A result of ``kbitc eval``: written and read back, by this version's files and by older ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from kbitc.artifact.evaluations import (
    EVAL_FILE,
    Evaluation,
    evaluations_of,
    keep_evaluation,
    read_evaluations,
)
from kbitc.errors import UsageError

PLAIN = Evaluation(model="demo-4bit", text="t", context=8, tokens=7, bits_per_param=4.0, loss=3.0, nbytes=99)
FULL = replace(
    PLAIN,
    activations="int8",
    float_activations={"lm_head": "is tied"},
    reference_loss=2.75,
    divergence=0.1,
)
OLD = {"model": "m", "text": "t", "context": 8, "tokens": 7, "bits_per_param": 4.0, "loss": 3.0}
"""What the first version with ``--record`` wrote at least."""


@pytest.mark.parametrize("evaluation", [PLAIN, FULL], ids=["plain", "full"])
def test_it_comes_back_as_it_was(evaluation):
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation


def test_keys_of_the_output():
    """Scripts read them; a comparison adds two."""
    keys = [
        *("model", "text", "perplexity", "loss", "tokens", "context", "bits_per_param", "bytes"),
        *("activations", "float_activations"),
    ]
    assert list(PLAIN.to_json()) == keys
    assert list(FULL.to_json()) == [*keys, "kl_divergence", "reference_loss"]
    assert PLAIN.to_json()["perplexity"] == math.exp(3.0)
    assert replace(PLAIN, loss=1e4).to_json()["perplexity"] == math.inf


def test_increase_is_above_the_reference():
    assert FULL.increase == 0.25
    assert PLAIN.increase is None


def test_a_file_holds_one_or_a_list(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(FULL.to_json()))
    assert read_evaluations(path) == [FULL]
    path.write_text(json.dumps([PLAIN.to_json(), FULL.to_json()]))
    assert read_evaluations(path) == [PLAIN, FULL]


def test_one_of_the_same_text_and_windows_is_replaced(tmp_path):
    keep_evaluation(tmp_path, PLAIN)
    keep_evaluation(tmp_path, replace(PLAIN, loss=2.0))
    keep_evaluation(tmp_path, replace(PLAIN, text="u"))
    assert [(e.text, e.loss) for e in evaluations_of(tmp_path)] == [("t", 2.0), ("u", 3.0)]
    keep_evaluation(tmp_path, replace(PLAIN, context=16))
    keep_evaluation(tmp_path, replace(PLAIN, tokens=14))
    assert len(evaluations_of(tmp_path)) == 4
    assert [path.name for path in tmp_path.iterdir()] == [EVAL_FILE]


def test_old_files_are_read_and_kept_on(tmp_path):
    """They know neither bytes nor activations, and may have a reference's loss without a divergence."""
    old = OLD | {"reference_loss": 2.5}
    (tmp_path / EVAL_FILE).write_text(json.dumps([old]))
    (known,) = evaluations_of(tmp_path)
    assert (known.nbytes, known.activations, known.increase) == (None, "float", 0.5)
    keep_evaluation(tmp_path, replace(PLAIN, text="u"))
    first, second = json.loads((tmp_path / EVAL_FILE).read_text())
    assert old.items() <= first.items()
    assert "bytes" not in first
    assert second["text"] == "u"


def test_an_artifacts_own_come_first(tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(OLD))
    assert [e.model for e in evaluations_of(tmp_path, [other])] == ["m"]
    keep_evaluation(tmp_path, FULL)
    assert [e.model for e in evaluations_of(tmp_path, [other])] == ["demo-4bit", "m"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"model": 1}', "KeyError: 'context'"),
        (json.dumps(OLD | {"loss": "much"}), "ValueError"),
        (json.dumps(OLD | {"tokens": None}), "TypeError"),
        (json.dumps(OLD | {"float_activations": 3}), "AttributeError"),
        ("[3]", "TypeError"),
        ('[{"model"', "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_a_damaged_file_is_named_and_not_written_over(text, why, tmp_path):
    path = tmp_path / EVAL_FILE
    path.write_text(text)
    for use in (lambda: evaluations_of(tmp_path), lambda: keep_evaluation(tmp_path, PLAIN)):
        with pytest.raises(UsageError, match=rf"kbit_eval\.json: not a result of 'kbitc eval --json'.*{why}"):
            use()
    assert path.read_text() == text


def test_no_folder_to_keep_it_in(tmp_path):
    with pytest.raises(UsageError, match=r"kbit_eval\.json: cannot be written"):
        keep_evaluation(tmp_path / "none", PLAIN)
