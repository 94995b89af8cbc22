"""Tensors that are read some rows at a time."""

from __future__ import annotations

import pytest
import torch

from kbitc.checkpoint import open_checkpoint
from kbitc.errors import SourceError


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_pieces_are_the_whole(family, tiny_model, tmp_path):
    """Of what is stored just so, and of experts, which transformers keeps one by one in files."""
    tiny_model(family).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.tensors():
            whole = checkpoint.read(name)
            for rows in (1, 7, len(whole), 1000):
                pieces = list(checkpoint.pieces(name, rows))
                assert [len(piece) for piece in pieces[:-1]] == [rows] * (len(pieces) - 1)
                assert torch.equal(torch.cat(pieces), whole)
                assert pieces[0].dtype is whole.dtype


def test_pieces_are_read_one_by_one(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        whole = checkpoint.read("lm_head.weight")
        pieces = checkpoint.pieces("lm_head.weight", 10)
        first = next(pieces)
        assert first.untyped_storage().nbytes() == 10 * whole[0].nbytes
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(SourceError, match="changed while it was being read"):
            next(pieces)
