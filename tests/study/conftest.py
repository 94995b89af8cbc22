"""A tiny model, a text, and rows as a sweep makes them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kbitc.checkpoint import demo
from kbitc.study.ledger import Row

SIZES = [2**i * 100_000 for i in range(6)]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo.heldout().read_text("utf-8")[:6000], "utf-8")
    return path


def row(size, bits, *, type_="int", block=64, seed=0, loss=None, windows=16, **options):
    """A job of a law: L = 2 + 3 (N / 1e5)^-0.3 + 4 e^(-1.1 k), a window's noise in common."""
    law = 2 + 3 * (size / 1e5) ** -0.3 + (0 if bits == 16 else 4 * np.exp(-1.1 * bits))
    value = law if loss is None else loss
    losses = value + 0.05 * np.random.default_rng(seed).standard_normal(windows)
    losses += value - losses.mean()
    treated = size * 3 // 4
    family, *flags = type_.split("+")
    spec = "fp16" if bits == 16 else "+".join([f"{family}{bits}:{block}", *flags])
    made = {
        "model": f"models/{size}", "fingerprint": f"f{size}", "family": "llama-0", "parameters": size,
        "quantized_parameters": treated, "format": spec, "type": "fp16" if bits == 16 else type_, "bits": bits,
        "block": 0 if bits == 16 else block, "quantizer": "absmax", "scope": "linear", "outliers": 0.0,
        "has_mean": False, "is_flat": False, "loss": float(value), "loss_error": 0.0125,
        "total_bits": round(16 * (size - treated) + treated * (bits + (0.25 if bits < 16 else 0))),
        "paper_bits": float(treated * (bits + (16 / block if bits < 16 else 0))), "losses": losses.tolist(),
        "tokens": 2032, "context": 128, "text": "t.txt", "text_sha256": "0" * 64, "kept": ["embed.weight"],
        "calibrate": "", "calibration": "", "seed": 0, "seconds": 0.5, "peak_bytes": 10**8, "kbitc": "0",
        "torch": "2", "transformers": "5",
    } | options  # fmt: skip
    key = hashlib.sha256(repr(sorted(made.items(), key=str)).encode()).hexdigest()[:32]
    return Row(key=key, **made)


@pytest.fixture(scope="session")
def make_row():
    return row


@pytest.fixture(scope="session")
def rows():
    """Six sizes at three to eight bits, three types, two blocks; quantile better than int."""
    made = [row(size, 16) for size in SIZES]
    for size in SIZES:
        for bits in range(3, 9):
            for type_, worse in (("int", 1.0), ("fp+paper", 0.8), ("dynamic", 1.1), ("quantile", 0.7)):
                for block, more in ((64, 1.0), (1024, 1.6)):
                    clean = 2 + 3 * (size / 1e5) ** -0.3
                    loss = clean + worse * more * 4 * np.exp(-1.1 * bits)
                    made.append(row(size, bits, type_=type_, block=block, loss=loss))
    return made
