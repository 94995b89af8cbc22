"""What is done with a mutant: the command or the function that reads it, and what must not have changed.

The one thing to know: where a file carries a checksum, a mutant is refused or gives exactly what the good
file gives, which a target's digest says. Of a source nobody can know whether it was changed: no digest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from benchmarks.fuzz import corpus
from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.errors import KbitcError

IDS = tuple(range(4, 20))
SCRIPT = "<script>alert(1)</script>"  # among the mutators' strange values


@dataclass(frozen=True)
class Target:
    """A way in.

    Attributes:
        name: in the table.
        item: folder of the corpus that is copied and mutated.
        act: reads the mutated folder; gives a digest of what must not change, or "".
        share: how often it is chosen, beside the others.
        files: patterns of the files that are mutated.
        is_foreign: another library is called, which may refuse in its own words before it asks kbitc.
    """

    name: str
    item: str
    act: Callable[[Path, Path], str]
    share: int
    files: tuple[str, ...] = ("**/*",)
    is_foreign: bool = False

    def candidates(self, folder: Path) -> list[Path]:
        """Files of a copied item that may be mutated, small ones of many kinds as likely as large ones."""
        found = {path for pattern in self.files for path in folder.glob(pattern) if path.is_file()}
        return sorted(found)


class ChangedError(Exception):
    """A mutant got through: what was made of it holds script of the mutant's."""


class OutsideError(Exception):
    """transformers made a model by itself: the mutant's config does not name kbitc, which was not asked."""


class Refused(KbitcError):
    """A command ended with exit code 1 or 2, as an error does."""


def command(*arguments: str | Path) -> None:
    """Run the command line in this process.

    Raises:
        Refused: the exit code says so, of an error of kbitc's own; others come as they are.
    """
    from kbitc.cli.main import main

    argv = mock.patch.object(sys, "argv", ["kbitc", *map(str, arguments)])
    with argv, mock.patch.dict(os.environ, {"KBITC_DEBUG": "1"}):
        try:
            main()
        except SystemExit as error:
            if error.code not in (0, 1, 2):
                raise RuntimeError(f"exit code {error.code}") from error
            if error.code:
                raise Refused(f"exit code {error.code}") from error


def _logits(model: torch.nn.Module) -> str:
    from kbitc.tensor.kbit_tensor import KbitTensor

    tensors = {
        name: value.dequantize() if isinstance(value, KbitTensor) else value
        for name, value in model.named_parameters()
    }
    with torch.no_grad():
        return digest_of_tensors({"logits": model(torch.tensor([IDS])).logits, **tensors})


def _load(folder: Path, good: Path) -> str:
    del good
    import kbitc

    return _logits(kbitc.load(folder))


def _from_pretrained(folder: Path, good: Path) -> str:
    del good
    from transformers import AutoModelForCausalLM

    from kbitc.compiler.transformers_client import KbitConfig

    with mock.patch.object(KbitConfig, "__init__", autospec=True, side_effect=KbitConfig.__init__) as asked:
        model = AutoModelForCausalLM.from_pretrained(folder)
    if not asked.called and not _names_kbitc(folder / "config.json"):
        raise OutsideError("config.json does not name kbitc, and transformers made a model without it")
    return _logits(model)


def _names_kbitc(config: Path) -> bool:
    """Whether transformers finds kbitc's method in a config."""
    match json.loads(config.read_bytes()):
        case {"quantization_config": {"quant_method": "kbit"}}:
            return True
    return False


def _load_into(folder: Path, good: Path) -> str:
    from transformers import AutoModelForCausalLM

    import kbitc

    module = AutoModelForCausalLM.from_pretrained(good / "source", dtype=torch.float32)
    return _logits(kbitc.load_into(module, folder))


def _open_source(folder: Path, good: Path) -> str:
    del good
    from kbitc.checkpoint import open_checkpoint

    path = next(folder.glob("*.gguf"), folder)
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors():
            checkpoint.read(name)
        checkpoint.fingerprint()
        out = folder.with_name(f"{folder.name}-companions")
        out.mkdir()
        checkpoint.save_companions(out)
    return ""


def _compile_source(folder: Path, good: Path) -> str:
    del good
    command("compile", folder, "--spec", corpus.SPEC, "-o", folder.with_name("compiled"))
    return ""


def _compile_plan(folder: Path, good: Path) -> str:
    plan = next(folder.glob("*.json"), folder / "plan.json")
    command("compile", good / "source", "--plan", plan, "--dry-run")
    return ""


def _replan(folder: Path, good: Path) -> str:
    del good
    command("plan", folder / "kbit_scores.json", "--bits", "4.5")
    return ""


def _resume(folder: Path, good: Path) -> str:
    command("compile", good / "source", "--spec", corpus.SPEC, "-o", folder / "out", "--resume")
    return _load(folder / "out", good)


def _remember(folder: Path, good: Path) -> str:
    return digest_of_tensors(corpus.remember(good / "source", folder))


def _inspect(folder: Path, good: Path) -> str:
    del good
    page = folder.with_name("page.html")
    command("inspect", folder, "--html", page)
    return _no_script(page)


def _inspect_evaluations(folder: Path, good: Path) -> str:
    page = folder.with_name("page.html")
    command("inspect", good / "whole", "--html", page, "--measured", folder / "eval.json")
    return _no_script(page)


def _no_script(page: Path) -> str:
    if SCRIPT in page.read_text(encoding="utf-8"):
        raise ChangedError("the page holds script of the mutant's")
    return ""


def _run(folder: Path, good: Path) -> str:
    del good
    command(
        "run",
        folder,
        "w1 w2",
        "-n",
        "2",
        "--backend",
        "auto" if (folder / "model.onnx").exists() else "eager",
    )
    return ""


def _onnx(folder: Path, good: Path) -> str:
    del good
    from kbitc.backends.onnx_export.runtime import OnnxModel

    return digest_of_tensors({"logits": OnnxModel(folder)(torch.tensor([IDS])).logits})


def targets() -> list[Target]:
    """Every way in that the installed packages have."""
    ways = [
        Target("source: open and read", "source", _open_source, 20),
        Target("source: compile", "source", _compile_source, 3),
        Target("artifact: load", "artifact", _load, 20),
        Target("artifact, one file: load", "whole", _load, 8, ("*.json", "*.safetensors")),
        Target("artifact: from_pretrained", "whole", _from_pretrained, 10, ("*.json", "*.safetensors"), True),
        Target("artifact: load_into", "whole", _load_into, 5, ("*.json", "*.safetensors")),
        Target("artifact: inspect", "scores", _inspect, 6, ("*.json",)),
        Target("artifact of a model: inspect", "whole", _inspect, 2, ("*.json",)),
        Target("artifact: run", "whole", _run, 4),
        Target("plan file", "plan", _compile_plan, 4),
        Target("plan rules", "rules", _compile_plan, 3),
        Target("score table", "measured", _replan, 6),
        Target("evaluations", "evaluations", _inspect_evaluations, 4),
        Target("journal: resume", "journal", _resume, 4, ("**/*", "**/*.jsonl")),
        Target("moments", "moments", _remember, 5, ("moments/*",)),
    ]
    if importlib.util.find_spec("gguf"):
        ways.append(Target("GGUF: open and read", "gguf", _open_source, 12))
    if corpus.has_onnx():
        ways.append(Target("ONNX: load and run", "onnx", _onnx, 10))
        ways.append(Target("ONNX: kbitc run", "onnx", _run, 2))
    return ways
