"""The fuzzer itself: mutators are total and seeded, and every fate of a mutant is told from the others."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from random import Random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

import kbitc
from benchmarks.fuzz import campaign as campaigns
from benchmarks.fuzz import corpus, mutators
from benchmarks.fuzz.campaign import Campaign, Limits
from benchmarks.fuzz.targets import ChangedError, OutsideError, Refused, Target, command, targets
from kbitc.errors import SourceError

SAFETENSORS = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.float16)})
JSON = json.dumps({"a": 1, "b": [1, 2.5, "x"], "c": {"d": None, "e": True}}).encode()
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(range(200))
GOOD = {"f.json": JSON, "f.jsonl": JSON + b"\n" + JSON + b"\n", "f.safetensors": SAFETENSORS, "f.gguf": GGUF}


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), inner, max_size=3)
    ),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())
NO_OFFSETS = json.dumps({"a": {"dtype": "F32", "shape": [], "data_offsets": [None, None]}}).encode()
NO_OFFSETS = struct.pack("<Q", len(NO_OFFSETS)) + NO_OFFSETS
ANY_BYTES = (
    st.binary(max_size=200) | ANY_JSON | ANY_JSON.map(lambda text: struct.pack("<Q", len(text)) + text)
)


@given(name=st.sampled_from([*GOOD, "f.bin"]), data=ANY_BYTES, seed=st.integers(0, 2**32))
@example("f.safetensors", struct.pack("<Q", 1) + b"0", 0)
@example("f.safetensors", NO_OFFSETS, 1)
def test_mutators_take_any_bytes(name, data, seed):
    mutator = mutators.mutator_of(name)
    assert mutator(data, Random(seed)) == mutator(data, Random(seed))


@pytest.mark.parametrize("name", GOOD)
def test_mutants_differ_and_are_many(name):
    mutator = mutators.mutator_of(name)
    made = [mutator(GOOD[name], Random(seed)) for seed in range(300)]
    assert sum(mutant != GOOD[name] for mutant in made) > 240
    assert len(set(made)) > 100


def test_most_json_stays_json():
    made = [mutators.mutate_json(JSON, Random(seed)) for seed in range(300)]
    assert sum(is_json(mutant) for mutant in made) > 220
    assert any(mutant.startswith(b"[" * 1000) for mutant in made)


def is_json(data):
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def test_safetensors_mutants_reach_behind_the_header():
    """Some change only the data, some only the header, and most headers stay JSON."""
    size = 8 + int.from_bytes(SAFETENSORS[:8], "little")
    made = [mutators.mutate_safetensors(SAFETENSORS, Random(seed)) for seed in range(300)]
    assert any(m[:size] == SAFETENSORS[:size] and m != SAFETENSORS for m in made)
    changed = [m for m in made if m[8:size] != SAFETENSORS[8:size]]
    assert any(m.endswith(SAFETENSORS[size:]) for m in changed)
    headers = [m[8 : 8 + int.from_bytes(m[:8], "little")] for m in made]
    assert sum(map(is_json, headers)) > 220
    swapped = [json.loads(h) for h in headers if is_json(h)]
    assert any(isinstance(h, dict) and h.get("b", {}).get("dtype") == "BF16" for h in swapped)


def test_files_gone_astray(tmp_path):
    done = set()
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "a.json").write_bytes(JSON)
        (folder / "b.json").write_bytes(b"{}")
        done.add(mutators.misplace(folder / "a.json", Random(seed)).partition(": ")[2].partition(":")[0])
    assert done >= {
        "gone",
        "empty",
        "a folder",
        "a broken link",
        "a link to itself",
        "a pipe",
        "a copy of b.json",
    }


def test_a_command_is_refused_or_raises(tmp_path):
    command("quantizers")
    with pytest.raises(Refused, match="exit code 1"):
        command("inspect", tmp_path / "nothing")


def fate(folder, good):
    del good
    match (folder / "file.json").read_bytes():
        case b"good" | b"same":
            return "digest"
        case b"refused":
            raise SourceError("no")
        case b"accepted":
            return "another"
        case b"script":
            raise ChangedError("script")
        case b"outside":
            raise OutsideError
        case b"exception":
            raise KeyError("x")
        case b"memory":
            return str(len(bytearray(2**40)))
        case b"hang":
            time.sleep(60)
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


FATES = ["same", "refused", "accepted", "script", "outside", "exception", "memory", "hang", "crash"]


@pytest.fixture
def stub(monkeypatch):
    """A campaign with one way in, whose mutants say themselves what becomes of them."""

    def make(folder, items):
        assert items == {"item"}
        (folder / "item").mkdir(parents=True)
        (folder / "item" / "file.json").write_bytes(b"good")

    def mutate(path, random):
        path.write_text(random.choice(FATES))
        return "mutated"

    monkeypatch.setattr(corpus, "make_corpus", make)
    monkeypatch.setattr(campaigns, "targets", lambda: [Target("way", "item", fate, 1)])
    monkeypatch.setattr(campaigns, "mutate_file", mutate)
    monkeypatch.setattr(campaigns, "MISPLACED", 0)


def test_every_fate_is_counted_and_kept(stub, tmp_path):
    log, failures = tmp_path / "log.jsonl", tmp_path / "failures"
    with Campaign(0, Limits(timeout=1.0), failures=failures) as campaign:
        first = campaign.run(24, log=log)
    counter = first.outcomes["way"]
    assert set(counter) == {
        "same", "refused", "accepted", "outside kbitc", "exception", "memory", "hang", "crash",
    }  # fmt: skip
    assert first.count == 24
    assert first.failures == 24 - counter["same"] - counter["refused"] - counter["outside kbitc"]
    assert "outside kbitc" in first.table()
    assert "way" in first.table()
    assert "KeyError" in first.signatures()
    assert "killed by SIGSEGV" in first.signatures()
    kept = [json.loads(path.read_text()) for path in failures.glob("*/mutant.json")]
    assert {entry["outcome"] for entry in kept} == {"accepted", "exception", "memory", "hang", "crash"}
    crash = next(failures.glob("*-crash"))
    assert (crash / "item" / "file.json").read_text() == "crash"

    with Campaign(0, Limits(timeout=1.0)) as campaign:
        again = campaign.run(24, log=log)
    assert again.outcomes == first.outcomes
    assert len(log.read_text().splitlines()) == 24


def test_the_environment_is_as_before(stub, monkeypatch):
    monkeypatch.setenv("KBITC_CACHE", "somewhere")
    with Campaign(0):
        assert os.environ["KBITC_CACHE"] != "somewhere"
    assert os.environ["KBITC_CACHE"] == "somewhere"


def test_a_mutant_is_its_seed_and_number(stub):
    made = []
    for seed in (0, 0, 1):
        with Campaign(seed) as campaign:
            made.append([campaign.make(i)[1].joinpath("file.json").read_text() for i in range(12)])
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_a_campaign_may_begin_in_the_middle(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(campaigns, "mutate_file", lambda path, random: path.write_text("same"))
    log = tmp_path / "log.jsonl"
    with Campaign(0) as campaign:
        assert campaign.run(2, log=log).count == 2
        assert campaign.run(4, first=1, log=log).count == 4
    assert sorted(json.loads(line)["mutant"] for line in log.read_text().splitlines()) == [0, 1, 2, 3, 4]


def test_a_fault_behind_a_command_is_no_refusal(monkeypatch):
    """The command line says one line of it, and exits as it does after an error of ours."""

    def fail(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("kbitc.compiler.inspection.inspect", fail)
    with pytest.raises(KeyError):
        command("inspect", "demo")


@pytest.mark.parametrize("change", ["none", "removed", "another", "wrong"])
def test_what_transformers_does_by_itself_is_told_from_what_kbitc_does(tmp_path, change):
    """A config that names kbitc no more; an entry that does is kbitc's to refuse."""
    way = next(each for each in targets() if each.name == "artifact: from_pretrained")
    corpus._source(tmp_path / "source")
    kbitc.compile(tmp_path / "source", spec="nf4:32", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if change == "removed":
        del config["quantization_config"]
    elif change == "another":
        config["quantization_config"]["quant_method"] = "kbit_"
    elif change == "wrong":
        config["quantization_config"]["weights"] = 3
    if change == "none":
        assert way.act(tmp_path / "out", tmp_path)
        return
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError if change == "wrong" else OutsideError):
        way.act(tmp_path / "out", tmp_path)


def test_no_time_is_said(stub):
    with Campaign(0, Limits(seconds=0)) as campaign:
        results = campaign.run(5)
    assert results.is_cut
    assert results.count == 0


def test_the_good_files_are_fine(monkeypatch, tmp_path):
    """Every way in of real files answers on the good ones; those with a digest give it twice."""
    way = next(each for each in targets() if each.name == "moments")
    (tmp_path / "good").mkdir()
    monkeypatch.setenv("KBITC_CACHE", str(tmp_path / "cache"))
    corpus._source(tmp_path / "good" / "source")
    first = way.act(tmp_path / "moments", tmp_path / "good")
    assert first
    assert way.act(tmp_path / "moments", tmp_path / "good") == first
    assert list((tmp_path / "moments").rglob("*.safetensors"))
