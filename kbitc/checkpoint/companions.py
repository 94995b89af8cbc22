"""The small files beside the weights that an artifact needs too: config, tokenizer, processor, modules.

The one thing to know: beside a few patterns nobody lists them. They are what tokenizers of the installed
transformers name, what the folder's own configs name, and the folders of sentence-transformers; nothing comes
from outside the source.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from kbitc.checkpoint.folder_checks import inside, is_at_home
from kbitc.errors import SourceError
from kbitc.system.json_file import read_any_json

CONFIG = "config.json"
CODE = "*.py"  # a tokenizer's own code: copied for those who trust it, never run here
PATTERNS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "*vocab.json",
    "dict*.txt",
    "merges.txt",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
"""What transformers and sentence-transformers name in places that are not looked into."""

MODULES = "modules.json"
PARTS = ("tokenizer_config.json", "*processor_config.json")
"""A folder with one of these and no config.json is a part of a processor."""

WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".jsonl")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILE_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*\.\w{1,16}", re.ASCII)

_log = logging.getLogger(__name__)


@functools.cache
def vocabulary_names() -> tuple[str, ...]:
    """The files that tokenizers of the installed transformers read, sorted; it is not imported for that."""
    spec = importlib.util.find_spec("transformers")
    names: set[str] = set()
    for root in (spec and spec.submodule_search_locations) or ():
        for file in (*Path(root).glob("tokenization_*.py"), *Path(root).glob("models/*/tokenization_*.py")):
            text = file.read_text(encoding="utf-8")
            for table in re.findall(r"vocab_files_names[^={]*= *\{(.*?)\}", text, re.DOTALL | re.IGNORECASE):
                names.update(re.findall(r': *"([^"]+)"', table))
    return tuple(sorted(names))


def patterns() -> tuple[str, ...]:
    """Globs of the companions that can be known before the folder is seen, the config left out."""
    return (*PATTERNS, *vocabulary_names())


def named_in(folder: Path) -> list[str]:
    """Globs of the further companions that a folder's own configs name."""
    named = []
    for config in _files(folder, ("*config.json",)):
        if config.name != CONFIG:
            named += [text for text in _strings(_read(config)) if _is_small(text)]
    for path in _module_folders(folder):
        named += [f"{path}/*{suffix}" for suffix in (".json", ".txt", ".model", ".safetensors")]
    return named


def companion_files(source: Path) -> list[Path]:
    """Every companion in a folder but the config, as paths within it.

    Raises:
        SourceError: one lies outside the folder, or is no plain file.
    """
    found = set(_files(source, (*patterns(), CODE)))
    for config in [*found]:
        if config.name.endswith("config.json"):
            named = (source / text for text in _strings(_read(config)) if _is_small(text))
            found.update(path for path in named if path.exists() or path.is_symlink())
    for path in _module_folders(source):
        for file in _files(source / path, ("**/*",)):
            if file.name.endswith(PICKLES):
                _log.warning("%s: is pickled, and not copied; convert it to safetensors", file)
            else:
                found.add(file)
    for part in source.iterdir():
        if part.is_dir() and any(_files(part, PARTS)) and not (part / CONFIG).exists():
            found.update(_files(part, (*patterns(), CODE)))
    for file in found:
        checked(file, source)
    return sorted(file.relative_to(source) for file in found if not file.is_dir())


def copy_files(source: Path, folder: Path) -> None:
    """Copy every companion but the config; links within a hub cache are followed.

    Raises:
        SourceError: one lies outside the folder, or is no plain file.
    """
    for path in companion_files(source):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checked(source / path, source), target)


def checked(path: Path, source: Path) -> Path:
    """Where a file of a source really lies: in the source, or among the blobs of the hub cache that it is in.

    Raises:
        SourceError: elsewhere, or it is no plain file.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{path}: is a link that leads nowhere; put the file itself there") from error
    if not is_at_home(real, source):
        raise SourceError(
            f"{path}: is a link to {real}, outside the model's folder, and nothing from elsewhere is put "
            "into an artifact; put the file itself there"
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SourceError(f"{path}: is no plain file; put the file itself there, or remove it")
    return real


def _files(folder: Path, globs: tuple[str, ...]) -> Iterator[Path]:
    for glob in globs:
        yield from (path for path in sorted(folder.glob(glob)) if not path.is_dir())


def _is_small(text: str) -> bool:
    """Whether a text names a file that may be a companion: below the folder, and no weights."""
    is_name = len(text) < 256 and FILE_NAME.fullmatch(text) is not None
    return is_name and text != CONFIG and not text.endswith((*WEIGHTS, *PICKLES))


def _strings(data: Any) -> Iterator[str]:
    stack = [data]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            stack += value.values() if isinstance(value, dict) else value


def _module_folders(source: Path) -> list[str]:
    """The folders of a sentence-transformers model, beside that of the transformer itself."""
    file = source / MODULES
    if not file.exists():
        return []
    modules = _read(file)
    if not isinstance(modules, list):
        raise SourceError(f"{file}: is no list of modules")
    paths = [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
    for path in paths:
        inside(source, path, str(file))
    return [path for path in paths if PurePosixPath(path).parts]


def _read(file: Path) -> Any:
    checked(file, file.parent)
    return read_any_json(file)


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write config.json without a quantization entry."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
