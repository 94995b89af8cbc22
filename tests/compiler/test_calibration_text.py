"""Text for models that are no causal language models, and how it is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbitc
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibration_text import all_windows, spread, takes_text, with_decoder_text
from kbitc.compiler.calibrator import Calibrator, make_calibrator
from kbitc.errors import UsageError
from kbitc.graph.context import silent

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, CLS, SEP, A = 0, 2, 3, 4  # A: the id of "a"; others follow


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path / "cache")


def tokenizer_with(template):
    """One token a letter, between those of a template of tokenizers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture
def folder(tiny_model, tmp_path):
    """Saves a family's tiny model with a tokenizer of that template, and a text of all letters."""
    (tmp_path / "text.txt").write_text(LETTERS * 40)

    def save(family, template="[CLS] $A [SEP]"):
        model = tiny_model(family)
        model.save_pretrained(tmp_path / family)
        tokenizer_with(template).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [("[CLS] $A [SEP]", [CLS], [SEP]), ("$A [SEP]", [], [SEP]), ("$A", [], []), ("[CLS] $A", [CLS], [])],
)
def test_each_window_has_the_ends_of_a_text(template, first, last):
    tokenizer = tokenizer_with(template)
    windows = spread(all_windows(tokenizer, LETTERS, 6, has_ends=True), 3)
    inner = 6 - len(first) - len(last)
    assert windows.shape == (3, 6)
    starts = [i * (len(LETTERS) // inner) // 3 * inner for i in range(3)]
    for window, start in zip(windows.tolist(), starts, strict=True):
        assert window == first + [A + start + i for i in range(inner)] + last
    plain = spread(all_windows(tokenizer, LETTERS, 6), 1)  # a causal language model's: the text begins once
    assert plain[0].tolist() == (first + [A + i for i in range(6)])[:6]


def test_windows_that_cannot_be():
    tokenizer = tokenizer_with("[CLS] $A [SEP]")
    with pytest.raises(UsageError, match="my text has 3 tokens, fewer than one window of 4; give a longer"):
        all_windows(tokenizer, "abc", 6, "my text", has_ends=True)
    with pytest.raises(UsageError, match="a window of 2 tokens has no room for text between the 2 tokens"):
        all_windows(tokenizer, "abc", 2, has_ends=True)
    with pytest.raises(UsageError, match="has 0 tokens"):
        all_windows(tokenizer, " \n"[:0], 6, has_ends=True)


@pytest.mark.parametrize(("family", "takes"), [("roberta", True), ("t5", True), ("clip", True)])
def test_who_takes_text(family, takes, tiny_model):
    assert takes_text(tiny_model(family)) is takes
    assert not takes_text(nn.Linear(3, 3))


def test_an_encoder_reads_whole_texts(folder, tmp_path):
    with open_checkpoint(folder("roberta")) as checkpoint:
        made = make_calibrator(checkpoint, str(tmp_path / "text.txt"), silent, is_wanted=True)
        assert made.is_text
        assert made.label == "up to 2 windows of 16 tokens of text.txt"
        feeds = made.feeds(3)
        assert [feed["input_ids"].shape for feed in feeds] == [(1, 16)] * 3
        for feed in feeds:
            assert feed["input_ids"][0, [0, -1]].tolist() == [CLS, SEP]
            assert bool((feed["input_ids"][0, 1:-1] >= A).all())
            assert bool((feed["attention_mask"] == 1).all())
        logits = torch.zeros(1, 16, 101, requires_grad=True)
        drawn = [made.loss(feeds[0], [logits * 0], seed) for seed in (0, 0)]
        assert drawn[0] == drawn[1]
        made.loss(feeds[0], [logits], 0).backward()
        # Outcomes of all sixteen positions, drawn; next tokens would have fifteen, those of the text.
        assert torch.equal((logits.grad[0].min(-1).values < 0), torch.ones(16, dtype=torch.bool))


def test_an_encoder_reads_sentences_several_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.SENTENCE", 7)
    with open_checkpoint(folder("roberta")) as checkpoint:
        made = Calibrator(checkpoint, tmp_path / "text.txt")
        assert made.label == "up to 16 windows of 7 tokens of text.txt"
        feeds = made.feeds(3)
        assert [{key: value.shape for key, value in feed.items()} for feed in feeds] == [
            {"input_ids": (8, 7), "attention_mask": (8, 7)}
        ] * 3
        ids = torch.cat([feed["input_ids"] for feed in feeds])
        assert torch.equal(ids, made.windows(24))
        assert bool((ids[:, 0] == CLS).all())
        short = made.feeds(100)  # 208 windows: as many inputs as are asked for, of two
        assert [feed["input_ids"].shape for feed in short] == [(2, 7)] * 100
        monkeypatch.setattr("kbitc.compiler.calibrator.SMALL", 1000)
        assert Calibrator(checkpoint, tmp_path / "text.txt").feeds(3)[0]["input_ids"].shape == (2, 7)
        assert Calibrator(checkpoint, "random").feeds(3)[0]["input_ids"].shape == (1, 16)
    with open_checkpoint(folder("t5")) as checkpoint:  # its decoder reads as much as its encoder
        assert Calibrator(checkpoint, tmp_path / "text.txt").feeds(3)[0]["input_ids"].shape[0] == 1


@pytest.mark.parametrize(("family", "start"), [("t5", PAD), ("bart", 2)])
def test_a_decoder_reads_the_same_text_shifted(family, start, folder, tmp_path):
    with open_checkpoint(folder(family, "$A [SEP]")) as checkpoint:
        (feed, other) = Calibrator(checkpoint, tmp_path / "text.txt").feeds()
    assert feed["decoder_input_ids"].shape == (1, 15)
    assert int(feed["decoder_input_ids"][0, 0]) == start
    assert torch.equal(feed["decoder_input_ids"][0, 1:], feed["input_ids"][0, :14])
    assert not torch.equal(feed["input_ids"], other["input_ids"])


def test_a_decoder_of_other_tokens_keeps_what_was_drawn(tiny_model):
    model = tiny_model("bart")
    drawn = torch.tensor([[5, 6, 7]])
    feed = {"input_ids": torch.tensor([[8, 9, 10, 11]]), "decoder_input_ids": drawn}
    assert with_decoder_text(model, feed)["decoder_input_ids"].tolist() == [[2, 8, 9]]
    model.config.vocab_size = 11  # 11 itself is not known then
    assert with_decoder_text(model, feed)["decoder_input_ids"] is drawn
    model.config.vocab_size = 101
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.config, name, None)
        setattr(model.generation_config, name, None)
    assert with_decoder_text(model, feed)["decoder_input_ids"] is drawn
    assert with_decoder_text(model, {"input_ids": drawn}) == {"input_ids": drawn}


@pytest.mark.parametrize("family", ["roberta", "t5", "clip"])
def test_compiled_on_text(family, folder, tmp_path):
    source = folder(family)
    packed = kbitc.compile(source, bits=5, calibrate=tmp_path / "text.txt", out=tmp_path / "out")
    assert any(isinstance(p, kbitc.KbitTensor) for p in packed.parameters())
    plan = (tmp_path / "out" / "kbit_plan.json").read_text()
    assert '"calibration": "up to 2 windows of 16 tokens of text.txt"' in plan
    random = kbitc.compile(source, bits=5)
    scales = [
        [p.packed.scales for p in m.parameters() if isinstance(p, kbitc.KbitTensor)] for m in (packed, random)
    ]
    assert any(not torch.equal(a, b) for a, b in zip(*scales, strict=True))


def test_given_tokens_are_text_for_an_encoder(tiny_model):
    ids = torch.randint(101, (3, 9), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(tiny_model("roberta")) as checkpoint:
        made = make_calibrator(checkpoint, ids, silent, is_wanted=True)
        assert torch.equal(torch.cat([feed["input_ids"] for feed in made.feeds()]), ids)
        assert torch.equal(torch.cat([feed["input_ids"] for feed in made.feeds(2)]), ids[:2])
        with pytest.raises(UsageError, match="int64 token ids of shape"):
            make_calibrator(checkpoint, ids.float(), silent, is_wanted=True)


def test_models_without_tokens_say_so(tiny_model, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ViTModel(ViTConfig(**sizes, image_size=14, patch_size=7))
    for model in (vision, nn.Linear(4, 4)):
        with open_checkpoint(model) as checkpoint:
            with pytest.raises(UsageError, match=r"takes no token ids \(input_ids.*--calibrate random"):
                make_calibrator(checkpoint, "text.txt", silent, is_wanted=True)
            with pytest.raises(
                UsageError, match="no causal language model of transformers.*no other samples"
            ):
                make_calibrator(checkpoint, "self", silent, is_wanted=True)
    with open_checkpoint(tiny_model("roberta")) as checkpoint:
        made = make_calibrator(checkpoint, "text.txt", silent, is_wanted=True)
        with pytest.raises(UsageError, match="has no tokenizer; give token ids.*calibrate with 'random'"):
            made.feeds()
