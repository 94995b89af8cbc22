"""AutoRound: rounding and clipping learned by signed gradient descent, block by block."""

from __future__ import annotations

import math
import time

from .common import Job, Quantized, linears


def quantize(job: Job) -> Quantized:
    """Options: ``bits``, ``group``, ``sym``, ``iters``, ``batch``."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    options, ids = job.options, job.ids()
    model = job.load(torch.float32)
    names = dict(linears(model))
    start = time.perf_counter()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(str(job.model)),
        scheme=f"W{options['bits']}A16",
        group_size=options["group"],
        sym=options["sym"],
        dataset=list(ids.split(1)),
        iters=options["iters"],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=options["batch"],
        device_map="cpu",
        low_cpu_mem_usage=False,
    )
    tuned, _ = tuner.quantize()
    out = Quantized(time.perf_counter() - start)
    for name in names:
        module = tuned.get_submodule(name.removesuffix(".weight"))
        if getattr(module, "scale", None) is None:
            continue  # it leaves a layer alone whose size it does not like
        rows, columns = module.weight.shape
        groups = rows * math.ceil(columns / options["group"])
        if module.scale.numel() != groups:
            raise RuntimeError(f"{name}: {module.scale.numel()} scales, not {groups}")
        # Scales at 16 bits; a symmetric format needs no zero points, though GPTQ's files have them.
        zeros = 0 if options["sym"] else groups * options["bits"]
        out.add(name, module.weight.data, (rows * columns * options["bits"] + groups * 16 + zeros) // 8)
    if not out.weights:
        raise RuntimeError("no weight was quantized")
    if left := len(names) - len(out.weights):
        out.notes.append(f"{left} weights stay at 16 bits")
    out.notes.append(f"{options['iters']} iterations, batches of {options['batch']}")
    return out
