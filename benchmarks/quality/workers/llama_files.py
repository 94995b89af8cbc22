"""Files of llama.cpp: made by its own quantizer, and scored by its own kernels.

python -m workers.llama_files quantize JOB.json                one file of each type from a dense one
python -m workers.llama_files score FILE TOKENS OUT [THREADS]  the loss of each window of tokens
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def quantize(job_file: str) -> None:
    """Options of the job: ``source``, a dense GGUF file; ``types``, name to the file to make."""
    import gguf
    import torch

    from .common import Job
    from .peer_llama import moments, run_quantizer

    given = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    model, tokens = Path(given["model"]), Path(given["tokens"])
    job = Job({}, model, tokens, model, given["threads"])
    dense = job.load(torch.float32)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, dense.config.num_hidden_layers)
    importance = {
        known.get_name(name, try_suffixes=(".weight",)): values
        for name, values in moments(dense, job.ids()).items()
    }
    for kind, file in given["types"].items():
        own = Job({"type": kind, "embedding": ""}, model, tokens, model, given["threads"])
        run_quantizer(Path(given["source"]), Path(file), own, importance)


def score(file: str, tokens: str, out: str, threads: str = "2") -> None:
    """Write the mean negative log-likelihood of each window, in nats per token."""
    import llama_cpp
    import torch
    from safetensors.torch import load_file

    ids = load_file(tokens)["ids"]
    model = llama_cpp.Llama(
        file,
        n_ctx=ids.shape[1],
        n_batch=ids.shape[1],
        logits_all=True,
        verbose=False,
        n_threads=int(threads),
        n_threads_batch=int(threads),
    )
    losses = []
    for window in ids:
        model.reset()
        model.eval(window.tolist())
        logits = torch.from_numpy(model.scores[: len(window) - 1]).float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    Path(out).write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    {"quantize": quantize, "score": score}[sys.argv[1]](*sys.argv[2:])
