"""HQQ: codes with a 16-bit scale and zero point a group, by half-quadratic splitting."""

from __future__ import annotations

import time

from .common import Job, Quantized, linears


def quantize(job: Job) -> Quantized:
    """Options: ``bits``, ``group``, ``axis``."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options = job.options
    config = BaseQuantizeConfig(nbits=options["bits"], group_size=options["group"], axis=options["axis"])
    model, out, start = job.load(), Quantized(), time.perf_counter()
    for name, module in linears(model):
        layer = HQQLinear(module, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        nbytes = layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
        out.add(name, layer.dequantize(), nbytes)
    out.seconds = time.perf_counter() - start
    return out
