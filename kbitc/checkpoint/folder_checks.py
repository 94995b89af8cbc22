"""What a model folder must hold, and what to do about everything else that is found there."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbitc.checkpoint.safetensors_file import read_header
from kbitc.errors import SourceError
from kbitc.system.json_file import AGAIN, read_json

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ARTIFACT = "kbit_plan.json"
METHOD = "kbit"
WANTED = "give a Hugging Face model folder (config.json and model.safetensors)"


def check_folder(folder: Path, label: str) -> None:
    """See that a folder is a model's and that kbitc can compile it; does not look at the weights.

    Raises:
        SourceError: no config.json, or one of a compiled or quantized model.
    """
    if (folder / ARTIFACT).exists():
        raise SourceError(f"{label}: is compiled already; compile the model that it was made from")
    config = folder / "config.json"
    if not config.exists():
        raise SourceError(f"{label}: no config.json; {_instead_of_config(folder)}")
    check_regular(folder, label)
    check_unquantized(read_json(inside(folder, config.name, label)), label)


def check_regular(folder: Path, label: str) -> None:
    """See that a folder holds files and folders only: reading a pipe waits for ever, a device gives no end.

    Whatever kbitc opens itself is looked at again then; this is for the other libraries that read the folder,
    and the folders in it (hidden ones they do not read), each in its own time.

    Raises:
        SourceError: it holds something else.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names)):
            try:
                mode = path.stat().st_mode
            except OSError:
                continue  # a link to nothing; whoever needs the file says so
            if not stat.S_ISREG(mode):
                raise SourceError(
                    f"{label}: '{path.relative_to(folder)}' is a pipe, socket or device, no file; remove it"
                )


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
    whole = inside(folder, named if isinstance(named, str) else WHOLE, label)
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


def inside(folder: Path, name: str, label: str) -> Path:
    """A file that something in a folder names, if it lies in that folder.

    It need not be there. A snapshot of the hub's cache links to the cache's own blobs; any other way out is
    refused.

    Raises:
        SourceError: it lies elsewhere, or nothing can be reached by that name.
    """
    path = folder / name
    is_plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if is_plain:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # too long, a NUL, a link to itself
            reason = error.strerror if isinstance(error, OSError) else error
            raise SourceError(f"{label}: the file {name!r:.100} cannot be read: {reason}; {AGAIN}") from error
    if not is_plain or not is_at_home(path.resolve(), folder):
        raise SourceError(
            f"{label}: {name!r:.100} is a file outside of {folder}, which is not read; copy it into "
            "the folder"
        )
    return path


def is_at_home(real: Path, folder: Path) -> bool:
    """Whether a resolved path lies in a folder or, of a snapshot in the hub's cache, among its blobs."""
    home = folder.resolve()
    is_snapshot = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    homes = (home, home.parents[1] / "blobs") if is_snapshot else (home,)
    return any(real.is_relative_to(each) for each in homes)


def _shards(index: Path, label: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{index}: has no 'weight_map' from tensors to files; {AGAIN}")
    files = [inside(index.parent, name, label) for name in sorted(set(weight_map.values()))]
    gone = [file.name for file in files if not file.exists()]
    if gone:
        raise SourceError(
            f"{label}: {len(gone)} of {len(files)} shards are missing, the first is '{gone[0]}' "
            f"(named by {index.name}); finish the download"
        )
    held = {file.relative_to(index.parent): read_header(file).keys() for file in files}
    for name, shard in weight_map.items():
        if name not in held[Path(shard)]:
            raise SourceError(
                f"{label}: {index.name} says that {shard} holds '{name}', but it does not; index "
                f"and shards are of different downloads; {AGAIN}"
            )
    return files


def pickle_message(label: str, file: str, config: Mapping[str, Any] | None = None) -> str:
    """Why a pickled checkpoint is refused, and how to convert it."""
    named = (config or {}).get("architectures")
    first = named[0] if isinstance(named, list) and named else "AutoModelForCausalLM"
    return (
        f"{label}: its weights are pickled ({file}), and a pickle can run code when it is opened, "
        'so kbitc does not. Where you trust the file, convert it once: python -c "from transformers import '
        f"{first} as M; M.from_pretrained('FOLDER').save_pretrained('FOLDER-safetensors')\", "
        "and give the new folder (copy the tokenizer files into it)"
    )
