"""The small files that go with a model: found by what names them, and never from elsewhere."""

from __future__ import annotations

import json
import os

import pytest

from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.companions import companion_files, named_in, vocabulary_names
from kbitc.errors import SourceError


@pytest.fixture
def source(tiny_model, tmp_path):
    folder = tmp_path / "source"
    tiny_model("llama").save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def put(folder, *names, text="{}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def copied(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    open_checkpoint(source).save_companions(out)
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"config.json"}


TOKENIZERS = (
    "spm.model spiece.model sentencepiece.bpe.model source.spm target.spm target_vocab.json spm_char.model dict.txt "
    "vocab.txt vocab.json merges.txt bpe.codes vocab-src.json vocab-tgt.json emoji.json entity_vocab.json "
    "word_shape.json word_pronunciation.json normalizer.json tokenizer.model tokenizer.model.v3 tekken.json "
    "qwen.tiktoken prophetnet.tokenizer byte_maps.json"
).split()


def test_what_any_tokenizer_names(source, tmp_path):
    put(source, *TOKENIZERS)
    assert copied(source, tmp_path) == set(TOKENIZERS)
    assert {"spm.model", "dict.txt", "tokenizer_config.json"} <= set(vocabulary_names())


def test_what_the_configs_name(source, tmp_path):
    tokenizer = {
        "vocab_file": "own/words.lst", "extra": [{"table": "readings.bin2"}], "weights": "model.safetensors",
        "pickle": "x.pt", "up": "../outside.txt", "root": "/etc/passwd", "journal": "journal.jsonl", "gone": "gone.txt",
    }  # fmt: skip
    put(source, "tokenizer_config.json", text=json.dumps(tokenizer))
    put(
        source,
        "own/words.lst",
        "readings.bin2",
        "x.pt",
        "journal.jsonl",
        "../outside.txt",
        "notes.txt",
        ".env",
    )
    assert copied(source, tmp_path) == {"tokenizer_config.json", "own/words.lst", "readings.bin2"}
    assert {"own/words.lst", "readings.bin2"} <= set(named_in(source))
    assert not {"x.pt", "model.safetensors", "/etc/passwd"} & set(named_in(source))


def test_processors_and_templates(source, tmp_path):
    names = {
        "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
        "image_processor_config.json", "audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/rag.jinja", "qformer_tokenizer/tokenizer_config.json",
        "qformer_tokenizer/vocab.txt",
    }  # fmt: skip
    put(source, *names)
    put(
        source,
        "checkpoint-5/config.json",
        "checkpoint-5/tokenizer_config.json",
        "docs/vocab.txt",
        "README.md",
    )
    assert copied(source, tmp_path) == names


def modules(*paths):
    return json.dumps([{"idx": i, "name": str(i), "path": path, "type": "t"} for i, path in enumerate(paths)])


def test_the_folders_of_sentence_transformers(source, tmp_path, caplog):
    put(source, "modules.json", text=modules("", "1_Pooling", "2_Dense"))
    names = {
        "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/deeper/table.txt",
    }  # fmt: skip
    put(source, *names, "2_Dense/pytorch_model.bin", "3_Other/config.json")
    assert copied(source, tmp_path) == {"modules.json", *names}
    assert "pytorch_model.bin: is pickled" in caplog.text
    assert {"1_Pooling/*.json", "2_Dense/*.safetensors"} <= set(named_in(source))


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b"])
def test_modules_outside_the_folder(path, source):
    put(source, "modules.json", text=modules("", path))
    with pytest.raises(SourceError, match="is a file outside of"):
        open_checkpoint(source)


@pytest.mark.parametrize("path", [".", "./", ""])
def test_a_module_that_is_the_folder_itself(path, source, tmp_path):
    put(source, "modules.json", text=modules(path))
    assert copied(source, tmp_path) == {"modules.json"}


@pytest.mark.parametrize("text", ["{", "7", "[" * 100_000])
def test_modules_that_cannot_be_read(text, source):
    put(source, "modules.json", text=text)
    with pytest.raises(SourceError, match=r"modules\.json"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "name",
    ["vocab.txt", "spm.model", "chat_template.jinja", "tok.py", "config.json", "1_Pooling/config.json"],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_to_elsewhere_is_refused(name, is_folder, source, tmp_path):
    put(tmp_path, "secret/config.json", text=(source / "config.json").read_text())
    put(source, "modules.json", text=modules("", "1_Pooling"))
    path = source / name
    if "/" in name and is_folder:
        path.parent.symlink_to(tmp_path / "secret")
    else:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(tmp_path / "secret/config.json", path.parent))
    with pytest.raises(SourceError, match=r"outside (of .*/source|the model's folder)"):
        open_checkpoint(source)


def test_a_link_within_the_folder_is_followed(source, tmp_path):
    put(source, "files/words.txt", text="words")
    (source / "vocab.txt").symlink_to("files/words.txt")
    assert copied(source, tmp_path) == {"vocab.txt"}
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"


@pytest.mark.parametrize("make", ["pipe", "nowhere", "circle"])
def test_what_is_no_file_is_refused(make, source):
    path = source / "vocab.txt"
    if make == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("gone.txt" if make == "nowhere" else "vocab.txt")
    with pytest.raises(SourceError, match=r"vocab\.txt'?:? is"):
        open_checkpoint(source)


def test_a_hub_cache_s_own_blobs_alone(source, tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    (repo / "blobs").mkdir()
    source.rename(snapshot)
    for name in ("config.json", "vocab.txt"):
        put(
            repo,
            f"blobs/{name}-blob",
            text=(snapshot / name).read_text() if name == "config.json" else "words",
        )
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(f"../../blobs/{name}-blob")
    assert copied(snapshot, tmp_path) == {"vocab.txt"}
    put(tmp_path, "models--org--other/blobs/secret")
    (snapshot / "merges.txt").symlink_to(tmp_path / "models--org--other/blobs/secret")
    with pytest.raises(SourceError, match="outside the model's folder"):
        companion_files(snapshot)
