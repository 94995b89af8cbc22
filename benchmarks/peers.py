"""Peers of kbitc on a CPU: ONNX Runtime, bitsandbytes and llama.cpp, in an environment of their own.

Imported, it times calls; run as a script there (`benchmarks.peer_environment`), it measures. It imports
nothing of kbitc, and the script talks JSON on standard output, one line an answer:

    python peers.py linear SIZE THREADS      # then one request a line on standard input
    python peers.py llama FILE THREADS PROMPT NEW RUNS
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

COLD_BYTES = 256 << 20  # the copies of a weight are at least so large together
SETTLE = 0.02  # seconds in which the threads of what ran before stop spinning
WARM_UP = 0.015  # seconds of calls before the first sample: sleeping cores and threads take that long
SAMPLES = 5  # of one slice, about
ERROR_ROWS = 512  # rows of a result that are compared with float64

ORT_INT8 = "ONNX Runtime MatMulNBits int4:64, int8 input"
ORT_BNB4 = "ONNX Runtime MatMulBnb4 nf4:64"
BITSANDBYTES = "bitsandbytes nf4:64, fp32 input"
BITSANDBYTES_PLAIN = "bitsandbytes nf4:64, fp32 input, no AVX-512 BF16"

PATIENCE = 6  # a slice is at most so many times longer than asked
SWITCH_EVERY = 0.05  # seconds in which one involuntary context switch is no disturbance

Call = Callable[[], Any]
Sample = tuple[float, bool]


def copies_of(nbytes: int) -> int:
    """How many copies of a weight no cache holds."""
    return math.ceil(COLD_BYTES / nbytes)


def time_calls(calls: Sequence[Call], seconds: float, work: int = 1) -> list[Sample]:
    """Call in rotation for a while; longer if other processes took a core in every sample.

    Args:
        calls: one for each copy of the weight.
        seconds: how long, about; at least one call is timed.
        work: what one call does counts as so many.

    Returns:
        Samples: seconds that one unit of work took, and whether this process kept its cores.
    """
    time.sleep(SETTLE)
    at, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < WARM_UP or at == 0:
        calls[at % len(calls)]()
        at += 1
    chunk = max(1, int(seconds / SAMPLES / (spent / at)))
    samples: list[Sample] = []
    start = time.perf_counter()
    while True:
        each, is_clean = _timed(calls, at, chunk)
        samples.append((each / work, is_clean))
        at += chunk
        spent = time.perf_counter() - start
        if spent >= PATIENCE * seconds or (spent >= seconds and any(clean for _, clean in samples)):
            return samples


def _timed(calls: Sequence[Call], at: int, count: int) -> Sample:
    """Seconds of one of so many calls, and whether no thread of this process was put aside."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    for index in range(at, at + count):
        calls[index % len(calls)]()
    taken = time.perf_counter() - start
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    return taken / count, switches <= taken / SWITCH_EVERY


def last_line(error: Exception) -> str:
    """What to tell of an error, or of a process that failed."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


@dataclass
class Peer:
    """One contender.

    Attributes:
        cold: calls over all copies of the weight.
        work: products in one cold call.
        warm: the same weight each time.
        nbytes: of the stored weight.
        error: relative, against float64 with the dequantized weight.
    """

    cold: Sequence[Call]
    work: int
    warm: Call
    nbytes: int
    error: float


@dataclass
class Problem:
    """The weight (numpy, float32, square), the input and the number of threads."""

    weight: Any
    x: Any
    threads: int

    @property
    def size(self) -> int:
        """Rows, and input features."""
        return int(self.weight.shape[0])

    def error(self, found: Any, dense: Any) -> float:
        """Relative error of a product with the dense weight that was stored."""
        import numpy as np

        exact = self.x.astype(np.float64) @ dense[:ERROR_ROWS].astype(np.float64).T
        difference = np.asarray(found, np.float64).reshape(1, -1)[:, :ERROR_ROWS] - exact
        return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def make_problem(size: int, threads: int) -> Problem:
    """Gaussian weight and input, of a fixed seed."""
    import numpy as np

    generator = np.random.default_rng(0)
    weight = generator.standard_normal((size, size), dtype=np.float32) * np.float32(0.02)
    return Problem(weight, generator.standard_normal((1, size), dtype=np.float32), threads)


def int4_blocks(weight: Any, block: int) -> tuple[Any, Any, Any]:
    """MatMulNBits' symmetric int4: packed codes, scales, and the dense weight that they stand for."""
    import numpy as np

    size = weight.shape[0]
    blocks = weight.reshape(size, -1, block)
    at = np.abs(blocks).argmax(-1, keepdims=True)
    scales = np.take_along_axis(blocks, at, -1) / np.float32(-8)
    codes = np.clip(np.rint(blocks / scales), -8, 7)
    dense = (codes * scales).reshape(weight.shape)
    unsigned = (codes + 8).astype(np.uint8)
    packed = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return packed, scales[..., 0].astype(np.float32), dense


