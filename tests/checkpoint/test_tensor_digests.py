"""A digest of tensors is of all that they are, and of no order that they are given in."""

from __future__ import annotations

import hashlib

import torch

from kbitc.checkpoint.tensor_digests import digest_of_tensor, digest_of_tensors


def test_of_one_it_is_of_its_bytes_in_row_major_order():
    x = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert digest_of_tensor(x) == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert digest_of_tensor(x.T.contiguous().T) == digest_of_tensor(x)
    assert digest_of_tensor(x.T) != digest_of_tensor(x)
    assert (
        digest_of_tensor(torch.tensor(1.5, dtype=torch.bfloat16)) == hashlib.sha256(b"\xc0\x3f").hexdigest()
    )


def test_of_several_it_is_of_names_dtypes_shapes_and_bytes():
    x, y = torch.arange(4.0), torch.ones(0)
    others = [
        {"a": x.half(), "b": y}, {"a": x.reshape(2, 2), "b": y}, {"a": x.flip(0), "b": y},
        {"a": x.view(torch.int32), "b": y}, {"b": x, "a": y}, {"c": x, "b": y}, {"a": x},
    ]  # fmt: skip
    assert len({digest_of_tensors(each) for each in ({"a": x, "b": y}, *others)}) == 1 + len(others)
    assert digest_of_tensors({"b": y, "a": x.clone()}) == digest_of_tensors({"a": x, "b": y})
