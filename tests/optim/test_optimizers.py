"""Optimizers on block-wise states: against torch's, their saved states, pages, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from kbitc import optim
from kbitc.errors import UsageError
from kbitc.optim import pages

OURS = {
    "adam": lambda params, **more: optim.Adam8bit(params, lr=1e-2, weight_decay=0.01, **more),
    "adamw": lambda params, **more: optim.AdamW8bit(params, lr=1e-2, **more),
    "sgd": lambda params, **more: optim.SGD8bit(params, lr=0.1, nesterov=True, weight_decay=0.01, **more),
    "damped": lambda params, **more: optim.SGD8bit(params, lr=0.1, dampening=0.5, maximize=True, **more),
    "lion": lambda params, **more: optim.Lion8bit(params, lr=1e-3, weight_decay=0.1, **more),
    "stable": lambda params, **more: optim.StableAdamW(params, lr=1e-2, **more),
}
TORCHS = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "damped": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, maximize=True),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 70))


def train(make, steps=20):
    model, losses = net(), []
    optimizer = make(model.parameters())
    x, y = torch.randn(2, 64, 70, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(value, other[key][field]) for field, value in one[key].items())


@pytest.mark.parametrize("name", TORCHS)
def test_with_whole_states_it_is_torchs(name):
    model, _, losses = train(lambda params: OURS[name](params, bits=32))
    wanted, _, wanted_losses = train(TORCHS[name])
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=1e-6)
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "stable"])
def test_eight_bits_learn_as_well(name):
    whole, codes = (train(lambda p, b=b: OURS[name](p, bits=b), 40)[2] for b in (32, 8))
    assert codes[-1] < whole[0]
    assert abs(codes[-1] - whole[-1]) < 0.05 * whole[0]


def lion_by_hand(param, grad, mean, rate):
    param *= 1 - rate * 0.1
    param -= rate * (0.9 * mean + 0.1 * grad).sign()
    mean.lerp_(grad, 0.01)


def test_lion_is_the_papers():
    param, own = nn.Parameter(torch.randn(100)), None
    own, mean = param.detach().clone(), torch.zeros(100)
    optimizer = optim.Lion8bit([param], lr=1e-2, weight_decay=0.1, bits=32)
    for _ in range(5):
        param.grad = torch.randn(100)
        lion_by_hand(own, param.grad, mean, 1e-2)
        optimizer.step()
    torch.testing.assert_close(param.detach(), own)


def test_stable_adamw_divides_by_the_size_of_an_update():
    """After calm gradients a sudden one: the step is as long as Adam's over the root mean square of g / sqrt(v)."""
    param = nn.Parameter(torch.zeros(50))
    optimizer = optim.StableAdamW([param], lr=1.0, betas=(0.0, 0.99), weight_decay=0.0)
    square = torch.zeros(50)
    for step, size in enumerate((1.0, 1.0, 1e4), 1):
        before, grad = param.detach().clone(), torch.randn(50) * size
        param.grad = grad
        optimizer.step()
        square = 0.99 * square + 0.01 * grad.square()
        ratio = grad / (square / (1 - 0.99**step)).sqrt()
        clip = max(1.0, ratio.square().mean().sqrt().item())
        torch.testing.assert_close(param.detach() - before, -ratio / clip, rtol=1e-4, atol=1e-6)
    assert clip > 1.5


def test_bytes_of_states():
    param = nn.Parameter(torch.randn(1000, 1024))
    param.grad = torch.randn_like(param)
    for bits, most in ((8, 2.04), (4, 1.04)):
        optimizer = optim.AdamW8bit([param], bits=bits)
        optimizer.step()
        held = sum(t.nbytes for key, t in optimizer.state_dict()["state"][0].items() if key != "step")
        assert held / param.numel() <= most


def test_small_parameters_and_marked_ones_keep_whole_states():
    small, marked, plain = (nn.Parameter(torch.randn(n)) for n in (100, 5000, 5000))
    marked.optim_bits = 32
    optimizer = optim.AdamW8bit([small, marked, plain])
    for param in (small, marked, plain):
        param.grad = torch.randn_like(param)
    optimizer.step()
    kept = [optimizer.state_dict()["state"][i]["exp_avg"].dtype for i in range(3)]
    assert kept == [torch.float32, torch.float32, torch.uint8]


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("is_paged", [False, True])
def test_saved_states_come_back_byte_for_byte(tmp_path, bits, is_paged):
    model, optimizer, _ = train(lambda p: optim.AdamW8bit(p, bits=bits, block=96), 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    loaded = optim.AdamW8bit(
        other.parameters(), lr=5.0, bits=bits, block=96, paged=tmp_path if is_paged else False
    )
    loaded.load_state_dict(torch.load(file, weights_only=True))
    same(loaded.state_dict()["state"], optimizer.state_dict()["state"])
    assert loaded.param_groups[0]["lr"] == 1e-3
    for own, others in zip(model.parameters(), other.parameters(), strict=True):
        own.grad = torch.randn_like(own)
        others.grad = own.grad.clone()
    optimizer.step()
    loaded.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", OURS)
def test_paged_states_change_nothing(tmp_path, monkeypatch, name):
    """Cut into pieces of two blocks."""
    monkeypatch.setattr("kbitc.optim.blockwise.PIECE", 512)
    bits = {"bits": 8, "min_size": 1000}
    model, optimizer, _ = train(lambda p: OURS[name](p, **bits), 4)
    paged, on_disk, _ = train(lambda p: OURS[name](p, paged=str(tmp_path), **bits), 4)
    for a, b in zip(model.parameters(), paged.parameters(), strict=True):
        if name == "stable":  # the size of an update is a sum, of pieces here
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    if name != "stable":
        same(optimizer.state_dict()["state"], on_disk.state_dict()["state"])
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages.os, "posix_fallocate", full)
    param = nn.Parameter(torch.randn(5000))
    param.grad = torch.randn_like(param)
    with pytest.raises(UsageError, match="no room for 0.0 MB more"):
        optim.AdamW8bit([param], paged=tmp_path).step()


