"""The artifact on disk: exact sizes, stable bytes, nothing half-written, every damage found."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.reader import Artifact
from kbitc.artifact.writer import Writer, _lay_out
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import SourceError, UsageError
from kbitc.formats.layout import Slot
from kbitc.quantizers import quantize
from kbitc.tensor.kbit_tensor import KbitTensor

SLOTS = {
    "a": {"a.planes": Slot(torch.uint8, (3, 5)), "a.scales": Slot(torch.float16, (3, 2))},
    "b": {"b": Slot(torch.float32, (7,))},
}
DATA = {
    "a": {
        "a.planes": torch.arange(15, dtype=torch.uint8).view(3, 5),
        "a.scales": torch.ones(3, 2, dtype=torch.bfloat16),
    },
    "b": {"b": torch.randn(7, generator=torch.Generator().manual_seed(0))},
}


def write(out, **options):
    with Writer(out, SLOTS, {"id": 1}, **options) as writer:
        for unit, tensors in DATA.items():
            if unit not in writer.done:
                writer.put(unit, tensors, {})
        writer.commit({PLAN_FILE: "{}"})
    return out


def test_the_file_is_plain_safetensors_with_aligned_tensors(tmp_path):
    file = write(tmp_path / "out") / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        for unit in DATA.values():
            for key, tensor in unit.items():
                assert torch.equal(handle.get_tensor(key), tensor)
                assert handle.get_tensor(key).dtype == tensor.dtype
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 8 == 0
    for entry in (e for k, e in json.loads(raw[8 : 8 + length]).items() if k != "__metadata__"):
        size = {"F32": 4, "BF16": 2, "U8": 1}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0
    assert len(raw) == 8 + length + sum(t.nbytes for unit in DATA.values() for t in unit.values())


def test_shards_are_cut_and_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.artifact.writer.SHARD_BYTES", 30)
    out = write(tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {
        "a.planes": "model-00001-of-00002.safetensors",
        "a.scales": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


def test_header_room_fits_any_offsets():
    for size in (1, 9, 99, 12345, 10**9):
        file = _lay_out("x", {"k": Slot(torch.float16, (size,)), "l": Slot(torch.uint8, (3,))})
        assert len(file.header({"k": torch.bfloat16})) == file.header_bytes
        assert len(file.header({})) == file.header_bytes


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="boom"), Writer(tmp_path / "out", SLOTS, {}) as writer:
        writer.put("a", DATA["a"], {})
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_what_resume_needs(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", SLOTS, {"id": 1}) as writer:
        writer.put("a", DATA["a"], {})
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    with Writer(tmp_path / "out", SLOTS, {"id": 1}, is_resumed=True) as writer:
        assert set(writer.done) == {"a"}
        writer.put("b", DATA["b"], {})
        writer.commit({PLAN_FILE: "{}"})
    whole = write(tmp_path / "whole")
    resumed = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert resumed == (whole / "model.safetensors").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_resume_survives_a_torn_journal_line(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", SLOTS, {"id": 1}) as writer:
        writer.put("a", DATA["a"], {})
        raise KeyboardInterrupt
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"unit": "b", "tens')
    with Writer(tmp_path / "out", SLOTS, {"id": 1}, is_resumed=True) as writer:
        assert set(writer.done) == {"a"}
        writer.put("b", DATA["b"], {})
        writer.commit({PLAN_FILE: "{}"})
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert torch.equal(handle.get_tensor("b"), DATA["b"]["b"])


@pytest.fixture
def interrupted(tmp_path):
    """A folder of which both units were written before the interruption; gives the journal."""
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", SLOTS, {"id": 1}) as writer:
        for unit, tensors in DATA.items():
            writer.put(unit, tensors, {"error": 0.5})
        raise KeyboardInterrupt
    return writer.journal, writer.partial


def resume(tmp_path):
    """Finish it; the units that were found done, and the file's bytes."""
    with Writer(tmp_path / "out", SLOTS, {"id": 1}, is_resumed=True) as writer:
        done = set(writer.done)
        for unit in set(DATA) - done:
            writer.put(unit, DATA[unit], {"error": 0.5})
        notes = [writer.done[unit]["error"] for unit in DATA]
        writer.commit({PLAN_FILE: "{}"})
    return done, notes, (tmp_path / "out" / "model.safetensors").read_bytes()


def test_resume_takes_nothing_from_a_changed_journal(interrupted, tmp_path):
    journal, _ = interrupted
    whole = (write(tmp_path / "whole") / "model.safetensors").read_bytes()
    head, *lines = journal.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("0.5", "0.7")
    journal.write_text("".join([head, *lines]))
    assert resume(tmp_path) == ({"a"}, [0.5, 0.5], whole)


@pytest.mark.parametrize(
    "line", [b"[1]", b"{" * 9000, b'{"unit": "b"}', b"\xff", b'{"unit": "b", "tensors": 3}']
)
def test_resume_survives_a_damaged_journal(interrupted, tmp_path, line):
    journal, _ = interrupted
    head, first, _ = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(head + first + line + b"\n")
    assert resume(tmp_path)[0] == {"a"}


def test_resume_writes_again_what_the_files_do_not_hold(interrupted, tmp_path):
    """As after a power failure, where the journal may be ahead of the data."""
    _, partial = interrupted
    whole = (write(tmp_path / "whole") / "model.safetensors").read_bytes()
    file = partial / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done, _, written = resume(tmp_path)
    assert (len(done), written) == (1, whole)


