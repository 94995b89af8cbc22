"""`make demo`: compile the model in the package, and show what that did to it.

python examples/demo.py [--bits 4]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from kbitc.backends import make_decoder
from kbitc.checkpoint import demo
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.evaluation.generation import generate
from kbitc.evaluation.opening import Loaded, open_model
from kbitc.evaluation.perplexity import perplexity, read_text, windows

PROMPT = "Python is a programming language that"


def describe(name: str, loaded: Loaded, text: str) -> str:
    """One row of the table: size, bits, perplexity."""
    ids = windows(loaded.model, loaded.tokenizer, text, demo.CONTEXT, None)
    score = perplexity(loaded.model, ids)
    return (
        f"{name:>12}  {loaded.nbytes / 1e6:8.2f} MB  {loaded.bits_per_param:8.4f}  "
        f"{score.perplexity:10.3f}   ({score.tokens:,} held-out tokens)"
    )


def main() -> None:
    """Compile, evaluate before and after, generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=4.0)
    bits = parser.parse_args().bits
    text = read_text(demo.heldout())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        result = compile_to("demo", out, Request(bits=bits))
        seconds = sum(result.seconds.values())
        print(
            f"kbitc compile demo --bits {bits:g}: {len(result.program.weights)} weights in {seconds:.1f} s\n"
        )
        dense, packed = open_model("demo"), open_model(str(out))
        print(f"{'':>12}  {'tensors':>11}  {'bits/par':>8}  {'perplexity':>10}")
        print(describe("16-bit", dense, text))
        print(describe("compiled", packed, text))
        print(f"\nThe compiled model continues {PROMPT!r}:\n")
        decoder = make_decoder(packed.model)
        print("  " + PROMPT + "".join(generate(decoder, packed.tokenizer, PROMPT, 48)))


if __name__ == "__main__":
    main()