def test_paged_states_are_not_pickled(tmp_path):
    optimizer = optim.AdamW8bit([nn.Parameter(torch.randn(5000))], paged=tmp_path)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_a_parameter_that_is_not_contiguous():
    one, other = nn.Parameter(torch.randn(70, 90).mT), nn.Parameter(torch.zeros(90, 70))
    other.data.copy_(one.data)
    one.grad = torch.randn(90, 70)
    other.grad = one.grad.clone()
    optim.AdamW8bit([one]).step()
    optim.AdamW8bit([other]).step()
    assert torch.equal(one, other)


def test_a_sparse_gradient_is_an_error_and_nothing_moves():
    layer, table = nn.Linear(8, 8), nn.Embedding(10, 8, sparse=True)
    optimizer = optim.AdamW8bit([*layer.named_parameters(), ("table.weight", table.weight)])
    layer(table(torch.tensor([1, 2]))).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(UsageError, match="'table.weight' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 128}, "group 0 has block=256, and this optimizer 128"),
        ({"bits": 4}, "group 0 has bits=8, and this optimizer 4"),
        ({"min_size": 9}, "group 0 has min_size=4096, and this optimizer 9"),
    ],
)
def test_states_of_another_layout_are_an_error(options, message):
    _, optimizer, _ = train(optim.AdamW8bit, 1)
    with pytest.raises(UsageError, match=message):
        optim.AdamW8bit(net().parameters(), **options).load_state_dict(optimizer.state_dict())


def test_states_of_another_optimizer_or_size_are_an_error():
    _, optimizer, _ = train(optim.AdamW8bit, 1)
    fresh = optim.AdamW8bit(net().named_parameters())
    with pytest.raises(UsageError, match="says no bits: it is another optimizer's"):
        fresh.load_state_dict(train(torch.optim.AdamW, 1)[1].state_dict())
    with pytest.raises(UsageError, match="parameter '0.weight': the saved state holds momentum_buffer"):
        fresh.load_state_dict(train(optim.SGD8bit, 1)[1].state_dict())
    with pytest.raises(UsageError, match=r"groups of \[4\] parameters, and this optimizer of \[2\]"):
        optim.AdamW8bit(nn.Linear(2, 2).parameters()).load_state_dict(optimizer.state_dict())
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][2]["exp_avg_sq"] = torch.zeros(7, dtype=torch.uint8)
    with pytest.raises(UsageError, match="parameter '2.weight': exp_avg_sq is saved as torch.uint8"):
        fresh.load_state_dict(broken)
    assert not fresh.state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.AdamW8bit(p, lr=-1.0), "lr is -1.0"),
        (lambda p: optim.AdamW8bit(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: optim.AdamW8bit(p, bits=5), "bits is 5; expected one of 4, 8, 32"),
        (lambda p: optim.AdamW8bit(p, block=255), "block is 255"),
        (lambda p: optim.SGD8bit(p, momentum=0.0), "without momentum"),
        (lambda p: optim.SGD8bit(p, nesterov=True, dampening=0.1), "no dampening"),
        (lambda p: optim.AdamW8bit([p[0].double().detach().requires_grad_()]), "parameter 0 of its group is"),
    ],
)
def test_options_out_of_range_are_errors(make, message):
    with pytest.raises(UsageError, match=message):
        make([nn.Parameter(torch.zeros(5))])


def test_sharded_parameters_are_an_error(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        spread = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(UsageError, match="parameter 0 of its group is sharded by FSDP2"):
            optim.AdamW8bit([nn.Parameter(spread)])
    finally:
        dist.destroy_process_group()
    flattened = nn.Parameter(torch.zeros(5))
    flattened._fsdp_flattened = True
    with pytest.raises(UsageError, match="sharded by FSDP,"):
        optim.AdamW8bit([flattened])


def test_a_schedule_and_a_closure():
    param = nn.Parameter(torch.ones(5))
    optimizer = optim.SGD8bit([param], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    schedule.step()
    assert param.tolist() == [0.0] * 5
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_is_seen_by_autograd():
    param = nn.Parameter(torch.ones(5))
    loss = param.square().sum()
    param.grad = torch.ones(5)
    optim.AdamW8bit([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
