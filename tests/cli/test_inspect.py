"""``kbitc inspect``: a model, an artifact, the page and the graph."""

from __future__ import annotations

import json


def test_inspect_artifact_and_model(kbitc, compiled, tmp_path):
    out, data = compiled
    page, graph = tmp_path / "r.html", tmp_path / "g.dot"
    done = kbitc("inspect", out, "--html", page, "--dot", graph, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert set(shown["weights"]) == set(data["weights"])
    assert shown["fusions"] == data["fusions"]
    assert len(shown["fusions"]["merge_linears"]["groups"]) == 2 * 6  # layers
    assert "merge_linears: fired 12 times (30 names), left" in kbitc("inspect", out).stdout
    assert "<table>" in page.read_text()
    assert "http" not in page.read_text().replace("http-equiv", "")  # one file, nothing fetched
    assert graph.read_text().count('label="linear"') == len(data["weights"])
    model = json.loads(kbitc("inspect", "demo", "--json").stdout)
    assert model["weights"]["model.embed_tokens.weight"]["aliases"] == ["lm_head.weight"]
    assert model["parameters"] == data["parameters"]
    assert model["fusions"].pop("fold_norms")["groups"]
    assert model["fusions"] == data["fusions"]
