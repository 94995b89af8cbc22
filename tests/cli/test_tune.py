"""``kbitc tune`` as it is typed."""

from __future__ import annotations

import json

from kbitc.artifact.reader import Artifact


def test_an_artifact_is_tuned_and_verified(kbitc, compiled, tmp_path):
    options = ("--windows", "2", "--steps", "1", "--calibrate", "random")
    done = kbitc("tune", compiled[0], "-o", tmp_path / "tuned", *options, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    plan = Artifact.open(tmp_path / "tuned").plan
    assert plan.tuning is not None
    assert told["held_out_before"] == plan.tuning.before
    assert plan.tuning.calibration == "10 random inputs"
    assert kbitc("verify", tmp_path / "tuned").returncode == 0
    again = kbitc("tune", compiled[0], "-o", tmp_path / "tuned", *options)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_folder_that_is_no_artifact(kbitc, tmp_path):
    done = kbitc("tune", tmp_path)
    assert done.returncode == 1
    assert "not a compiled model" in done.stderr
