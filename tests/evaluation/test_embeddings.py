"""Agreement of embeddings by its definition."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.embeddings import (
    POOLINGS,
    image_processor,
    image_text_agreement,
    pooling_of,
    read_images,
    read_lines,
    text_agreement,
)

LINES = [" ".join(f"w{(7 * i + j * j) % 90 + 10:03}" for j in range(3 + i % 5)) for i in range(12)]


def changed(model, by=0.3):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * by)
    return other


@pytest.fixture
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 75, "num_hidden_layers": 2, "num_attention_heads": 3}
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=101, max_position_embeddings=20, **sizes)
    ).eval()


POOLED = {
    "mean": lambda h: h.mean(0),
    "cls": lambda h: h[0],
    "max": lambda h: h.max(0).values,
    "last": lambda h: h[-1],
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_texts(pooling, bert, words):
    other, tokenizer = changed(bert), words(framed=True)
    found = text_agreement(bert, other, tokenizer, LINES, pooling=pooling)

    def vectors(model):
        rows = []
        for line in LINES:
            with torch.no_grad():
                hidden = model(**tokenizer(line, return_tensors="pt")).last_hidden_state[0]
            rows.append(POOLED[pooling](hidden).double())
        return rows

    ours, theirs = vectors(bert), vectors(other)
    cosine = nn.CosineSimilarity(dim=0)
    assert found.cosines == pytest.approx(
        [float(cosine(a, b)) for a, b in zip(ours, theirs, strict=True)], abs=1e-5
    )

    def nearest(rows, i):
        return max((j for j in range(len(rows)) if j != i), key=lambda j: float(cosine(rows[i], rows[j])))

    assert found.agreed == tuple(int(nearest(ours, i) == nearest(theirs, i)) for i in range(len(LINES)))
    assert found.to_json()["retrieval"]["agreement"] < 1


def test_a_model_agrees_with_itself(bert, words):
    data = text_agreement(bert, bert, words(), LINES).to_json()
    assert data["cosine"]["least"] == pytest.approx(1, abs=1e-6)
    assert data["retrieval"] == {"agreement": 1.0, "standard_error": 0.0, "items": 12}


def test_long_texts_are_cut_with_their_frame(bert, words):
    told = []
    long = " ".join(["w005 w006 w007"] * 20)
    found = text_agreement(
        bert, bert, words(framed=True), [long, "w008"], on_progress=lambda *step: told.append(step)
    )
    assert found.agreed == (1, 1)
    assert told == [("embedding texts", 1, 2), ("embedding texts", 2, 2)]


def test_a_reference_of_another_width(bert, words):
    other = transformers.BertModel(
        transformers.BertConfig(vocab_size=101, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UsageError, match="24 wide, this model's 36"):
        text_agreement(bert, other.eval(), words(), LINES)


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        pixels = torch.randint(
            0, 255, (30, 40, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def processor(tmp_path):
    sizes = {"size": {"shortest_edge": 21}, "crop_size": {"height": 21, "width": 21}}
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "do_resize": True,
        **sizes,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return image_processor(tmp_path)


def test_images_and_texts(tiny_model, words, pictures, processor):
    model = tiny_model("clip")
    other, tokenizer = changed(model, 0.15), words(eos_token="w001")
    images, lines = read_images(pictures, None), [f"{line} w001" for line in LINES[:6]]
    found = image_text_agreement(model, other, tokenizer, processor, lines, images)

    def closeness(scored):
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        rows = []
        for line in lines:
            with torch.no_grad():
                out = scored(**tokenizer(line, return_tensors="pt"), pixel_values=pixels)
            rows.append(out.logits_per_image[:, 0])
        return torch.stack(rows, 1), out.image_embeds

    (ours, our_images), (theirs, their_images) = closeness(model), closeness(other)
    assert found.images.agreed == tuple((ours.argmax(1) == theirs.argmax(1)).long().tolist())
    assert found.texts.agreed == tuple((ours.argmax(0) == theirs.argmax(0)).long().tolist())
    assert found.images.cosines == pytest.approx((our_images * their_images).sum(1).tolist(), abs=1e-4)
    assert len(found.texts.cosines) == 6


def test_images_that_are_none(pictures, tmp_path):
    assert [image.size for image in read_images(pictures, 2)] == [(40, 30)] * 2
    with pytest.raises(UsageError, match="is no folder"):
        read_images(tmp_path / "gone", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="fewer than two images"):
        read_images(tmp_path / "empty", None)
    (pictures / "0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"0\.png is no image"):
        read_images(pictures, None)
    with pytest.raises(SourceError, match="no preprocessor_config.json"):
        image_processor(tmp_path / "empty")


def test_lines():
    assert read_lines("a\n\n b \na\nc", "--text", None) == ["a", "b", "c"]
    assert read_lines("a\nb\nc", "--text", 2) == ["a", "b"]
    with pytest.raises(UsageError, match="--text: has fewer than two"):
        read_lines("a\na\n", "--text", None)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "max"}, "max"),
    ],
)
def test_pooling(config, pooling, tmp_path):
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 36} | config))
    assert pooling_of(tmp_path) == pooling


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_weightedmean_tokens": True},
        {},
    ],
)
def test_pooling_that_is_not_known(config, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="use sentence-transformers"):
        pooling_of(tmp_path)
