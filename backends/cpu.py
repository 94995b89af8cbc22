"""The CPU: a model's decode step, compiled once by AOTInductor, kbit ops called without Python.

before:  one Python call of every module a token
after:   one call of a shared library a token; packed weights stay where they are (user-managed
         constants), so that the package is small and loading it copies nothing

The one thing to know: a package depends on the architecture, the formats and the machine, never on the
weights' values, and serves every length. It is kept under ``$KBITC_CACHE/decode`` (by default
``~/.cache/kbitc/decode``) and not beside the artifact, which may be read-only or on another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc import matching, reads, rewriting
from kbitc.backends import _decode_step, _decoder
from kbitc.backends._decode_step import TracedStep, export_step
from kbitc.backends._decoder import Decoder, GrowingCache, why_not
from kbitc.errors import BackendUnavailable, UsageError
from kbitc.fusions import Fired
from kbitc.kernels.cpu import build
from kbitc.pipeline import Pass, lowering_pipeline
from kbitc.tensor import KbitTensor
from kbitc.version import VERSION

PACKAGE = "step.pt2"
CONSTANTS = "constants.safetensors"
FUSIONS = "fusions.json"
OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # What surrounds the matmuls of one token is too little work to share between threads.
    "cpp.threads": 1,
}
# What a call of forward may say and still be the plain step.
PLAIN = {"input_ids", "past_key_values", "attention_mask", "position_ids", "cache_position"}
FLAGS = {"use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False}


@dataclass(frozen=True)
class Cpu:
    """Compiles the decode step; everything else runs as it is.

    Attributes:
        passes: what lowers the step instead of `kbitc.pipeline.LOWERING`, as values or names.
        disabled: names of lowering passes to leave out.
    """

    passes: tuple[Pass | str, ...] | None = None
    disabled: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What to install; None if nothing."""
        named = os.environ.get("CXX")
        if any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"])):
            return None
        return "no C++ compiler was found; install g++ or clang++, or name one in CXX"

    def decoder(self, model: nn.Module) -> CompiledDecoder:
        """See `CompiledDecoder`.

        Raises:
            UsageError: also for unknown or misplaced lowering passes.
        """
        return CompiledDecoder(model, lowering_pipeline(self.passes, self.disabled))


