"""The plan file: what is written is what is read, old files are read too, and damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbitc.artifact.folders import FORMAT
from kbitc.artifact.plan_file import LeftAlone, PassEntry, PlanFile, Prediction, WeightEntry
from kbitc.errors import SourceError
from kbitc.formats.spec import parse
from kbitc.graph.plan import Choice, Plan
from kbitc.pipeline.records import Fired

PATH = Path("/models/out/kbit_plan.json")
SPECS = ("nf4:64", "int3:50+zp", "bof5:32+dq", "learned4:64+out2%", "int8:64", "fp16")

texts = st.text(max_size=12)
names = st.text(min_size=1, max_size=12)
counts = st.integers(1, 10**12)
shapes = st.lists(st.integers(1, 1000), max_size=4).map(tuple)
aliases = st.lists(texts, max_size=2).map(tuple)
shares = st.floats(0, 1).map(lambda value: round(value, 6))
numbers = st.floats(-1e6, 1e6)
features = st.none() | st.fixed_dictionaries(
    {"index": st.lists(st.integers(0, 99)), "kept": st.integers(0, 99)}
)
choices = st.builds(
    Choice,
    st.sampled_from(SPECS).map(parse),
    texts,
    error=st.none() | shares,
    bits=st.none() | shares,
    quantizer=st.sampled_from(("", "absmax", "weighted")),
)
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
entries = st.builds(WeightEntry, choices, shapes, dtypes, st.booleans(), aliases, features)
plans = st.builds(
    PlanFile,
    source=texts,
    source_hash=st.none() | texts,
    parameters=counts,
    nbytes=counts,
    source_bytes=counts,
    weights=st.dictionaries(names, entries, max_size=3),
    left_alone=st.dictionaries(names, st.builds(LeftAlone, texts, shapes, aliases), max_size=2),
    checksums=st.dictionaries(names, texts, max_size=3),
    files=st.none() | st.dictionaries(names, texts, max_size=3),
    budget=st.none() | numbers,
    calibration=st.none() | texts,
    predicted=st.none() | st.builds(Prediction, numbers, texts, texts, st.none() | numbers),
    passes=st.lists(
        st.builds(PassEntry, names, st.integers(0, 999), st.integers(0, 999), texts), max_size=2
    ).map(tuple),
    fusions=st.dictionaries(
        names,
        st.builds(Fired, st.lists(aliases, max_size=2).map(tuple), st.dictionaries(names, texts, max_size=2)),
        max_size=2,
    ),
    kbitc=texts,
)


@settings(deadline=None, max_examples=200)
@given(plans)
def test_what_is_written_is_what_is_read(plan):
    text = json.dumps(plan.to_json())
    back = PlanFile.from_json(json.loads(text), PATH)
    assert back == plan
    assert json.dumps(back.to_json()) == text


@settings(deadline=None, max_examples=50)
@given(plans)
def test_it_is_a_plan_that_can_be_given_back(plan):
    read = Plan.from_json(plan.to_json(), plan.weights)
    assert read.budget == plan.budget
    for name, entry in plan.weights.items():
        assert (read.weights[name].spec, read.weights[name].quantizer) == (entry.spec, entry.choice.quantizer)


OLD = {  # as kbitc.save wrote it before there were quantizers
    "format": 1,
    "kbitc": "0.1.0",
    "source": {"name": "Sequential", "sha256": None},
    "budget": None,
    "parameters": 3237,
    "bytes": 2000,
    "source_bytes": 6474,
    "bits_per_param": 4.9428,
    "weights": {
        "0.weight": {
            "spec": "nf3:64+dq+out2%",
            "bits": 4.25,
            "reason": "saved from a module",
            "shape": [30, 100],
            "dtype": "float32",
            "is_transposed": False,
            "aliases": [],
        },
        "1.weight": {
            "spec": "fp16",
            "reason": "",
            "shape": [7, 30],
            "dtype": "float32",
            "is_transposed": True,
            "aliases": ["2.weight"],
        },
    },
    "left_alone": {"0.bias": {"reason": "not packed in the module", "shape": [30], "aliases": []}},
    "checksums": {"0.bias": "ab"},
}


def test_an_old_file_is_read():
    plan = PlanFile.from_json(OLD, PATH)
    assert plan.weights["0.weight"].choice == Choice(
        parse("nf3:64+dq+out2%"), "saved from a module", bits=4.25
    )
    assert plan.weights["1.weight"].aliases == ("2.weight",)
    assert list(plan.packed) == ["0.weight"]
    assert (plan.predicted, plan.calibration, plan.passes, plan.fusions) == (None, None, (), {})
    assert plan.bits_per_param == 8 * 2000 / 3237
    assert plan.to_json().keys() >= OLD.keys()


def changed(path, value):
    """The old file with one value replaced, or removed where it is `...`."""
    data = json.loads(json.dumps(OLD))
    *way, last = path
    place = data
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize("key", [key for key in OLD if key not in ("kbitc", "budget", "bits_per_param")])
def test_what_every_file_has_is_missed(key):
    with pytest.raises(SourceError, match=rf"^{PATH}: damaged \(.*'{key}'\); compile the model again"):
        PlanFile.from_json(changed([key], ...), PATH)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["weights"], [1]),
        (["weights", "0.weight"], "nf4:64"),
        (["weights", "0.weight", "shape"], 30),
        (["weights", "0.weight", "dtype"], "float3"),
        (["weights", "0.weight", "dtype"], "relu"),
        (["weights", "0.weight", "error"], "small"),
        (["weights", "0.weight", "aliases"], ...),
        (["weights", "0.weight", "outlier_features"], 3),
        (["left_alone", "0.bias"], None),
        (["checksums"], "ab"),
        (["source"], "x"),
        (["parameters"], "many"),
        (["parameters"], 0),
        (["budget"], "four"),
        (["predicted"], {"cost": 1}),
        (["passes"], [{}]),
        (["fusions"], {"merge_linears": []}),
    ],
)
def test_damage_is_named(path, value):
    with pytest.raises(SourceError, match=rf"^{PATH}: damaged .*compile the model again"):
        PlanFile.from_json(changed(path, value), PATH)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_plan_is_damaged(data):
    with pytest.raises(SourceError, match="damaged"):
        PlanFile.from_json(data, PATH)


def test_a_bad_spec_says_which():
    with pytest.raises(SourceError, match=rf"^{PATH}: no data type 'nope'"):
        PlanFile.from_json(changed(["weights", "0.weight", "spec"], "nope4:64"), PATH)


def test_a_newer_file_says_who_wrote_it_and_what_to_do():
    newer = replace(PlanFile.from_json(OLD, PATH), format=FORMAT + 1, kbitc="9.9").to_json()
    message = rf"^/models/out: artifact format {FORMAT + 1} \(written by kbitc 9.9\), but .* up to {FORMAT}; upgrade"
    with pytest.raises(SourceError, match=message):
        PlanFile.from_json(newer, PATH)
