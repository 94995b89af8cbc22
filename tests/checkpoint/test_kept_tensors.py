"""What is kept is read back as it was written, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbitc.checkpoint.kept_tensors import read_tensors, write_tensors
from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.errors import SourceError

TENSORS = {"a|0.rows": torch.randn(3, 4), "b": torch.tensor(0.5, dtype=torch.float64), "c": torch.ones(0)}


@pytest.fixture
def file(tmp_path):
    write_tensors(TENSORS, tmp_path / "kept.safetensors")
    return tmp_path / "kept.safetensors"


def test_kept_tensors_come_back(file):
    back = read_tensors(file)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in TENSORS.items())


def test_every_changed_byte_is_found(file):
    raw = file.read_bytes()
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        file.write_bytes(changed)
        try:
            back = read_tensors(file)
        except SourceError:
            continue
        same = all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in TENSORS.items())
        assert same and back.keys() == TENSORS.keys(), at  # a space, or a byte of "format"
    file.write_bytes(raw[:-1])
    with pytest.raises(SourceError):
        read_tensors(file)


def test_a_header_in_another_order_holds_the_same(file):
    raw = file.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(dict(reversed(json.loads(raw[8:size]).items()))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[size:])
    back = read_tensors(file)
    assert list(back) != list(read_tensors_of(raw, file))
    assert digest_of_tensors(back) == digest_of_tensors(TENSORS)


def read_tensors_of(raw, file):
    file.with_name("other.safetensors").write_bytes(raw)
    return read_tensors(file.with_name("other.safetensors"))


def test_a_file_of_somebody_else_has_no_checksum(file):
    save_file(load_file(file), file)
    with pytest.raises(SourceError, match="has no checksum"):
        read_tensors(file)