def nf4_blocks(weight: Any, block: int) -> tuple[Any, Any, Any]:
    """MatMulBnb4's NF4: packed codes, block maxima, and the dense weight that they stand for."""
    import numpy as np

    levels = np.array(NF4, np.float32)
    blocks = weight.reshape(-1, block)
    scales = np.abs(blocks).max(-1, keepdims=True)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / scales).astype(np.uint8)
    dense = (levels[codes] * scales).reshape(weight.shape)
    flat = codes.reshape(-1)
    return (flat[0::2] << 4) | flat[1::2], scales[:, 0], dense


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def onnx_nbits(problem: Problem, block: int, level: int) -> Peer:
    """ONNX Runtime's int4 MatMul; accuracy level 4 quantizes the input to int8, level 1 does not."""
    codes, scales, dense = int4_blocks(problem.weight, block)
    traits = {"bits": 4, "block_size": block, "accuracy_level": level}
    return _onnx_peer(problem, "MatMulNBits", (codes, scales), dense, traits)


def onnx_bnb4(problem: Problem) -> Peer:
    """ONNX Runtime's NF4 MatMul."""
    codes, scales, dense = nf4_blocks(problem.weight, 64)
    return _onnx_peer(problem, "MatMulBnb4", (codes, scales), dense, {"block_size": 64, "quant_type": 1})


def _onnx_peer(
    problem: Problem, op: str, weight: tuple[Any, Any], dense: Any, traits: dict[str, int]
) -> Peer:
    nbytes = sum(part.nbytes for part in weight)
    copies = copies_of(nbytes)
    cold = _onnx_session(problem, op, weight, traits, copies)
    warm = _onnx_session(problem, op, weight, traits, 1)
    feed = {"x": problem.x}
    found = warm.run(None, feed)[0]
    return Peer(
        cold=[lambda: cold.run(None, feed)],
        work=copies,
        warm=lambda: warm.run(None, feed),
        nbytes=nbytes,
        error=problem.error(found, dense),
    )


