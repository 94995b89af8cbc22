"""llama.cpp: its own types, chosen by `llama_model_quantize` under an importance matrix E[x^2].

The one thing to know: a model of transformers becomes a GGUF file without a vocabulary, which the quantizer
does not read; only the Llama architecture is written here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common import Job, Quantized, linears


def quantize(job: Job) -> Quantized:
    """Options: ``type`` (as in ``Q4_K_M``), ``embedding`` ("" as the type says, or "F16")."""
    import torch

    model = job.load()
    if model.config.model_type != "llama":
        raise RuntimeError(f"{model.config.model_type}: only llama models are written as GGUF here")
    source, made = job.scratch / "source.gguf", job.scratch / "quantized.gguf"
    names = write_gguf(model, source)
    start = time.perf_counter()
    importance = moments(job.load(torch.float32), job.ids())
    run_quantizer(source, made, job, {names[name]: value for name, value in importance.items()})
    out = Quantized(time.perf_counter() - start)
    read_gguf(model, made, names, out)
    return out


def moments(model: Any, ids: Any) -> dict[str, Any]:
    """E[x^2] of each input feature of every linear weight but the head's, as `llama-imatrix` has them."""
    import torch

    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, given: tuple[Any, ...]) -> None:
            x = given[0].detach().reshape(-1, given[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears(model)]
    with torch.inference_mode():
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (total / ids.numel()).float() for name, total in sums.items()}


def write_gguf(model: Any, file: Path) -> dict[str, str]:
    """Write a Llama model of transformers at 16 bits.

    Returns:
        The name there of each parameter.
    """
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    names = {}
    for name, parameter in model.named_parameters():
        names[name] = known.get_name(name, try_suffixes=(".weight", ".bias"))
        values = ordered(model, name, parameter.detach().float(), is_back=False).numpy()
        writer.add_tensor(names[name], values.astype(np.float16) if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names


def ordered(model: Any, name: str, weight: Any, *, is_back: bool) -> Any:
    """Rows of queries and keys in the order that llama.cpp rotates them in, or back."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    half = weight.shape[0] // count // 2
    shape = (count, half, 2, -1) if is_back else (count, 2, half, -1)
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape).contiguous()


def run_quantizer(source: Path, made: Path, job: Job, importance: Mapping[str, Any]) -> None:
    """Call `llama_model_quantize`.

    Raises:
        RuntimeError: it fails.
    """
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = job.threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.options['type']}")
    if job.options["embedding"]:
        kind = getattr(llama_cpp, f"GGML_TYPE_{job.options['embedding']}")
        params.token_embedding_type = params.output_tensor_type = kind
    # The array ends with an entry without a name.
    rows = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for row, (name, values) in zip(rows, importance.items(), strict=False):
        row.name, row.size = name.encode(), len(values)
        row.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
    params.imatrix = rows
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(made), params):
        raise RuntimeError("llama_model_quantize failed")


def read_gguf(model: Any, file: Path, names: Mapping[str, str], out: Quantized) -> None:
    """What each tensor of a GGUF file stands for, and its bytes there."""
    import gguf
    import torch

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    types: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        tensor = tensors[names[name]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape)
        dense = ordered(model, name, torch.from_numpy(values.copy()), is_back=True)
        out.add(name, dense, tensor.n_bytes)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + parameter.numel()
    total = sum(types.values())
    shares = sorted(types.items(), key=lambda item: -item[1])
    if "LLAMA_CPP_LIB_PATH" in os.environ:
        out.notes.append("library given by LLAMA_CPP_LIB_PATH")
    out.notes.append(", ".join(f"{name} {100 * n / total:.0f} %" for name, n in shares if n > total // 200))
