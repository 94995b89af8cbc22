"""Mutators: a file's bytes and a seeded generator to other bytes, and folders with a file gone astray.

The one thing to know: a mutator that knows a format keeps most of it right, so that a mutant gets past the
first check and reaches the code behind it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]
"""Bytes of a file to those of a mutant; may give them back unchanged where there is nothing to change."""

DEPTH = 3000  # of nested JSON, past Python's limit of recursion
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5,
    float("nan"), float("inf"), "", "0", "x", "../x", "/etc/hostname", "nf4:64", "nf9:0", "fp16", "float16",
    "bfloat16", "float8_e4m3fn", "complex64", "\u0000", "\ud83d\ude00", "%s%n", "a" * 5000,
    "<script>alert(1)</script>", [], {}, [[]], [0], [-1], [2**40], {"": 0}, ["x"] * 50,
)  # fmt: skip
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "U16",
    "F8_E4M3",
    "C64",
    "f32",
    "",
)


def flip_bits(data: bytes, random: Random) -> bytes:
    """One to eight bits, anywhere."""
    mutant = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8)) if data else 0):
        mutant[random.randrange(len(mutant))] ^= 1 << random.randrange(8)
    return bytes(mutant)


def truncate(data: bytes, random: Random) -> bytes:
    """The end is missing."""
    return data[: random.choice((0, 1, 7, 8, len(data) // 2, len(data) - 1, random.randrange(len(data) + 1)))]


def extend(data: bytes, random: Random) -> bytes:
    """Something stands behind the end."""
    return data + random.choice((b"\0", b"\n", b"}", b"\0" * 4096, data[:64]))


def overwrite(data: bytes, random: Random) -> bytes:
    """A run of zeros, ones, or of another place."""
    if not data:
        return data
    start, count = random.randrange(len(data)), random.choice((1, 2, 4, 8, 64, 512))
    other = random.randrange(len(data))
    run = random.choice((b"\0" * count, b"\xff" * count, data[other : other + count]))
    return (data[:start] + run + data[start + len(run) :])[: len(data)]


def remove(data: bytes, random: Random) -> bytes:
    """A run in the middle is missing, so that all behind it moves."""
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.choice((1, 4, 8, 64)) :]


def insert(data: bytes, random: Random) -> bytes:
    """A run in the middle is new."""
    start = random.randrange(len(data) + 1)
    return data[:start] + random.randbytes(random.choice((1, 4, 8, 64))) + data[start:]


BYTES: tuple[Mutator, ...] = (flip_bits, flip_bits, truncate, extend, overwrite, overwrite, remove, insert)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Of a format that no mutator knows."""
    return random.choice(BYTES)(data, random)


def strange(random: Random) -> Any:
    """A value that a file of ours rarely holds; the caller's own, since later mutations may change it."""
    return copy.deepcopy(random.choice(STRANGE))


