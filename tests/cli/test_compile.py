"""``kbitc compile``: what it says, and that nothing is written where it fails."""

from __future__ import annotations

import json
import resource
import signal


def test_compile_json_keeps_the_budget(compiled):
    out, data = compiled
    assert data["bits_per_param"] <= 4.0
    payload = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert data["bytes"] <= payload
    assert data["weights"]
    assert data["left_alone"]


def test_tables_for_people(kbitc, compiled, tmp_path):
    done = kbitc("compile", "demo", "--spec", "nf4:64", "-o", tmp_path / "x")
    assert done.returncode == 0
    assert "stored bits per parameter" in done.stdout
    assert "nf4:64" in done.stdout
    dry = kbitc("compile", "demo", "--spec", "nf4:64", "--dry-run", "-o", tmp_path / "y")
    assert "nothing was written" in dry.stdout
    assert not (tmp_path / "y").exists()


def test_existing_output_needs_force(kbitc, compiled):
    out, _ = compiled
    done = kbitc("compile", "demo", "-o", out)
    assert done.returncode == 2
    assert "--force" in done.stderr


def test_plan_with_an_unknown_weight(kbitc, compiled, tmp_path):
    out, _ = compiled
    plan = json.loads((out / "kbit_plan.json").read_text())
    plan["weights"]["model.layers.0.self_attn.qq_proj.weight"] = {"spec": "nf4:64"}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    done = kbitc("compile", "demo", "--plan", tmp_path / "p.json", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "did you mean 'model.layers.0.self_attn.q_proj.weight'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_full_disk(kbitc, tmp_path):
    """A file system with no room: /dev/full does not take folders, so a size limit stands in."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        done = kbitc("compile", "demo", "--spec", "nf4:64", "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []
