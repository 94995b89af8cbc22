"""Tensors in memory of large pages: copies with storages of their own."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from kbitc.system import large_pages
from kbitc.system.large_pages import ALIGNED, LEAST, LargePages


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(large_pages, "CHUNK", 3 * LEAST)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_places_are_copies_side_by_side(dtype, small):
    pages = LargePages()
    given = [
        torch.arange(count, dtype=torch.int32).to(dtype).view(3, -1) for count in (12_300, 4_101, 60_000)
    ]
    placed = [pages.place(tensor) for tensor in given]
    for own, tensor in zip(placed, given, strict=True):
        assert torch.equal(own, tensor)
        assert own.dtype == dtype
        assert own.is_contiguous()
        assert own.data_ptr() != tensor.data_ptr()
        assert own.data_ptr() % ALIGNED == 0
        assert own.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    placed[0].fill_(1)
    assert torch.equal(placed[1], given[1])
    assert torch.equal(copy.deepcopy(placed)[2], given[2])


def test_neighbours_lie_side_by_side():
    pages = LargePages()
    first, second = (pages.place(torch.zeros(LEAST, dtype=torch.uint8)) for _ in range(2))
    assert second.data_ptr() - first.data_ptr() == LEAST


def test_what_lies_elsewhere():
    pages = LargePages()
    small, turned = torch.zeros(LEAST - 1, dtype=torch.uint8), torch.arange(9900.0).view(99, 100).T
    for tensor in (small, turned):
        own = pages.place(tensor)
        assert torch.equal(own, tensor)
        assert own.is_contiguous()
        assert own.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    other = torch.zeros(9999, device="meta")
    assert pages.place(other) is other


def test_tensors_outlive_the_pages(small):
    own = LargePages().place(torch.ones(LEAST))
    gc.collect()
    assert own.sum() == LEAST
