"""``kbitc eval`` of every kind of model: the numbers of the parts, and options that say nothing."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import typer.main
from typer.testing import CliRunner

from kbitc.cli.main import app
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.kinds import Kind
from kbitc.evaluation.scoring import Asked
from kbitc.evaluation.task_files import TASKS

TEXT = "\n".join(" ".join(f"w{(i * 13 + 7 * j) % 90 + 10:03}" for j in range(6)) for i in range(20))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def output(*arguments):
    outcome = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if outcome.exception is not None:
        raise outcome.exception
    return outcome.stdout


def run(*arguments):
    """The JSON of the command and what it says to people."""
    return json.loads(output(*arguments, "--json")), " ".join(output(*arguments).split())


def saved(model, tokenizer, folder, spec="int4:32"):
    """``(source, artifact)``."""
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    compile_to(folder / "source", folder / "out", Request(spec=spec))
    return folder / "source", folder / "out"


def test_causal_with_a_paired_interval(text, tmp_path, tiny_model, words):
    source, out = saved(tiny_model("gpt2"), words(), tmp_path)
    data, said = run(out, "--text", text, "--context", 12, "--against", source)
    assert data["kind"] == "causal language model"
    assert data["windows"] == 10
    assert data["difference"]["mean"] == pytest.approx(data["loss"] - data["reference_loss"])
    assert data["difference"]["low"] < data["difference"]["mean"] < data["difference"]["high"]
    assert set(data["versions"]) == {"kbitc", "python", "torch", "transformers"}
    assert data["seed"] == 1234
    assert f"loss minus that of {source}: {data['difference']['mean']:+.4f} [" in said


def test_masked(text, tmp_path, tiny_model, words):
    source, out = saved(tiny_model("roberta"), words(framed=True, mask_token="w004"), tmp_path)
    data, said = run(out, "--text", text, "--context", 20, "--against", source, "--seed", 3)
    assert data["kind"] == "masked language model"
    assert (data["items"], data["tokens"], data["seed"]) == (6, 18, 3)
    assert data["difference"]["mean"] == pytest.approx(data["loss"] - data["reference_loss"])
    assert "perplexity" not in data
    assert (data["text"], data["context"], data["limit_tokens"]) == ("text.txt", 20, None)
    assert f"loss {data['loss']:.4f} ± " in said
    assert "18 masked tokens of 6 windows" in said
    again = json.loads(output(source, "--text", text, "--context", 20, "--seed", 3, "--json"))
    assert again["loss"] == pytest.approx(data["reference_loss"])
    assert "difference" not in again
    with pytest.raises(UsageError, match="--record: keeps perplexities"):
        run(out, "--text", text, "--context", 20, "--record")
    with pytest.raises(UsageError, match="--tasks|--pairs: says nothing about"):
        run(out, "--pairs", write_pairs(tmp_path))


def write_pairs(folder):
    path = folder / "pairs.tsv"
    path.write_text("w005 w006\tw007 w008\nw010\tw011 w012 w013\nw014\tw015\n")
    return path


def test_encoder_decoder(text, tmp_path, tiny_model, words):
    model = tiny_model("bart")
    source, out = saved(model, words(framed=True, pad_token="w001"), tmp_path)
    data, said = run(out, "--pairs", write_pairs(tmp_path), "--against", source, "--limit", 2)
    assert data["kind"] == "encoder-decoder"
    assert (data["items"], data["tokens"], data["limit"]) == (2, 4 + 5, 2)
    assert data["difference"]["mean"] == pytest.approx(data["loss"] - data["reference_loss"])
    assert data["pairs"].endswith("pairs.tsv")
    assert "9 target tokens of 2 pairs" in said
    with pytest.raises(UsageError, match="scored as an encoder-decoder, for which eval needs --pairs FILE"):
        run(out)
    with pytest.raises(UsageError, match="--text: says nothing about"):
        run(out, "--text", text, "--pairs", write_pairs(tmp_path))


def test_embedding(text, tmp_path, words):
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 75, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=101, **sizes))
    source, out = saved(model, words(framed=True), tmp_path)
    data, said = run(out, "--text", text, "--against", source)
    assert data["kind"] == "embedding model"
    assert data["pooling"] == "mean"
    assert 0.5 < data["texts"]["cosine"]["least"] <= data["texts"]["cosine"]["mean"] < 1
    assert data["texts"]["retrieval"]["items"] == 20
    assert f"the same nearest other text for {data['texts']['retrieval']['agreement']:.4f} ±" in said
    with pytest.raises(UsageError, match="an embedding model, for which eval needs --against MODEL"):
        run(out, "--text", text)
    with pytest.raises(UsageError, match="is scored as causal language model, and .* as embedding model"):
        run(out, "--text", text, "--against", "demo")


def test_images_and_texts(text, tmp_path, tiny_model, words):
    image = pytest.importorskip("PIL.Image")
    source, out = saved(tiny_model("clip"), words(eos_token="w001"), tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(4):
        image.new("RGB", (30, 30), (60 * i, 250 - 60 * i, 17)).save(tmp_path / "images" / f"{i}.png")
    options = ("--text", text, "--images", tmp_path / "images", "--against", source)
    with pytest.raises(SourceError, match="no preprocessor_config.json"):
        run(out, *options)
    sizes = {"size": {"shortest_edge": 21}, "crop_size": {"height": 21, "width": 21}}
    (out / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **sizes})
    )
    data, said = run(out, *options, "--limit", 6)
    assert data["kind"] == "image-text model"
    assert (data["texts"]["cosine"]["items"], data["images"]["cosine"]["items"]) == (6, 4)
    assert "the same nearest image for" in said
    assert "the same nearest text for" in said
    with pytest.raises(UsageError, match="eval needs --images DIR"):
        run(out, "--text", text, "--against", source)
    with pytest.raises(UsageError, match="gone: is no folder"):
        run(out, "--text", text, "--against", source, "--images", tmp_path / "gone")


def test_what_cannot_be_scored_is_refused(text, tmp_path, words):
    sizes = {"hidden_size": 36, "intermediate_size": 75, "num_hidden_layers": 1, "num_attention_heads": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=101, **sizes))
    _, out = saved(model, words(), tmp_path)
    with pytest.raises(UsageError, match="says anything of a BertForSequenceClassification"):
        run(out, "--text", text)


@pytest.fixture
def tasks(tmp_path):
    rows = [{"query": f"The file {i}", "choices": ["is open", "flies"], "gold": i % 2} for i in range(8)]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"context": "This is a", "continuation": "list"}
    (tmp_path / "lambada_openai.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    return tmp_path


def test_tasks(tasks, tmp_path):
    pytest.importorskip("lm_eval")
    compile_to("demo", tmp_path / "out", Request(spec="int3:64"))
    options = ("--tasks", "copa, lambada_openai", "--data", tasks, "--limit", 6, "--dtype", "float32")
    data, said = run(tmp_path / "out", *options, "--against", "demo")
    assert "perplexity" not in data  # nobody asked for a text
    assert list(data["tasks"]) == list(data["reference_tasks"]) == ["copa", "lambada_openai"]
    copa = data["tasks"]["copa"]
    assert copa["items"] == len(copa["hits"]) == 6
    assert copa["accuracy"] == sum(copa["hits"]) / 6
    assert copa["sha256"]
    assert data["mean_accuracy"]["mean"] == pytest.approx(
        (copa["accuracy"] + data["tasks"]["lambada_openai"]["accuracy"]) / 2
    )
    assert set(data["task_differences"]) == {"copa", "lambada_openai", "mean"}
    assert (data["limit"], data["shots"], data["seed"], data["against"]) == (6, 0, 1234, "demo")
    assert "lm_eval" in data["versions"]
    assert data["data"] == str(tasks)
    assert f"{100 * copa['accuracy']:.1f} ± {100 * copa['standard_error']:.1f}" in said
    mean = data["task_differences"]["mean"]
    assert f"{100 * mean['mean']:+.1f} [{100 * mean['low']:+.1f}, {100 * mean['high']:+.1f}]" in said
    with pytest.raises(UsageError, match="--record: keeps perplexities"):
        run(tmp_path / "out", *options, "--record")
    both = json.loads(output("demo", *options, "--text", _some_text(tmp_path), "--context", 16, "--json"))
    assert both["perplexity"] > 1
    assert both["tasks"]


def _some_text(folder):
    (folder / "some.txt").write_text("The file is open. " * 20)
    return folder / "some.txt"


def test_names_and_files_of_tasks(tasks):
    with pytest.raises(UsageError, match="no task 'lambada'; did you mean 'lambada_openai'"):
        run("nowhere", "--tasks", "lambada", "--data", tasks)  # asked before the model is opened
    with pytest.raises(UsageError, match=f"{tasks}/piqa.jsonl; put the file there"):
        run("nowhere", "--tasks", "piqa", "--data", tasks)
    with pytest.raises(UsageError, match="--shots: is of --tasks"):
        run("nowhere", "--shots", 2)
    with pytest.raises(UsageError, match="--limit-tokens takes the first tokens"):
        run("demo", "--limit", 2)


def test_the_help_names_every_task():
    command = typer.main.get_command(app).commands["eval"]
    (option,) = [parameter for parameter in command.params if parameter.name == "tasks"]
    assert option.help.rstrip(".").partition(": ")[2].split(", ") == list(TASKS)


def test_each_kind_says_what_it_takes():
    for kind in Kind:
        with pytest.raises(UsageError, match=f"m.* is scored as an? {kind}"):
            Asked(limit_tokens=4, limit=4, tasks=("piqa",), pairs="x", images="y").check_kind(
                kind, "m", has_reference=True
            )
