"""``kbitc verify FILE.gguf``: the gguf package and llama.cpp against the artifact that the file came from.

The one thing to know: weights are compared as the gguf package decodes them, to the last bit. llama.cpp
rounds activations to 8 bits in blocks, so that logits are compared within a tolerance, and greedy tokens
where the artifact prefers one by more than the error of the logits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kbitc.artifact.loading import load
from kbitc.artifact.reader import Artifact
from kbitc.backends.gguf_export.architectures import architecture_of, names_of, order_of
from kbitc.checkpoint.dense import tokenizer_in
from kbitc.errors import BackendUnavailable, SourceError, UsageError, foreign
from kbitc.evaluation.checks import Check, differing
from kbitc.evaluation.onnx_verify import TEXT
from kbitc.system import files
from kbitc.tensor.kbit_tensor import KbitTensor

PACKAGE = "llama_cpp"
TOKENS = 16
TOLERANCE = 0.1  # of logits; 0.008 of the demo model, 0.048 of SmolLM2-135M; a wrong order of rows gives 1
MAGIC = b"GGUF"


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as GGUF files do."""
    if not Path(path).is_file():
        return False
    with files.reading(Path(path)) as file:
        return file.read(len(MAGIC)) == MAGIC


def verify(file: str | Path, against: str | None) -> list[Check]:
    """Check a file of ``kbitc export --format gguf``.

    Args:
        file: the file.
        against: the artifact that it came from.

    Raises:
        BackendUnavailable: gguf or llama-cpp-python is not installed.
        SourceError: the file is damaged, or llama.cpp cannot load it.
        UsageError: no artifact is named, or the file has other tensors than it.
    """
    if against is None:
        raise UsageError(f"{file}: name the artifact that it came from with --against OUT")
    for package, name in (("gguf", "gguf"), (PACKAGE, "llama-cpp-python")):
        if find_spec(package) is None:
            raise BackendUnavailable(
                f"{file}: comparing it needs {name}; install it with: pip install {name}"
            )
    artifact = Artifact.open(Path(against))
    return [weights_check(Path(file), artifact), *_runs(Path(file), artifact)]


def weights_check(file: Path, artifact: Artifact) -> Check:
    """Weights that decode to other bits than the artifact's.

    Raises:
        SourceError: the file is damaged.
        UsageError: it has other tensors.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(artifact.folder, trust_remote_code=False)
    architecture = architecture_of(config, str(artifact.folder))
    names = names_of([*artifact.plan.weights], config, architecture, str(artifact.folder))
    with foreign(f"{file}: the gguf package cannot read it", "export it again"):
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wrong = 0
    for name, value in artifact.state().items():
        if not isinstance(value, KbitTensor):
            continue
        if names[name] not in stored:
            raise UsageError(
                f"{file}: has no '{names[name]}', which {artifact.folder} packs; export it again"
            )
        tensor, packed = stored[names[name]], value.packed
        wanted = torch.ops.kbit.dequantize(*packed.operands(), torch.float32)
        order = order_of(name, len(wanted), config, architecture)
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        wrong += not torch.equal(found.view(wanted.shape), wanted if order is None else wanted[order])
    return Check("weights that decode to other bits", wrong, 0)


def _runs(file: Path, artifact: Artifact) -> list[Check]:
    import llama_cpp

    model: Any = load(artifact.folder, dtype=torch.float32)
    tokenizer = tokenizer_in(artifact.folder)
    if tokenizer is None:
        raise SourceError(f"{artifact.folder}: has no tokenizer to compare with")
    ids = list(tokenizer(TEXT)["input_ids"])
    with torch.inference_mode():
        options = {"max_new_tokens": TOKENS, "do_sample": False}
        whole = model.generate(torch.tensor([ids]), **options)[0]
        wanted = model(input_ids=whole[None]).logits[0].numpy()
    with foreign(f"{file}: llama.cpp cannot load it"), _quiet():
        theirs = llama_cpp.Llama(str(file), n_ctx=len(whole) + 1, logits_all=True, verbose=False)
        own = theirs.tokenize(TEXT.encode(), add_bos=True, special=True)
        theirs.eval(whole.tolist())
        found = np.array(theirs.scores[: len(whole)])
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    margin = 2 * float(np.abs(found - wanted).max())
    return [
        Check("tokens of a text that llama.cpp reads otherwise", differing(own, ids), 0),
        Check("relative error of logits in llama.cpp", error, TOLERANCE),
        Check(f"of {TOKENS} greedy tokens that clearly differ", _clear(found, wanted, len(ids), margin), 0),
    ]


def _clear(found: Any, wanted: Any, start: int, margin: float) -> int:
    """Greedy tokens after ``start`` that differ though the artifact's is ahead by more than a margin."""
    rows = np.arange(start - 1, len(wanted) - 1)
    ahead = wanted[rows].max(1) - wanted[rows, found[rows].argmax(1)]
    return int((ahead > margin).sum())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what llama.cpp writes to the process's error stream."""
    with Path(os.devnull).open("wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
