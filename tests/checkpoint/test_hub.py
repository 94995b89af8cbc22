"""Hub ids, against a server on this machine and against its cache. Nothing here needs a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "c" * 40
NOWHERE = "http://127.0.0.1:9"
NOT_THERE = "not in the download cache, and the hub cannot be reached"

OPEN = """
import json, sys
from kbitc.checkpoint import open_checkpoint
from kbitc.errors import SourceError
for source in sys.argv[1:]:
    source, _, revision = source.partition("|")
    try:
        with open_checkpoint(source, revision=revision or None) as checkpoint:
            for name in checkpoint.tensors():
                checkpoint.read(name)
            print(json.dumps([checkpoint.label, len(checkpoint.tensors()), str(checkpoint.folder)]))
    except SourceError as error:
        print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """The routes that a snapshot download uses; revisions main, v1 and the commit."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.server.seen.append(self.path)
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            org, name, verb, revision = [*path.removeprefix("/api/models/").split("/"), "", ""][:4]
        else:
            org, name, verb, revision = [*path.removeprefix("/").split("/"), "", ""][:4]
        if name == "gated":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if name == "broken":
            return self.send(500, b"")
        folder = self.server.root / org / name
        if not folder.is_dir():
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if verb in ("revision", "tree", "resolve") and revision not in ("main", "v1", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if verb == "resolve":
            file = folder / path.rpartition("/")[2]
            if not file.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            data = file.read_bytes()
            return self.send(200, data, {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        files = sorted(folder.iterdir())
        if verb == "tree":
            tree = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": sha1(f.read_bytes()).hexdigest(),
                }
                for f in files
            ]
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        info = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
        return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def send(self, code, data, headers=()):
        self.send_response(code)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny_model, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.seen = tmp_path / "served", []
    for name, shard in (
        ("tiny", "1GB"),
        ("named", "1GB"),
        ("sharded", "20KB"),
        ("awq", "1GB"),
        ("pickled", "1GB"),
    ):
        tiny_model("llama").save_pretrained(server.root / "org" / name, max_shard_size=shard)
        (server.root / "org" / name / "pytorch_model.bin").write_bytes(b"never fetched")
        (server.root / "org" / name / "modeling.py").write_bytes(b"never fetched")
        (server.root / "org" / name / "consolidated.safetensors").write_bytes(b"never fetched")
    (server.root / "org" / "pickled" / "model.safetensors").unlink()
    config = server.root / "org" / "awq" / "config.json"
    quantized = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}
    config.write_text(json.dumps(quantized))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def opened(hub, tmp_path):
    def run(*sources, **settings):
        """What opening each of them, in one process of its own, gives: facts, or the error's text."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1", **settings,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", OPEN, *sources],
            env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_download_then_cache(opened, hub):
    """Also what the files of a tokenizer name, shards, and revisions; later, all of it without a network."""
    folder = hub.root / "org" / "named"
    (folder / "tokenizer_config.json").write_text(
        '{"vocab_file": "words.lst", "weights": "pytorch_model.bin"}'
    )
    for name in ("words.lst", "spm.model", "dict.txt", "notes.txt"):
        (folder / name).write_text(name)  # equal contents would be fetched once
    sources = ("org/tiny", "org/named", "org/sharded@v1", "org/sharded|v1")
    *answers, unknown = opened(*sources, "org/sharded@v2")
    answer, named, first, second = answers
    label, count, folder = answer
    assert (label, count) == ("org/tiny", 21)
    assert folder.endswith(f"snapshots/{COMMIT}")
    assert fetched(hub, "org/tiny") == {"config.json", "generation_config.json", "model.safetensors"}
    assert named[1] == 21
    assert {"words.lst", "spm.model", "dict.txt"} <= fetched(hub, "org/named")
    assert not {"notes.txt", "pytorch_model.bin", "modeling.py"} & fetched(hub, "org/named")
    assert first[:2] == ["org/sharded@v1", 21]
    assert second[:2] == ["org/sharded", 21]
    assert "no revision 'v2'" in unknown
    *again, text = opened(*sources, "org/never", HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1")
    assert again == answers
    assert NOT_THERE in text


def fetched(hub, name):
    """Files of a model that were asked for."""
    return {path.rpartition("/")[2] for path in hub.seen if path.startswith(f"/{name}/resolve/")}


def test_what_is_wrong_is_said_in_one_paragraph(opened, hub, tmp_path):
    (tmp_path / "org" / "nine").mkdir(parents=True)
    wanted = {
        "org/awq": "quantized already, by 'awq'",
        "org/none": "neither a local path nor a model of the hub",
        "org/nin": "did you mean 'org/nine'?",
        "org/gated": "accept its terms on its hub page",
        "org/pickled": "a pickle can run code",
        "org/broken": "downloading it failed",
        "org/bad--name": "neither a local path nor a hub id",
    }
    for (name, message), text in zip(wanted.items(), opened(*wanted), strict=True):
        assert message in text
        assert text.startswith(name)
        assert "\n" not in text
    assert not any("model.safetensors" in path for path in hub.seen), "refused before weights are fetched"


def test_no_network_and_nothing_cached(opened):
    (text,) = opened("org/tiny", HF_ENDPOINT=NOWHERE)
    assert NOT_THERE in text
