"""bitsandbytes: 4-bit codes with float32 block maxima, or those quantized again."""

from __future__ import annotations

import time

from .common import Job, Quantized, linears


def quantize(job: Job) -> Quantized:
    """Options: ``block``, ``type`` ("nf4"), ``double`` (quantize the block maxima too)."""
    import torch
    from bitsandbytes import functional

    model, out, start = job.load(), Quantized(), time.perf_counter()
    for name, module in linears(model):
        codes, state = functional.quantize_4bit(
            module.weight.data,
            blocksize=job.options["block"],
            compress_statistics=job.options["double"],
            quant_type=job.options["type"],
        )
        state.dtype = torch.float32  # what the codes stand for, not rounded to the model's dtype
        nbytes = codes.nbytes + state.absmax.nbytes
        if state.nested:
            nbytes += state.state2.absmax.nbytes + state.offset.nbytes
        out.add(name, functional.dequantize_4bit(codes, state), nbytes)
    out.seconds = time.perf_counter() - start
    return out
