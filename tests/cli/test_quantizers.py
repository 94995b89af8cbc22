"""``kbitc quantizers``, and the option of compile that takes one."""

from __future__ import annotations

import json

import pytest

from kbitc.quantizers import quantizer_names


def test_quantizers_are_listed(kbitc):
    listed = json.loads(kbitc("quantizers", "--json").stdout)
    assert [about["name"] for about in listed] == quantizer_names()
    requires = {about["name"]: about["requires"] for about in listed}
    assert requires["absmax"] == []
    assert requires["weighted"] == ["moments"]
    assert requires["feedback"] == ["moments", "gram"]
    assert all(about["summary"].endswith(".") for about in listed)
    shown = kbitc("quantizers").stdout
    assert [about["name"] for about in listed if about["summary"].split()[0] not in shown] == []


@pytest.mark.parametrize("name", ["absmax", "weighted", "feedback"])
def test_compile_takes_one_for_every_weight(kbitc, name, tmp_path):
    request = ("--spec", "nf4:64", "--quantizer", name, "--calibrate", "self")
    done = kbitc("compile", "demo", *request, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    weights = json.loads((tmp_path / "out" / "kbit_plan.json").read_text())["weights"]
    assert {entry["quantizer"] for entry in weights.values()} == {name}
