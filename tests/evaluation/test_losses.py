"""Losses of masked models and encoder-decoders by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kbitc.errors import UsageError
from kbitc.evaluation.intervals import paired
from kbitc.evaluation.losses import masked_loss, masked_windows, pairs_loss, read_pairs

TEXT = " ".join(f"w{(i * 37) % 90 + 10:03}" for i in range(200))


def changed(model):
    """Another model, near to it."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    return other


def test_masked_windows(tiny_model, words):
    model, tokenizer = tiny_model("roberta"), words(framed=True, mask_token="w004")
    items = masked_windows(model, tokenizer, TEXT, context=32, limit=None, seed=7)
    assert len(items) == 200 // 30
    body = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    for i, item in enumerate(items):
        assert len(item.ids) == 32
        assert item.ids[0] == 2
        assert item.ids[-1] == 3
        assert len(item.places) == len(set(item.places.tolist())) == round(0.15 * 30)
        whole = item.ids.clone()
        assert set(whole[item.places].tolist()) == {4}
        whole[item.places] = item.targets
        assert torch.equal(whole[1:-1], body[i * 30 : (i + 1) * 30])
        assert (whole == 4).sum() == 0
    again, other = (
        masked_windows(model, tokenizer, TEXT, context=32, limit=None, seed=seed) for seed in (7, 8)
    )
    assert all(torch.equal(a.places, b.places) for a, b in zip(items, again, strict=True))
    assert any(not torch.equal(a.places, b.places) for a, b in zip(items, other, strict=True))
    assert len(masked_windows(model, tokenizer, TEXT, context=32, limit=61, seed=7)) == 2


def test_masked_loss_is_the_definition(tiny_model, words):
    model = tiny_model("roberta")
    items = masked_windows(model, words(framed=True, mask_token="w004"), TEXT, context=20, limit=None, seed=0)
    other, told = changed(model), []
    score = masked_loss(model, items, reference=other, on_progress=lambda *step: told.append(step))

    def losses(scored):
        rows = []
        for item in items:
            with torch.no_grad():
                logits = scored(item.ids[None]).logits[0].double()
            each = [-logits[p].log_softmax(-1)[t] for p, t in zip(item.places, item.targets, strict=True)]
            rows.append(float(torch.stack(each).mean()))
        return rows

    ours, theirs = losses(model), losses(other)
    assert score.losses == pytest.approx(ours, rel=1e-5)
    assert score.loss == pytest.approx(np.mean(ours), rel=1e-5)
    assert score.reference_loss == pytest.approx(np.mean(theirs), rel=1e-5)
    assert score.standard_error == pytest.approx(np.std(ours, ddof=1) / np.sqrt(len(ours)), rel=1e-4)
    assert score.difference.mean == pytest.approx(np.mean(ours) - np.mean(theirs), rel=1e-3)
    assert score.tokens == len(items) * 3
    assert told[-1] == ("scoring", len(items), len(items))
    assert masked_loss(model, items).difference is None


def test_masks_that_cannot_be(tiny_model, words):
    model = tiny_model("roberta")

    def ask(tokenizer, text=TEXT, context=20):
        masked_windows(model, tokenizer, text, context=context, limit=None, seed=0)

    with pytest.raises(UsageError, match="no mask token"):
        ask(words())
    with pytest.raises(UsageError, match="takes 4 to 33 tokens"):
        ask(words(framed=True, mask_token="w004"), context=34)
    with pytest.raises(UsageError, match="takes 4 to 33 tokens"):
        ask(words(framed=True, mask_token="w004"), context=3)
    with pytest.raises(UsageError, match="has 2 tokens, fewer than one window"):
        ask(words(mask_token="w004"), text="w005 w006")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_pairs_loss_is_the_definition(family, tiny_model, words):
    model = tiny_model(family)
    model.config.decoder_start_token_id = 2
    other, tokenizer = changed(model), words(framed=True, pad_token="w001")
    pairs = [("w005 w006 w007", "w008 w009"), ("w010", "w011 w012 w013 w014 w015"), ("w020 w021", "w022")]
    score = pairs_loss(model, tokenizer, pairs, reference=other)
    start = model.config.decoder_start_token_id

    def losses(scored):
        rows = []
        for source, target in pairs:
            read, written = ([2, *(int(w[1:]) for w in text.split()), 3] for text in (source, target))
            total = 0.0
            for i, token in enumerate(written):  # a prefix at a time
                given = {
                    "input_ids": torch.tensor([read]),
                    "decoder_input_ids": torch.tensor([[start, *written[:i]]]),
                }
                with torch.no_grad():
                    total -= float(scored(**given).logits[0, -1].double().log_softmax(-1)[token])
            rows.append(total / len(written))
        return rows

    ours, theirs, counts = losses(model), losses(other), [4, 7, 3]
    assert score.counts == tuple(counts)
    assert score.losses == pytest.approx(ours, rel=1e-4)
    assert score.loss == pytest.approx(np.average(ours, weights=counts), rel=1e-4)
    assert score.reference_loss == pytest.approx(np.average(theirs, weights=counts), rel=1e-4)
    assert score.difference == paired(score.losses, score.reference_losses, weights=counts)
    assert score.difference.mean == pytest.approx(score.loss - score.reference_loss, rel=1e-6)


def test_pairs_that_are_too_long(tiny_model, words):
    long = " ".join(["w005"] * 40)
    with pytest.raises(UsageError, match="pair 2: has 40 tokens on one side, and this model takes 1 to 33"):
        pairs_loss(tiny_model("bart"), words(), [("w005", "w006"), ("w005", long)])


def test_files_of_pairs(tmp_path):
    wanted = [("a b", "c"), ("d", "e f")]
    lines = '{"source": "a b", "target": "c"}\n\n{"target": "e f", "source": "d", "id": 3}\n'
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.tsv").write_text("a b\tc\r\nd\te f\n")
    assert read_pairs(tmp_path / "x.jsonl", None) == read_pairs(tmp_path / "x.tsv", None) == wanted
    assert read_pairs(tmp_path / "x.tsv", 1) == wanted[:1]


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("x.csv", "a,b", "neither .jsonl"),
        ("x.tsv", "a\tb\nc\n", "line 2: is no pair"),
        ("x.tsv", "a\tb\tc\n", "line 1: is no pair"),
        ("x.jsonl", '{"source": "a"}', "line 1: is no pair"),
        ("x.jsonl", '{"source": "a", "target": 3}', "line 1: is no pair"),
        ("x.jsonl", "[1, 2, 3]", "line 1: is no pair"),
        ("x.jsonl", "{", "line 1: is no pair"),
        ("x.tsv", "a\t \n", "line 1: has an empty"),
        ("x.tsv", " \n", "is empty"),
    ],
)
def test_files_that_hold_no_pairs(name, body, said, tmp_path):
    (tmp_path / name).write_text(body)
    with pytest.raises(UsageError, match=said):
        read_pairs(tmp_path / name, None)
    with pytest.raises(UsageError, match=r"--pairs .*gone\.tsv: cannot be read"):
        read_pairs(tmp_path / "gone.tsv", None)
