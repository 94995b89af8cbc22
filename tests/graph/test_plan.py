"""Plan files: exact names win, globs in order, and nothing is silently unmatched."""

from __future__ import annotations

import json

import pytest

from kbitc.compiler.request import Request, pipeline_of
from kbitc.errors import UsageError
from kbitc.formats.spec import parse
from kbitc.graph.plan import Choice, Plan, read_rules

NAMES = ["embed.weight", "layers.0.q.weight", "layers.1.q.weight"]


def specs(weights):
    return {n: str(c.spec) for n, c in Plan.from_json({"weights": weights}, NAMES).weights.items()}


def test_exact_names_win_over_patterns_and_patterns_go_in_order():
    found = specs({"layers.*": "nf3:64", "*": "nf4:64", "layers.1.q.weight": {"spec": "int8:32"}})
    assert found == {"embed.weight": "nf4:64", "layers.0.q.weight": "nf3:64", "layers.1.q.weight": "int8:32"}


def test_json_round_trips():
    plan = Plan({n: Choice(parse("nf4:64+dq"), "because", 0.1, 4.1) for n in NAMES}, budget=4.0)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), NAMES)
    assert {n: (c.spec, c.reason) for n, c in again.weights.items()} == {
        n: (c.spec, c.reason) for n, c in plan.weights.items()
    }
    assert again.budget == 4.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": {"*": "nf4:64", "layers.0.k.weight": "nf4:64"}}, "did you mean 'layers.0.q.weight'"),
        ({"weights": {"*": "nf4:64", "blocks.*": "nf4:64"}}, r"no weight 'blocks\.\*'"),
        ({"weights": {"layers.*": "nf4:64"}}, "no rule matches 'embed.weight'"),
        ({"weights": {"*": "nf44:64"}}, r"plan: \*: .*44 bits"),
        ({"weights": {"*": {"bits": 4}}}, "expected a spec"),
        ({"weights": ["nf4:64"]}, "not a plan"),
        ([], "not a plan"),
        ({"format": 2, "weights": {"*": "nf4:64"}}, "upgrade kbitc"),
    ],
)
def test_bad_plans_say_why(data, message):
    with pytest.raises(UsageError, match=message):
        Plan.from_json(data, NAMES)


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        read_rules(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        read_rules(tmp_path / "bad.json")
    for text in ("null", "3", "[]", '"x"', "{}", '{"weights": 3}', '{"weights": {}, "format": "x"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UsageError, match=r"other\.json: (not a plan|plan format)"):
            read_rules(tmp_path / "other.json")
        with pytest.raises(UsageError, match=r"other\.json: (not a plan|plan format)"):
            pipeline_of(Request(plan=tmp_path / "other.json"))
    with pytest.raises(UsageError, match="plan: not a plan"):
        pipeline_of(Request(plan={"weights": 3}))
