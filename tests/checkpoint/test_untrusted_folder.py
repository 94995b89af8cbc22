"""A model folder from a stranger: its code never runs, nobody is asked, and no file outside of it is read."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.dense import tokenizer_in
from kbitc.checkpoint.skeletons import load_config
from kbitc.errors import SourceError

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("kbitc", "passes", "backends") for path in (ROOT / room).rglob("*.py")]
HARMLESS = {
    "GenerationConfig",  # has no code that a folder could bring
    "PeftModel",  # lies over a model that is there
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_says_that_code_of_a_model_is_not_run(path):
    """Without it transformers asks on the terminal, and a pipe that says yes is enough."""
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module")
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id in HARMLESS)
    ]
    for call in calls:
        values = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert values.get("trust_remote_code") == "False", f"{path}:{call.lineno}"


@pytest.fixture
def yes(monkeypatch):
    """Whoever is asked says yes; what was asked."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    return asked


def edit(folder, name, **values):
    path = folder / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | values))


def plant(folder):
    """Code that leaves a mark when it is run."""
    mark = folder / "ran"
    body = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('')\n"
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    for module in ("evil", "custom_generate/generate"):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text(body + "".join(f"class {name}: pass\n" for name in names))
    return mark, {name: f"evil.{name}" for name in names}


@pytest.fixture
def source(tiny_model, tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["EvilForCausalLM"]},
        {"model_type": "evil"},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": ["LlamaConfig"]},
        {"architectures": ["pipeline"]},
    ],
)
def test_code_of_a_source_is_not_run(source, changes, yes):
    mark, auto_map = plant(source)
    edit(source, "config.json", auto_map=auto_map, **changes)
    with pytest.raises(SourceError):
        open_checkpoint(source)
    assert not mark.exists()
    assert yes == []


@pytest.mark.parametrize("value", ["evil/attention", "evil/attention@main:x", {"": "evil/attention"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_from_the_hub_is_not_fetched(source, key, value):
    edit(source, "config.json", **{key: value})
    with pytest.raises(SourceError, match="names the attention .* is not run"):
        open_checkpoint(source)


def test_a_class_of_transformers_itself_is_taken_from_there(source, yes):
    mark, auto_map = plant(source)
    edit(source, "config.json", auto_map=auto_map)
    assert type(open_checkpoint(source).skeleton()).__module__.startswith("transformers.")
    assert not mark.exists()
    assert yes == []


def test_code_of_a_tokenizer_is_not_run(source, yes):
    mark, auto_map = plant(source)
    edit(source, "tokenizer_config.json", auto_map={"AutoTokenizer": [auto_map["AutoTokenizer"], None]})
    edit(source, "config.json", model_type="evil", auto_map=auto_map)
    with pytest.raises(SourceError, match="its tokenizer cannot be read.*is not run"):
        tokenizer_in(source)
    assert not mark.exists()
    assert yes == []


@pytest.mark.parametrize(
    "changes",
    [{"architectures": ["AutoModelForCausalLM"]}, {"architectures": ["Evil"]}, {"model_type": "evil"}],
)
def test_code_of_an_artifact_is_not_run(source, tmp_path, changes, yes):
    out = tmp_path / "out"
    kbitc.compile(source, spec="nf4:16", out=out)
    mark, auto_map = plant(out)
    edit(out, "config.json", auto_map=auto_map, **changes)
    edit(out, "generation_config.json", auto_map=auto_map)
    with pytest.raises(SourceError):
        kbitc.load(out, verify=False)
    assert not mark.exists()
    assert yes == []


def test_code_of_an_exported_folder_is_not_run(source, yes):
    mark, auto_map = plant(source)
    edit(source, "config.json", auto_map=auto_map, model_type="evil")
    with pytest.raises(SourceError):
        load_config(source, "exported")
    assert not mark.exists()
    assert yes == []


ELSEWHERE = ["../other.safetensors", "inner/../../other.safetensors", "{outside}", "link.safetensors"]


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("how", ["index", "transformers_weights"])
def test_no_weights_from_elsewhere(source, tmp_path, name, how):
    outside = tmp_path / "other.safetensors"
    (source / "model.safetensors").rename(outside)
    (source / "inner").mkdir()
    (source / "link.safetensors").symlink_to(outside)
    name = name.format(outside=outside)
    if how == "index":
        edit(source, "model.safetensors.index.json", weight_map=dict.fromkeys(open_names(outside), name))
    else:
        edit(source, "config.json", transformers_weights=name)
    with pytest.raises(SourceError, match="is a file outside of"):
        open_checkpoint(source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_link_to_elsewhere(source, tmp_path, name):
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(SourceError, match="is a file outside of"):
        open_checkpoint(source)


def open_names(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def test_a_snapshot_of_the_hub_links_to_its_own_blobs(tiny_model, tmp_path):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    tiny_model("llama").save_pretrained(snapshot)
    for path in [*snapshot.iterdir()]:
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert open_checkpoint(snapshot).tensors()
    assert PLAN_FILE not in [path.name for path in snapshot.iterdir()]


@pytest.mark.parametrize("name", ["a" * 5000, "x\0.safetensors", "circle.safetensors", "a/" * 3000 + "x"])
@pytest.mark.parametrize("how", ["index", "transformers_weights", "modules"])
def test_a_name_that_no_file_can_have(source, name, how):
    """Too long, with a NUL, or a link to itself."""
    (source / "circle.safetensors").symlink_to("circle.safetensors")
    tensors = open_names(source / "model.safetensors")
    if how == "index":
        (source / "model.safetensors").unlink()
        edit(source, "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, name))
    elif how == "modules":
        (source / "modules.json").write_text(json.dumps([{"path": name}]))
    else:
        edit(source, "config.json", transformers_weights=name)
    with pytest.raises(SourceError, match=r"the file '.{8,110} cannot be read: .*again") as error:
        open_checkpoint(source)
    assert len(str(error.value)) < 500
