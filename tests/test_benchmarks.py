"""The GPU benchmarks do on the CPU, with tiny weights, all that they do on a GPU but CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
import time
import types

import pytest
import torch
from torch import nn

import kbitc
from benchmarks import gpu_decode, gpu_layers, gpu_linear
from benchmarks.gpu import GRAPH_CALLS, GRAPH_SECONDS, Clock, Loop

TINY = "--device cpu --layers 1 --hidden 64 --intermediate 96 --heads 4 --kv-heads 2 --vocabulary 101".split()


@pytest.fixture(scope="module")
def clock():
    return Clock("cpu")


def table(text, title):
    """The rows of one table of a Markdown file, by column."""
    lines = text.split(f"## {title}")[1].strip().splitlines()
    body = itertools.takewhile(bool, lines)
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in body]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize("main", [gpu_linear.main, gpu_decode.main])
def test_without_a_gpu_one_line_and_2(main, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no CUDA device" in err
    assert err.count("\n") == 1


def test_linear(tmp_path):
    file = tmp_path / "linear.md"
    arguments = f"--device cpu --shapes 48x128,37x67 --m 1,3 --specs nf4:64,int3:32+dq --markdown {file}"
    assert gpu_linear.main(arguments.split()) == 0
    text = file.read_text()
    for title in ("48 x 128", "37 x 67"):
        rows = table(text, f"{title} (rows x in_features)")
        for name in ("torch bf16", "kbitc nf4:64", "kbitc int3:32+dq"):
            found = [row for row in rows if row["weight"] == name]
            assert [row["M"] for row in found] == ["1", "3"]
            assert all(float(row["µs"]) > 0 and 0 < float(row["error"]) < 1e-2 for row in found)
        # Every peer has its figures, or one row that says why not.
        peers = [row for row in rows if not row["weight"].startswith(("torch bf16", "kbitc"))]
        assert all(row["µs"] or ": " in row[""] for row in peers)
        for name in gpu_layers.PEERS:
            assert any(row["weight"].startswith(name) for row in peers)
    bars = {row["bar"]: row for row in table(text, "Bars")}
    assert bars["kbitc nf4:64, M = 1, 4096x14336"]["met"] == "not measured"
    assert bars["kbitc nf4:64, M = 1, 48x128"]["measured"]


def test_who_fails_is_named(clock, monkeypatch):
    def not_built(weight, clock):
        raise ImportError("no such package")

    def refuses(x):
        if len(x) > 1:
            raise RuntimeError("first line\none row alone")
        return x.new_zeros(1, 48)

    peers = {"away": not_built, "weak": lambda weight, clock: gpu_layers.Layer("weak", [refuses], 9, None)}
    monkeypatch.setattr(gpu_linear, "PEERS", peers)
    options = gpu_linear.parse_options("--device cpu --m 1,2 --specs nf4:64".split())
    rows = gpu_linear.shape_section(gpu_linear.make_bench(options), (48, 64)).rows
    assert [row["reason"] for row in rows if row["name"] == "away"] == ["ImportError: no such package"]
    one, two = (row for row in rows if row["name"] == "weak")
    assert one["us"] > 0
    assert one["error"] is None
    assert "us" not in two
    assert two["reason"] == "RuntimeError: one row alone"
    for row in rows:
        if "us" in row:
            dense = next(r for r in rows if (r["name"], r.get("count")) == ("torch bf16", row["count"]))
            assert row["speedup"] == pytest.approx(dense["us"] / row["us"])
            gb_s = 1e6 * row["megabytes"] / (1e-6 * row["us"]) / 1e9
            assert row["gb_s"] == pytest.approx(gb_s)
            assert row["copy_percent"] == pytest.approx(100 * gb_s / row["copy_gb_s"])


def test_bars_of_linear():
    def row(spec, count, **figures):
        return {"shape": (4096, 14336), "count": count, "name": f"kbitc {spec}", **figures}

    rows = [
        row("nf4:64", 1, us=10.0, copy_percent=61.0, speedup=2.4),
        row("nf4:64", 16, us=10.0, copy_percent=1.0, speedup=2.0),
        row("nf4:64", 4096, reason="RuntimeError: no"),
        row("nf3:64", 1, us=8.0),
        row("nf2:64", 1, us=9.0),
        {"shape": (4096, 14336), "name": "GemLite", "reason": "ImportError: no"},
    ]
    bars = gpu_linear.find_bars(rows)
    assert [bar["met"] for bar in bars] == ["yes", "NO", "yes", "not measured", "yes", "NO"]
    assert [bar["figure"] for bar in bars] == [61.0, 2.4, 2.0, None, 1.25, pytest.approx(8 / 9)]


def test_bars_are_those_of_the_default_run():
    options = gpu_linear.parse_options([])
    assert gpu_linear.MORE_AT in options.shapes
    assert set(gpu_linear.SPEED_BARS) <= set(options.m)
    assert {spec for pair in gpu_linear.FASTER for spec in pair} <= {gpu_linear.SPEC, *gpu_linear.MORE_SPECS}


def test_race_gives_seconds_of_one_call(clock):
    slow = clock.prepare([lambda: time.sleep(0.004)] * 2)
    fast, slow_seconds = clock.race([Loop(lambda: None, 1), slow])
    assert slow.count == 2
    assert fast < 0.002 < slow_seconds


class SimulatedGPU:
    """The part of torch.cuda that a clock uses, with a time of its own: it moves when work is done."""

    def __init__(self, monkeypatch):
        self.now, self.recording, self.graphs = 0.0, None, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def __init__(self):
                self.work = []
                gpu.graphs.append(self)

            def replay(self):
                for seconds, _ in self.work:
                    gpu.now += seconds

        @contextlib.contextmanager
        def capturing(graph):
            gpu.recording = graph.work
            yield
            gpu.recording = None

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "is_available": lambda: True,
            "synchronize": lambda device: None,
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capturing,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)

    def call(self, seconds, name):
        """Something that takes so long, now or when it is replayed."""

        def run():
            if self.recording is None:
                self.now += seconds
            else:
                self.recording.append((seconds, name))

        return run


def test_on_a_gpu_graphs_rotate_and_events_time_them(monkeypatch):
    gpu = SimulatedGPU(monkeypatch)
    clock = Clock("cuda")
    assert clock.copies_of(10_000_000) == 21  # 200 MiB in all
    assert clock.copies_of(1 << 30) == 2
    short = clock.prepare([gpu.call(4e-6, name) for name in "abc"])
    names = [name for _, name in gpu.graphs[-1].work]
    assert names == list("abc") * (len(names) // 3)
    assert short.count == len(names)
    assert 4e-6 * len(names) >= GRAPH_SECONDS
    long = clock.prepare([gpu.call(5e-3, name) for name in "ab"])
    assert long.count == 2
    assert clock.race([short, long]) == pytest.approx([4e-6, 5e-3])
    tiny = clock.prepare([gpu.call(1e-9, name) for name in "abc"])
    assert 0.9 * GRAPH_CALLS < tiny.count <= GRAPH_CALLS


def test_layers_store_what_they_multiply_with(clock):
    """The dense weight that a layer claims is near the given one, and its product's."""
    weight = (torch.randn(48, 128) * 0.02).to(torch.bfloat16)
    x = torch.randn(5, 128).to(torch.bfloat16)
    for layer in (
        gpu_layers.torch_dense(weight, clock),
        gpu_layers.packed(weight, clock, "nf4:64"),
        gpu_layers.torch_int4pack(weight, clock),
    ):
        off = float((layer.dense - weight.float()).norm() / weight.float().norm())
        assert off < 0.15, layer.name
        assert len(layer.products) == 2, layer.name
        for product in layer.products:
            exact = x.double() @ layer.dense.double().T
            assert (product(x) - exact).norm() < 1e-2 * exact.norm(), layer.name
        assert layer.error(x) < 1e-2


