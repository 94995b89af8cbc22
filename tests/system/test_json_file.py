"""Whatever is wrong with a file of JSON or the header of a model is one error that names it."""

from __future__ import annotations

import json
import os
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file

from kbitc.checkpoint.gguf_header import Header
from kbitc.checkpoint.safetensors_file import read_header
from kbitc.errors import SourceError, UsageError
from kbitc.system.json_file import MAX_DEPTH, parse, read_json, well_formed

DEEP = [MAX_DEPTH + 1, sys.getrecursionlimit() - 100, 100_000]
BAD = [
    *((b'{"a":' * n + b"1" + b"}" * n) for n in DEEP),
    *((b'{"a":' + b"[" * n + b"]" * n + b"}") for n in DEEP),
    b'{"a": "\\ud800"}',
    b'{"\\udfff": 1}',
    b'{"a": "\xff"}',
    b"\xff\xfe{\x00}\x00",
    b"",
    b"{",
    b"[1]",
    b'{"a": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("raw", BAD, ids=range(len(BAD)))
def test_bad_json_names_its_file(raw, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(raw)
    with pytest.raises(SourceError, match=r"config\.json: "):
        read_json(file)


def test_good_json_is_read():
    depth = MAX_DEPTH - 1
    nested = b"[" * depth + b'"\xc3\xbc"' + b"]" * depth
    value = parse(nested, "x")
    for _ in range(depth):
        (value,) = value
    assert value == "ü"
    assert parse(b'{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(SourceError, match="'a' stands there twice"):
        parse(b'{"a": 1, "a": 2}', "x", has_unique_keys=True)


def test_a_file_that_is_none_or_too_long(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in (
        ("pipe.json", "no regular file"),
        (".", "no regular file"),
        ("gone", "No such file"),
    ):
        with pytest.raises(SourceError, match=message):
            read_json(tmp_path / name)
    monkeypatch.setattr("kbitc.system.json_file.read_limited.__defaults__", (10,))
    (tmp_path / "long.json").write_text('{"a": "0123456789"}')
    with pytest.raises(SourceError, match="more than the 10"):
        read_json(tmp_path / "long.json")


@pytest.mark.parametrize(
    "mistake",
    [
        lambda d: d["b"],
        lambda d: d["a"]["b"],
        lambda d: d["a"][1],
        lambda d: int(d["inf"]),
        lambda d: 1 / d["zero"],
        lambda d: d["a"].items(),
        lambda _: int("x"),
    ],
)
def test_what_is_taken_apart_wrongly_is_damaged(mistake):
    with (
        pytest.raises(SourceError, match=r"plan\.json: damaged .*; compile again"),
        well_formed("plan.json", "compile again"),
    ):
        mistake({"a": [1], "inf": float("inf"), "zero": 0})
    with pytest.raises(AssertionError), well_formed("plan.json", "compile again"):
        raise AssertionError("a mistake of our own")
    with pytest.raises(SourceError, match=r"plan\.json: no spec"), well_formed("plan.json", "compile again"):
        raise UsageError("no spec")


def header(entries, payload=b"\0" * 64):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


HEADERS = [
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b'{"a": 1}',
    b"[]",
    b"7",
    b'{"a": {}}',
    {"a": entry("F99")},
    {"a": entry(["F32"])},
    {"a": entry(shape=(2.0,))},
    {"a": entry(shape=(True, 2))},
    {"a": entry(shape=(-2,))},
    {"a": entry(shape=(0, 10**30), span=(0, 0))},
    {"a": entry(shape=(0, 2**40, 2**40), span=(0, 0))},
    {"a": entry(span=(8, 0))},
    {"a": entry(span=(0, 8, 8))},
    {"a": entry(span=(0, 10**40), shape=(10**40 // 4,))},
    {"a": entry(), "b": entry()},
    b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2),
    b"{" + b'"\\ud800": ' + json.dumps(entry()).encode() + b"}",
]


@pytest.mark.parametrize("entries", HEADERS, ids=range(len(HEADERS)))
def test_a_damaged_header_names_its_file(entries, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(header(entries))
    with pytest.raises(SourceError, match=r"model\.safetensors: "):
        read_header(file)


def test_a_good_header_is_read(tmp_path):
    save_file({"a": torch.ones(3, 0), "b": torch.ones(5, dtype=torch.int8)}, tmp_path / "x.safetensors")
    assert {k: v.info.shape for k, v in read_header(tmp_path / "x.safetensors").items()} == {
        "a": (3, 0),
        "b": (5,),
    }


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="no regular file"):
        read_header(tmp_path / "model.safetensors")


def text(value):
    return struct.pack("<Q", len(value)) + value


def gguf(tensors=b"", entries=(), count=0, pairs=None):
    """A file of these metadata entries (key, kind, raw value) and raw tensor infos."""
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(entries) if pairs is None else pairs)
    return head + b"".join(text(k) + struct.pack("<I", kind) + v for k, kind, v in entries) + tensors


def info(name=b"t", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def array(kind, count, body=b""):
    return struct.pack("<IQ", kind, count) + body


GGUFS = {
    "huge_counts": gguf(count=2**63, pairs=2**63),
    "long_key": gguf(pairs=1) + struct.pack("<Q", 2**62),
    "alignment_0": gguf(entries=[(b"general.alignment", 4, struct.pack("<I", 0))]),
    "alignment_text": gguf(entries=[(b"general.alignment", 8, text(b"32"))]),
    "alignment_true": gguf(entries=[(b"general.alignment", 7, b"\1")]),
    "no_kind": gguf(entries=[(b"a", 99, b"")]),
    "no_element_kind": gguf(entries=[(b"a", 9, array(99, 3))]),
    "huge_array": gguf(entries=[(b"a", 9, array(4, 2**62))]),
    "huge_array_of_text": gguf(entries=[(b"a", 9, array(8, 2**62))]),
    "deep_arrays": gguf(entries=[(b"a", 9, array(9, 1) * 5000)]),
    "no_utf8": gguf(entries=[(b"\xff", 4, struct.pack("<I", 0))]),
    "dimensions": gguf(info(dims=(1,) * 9), count=1),
    "many_dimensions": gguf(text(b"t") + struct.pack("<I", 2**32 - 1), count=1),
    "huge_tensor": gguf(info(dims=(2**40, 2**40)), count=1),
    "huge_offset": gguf(info(offset=2**63), count=1),
    "partial_blocks": gguf(info(dims=(33,), kind=8) + b"\0" * 256, count=1),
    "zero_width": gguf(info(dims=(0, 4), kind=8) + b"\0" * 256, count=1),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_damaged_gguf_header_names_its_file(name, tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    file.write_bytes(GGUFS[name])
    with pytest.raises(SourceError, match=r"m\.gguf: "):
        Header.of(file, "m.gguf")
