"""``kbitc passes``, and the options of compile that edit and watch passes."""

from __future__ import annotations

import json


def test_passes_are_listed_edited_and_watched(kbitc, tmp_path):
    listed = json.loads(kbitc("passes", "--json").stdout)
    assert {"name", "runs", "needs", "gives", "requires", "provides", "summary"} == set(listed[0])
    runs = {about["name"]: about["runs"] for about in listed}
    assert (runs["canonicalize"], runs["fuse_dequantize"], runs["merge_linears"]) == (
        "compile",
        "lowering 1",
        "lowering 3",
    )
    page = tmp_path / "passes.html"
    done = kbitc(
        "compile", "demo", "--dry-run", "--spec", "nf4:64", "--passes", "canonicalize,apply_plan",
        "--passes-html", page, "--print-diff", "apply_plan", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"]["model.embed_tokens.weight"]["spec"] == "nf4:64"
    assert done.stderr.startswith("changes of apply_plan:\n--- before\n+++ after\n")
    assert "0 … 5 (6 alike)" in page.read_text()
    assert "http" not in page.read_text().replace("http-equiv", "")  # one file, nothing fetched
