"""Fine-tuning, merging and adapters of the demo model, from the command line's functions down."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.backends import make_decoder
from kbitc.checkpoint.dense import tokenizer_in
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.adapters import RECORD, put_adapter
from kbitc.evaluation.opening import open_model
from kbitc.system.json_file import read_json
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.training import trainer_steps
from kbitc.training.examples import IGNORED, chat_examples, collated, held_out, mean_loss
from kbitc.training.finetune_recipe import FinetuneRecipe
from kbitc.training.finetuning import adapted_model, finetune_to
from kbitc.training.merging import merge_to
from kbitc.training.residual import best_fit

QUICK = FinetuneRecipe(
    rank=4, targets="q_proj,v_proj,down_proj", steps=4, batch=2, context=16, rate=5e-3, save_every=2
)
IDS = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuning") / "demo"
    kbitc.compile("demo", spec="int3:64", out=folder, calibrate="none")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The king said to the queen that the horse was in the house by the river. " * 30)
    return path


@pytest.fixture(scope="module")
def finetuned(artifact, text, tmp_path_factory):
    return finetune_to(artifact, tmp_path_factory.mktemp("adapter") / "adapter", text=text, recipe=QUICK)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def test_finetune_writes_an_adapter_with_its_record(finetuned):
    assert finetuned.losses.after < finetuned.losses.before
    assert [step for step, _ in finetuned.losses.curve] == [1, 2, 3, 4]
    record = read_json(finetuned.out / RECORD)
    assert record["held_out_after"] == finetuned.losses.after
    assert record["recipe"]["rank"] == 4
    page = (finetuned.out / "report.html").read_text()
    assert "held out after" in page
    assert "<polyline" in page
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in finetuned.out.iterdir()
    }
    assert not list(finetuned.out.parent.glob(".adapter.*"))


def test_an_adapter_runs_on_the_native_step(finetuned, artifact):
    loaded = open_model(str(artifact), torch.float32, finetuned.out)
    assert loaded.nbytes > Artifact.open(artifact).payload_bytes
    bare = kbitc.load(artifact, dtype=torch.float32)
    assert (logits(loaded.model) - logits(bare)).abs().max() > 0.01
    wanted = list(make_decoder(loaded.model, "eager").generate(IDS, 8, ends=set()))
    decoder = make_decoder(loaded.model, "cpu")
    assert type(decoder).__name__ == "NativeDecoder"
    assert list(decoder.generate(IDS, 8, ends=set())) == wanted


class Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_and_ends_the_same(finetuned, artifact, text, tmp_path):
    def kill(what, done, _):
        if what == "training step" and done == 3:
            raise Killed

    out = tmp_path / "adapter"
    with pytest.raises(Killed):
        finetune_to(artifact, out, text=text, recipe=QUICK, on_progress=kill)
    assert not out.exists()
    steps = tmp_path / ".adapter.partial" / "steps"
    assert (steps / "checkpoint-2" / trainer_steps.MARK).exists()
    (steps / "checkpoint-3").mkdir()  # half written
    with pytest.raises(UsageError, match="begun with another model, text or options"):
        finetune_to(artifact, out, text=text, recipe=FinetuneRecipe(), is_resumed=True)
    seen = []
    again = finetune_to(
        artifact, out, text=text, recipe=QUICK, is_resumed=True, on_progress=lambda *given: seen.append(given)
    )
    assert [done for what, done, _ in seen if what == "training step"] == [3, 4]
    assert again.losses.after == pytest.approx(finetuned.losses.after, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merged(finetuned, artifact, text, tmp_path):
    merged = merge_to(artifact, finetuned.out, tmp_path / "merged", text=text, context=16)
    assert len(merged.errors) == 3 * kbitc.load(artifact).config.num_hidden_layers
    assert max(merged.errors.values()) < 0.1
    old, new = Artifact.open(artifact), Artifact.open(tmp_path / "merged")
    new.verify(is_whole=True)
    assert (new.payload_bytes, new.specs) == (old.payload_bytes, old.specs)
    assert new.plan.merged[0].weights == len(merged.errors)
    assert merged.before == pytest.approx(finetuned.losses.after, abs=0.05)
    assert merged.after is not None
    assert merged.after < finetuned.losses.before
    plain = merge_to(artifact, finetuned.out, tmp_path / "plain")
    assert plain.before is None
    beside = logits(open_model(str(artifact), torch.float32, finetuned.out).model)
    apart = [
        float((logits(kbitc.load(tmp_path / name, dtype=torch.float32)) - beside).norm())
        for name in ("merged", "plain")
    ]
    bare = float((logits(kbitc.load(artifact, dtype=torch.float32)) - beside).norm())
    assert max(apart) < bare


def test_residual(artifact, text):
    """The adapter starts from what quantization lost: nearer to the source, before a step was made."""
    model = kbitc.load(artifact, dtype=torch.float32)
    recipe = FinetuneRecipe(rank=16, init="residual")
    adapted = adapted_model(model, recipe, Artifact.open(artifact), "demo")
    layer = next(
        module for module in adapted.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    )
    assert isinstance(layer.base_layer.weight, KbitTensor)
    fitted = layer.get_delta_weight("default")
    assert fitted.norm() > 0
    rows = torch.tensor(tokenizer_in(artifact)(text.read_text())["input_ids"][:256]).view(8, 32)
    examples = [{"input_ids": row, "labels": row} for row in rows.tolist()]
    bare = mean_loss(kbitc.load(artifact, dtype=torch.float32), examples)
    source = mean_loss(kbitc.compile("demo", spec="int8:64", calibrate="none"), examples)
    assert source < mean_loss(adapted.eval(), examples) < bare


def test_best_fit():
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    a, b = best_fit(matrix, 5)
    u, s, v = torch.linalg.svd(matrix)
    wanted = matrix - u[:, :5] * s[:5] @ v[:5]
    assert (matrix - b @ a).norm() == pytest.approx(float(wanted.norm()), rel=1e-3)
    a, b = best_fit(matrix[:3], 5)
    assert torch.allclose(b @ a, matrix[:3], atol=1e-5)


def chats(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_chats_count_what_the_assistant_says(artifact, tmp_path):
    tokenizer = tokenizer_in(artifact)
    turns = [
        ("user", "Who is it?"),
        ("assistant", "The king."),
        ("user", "Where?"),
        ("assistant", "By the river."),
    ]
    path = chats(
        tmp_path / "c.jsonl", {"messages": [{"role": role, "content": said} for role, said in turns]}
    )
    with pytest.raises(UsageError, match="has no chat template"):
        chat_examples(tokenizer, path, 64)
    tokenizer.chat_template = TEMPLATE
    (example,) = chat_examples(tokenizer, path, 64)
    learned = [token for token in example["labels"] if token != IGNORED]
    said = tokenizer.decode(learned)
    assert "The king." in said
    assert "By the river." in said
    assert "Who" not in said
    assert "user" not in said
    with pytest.raises(UsageError, match="nothing that an assistant says within 3 tokens"):
        chat_examples(tokenizer, path, 3)
    said = {"messages": [{"role": "assistant", "content": "Yes."}]}
    with pytest.raises(UsageError, match=r"line 2: is no chat"):
        chat_examples(tokenizer, chats(tmp_path / "d.jsonl", said, {"text": "x"}), 64)


def test_finetuning_on_chats(artifact, tmp_path):
    folder = tmp_path / "with-template"
    shutil.copytree(artifact, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    said = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The king."}]}
    result = finetune_to(
        folder, tmp_path / "adapter", chat=chats(tmp_path / "c.jsonl", *[said] * 6), recipe=QUICK
    )
    assert result.losses.after < result.losses.before


def test_batches_are_padded():
    batch = collated([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    learned, held = held_out([{"input_ids": [i], "labels": [i]} for i in range(30)])
    assert (len(learned), held[0]["input_ids"]) == (27, [27])
    with pytest.raises(UsageError, match="one example is too few"):
        held_out([{"input_ids": [1], "labels": [1]}])


def saved(folder, artifact, **options):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    get_peft_model(kbitc.load(artifact, dtype=torch.float32), config).save_pretrained(folder)
    return folder


def test_misfits_are_named(finetuned, artifact, text, tiny_model, tmp_path):
    other = kbitc.compile(tiny_model("llama"), spec="nf4:32")
    with pytest.raises(UsageError, match="is of another model"):
        put_adapter(copy.deepcopy(other), finetuned.out)
    kbitc.compile("demo", spec="int4:64", out=tmp_path / "int4", calibrate="none")
    with pytest.raises(UsageError, match="was trained over another model"):
        open_model(str(tmp_path / "int4"), None, finetuned.out)
    with pytest.raises(SourceError, match="is no adapter of PEFT"):
        open_model(str(artifact), None, text.parent)
    adapter = saved(tmp_path / "whole", artifact)
    config = read_json(adapter / "adapter_config.json") | {"modules_to_save": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"saves 'lm_head' whole \(modules_to_save\)"):
        open_model(str(artifact), None, adapter)
    with pytest.raises(UsageError, match="is DoRA, which is more than a sum"):
        merge_to(artifact, saved(tmp_path / "dora", artifact, use_dora=True), tmp_path / "out")
    with pytest.raises(UsageError, match="--targets nowhere"):
        finetune_to(artifact, tmp_path / "a", text=text, recipe=FinetuneRecipe(targets="nowhere", context=16))
    with pytest.raises(UsageError, match="--text FILE or --chat"):
        finetune_to(artifact, tmp_path / "a")
    with pytest.raises(UsageError, match="expected one of plain, residual"):
        finetune_to(artifact, tmp_path / "a", text=text, recipe=FinetuneRecipe(init="best"))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "out").exists()
