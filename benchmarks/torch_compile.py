"""What ``torch.compile(model, backend="kbit")`` makes of a causal language model, against ``kbitc.compile``.

Greedy tokens (must be the same), compilations and graph breaks over growing lengths, bytes that stay
resident with ``free_source``, and the peak memory of each process.

    python -m benchmarks.torch_compile FOLDER [--bits 4] [--tokens 40] [--inner inductor]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kbitc
from kbitc.backends.dynamo.backend import kbit, models_of

PROMPT = "The capital of France is"


def greedy(call: Callable[..., Any], ids: Tensor, count: int) -> list[int]:
    """Tokens without a cache, so that every length is one more than the last."""
    for _ in range(count):
        logits = call(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return [int(token) for token in ids[0, -count:]]


def stored_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One process: ``kbitc.compile`` for ``--child plain``, else the backend."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    ids = AutoTokenizer.from_pretrained(options.folder)(PROMPT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    found: dict[str, Any] = {}
    with torch.no_grad():
        if options.child == "plain":
            tokens = greedy(kbitc.compile(model, bits=options.bits), ids, options.tokens)
        else:
            found["source"] = stored_bytes(list(model.parameters()))
            given = {"bits": options.bits, "inner": options.inner, "free_source": True}
            tokens = greedy(
                torch.compile(model, backend=kbit, options=given, fullgraph=True), ids, options.tokens
            )
            (kept,) = models_of(model)
            parameters = dict(model.named_parameters())
            found["packed"] = sum(tensor.nbytes for tensor in kept.operands.values())
            found["rest"] = sum(p.nbytes for name, p in parameters.items() if name not in kept.packed_names)
            found["resident"] = stored_bytes([*parameters.values(), *kept.operands.values()])
            counters = torch._dynamo.utils.counters
            found["compilations"] = counters["stats"]["unique_graphs"]
            found["graph breaks"] = sum(counters["graph_break"].values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens": tokens, "peak": peak, **found}


def main() -> None:
    """Measure both, each in a process of its own, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--child", choices=("plain", "backend"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    found = {}
    for child in ("plain", "backend"):
        command = [sys.executable, "-m", "benchmarks.torch_compile", *sys.argv[1:], "--child", child]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[child] = json.loads(done.stdout.splitlines()[-1])
    plain, backend = found["plain"], found["backend"]
    print(f"same {options.tokens} greedy tokens: {plain['tokens'] == backend['tokens']}")
    print(f"compilations {backend['compilations']}, graph breaks {backend['graph breaks']}")
    share = backend["resident"] / (backend["packed"] + backend["rest"])
    print(
        f"resident {backend['resident'] / 1e6:.2f} MB of {backend['source'] / 1e6:.2f}: packed "
        f"{backend['packed'] / 1e6:.2f} + 16-bit rest {backend['rest'] / 1e6:.2f}, times {share:.4f}"
    )
    for child, result in found.items():
        print(f"peak memory of the process, {child}: {result['peak'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
