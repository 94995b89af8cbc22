"""What ``options`` of ``torch.compile(model, backend='kbit')`` may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kbitc.compiler.calibrator import AUTO, Calibrate
from kbitc.compiler.request import Request
from kbitc.errors import UsageError, did_you_mean

INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class CompileOptions:
    """What ``options`` of torch.compile may say.

    Attributes:
        bits: see `kbitc.compile`, as the next six.
        spec: see there.
        plan: see there.
        calibrate: see there.
        agree: see there.
        strict: see there.
        quantizer: see there.
        example_inputs: inputs of the model (tuple or dict) of which its plan is made, for a model that
            transformers does not know; without them the plan is made of the first graph that Dynamo finds,
            and what that does not read stays at 16 bits.
        free_source: free the 16-bit data of packed weights once the first graph is compiled. The model can
            then only be run through what torch.compile returned.
        inner: what compiles the graphs on packed weights: "inductor", "aot_eager" or "eager".
        mode: of Inductor, see torch.compile: "default", "reduce-overhead", "max-autotune", ...
    """

    bits: float | None = None
    spec: str | None = None
    plan: Path | Mapping[str, Any] | None = None
    calibrate: Calibrate = AUTO
    agree: str = ""
    strict: bool = False
    quantizer: str = "auto"
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None
    free_source: bool = False
    inner: str = "inductor"
    mode: str | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> CompileOptions:
        """CompileOptions by name; "calibration" is another name of "calibrate".

        Raises:
            UsageError: an unknown option or inner compiler, or what `Request` refuses.
        """
        known = [option.name for option in fields(CompileOptions)]
        named = {("calibrate" if name == "calibration" else name): value for name, value in given.items()}
        for name in named:
            if name not in known:
                raise UsageError(f"torch.compile, backend 'kbit': {did_you_mean('option', name, known)}")
        if len(named) < len(given):
            raise UsageError("torch.compile, backend 'kbit': 'calibration' and 'calibrate' are one option")
        if isinstance(named.get("plan"), str):
            named["plan"] = Path(named["plan"])
        options = CompileOptions(**named)
        if options.inner not in INNER:
            raise UsageError(did_you_mean("inner compiler", options.inner, INNER))
        options.request()
        return options

    def request(self) -> Request:
        """The same to the compiler."""
        return Request.of(
            self.bits,
            self.spec,
            self.plan,
            is_strict=self.strict,
            calibrate=self.calibrate,
            agree=self.agree,
            quantizer=self.quantizer,
        )

    def key(self) -> tuple[object, ...]:
        """What the plan depends on; large values by identity."""
        given = (getattr(self, name) for name in _PLANNING)
        return tuple(value if isinstance(value, _SMALL) else id(value) for value in given)


_PLANNING = ("bits", "spec", "plan", "calibrate", "agree", "strict", "quantizer", "example_inputs")
_SMALL = (int, float, str, Path, type(None))