class CompiledDecoder(Decoder):
    """Decodes with the compiled step; prompts are read by the model itself, into the same cache.

    Compiling happens here, unless a package for such a model is in the cache folder.

    Attributes:
        model: as given.
        passes: that lowered the step.
        package: folder of the compiled step.
        was_compiled: False if the package was there already.
        fusions: what those passes did and left.

    Raises:
        UsageError: not a causal language model on the CPU whose layers have keys and values, or one
            that torch.export cannot trace.
        BackendUnavailable: no C++ compiler, or compiling failed.
    """

    name = "cpu"

    def __init__(self, model: nn.Module, passes: Sequence[Pass] | None = None) -> None:
        super().__init__(model)
        self.passes = tuple(lowering_pipeline() if passes is None else passes)
        reason = why_not(model) or _not_plain_cpu(model)
        if reason is not None:
            raise UsageError(f"the decode step cannot be compiled: {reason}; use the backend 'eager'")
        step = TracedStep(model)
        state = step.state()
        root = cache_folder()
        key = _key(model, step, state, self.passes)
        self.package = root / key
        self.was_compiled = not (self.package / PACKAGE).exists()
        if self.was_compiled:
            _compile(model, root, self.package, state, self.passes)
        fusions = json.loads((self.package / FUSIONS).read_text(encoding="utf-8"))
        self.fusions = {name: Fired.from_json(record) for name, record in fusions.items()}
        self._run = _load(self.package, state)
        self._state = state
        self._weights = _identities(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledDecoder:
        """The same decoder: what was compiled cannot be copied."""
        return self

    def step(self, token: int, cache: Any) -> Tensor:
        """See `Decoder.step`."""
        return self._step(torch.tensor([[token]]), cache)

    def prefill(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """See `Decoder.prefill`."""
        if cache is not None and ids.shape == (1, 1) and cache.get_seq_length() > 0:
            return self._step(ids, cache), cache
        self._check_weights()
        return super().prefill(ids, cache)

    def _step(self, ids: Tensor, cache: GrowingCache) -> Tensor:
        logits: Tensor
        (logits,) = self._run([ids, *cache.rows()])
        return logits

    def _check_weights(self) -> None:
        if _identities(self.model) != self._weights:
            raise UsageError(
                "the model's parameters were replaced after its decode step was compiled; make a new "
                "decoder, or use the backend 'eager'"
            )

    def install(self) -> None:
        """Let ``model.generate`` run on the compiled step, for one sequence without beams.

        Anything else (batches, beams, assistants, a cache of the caller's) runs as before, and so does a
        forward call that asks for more than logits. Tokens are the same either way.
        """
        model: Any = self.model
        plain_generate = type(model).generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            room = self._room(args, kwargs)
            if room is None:
                return plain_generate(model, *args, **kwargs)
            self._check_weights()
            with self._forward_replaced():
                return plain_generate(model, *args, **kwargs, past_key_values=self.new_cache(room))

        model.generate = generate

    def uninstall(self) -> None:
        """Undo ``install``."""
        vars(self.model).pop("generate", None)

    def _room(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Tokens that a call of generate may need; None if the call is not for the compiled step."""
        config = kwargs.get("generation_config") or self.model.generation_config

        def option(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        is_one = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] == 1 and ids.shape[1] > 0
        is_plain = (
            kwargs.get("past_key_values") is None
            and kwargs.get("inputs_embeds") is None
            and kwargs.get("assistant_model") is None
            and kwargs.get("custom_generate") is None
            and option("cache_implementation") is None
            and option("use_cache") is not False
            and option("prompt_lookup_num_tokens") is None
            and all(option(name) in (None, 1) for name in ("num_beams", "num_return_sequences"))
        )
        if not (is_one and is_plain):
            return None
        assert ids is not None
        new = option("max_new_tokens") or max((option("max_length") or 0) - ids.shape[1], 0)
        return int(ids.shape[1] + min(new, 1024))

    @contextmanager
    def _forward_replaced(self) -> Iterator[None]:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        model: Any = self.model
        plain_forward = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or not _is_plain_step(kwargs):
                return plain_forward(*args, **kwargs)
            cache = kwargs["past_key_values"]
            return CausalLMOutputWithPast(
                logits=self._step(kwargs["input_ids"], cache)[:, None],  # type: ignore[arg-type]
                past_key_values=cache,
            )

        had = vars(model).get("forward")
        model.forward = forward
        try:
            yield
        finally:
            if had is None:
                del model.forward
            else:
                model.forward = had


def _is_plain_step(kwargs: dict[str, Any]) -> bool:
    """True if a call of forward is one token after those in the cache, none of them masked."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if not isinstance(cache, GrowingCache) or ids is None or ids.shape != (1, 1):
        return False
    seen = cache.get_seq_length()
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return (
        seen > 0
        and (mask is None or (mask.shape == (1, seen + 1) and bool(mask.all())))
        and (positions is None or (positions.numel() == 1 and int(positions) == seen))
        and all(
            value is None or name in PLAIN or name == "logits_to_keep" or value == FLAGS.get(name)
            for name, value in kwargs.items()
        )
    )


def _not_plain_cpu(model: nn.Module) -> str | None:
    tensors = [*model.parameters(), *model.buffers()]
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if device is not None:
        return f"the model is on {device}, not on the CPU"
    if not any(isinstance(t, KbitTensor) for t in tensors):
        return "none of its weights is packed"
    return None


def _identities(model: nn.Module) -> tuple[tuple[str, int], ...]:
    return tuple((name, id(parameter)) for name, parameter in model.named_parameters())


def cache_folder() -> Path:
    """Where packages are kept."""
    return build.cache_folder() / "decode"


def _key(model: Any, step: TracedStep, state: dict[str, Tensor], passes: Sequence[Pass]) -> str:
    """A name for everything that a package depends on."""
    import transformers

    config = model.config.to_dict()
    # What says where a model came from; its tensors' dtypes and formats are listed below.
    for name in ("quantization_config", "_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    paths = {id(module): path for path, module in model.named_modules()}
    places = [
        (
            *(paths[id(module)], leaf, names, str(weight.dtype), weight.is_transposed, weight.activations),
            weight.operands()[9:],
        )
        for module, leaf, weight, names in step.places
    ]
    modules = [_decode_step, _decoder, matching, reads, rewriting]
    modules += [sys.modules[type(pass_).__module__] for pass_ in passes]
    # A pass that was typed in has no file.
    sources = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    facts = {
        "versions": [VERSION, torch.__version__, transformers.__version__, sys.version],
        "sources": [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*sources, Path(__file__))],
        "ops": [str(torch.ops.kbit.linears.default._schema), str(torch.ops.kbit.linear.default._schema)],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_flags()],
        "options": OPTIONS,
        "passes": [repr(pass_) for pass_ in passes],
        "model": [type(model).__name__, config, model.config._attn_implementation],
        "tensors": [(name, str(t.dtype), tuple(t.shape)) for name, t in state.items()],
        "places": places,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{model.config.model_type}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _cpu_flags() -> str:
    """The instruction sets that -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(
    model: nn.Module, root: Path, target: Path, state: dict[str, Tensor], passes: Sequence[Pass]
) -> None:
    """Export, compile, and put the package in place at once, complete or not at all."""
    missing = Cpu().missing()
    if missing is not None:
        raise BackendUnavailable(f"the decode step cannot be compiled: {missing}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    except OSError as error:
        raise BackendUnavailable(
            f"{root}: compiled code cannot be written there: {error.strerror}; name a folder in KBITC_CACHE"
        ) from error
    try:
        with _shown("compiling the decode step, once"):
            _build(model, made, state, passes)
        try:
            made.rename(target)
        except OSError:
            if not (target / PACKAGE).exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _build(model: nn.Module, folder: Path, state: dict[str, Tensor], passes: Sequence[Pass]) -> None:
    from safetensors.torch import save_file

    options = dict(OPTIONS)
    if getattr(model, "dtype", torch.float32) != torch.float32:
        options["emulate_precision_casts"] = True  # round between fused steps as the eager model does
    name = type(model).__name__
    # Inductor calls ops on fake tensors, and kbit::linears has no gradient.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported, fusions = export_step(model, passes)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{name}: torch.export cannot trace the decode step: {_first(error)}") from error
        try:
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(folder / PACKAGE), inductor_configs=options
            )
        except Exception as error:
            raise BackendUnavailable(f"{name}: AOTInductor cannot compile it: {_first(error)}") from error
    made = {
        name: value.contiguous()
        for name, value in exported.constants.items()
        if isinstance(value, Tensor) and name not in state
    }
    save_file(made, folder / CONSTANTS)
    record = {name: fired.to_json() for name, fired in fusions.items()}
    (folder / FUSIONS).write_text(json.dumps(record), encoding="utf-8")


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0]}".rstrip(": .")


def _load(folder: Path, state: dict[str, Tensor]) -> Any:
    """The function ``[ids, rows, ...] -> [logits]`` of a package, on these weights."""
    from safetensors.torch import load_file

    runner = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    known = {**load_file(folder / CONSTANTS), **state}
    needed = runner.get_constant_fqns()
    runner.load_constants({name: known[name] for name in needed}, check_full_update=True, user_managed=True)
    run = runner.loader.boxed_run  # type: ignore[attr-defined]

    def call(inputs: list[Tensor], _kept: Any = (runner, known)) -> Any:
        return run(inputs)

    return call


@contextmanager
def _shown(what: str) -> Iterator[None]:
    """A line on standard error with the seconds so far; a plain one where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} (about a minute; kept for the next start)", highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield


BACKEND = Cpu