def test_stored_bytes_of_a_subclass_are_those_of_its_parts():
    weight = kbitc.quantize(torch.randn(7, 67), "nf3:32+dq")
    assert gpu_layers.stored_bytes(torch.zeros(3, 5)) == 60
    assert gpu_layers.stored_bytes(weight) == sum(part.nbytes for part in weight.packed.tensors().values())


def test_decode(tmp_path):
    file = tmp_path / "decode.md"
    arguments = f"--prompt 5 --new 2 --runs 1 --inner eager --markdown {file}".split()
    assert gpu_decode.main([*TINY, *arguments]) == 0
    text = file.read_text()
    rows = table(text, "Decoding")
    names = [("torch bf16", "compiled"), ("kbitc nf4:64", "compiled")]
    names += [(model, "replayed") for model, _ in names]
    assert [(row["model"], row["steps"]) for row in rows] == names
    assert [row["graphs"] for row in rows] == ["1"] * 4
    for dense, packed in (rows[:2], rows[2:]):
        speeds = [float(row["decode tok/s"]) for row in (dense, packed)]
        assert float(packed["x 16-bit"]) == pytest.approx(speeds[1] / speeds[0], rel=0.2)
    bars = table(text, "Bars")
    assert [bar["met"] for bar in bars[1::2]] == ["yes", "yes"]  # the logits; the others depend on time
    assert {bar["met"] for bar in bars[::2]} <= {"yes", "NO"}


def test_a_model_that_fails_is_named(tmp_path):
    file = tmp_path / "decode.md"
    arguments = f"--only packed --steps replayed --spec nf9:64 --inner eager --markdown {file}".split()
    assert gpu_decode.main([*TINY, *arguments]) == 1
    text = file.read_text()
    (row,) = table(text, "Decoding")
    assert row["decode tok/s"] == ""
    assert row[""].startswith("UsageError: ")
    assert [bar["met"] for bar in table(text, "Bars")] == ["not measured"] * 2


def test_packed_model_is_the_dense_one_packed():
    config = gpu_decode.make_config(gpu_decode.parse_options(TINY))
    device = torch.device("cpu")
    dense = gpu_decode.build(config, torch.float32, device, None)
    packed = gpu_decode.build(config, torch.float32, device, "nf4:64")
    weights = dict(packed.named_parameters())
    for name, weight in dense.named_parameters():
        is_linear = isinstance(dense.get_submodule(name.rpartition(".")[0]), nn.Linear)
        assert isinstance(weights[name], kbitc.KbitTensor) == is_linear, name
        expected = kbitc.quantize(weight.detach(), "nf4:64").dequantize() if is_linear else weight
        found = weights[name].dequantize() if is_linear else weights[name]
        assert torch.equal(found, expected), name
    assert gpu_decode.weight_bytes(packed) < 0.5 * gpu_decode.weight_bytes(dense)


def test_wrong_logits_show(clock):
    options = gpu_decode.parse_options(TINY)
    with torch.no_grad():
        model = gpu_decode.build(gpu_decode.make_config(options), torch.float32, torch.device("cpu"), None)
        decoder = gpu_decode.StaticCacheDecoder(model, torch.tensor([[3, 1, 4]]), 8, "eager", None)
        decoder.decode(1)
        decoder.replay(clock)
        decoder.decode(1)
        assert decoder.ids.shape == (1, 6)
        assert decoder.difference() < 1e-5
        model.model.layers[0].mlp.down_proj.weight.mul_(-9)  # what was decoded used the former weight
        assert decoder.difference() > gpu_decode.TOLERANCE
