"""A tokenizer of transformers as llama.cpp's: its tokens, merges, special tokens and chat template.

The one thing to know: llama.cpp knows how text is split before merging by a *name*; what a tokenizer says is
looked up in `SPLITTERS`. One that it has no name for is refused: under another name it would read other
tokens than the model was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kbitc.errors import UsageError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNREACHED = -1e6  # the score of a token that no merge makes

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = ("bytes", "words")
"""The byte level with GPT-2's own splitting."""
SPLITTERS: Mapping[tuple[tuple[str, str], ...], str] = {
    (BYTES,): "gpt-2",
    (("digits", ""), BYTES): "smollm",
    (("split", _WORDS + r"\p{N}{1,3}" + _REST), ("bytes", "")): "llama-bpe",
    (("split", _WORDS + r"\p{N}" + _REST), ("bytes", "")): "qwen2",
}
"""How text is split, to llama.cpp's name for it."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_of(tokenizer: Any, size: int, label: str) -> Iterator[tuple[str, Any]]:
    """Keys and values below ``tokenizer.``.

    Args:
        tokenizer: of transformers, backed by the package tokenizers.
        size: rows of the model's embedding.
        label: for errors.

    Raises:
        UsageError: llama.cpp has no tokenizer of this kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "unknown"}}
    model = data["model"]
    if model["type"] != "BPE":
        raise UsageError(f"{label}: a tokenizer of type '{model['type']}' is not written as GGUF; BPE is")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    tokens, types = _tokens(data, size)
    if model.get("byte_fallback"):
        yield "ggml.model", "llama"
        yield "ggml.pre", "default"
        yield "ggml.scores", _scores(tokens, merges)
        yield "ggml.add_space_prefix", _begins_with_space(data)
        types = [
            _typed(token, kind, model.get("unk_token")) for token, kind in zip(tokens, types, strict=True)
        ]
    else:
        yield "ggml.model", "gpt2"
        yield "ggml.pre", _splitter_of(data, label)
        yield "ggml.merges", merges
    yield "ggml.tokens", tokens
    yield "ggml.token_type", types
    yield from _specials(tokenizer, size)


def _tokens(data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token's text and type, in the order of ids; rows that no token uses get a name."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in data["model"]["vocab"].items():
        if i < size:
            tokens[i], types[i] = token, NORMAL
    for added in data.get("added_tokens", ()):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER
    return tokens, types


def _typed(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    return BYTE if _BYTE_TOKEN.fullmatch(token) else kind


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Merged in the order of scores, as sentencepiece does: the first merge has the highest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else UNREACHED for token in tokens]


def _parts(stage: Any) -> list[Mapping[str, Any]]:
    """The stages of a sequence, or the one there is."""
    if stage is None:
        return []
    if stage["type"] == "Sequence":
        return list(stage.get("pretokenizers") or stage.get("normalizers") or ())
    return [stage]


def _begins_with_space(data: Mapping[str, Any]) -> bool:
    is_prepended = any(part["type"] == "Prepend" for part in _parts(data.get("normalizer")))
    return is_prepended or any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in _parts(data.get("pre_tokenizer"))
    )


def _splitter_of(data: Mapping[str, Any], label: str) -> str:
    found = tuple(map(_split, _parts(data.get("pre_tokenizer"))))
    if found not in SPLITTERS:
        listed = json.dumps(data.get("pre_tokenizer"))
        raise UsageError(
            f"{label}: llama.cpp's name for how its tokenizer splits text is not known, so it would read "
            f"other tokens: {listed[:200]}{'...' if len(listed) > 200 else ''}; known are those of "
            f"{', '.join(SPLITTERS.values())}"
        )
    return SPLITTERS[found]


def _split(part: Mapping[str, Any]) -> tuple[str, str]:
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes", "words" if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return "digits", ""
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return "split", str(part["pattern"].get("Regex", ""))
    return kind, "other"


def _specials(tokenizer: Any, size: int) -> Iterator[tuple[str, Any]]:
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        found = getattr(tokenizer, f"{key}_token_id", None)
        if found is not None and found < size:
            yield f"ggml.{name}_token_id", int(found)
    encoded = tokenizer("a")["input_ids"]
    yield "ggml.add_bos_token", bool(encoded) and encoded[0] == tokenizer.bos_token_id
    yield "ggml.add_eos_token", bool(encoded) and encoded[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        yield "chat_template", template
