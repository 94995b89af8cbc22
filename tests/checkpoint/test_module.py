"""A module in memory is read in place and left as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from kbitc.checkpoint import open_checkpoint
from kbitc.errors import SourceError, UsageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.plain = torch.ones(2)
        self.history = self.head.weight.sum()  # deepcopy refuses tensors with a history

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def test_skeleton_is_a_tied_meta_copy():
    net = Net().train()
    state = copy.deepcopy(net.state_dict())
    checkpoint = open_checkpoint(net)
    skeleton = checkpoint.skeleton()
    assert all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers()))
    assert skeleton.head.weight is skeleton.embed.weight
    assert not skeleton.training
    assert list(checkpoint.tensors()) == [
        "embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    ]  # fmt: skip
    assert net.training
    assert net.head.weight is net.embed.weight
    assert net.embed.weight.requires_grad
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_read_is_the_parameter_itself_detached():
    net = Net()
    tensor = open_checkpoint(net).read("embed.weight")
    assert tensor.data_ptr() == net.embed.weight.data_ptr()
    assert not tensor.requires_grad


@pytest.mark.parametrize("family", ["llama", "t5", "clip"])
def test_transformers_models(family, tiny_model, tmp_path):
    model = tiny_model(family)
    checkpoint = open_checkpoint(model)
    for name, info in checkpoint.tensors().items():
        assert tuple(checkpoint.read(name).shape) == info.shape
        assert torch.equal(checkpoint.read(name), model.state_dict()[name])
    checkpoint.save_companions(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] == [checkpoint.label]
    assert (tmp_path / "generation_config.json").exists() == model.can_generate()


def test_no_companions_without_a_config(tmp_path):
    open_checkpoint(Net()).save_companions(tmp_path)
    assert not list(tmp_path.iterdir())


def test_fingerprint_is_of_the_data():
    net = Net()
    first = open_checkpoint(net).fingerprint()
    assert open_checkpoint(copy.deepcopy(net.state_dict()) and net).fingerprint() == first
    with torch.no_grad():
        net.embed.weight[0, 0] += 1
    assert open_checkpoint(net).fingerprint() != first
    assert open_checkpoint(nn.Linear(2, 2).bfloat16()).fingerprint()


class Odd(torch.Tensor):
    pass


def packed():
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Odd))
    return linear


def with_lock():
    linear = nn.Linear(2, 2)
    linear.log = (line for line in ())
    return linear


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.LazyLinear(3), UsageError, "'weight' has no shape yet"),
        (lambda: nn.Linear(2, 2, device="meta"), UsageError, "'weight' is on the meta device"),
        (packed, UsageError, "'weight' is a .*, not a plain tensor"),
        (with_lock, SourceError, "cannot be copied"),
    ],
)
def test_modules_that_cannot_be_compiled(make, error, message):
    with pytest.raises(error, match=message):
        open_checkpoint(make())
