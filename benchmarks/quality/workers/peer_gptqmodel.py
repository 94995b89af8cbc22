"""GPTQModel: GPTQ, and GPTAQ, which also fits the inputs of the partly quantized model."""

from __future__ import annotations

import os
import time

from .common import Job, Quantized, linears

PARTS = ("qweight", "scales")  # "g_idx" follows from the group without activation order


def quantize(job: Job) -> Quantized:
    """Options: ``bits``, ``group``, ``sym``, ``gptaq``."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, of two cores, it refuses to start
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    options = job.options
    config = QuantizeConfig(
        bits=options["bits"],
        group_size=options["group"],
        sym=options["sym"],
        # The first format's zero points are off by one until the model is saved and loaded.
        format="gptq_v2",
        gptaq=GPTAQConfig() if options["gptaq"] else None,
        offload_to_disk=False,
        device="cpu",
    )
    names = [name for name, _ in linears(job.load())]
    model = GPTQModel.load(str(job.model), config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.ids()]
    start = time.perf_counter()
    model.quantize(rows, batch_size=1)
    out = Quantized(time.perf_counter() - start)
    for name in names:
        layer = model.model.get_submodule(name.removesuffix(".weight"))
        nbytes = sum(getattr(layer, part).nbytes for part in PARTS)
        nbytes += 0 if options["sym"] else layer.qzeros.nbytes
        out.add(name, layer.dequantize_weight().T, nbytes)
    return out