def test_resume_refuses_another_source(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", SLOTS, {"id": 1}):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="another source, plan or kbitc version"):
        Writer(tmp_path / "out", SLOTS, {"id": 2}, is_resumed=True)


def test_existing_output_needs_force(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        write(tmp_path / "out")
    write(tmp_path / "out", is_forced=True)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not a kbitc artifact"):
        write(other, is_forced=True)
    assert (other / "thesis.txt").exists()


def test_unwritable_target(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="not a writable folder"):
        write(file / "out")


def test_full_disk_writes_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left on device.*nothing was written"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path):
    model = nn.Sequential(nn.Linear(100, 30), nn.Linear(30, 7))
    model[0].weight = nn.Parameter(quantize(torch.randn(30, 100), "nf3:64+dq+out2%"), requires_grad=False)
    model[1].weight = nn.Parameter(quantize(torch.randn(7, 30), "learned4:8+zp"), requires_grad=False)
    kbitc.save(model, tmp_path / "saved")
    return model, tmp_path / "saved"


def test_state_is_what_was_saved(saved):
    model, folder = saved
    artifact = Artifact.open(folder)
    artifact.verify()
    state = artifact.state()
    for name in ("0.weight", "1.weight"):
        assert isinstance(state[name], KbitTensor)
        assert torch.equal(state[name].dequantize(), model.get_parameter(name).dequantize())
    assert torch.equal(state["0.bias"], model[0].bias.half())
    size = sum(t.nbytes for _, t in artifact.tensors())
    assert artifact.payload_bytes == size
    assert artifact.bits_per_param == 8 * size / sum(p.numel() for p in model.parameters())


OTHERS = (
    "complex64 uint16 uint32 uint64 int8 int16 int32 bool float8_e4m3fn float8_e5m2 float8_e4m3fnuz "
    "float8_e5m2fnuz float8_e8m0fnu"
)


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in OTHERS.split()])
def test_buffers_of_any_dtype(dtype, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 33)
            raw = torch.arange(1, 65, dtype=torch.uint8)
            self.register_buffer("table", raw % 2 > 0 if dtype == torch.bool else raw.view(dtype))
            self.register_buffer("one", self.table[1].clone())

        def forward(self, x):
            return self.linear(x)

    model, x = Model(), torch.randn(2, 64)
    packed = kbitc.compile(model, spec="nf4:64", out=tmp_path / "compiled", example_inputs=(x,))
    kbitc.save(packed, tmp_path / "saved")
    for name in ("compiled", "saved"):
        artifact = Artifact.open(tmp_path / name)
        artifact.verify()
        loaded = kbitc.load_into(Model().half(), tmp_path / name)
        for key in ("table", "one"):
            for got in (artifact.state()[key], loaded.state_dict()[key]):
                assert got.dtype == dtype
                raw = getattr(model, key)
                assert torch.equal(got.reshape(-1).view(torch.uint8), raw.reshape(-1).view(torch.uint8))


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(64, 33))
    model.register_buffer("phases", torch.ones(3, dtype=torch.complex128))
    with pytest.raises(UsageError, match="phases: is of complex128.*persistent=False"):
        kbitc.compile(model, spec="nf4:64", out=tmp_path / "out", example_inputs=(torch.randn(2, 64),))
    assert list(tmp_path.iterdir()) == []


def test_saving_nothing_packed_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="nothing in this model is packed"):
        kbitc.save(nn.Linear(3, 3), tmp_path / "x")


def damage(folder, change):
    copy = folder.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def edit_plan(**changes):
    def change(folder):
        plan = json.loads((folder / PLAN_FILE).read_text())
        (folder / PLAN_FILE).write_text(json.dumps(plan | changes))

    return change


def flip_last_byte(folder):
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_last_byte, "does not match its checksum"),
        (truncate, "is truncated"),
        (lambda f: (f / "model.safetensors").unlink(), "tensors are missing"),
        (lambda f: (f / PLAN_FILE).unlink(), "not a compiled model"),
        (lambda f: (f / PLAN_FILE).write_text("{"), "damaged"),
        (edit_plan(format=99), "upgrade kbitc"),
    ],
)
def test_damage_is_found(saved, change, message):
    _, folder = saved
    with pytest.raises(SourceError, match=message):
        kbitc.load_into(nn.Sequential(nn.Linear(100, 30), nn.Linear(30, 7)), damage(folder, change))


def test_artifact_of_a_plain_module_says_how_to_load_it(saved):
    with pytest.raises(SourceError, match="load_into"):
        kbitc.load(saved[1])


def test_loading_into_another_module_is_an_error(saved):
    with pytest.raises(UsageError, match="does not fit"):
        kbitc.load_into(nn.Sequential(nn.Linear(100, 30)), saved[1])


def test_names_that_a_rule_of_transformers_would_change_again_are_found(tmp_path):
    """Tipsv2 has "token_embedding." in a checkpoint become "embeddings.token_embedding.", which holds it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Tipsv2TextConfig(**sizes, vocab_size=64, max_position_embeddings=16)
    model = transformers.Tipsv2TextModel(config).eval()
    model.save_pretrained(tmp_path / "source")
    compile_to(tmp_path / "source", tmp_path / "out", Request.of(spec="int8:32"))
    loaded = kbitc.load(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        ours, theirs = loaded(ids).last_hidden_state, model(ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)
