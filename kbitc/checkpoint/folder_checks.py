"""What a model folder must hold, and what to do about everything else that is found there."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbitc.checkpoint.safetensors_file import AGAIN, read_header
from kbitc.errors import SourceError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ARTIFACT = "kbit_plan.json"
METHOD = "kbit"
WANTED = "give a Hugging Face model folder (config.json and model.safetensors)"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SourceError(f"{path}: is not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: is a JSON {type(data).__name__}, not an object; {AGAIN}")
    return data


def check_folder(folder: Path, label: str) -> None:
    """See that a folder is a model's and that kbitc can compile it; does not look at the weights.

    Raises:
        SourceError: no config.json, or one of a compiled or quantized model.
    """
    check_regular(folder, label)
    if (folder / ARTIFACT).exists():
        raise SourceError(f"{label}: is compiled already; compile the model that it was made from")
    config = folder / "config.json"
    if not config.exists():
        raise SourceError(f"{label}: no config.json; {_instead_of_config(folder)}")
    check_unquantized(read_json(config), label)


def check_regular(folder: Path, label: str) -> None:
    """See that a folder holds files and folders only: reading a pipe waits for ever, a device gives no end.

    Raises:
        SourceError: it holds something else.
    """
    for path in (folder, *sorted(folder.iterdir())):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nothing; whoever needs the file says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise SourceError(f"{label}: '{path.name}' is a pipe, socket or device, no file; remove it")


def check_unquantized(config: Mapping[str, Any], label: str) -> None:
    """See that a config is of a model with plain weights.

    Raises:
        SourceError: it is compiled, or quantized by another method.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        entry = part.get("quantization_config") or part.get("compression_config")
        if not entry:
            continue
        method = str(entry.get("quant_method", "another method")) if isinstance(entry, dict) else str(entry)
        if method == METHOD:
            raise SourceError(f"{label}: is compiled already; compile the model that it was made from")
        raise SourceError(
            f"{label}: is quantized already, by '{method}'; compile the 16-bit model that it was made from"
        )


def _instead_of_config(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return f"the folder is empty; {WANTED}"
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"it holds GGUF files: give one of them, such as {folder / ggufs[0]}"
    if "adapter_config.json" in names:
        return (
            "it holds an adapter: merge it into its base model first (PEFT: merge_and_unload), and "
            "give the folder of the result"
        )
    if "model_index.json" in names:
        return f"it holds a pipeline of several models: give one of its folders{_inner(folder)}"
    inner = _inner(folder)
    if inner:
        return f"did you mean one of its folders?{inner}"
    return (
        f"it holds {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}; {WANTED}, or convert "
        "the model to one"
    )


def _inner(folder: Path) -> str:
    models = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    return f" ({', '.join(models[:3])})" if models else ""


def weight_files(folder: Path, config: Mapping[str, Any], label: str) -> list[Path]:
    """The safetensors files of a model folder, by the same precedence as transformers.

    Raises:
        SourceError: none, a shard is missing, or the index does not fit the shards.
    """
    named = config.get("transformers_weights")
    whole = folder / (named if isinstance(named, str) else WHOLE)
    if whole.exists():
        return [whole]
    index = folder / INDEX
    if index.exists():
        return _shards(index, label)
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise SourceError(
            f"{label}: has neither {WHOLE} nor {INDEX}, but {', '.join(others[:3])}; if that is "
            f"the whole model, rename it to {WHOLE}, else download the index"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise SourceError(pickle_message(label, pickles[0], config))
    raise SourceError(f"{label}: has config.json but no weights; download {WHOLE} (or its shards) too")


def _shards(index: Path, label: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{index}: has no 'weight_map' from tensors to files; {AGAIN}")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    gone = [file.name for file in files if not file.exists()]
    if gone:
        raise SourceError(
            f"{label}: {len(gone)} of {len(files)} shards are missing, the first is '{gone[0]}' "
            f"(named by {index.name}); finish the download"
        )
    held = {file.name: read_header(file).keys() for file in files}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise SourceError(
                f"{label}: {index.name} says that {shard} holds '{name}', but it does not; index "
                f"and shards are of different downloads; {AGAIN}"
            )
    return files


def pickle_message(label: str, file: str, config: Mapping[str, Any] | None = None) -> str:
    """Why a pickled checkpoint is refused, and how to convert it."""
    names = (config or {}).get("architectures") or ["AutoModelForCausalLM"]
    return (
        f"{label}: its weights are pickled ({file}), and a pickle can run code when it is opened, "
        "so kbitc does "
        'not. Where you trust the file, convert it once: python -c "from transformers import '
        f"{names[0]} as M; M.from_pretrained('FOLDER').save_pretrained('FOLDER-safetensors')\", "
        "and give the new folder (copy the tokenizer files into it)"
    )