def _onnx_session(
    problem: Problem, op: str, weight: tuple[Any, Any], traits: dict[str, int], copies: int
) -> Any:
    """One graph with so many independent products of the same input."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, outputs = [], [], []
    for index in range(copies):
        names = [f"w{index}", f"s{index}"]
        # Of equal weights ONNX Runtime reads one, which the cache would hold: each copy is another one.
        parts = [np.roll(part, index, 0) for part in weight]
        constants += [numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=True)]
        size = {"K": problem.size, "N": problem.size}
        nodes.append(
            helper.make_node(op, ["x", *names], [f"y{index}"], domain="com.microsoft", **size, **traits)
        )
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, [1, problem.size]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, problem.size])
    graph = helper.make_graph(nodes, "products", [x], outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    content = onnx.ModelProto.SerializeToString(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def bitsandbytes_nf4(problem: Problem, dtype: str, *, is_plain: bool = False) -> Peer:
    """Linear4bit of bitsandbytes in evaluation mode, which repacks its weight for machines with AVX-512 BF16.

    ``is_plain``: the path that it takes on all others.
    """
    import bitsandbytes
    import torch

    weight = torch.from_numpy(problem.weight)
    x = torch.from_numpy(problem.x).to(getattr(torch, dtype))
    stored = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    layer = bitsandbytes.nn.Linear4bit(*weight.shape, bias=False, compute_dtype=x.dtype, quant_type="nf4")
    layer.weight = stored
    layer.support_avx512bf16_for_cpu &= not is_plain
    layer = layer.to("cpu").eval()
    state = layer.weight.quant_state
    dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float().numpy()
    nbytes = layer.weight.data.nbytes + state.absmax.nbytes
    layers = [copy.deepcopy(layer) for _ in range(copies_of(nbytes))]
    found, *_ = [one(x) for one in layers]  # all, since the first call may repack the weight
    if len({one.weight.data.data_ptr() for one in layers}) != len(layers):
        raise RuntimeError("the copies share memory")
    return Peer(
        cold=[lambda one=one: one(x) for one in layers],  # type: ignore[misc]
        work=1,
        warm=lambda: layers[0](x),
        nbytes=nbytes,
        error=problem.error(found.float().numpy(), dense),
    )


BUILDERS: dict[str, Callable[[Problem], Peer]] = {
    "ONNX Runtime MatMulNBits int4:32, int8 input": lambda problem: onnx_nbits(problem, 32, 4),
    ORT_INT8: lambda problem: onnx_nbits(problem, 64, 4),
    "ONNX Runtime MatMulNBits int4:32, fp32 input": lambda problem: onnx_nbits(problem, 32, 1),
    "ONNX Runtime MatMulNBits int4:64, fp32 input": lambda problem: onnx_nbits(problem, 64, 1),
    ORT_BNB4: onnx_bnb4,
    BITSANDBYTES: lambda problem: bitsandbytes_nf4(problem, "float32"),
    "bitsandbytes nf4:64, bf16 input": lambda problem: bitsandbytes_nf4(problem, "bfloat16"),
    BITSANDBYTES_PLAIN: lambda problem: bitsandbytes_nf4(problem, "float32", is_plain=True),
}


def serve(size: int, threads: int, answers: IO[str]) -> None:
    """Build every contender and say how that went, then answer timing requests until input ends."""
    _limit_torch(threads)
    problem = make_problem(size, threads)
    peers: dict[str, Peer] = {}
    summary = {}
    for name, build in BUILDERS.items():
        try:
            peer = build(problem)
        except Exception as error:  # noqa: BLE001  # whatever it is becomes the row's reason
            summary[name] = {"reason": f"{type(error).__name__}: {last_line(error)}"}
            continue
        peers[name] = peer
        summary[name] = {"bytes": peer.nbytes, "error": peer.error}
    _answer(answers, {"peers": summary, "versions": _versions("onnxruntime", "bitsandbytes", "torch")})
    for line in sys.stdin:
        request = json.loads(line)
        peer = peers[request["name"]]
        calls, work = (peer.cold, peer.work) if request["mode"] == "cold" else ([peer.warm], 1)
        samples = time_calls(calls, request["seconds"], work)
        time.sleep(SETTLE)  # the threads of this process stop spinning before another one measures
        _answer(answers, {"samples": samples})


def _limit_torch(threads: int) -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.import_module(name).__version__
        except (ImportError, OSError) as error:
            found[name] = str(error)
    return found


def _answer(answers: IO[str], data: Any) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()


def llama(file: str, threads: int, prompt: int, new: int, runs: int) -> dict[str, Any]:
    """Prefill and greedy decode speed of a GGUF file, at llama.cpp's own API, after one warm-up run."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        file,
        n_threads=threads,
        n_threads_batch=threads,
        n_ctx=prompt + new + 8,
        n_batch=prompt,
        n_ubatch=prompt,
        verbose=False,
    )
    context, count = model.ctx, model.n_vocab()
    ids = np.random.default_rng(0).integers(0, count, prompt).tolist()

    def evaluate(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(count,)).argmax())

    prefill, decode = [], []
    for _ in range(runs + 1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        token = evaluate(ids)
        middle = time.perf_counter()
        for _ in range(new):
            token = evaluate([token])
        prefill.append(prompt / (middle - start))
        decode.append(new / (time.perf_counter() - middle))
    name = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model.model, name, len(name))
    weights = int(llama_cpp.llama_model_size(model.model))
    return {
        "decode": sorted(decode[1:])[runs // 2],
        "prefill": sorted(prefill[1:])[runs // 2],
        "bytes": weights,
        "bits_per_param": 8 * weights / int(llama_cpp.llama_model_n_params(model.model)),
        "version": llama_cpp.__version__,
        "type": name.value.decode(),
    }


def main(arguments: list[str]) -> None:
    """``linear SIZE THREADS`` or ``llama FILE THREADS PROMPT NEW RUNS``."""
    # Libraries print to standard output; answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kind, *rest = arguments
    if kind == "linear":
        serve(*map(int, rest), answers=answers)
    else:
        _answer(answers, llama(rest[0], *map(int, rest[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