def mutate_value(value: Any, random: Random) -> Any:
    """One place of a JSON value is changed: strange, of another type, gone, twice, renamed, nested."""
    places = list(_places(value))
    if not places:
        return strange(random)
    parent, key = random.choice(places)
    old = parent[key]
    match random.randrange(9):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[random.choice((key.upper(), f"{key}_", "", "__class__"))] = parent.pop(key)
        case 1:
            parent.insert(key, old)
        case 2:
            other, name = random.choice(places)
            parent[key] = json.loads(json.dumps(other[name]))
        case 3 if isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[key] = random.choice(
                (old + 1, old - 1, -old, old * 2, old * 10**6, old // 2 if old == old else 0)
            )
        case 3 if isinstance(old, str):
            parent[key] = random.choice((old[:-1], old + "0", f"../{old}", old.swapcase()))
        case 4:
            parent[key] = random.choice(([old], {"x": old}, str(old)))
        case 5 if isinstance(parent, dict):
            parent[random.choice(("auto_map", "model_type", "dtype", "num_hidden_layers", "x"))] = strange(
                random
            )
        case _:
            parent[key] = strange(random)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        each = pending.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, item in items:
            places.append((each, key))
            pending.append(item)
    return places


def mutate_json(data: bytes, random: Random) -> bytes:
    """A JSON file that mostly stays JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    match random.randrange(12):
        case 0:
            opening = random.choice((b"[", b'{"a":'))
            return opening * DEPTH + (b"]" * DEPTH if opening == b"[" else b"1" + b"}" * DEPTH)
        case 1:
            return random.choice(
                (
                    b"null",
                    b"[]",
                    b"{}",
                    b'"x"',
                    b"3",
                    b"",
                    b"\xff\xfe",
                    b"NaN",
                    data.decode(errors="replace").encode("utf-16"),
                )
            )
        case 2:
            deep: Any = 0
            for _ in range(500):
                deep = [deep]
            places = _places(value)
            if places:
                parent, key = random.choice(places)
                parent[key] = deep
        case 3:  # a name twice: readers differ in which they take
            if isinstance(value, dict) and value:
                key = random.choice(list(value))
                twin = json.dumps({key: strange(random)})
                return (twin[:-1] + ", " + json.dumps(value)[1:]).encode()
        case _:
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                value = mutate_value(value, random)
    return json.dumps(value).encode()


def mutate_lines(data: bytes, random: Random) -> bytes:
    """JSON lines: one is changed, gone, twice, or moved."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return extend(data, random)
    at = random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(random.randrange(len(lines) + 1), lines[at])
        case 2:
            random.shuffle(lines)
        case _:
            lines[at] = mutate_json(lines[at], random).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def _entries(header: bytes) -> dict[str, Any]:
    """The tensors that a header declares; empty where it is not a header of safetensors."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return {}
    is_header = isinstance(entries, dict) and all(
        name == "__metadata__" or _is_entry(entry) for name, entry in entries.items()
    )
    return entries if is_header else {}


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*_], "data_offsets": [int(), int()]}:
            return True
    return False


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """The header's JSON, its length, or the data behind it."""
    size = int.from_bytes(data[:8], "little")
    header, payload = data[8 : 8 + size], data[8 + size :]
    entries = _entries(header)
    names = [name for name in entries if name != "__metadata__"]
    if not names:
        return mutate_bytes(data, random)
    name, other = random.choice(names), random.choice(names)
    entry = entries[name]
    match random.randrange(12):
        case 0:
            length = random.choice((0, 1, size + 8, size - 8, 2**20, 2**40, 2**63, 2**64 - 1))
            return length.to_bytes(8, "little") + data[8:]
        case 1:
            entry["dtype"] = random.choice(DTYPES)
        case 2:  # of equal width: every size stays right
            twins = {
                "F16": "BF16",
                "BF16": "F16",
                "F32": "I32",
                "I32": "F32",
                "U8": "I8",
                "I8": "U8",
                "I64": "F64",
            }
            entry["dtype"] = twins.get(entry["dtype"], entry["dtype"])
        case 3:
            entry["shape"] = random.choice(
                (
                    entry["shape"][::-1],
                    [*entry["shape"], 1],
                    [1, *entry["shape"]],
                    entry["shape"][:-1],
                    [0],
                    [-1],
                )
            )
        case 4:
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = random.choice(
                ([stop, start], [start, stop + 1], [0, 0], [-1, stop], [start, 2**62], [start + 8, stop + 8])
            )
        case 5:
            entries[name], entries[other] = entries[other], entries[name]
        case 6:
            entries[random.choice((f"{name}x", "", "../x", other))] = entries.pop(name)
        case 7:
            entries["extra.weight"] = dict(entry)
        case 8:
            entries = mutate_value(entries, random)
        case 9:
            return data[: 8 + size] + overwrite(payload, random)
        case _:
            return data[: 8 + size] + flip_bits(payload, random)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def mutate_gguf(data: bytes, random: Random) -> bytes:
    """Mostly the header: a number of eight or four bytes becomes a strange one."""
    if random.random() < 0.2 or len(data) < 64:
        return mutate_bytes(data, random)
    mutant = bytearray(data)
    for _ in range(random.choice((1, 1, 2))):
        # The counts stand at the start, and lengths and types all over the first part.
        at = random.choice(
            (4, 8, 16, random.randrange(24, min(len(data) - 8, 2048)), random.randrange(len(data) - 8))
        )
        number = random.choice(
            (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
        )
        if random.random() < 0.5:
            struct.pack_into("<I", mutant, at, number % 2**32)
        else:
            struct.pack_into("<Q", mutant, at, number)
    return bytes(mutant)


def mutator_of(name: str) -> Mutator:
    """The one that knows a file's format, by its name."""
    suffixes: dict[str, Mutator] = {
        ".json": mutate_json,
        ".jsonl": mutate_lines,
        ".safetensors": mutate_safetensors,
        ".gguf": mutate_gguf,
    }
    return suffixes.get(Path(name).suffix, mutate_bytes)


def mutate_file(path: Path, random: Random) -> str:
    """Change a file in place; returns what was done."""
    data = path.read_bytes()
    mutator = mutator_of(path.name) if random.random() < 0.85 else random.choice(BYTES)
    mutant = mutator(data, random)
    path.write_bytes(mutant)
    return f"{path.name}: {mutator.__name__}, {len(data)} to {len(mutant)} bytes"


def misplace(path: Path, random: Random) -> str:
    """A file is gone, empty, a folder, a link to elsewhere, a pipe, or another file; returns which."""
    siblings = [each for each in sorted(path.parent.iterdir()) if each.is_file() and each != path]
    match random.randrange(8):
        case 0:
            path.unlink()
            return f"{path.name}: gone"
        case 1:
            path.write_bytes(b"")
            return f"{path.name}: empty"
        case 2:
            path.unlink()
            path.mkdir()
            return f"{path.name}: a folder"
        case 3:
            path.unlink()
            path.symlink_to(path.parent / "no-such-file")
            return f"{path.name}: a broken link"
        case 4:
            path.unlink()
            path.symlink_to(path.name)
            return f"{path.name}: a link to itself"
        case 5:
            path.unlink()
            os.mkfifo(path)
            return f"{path.name}: a pipe"
        case 6 if siblings:
            other = random.choice(siblings)
            shutil.copyfile(other, path)
            return f"{path.name}: a copy of {other.name}"
        case _:
            twin = path.with_name(f"extra-{path.name}")
            shutil.copyfile(path, twin)
            return f"{twin.name}: " + mutate_file(twin, random)
