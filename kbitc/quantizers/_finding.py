"""What a quantizer is, and which one packs a weight."""

from __future__ import annotations

import functools
from typing import Any, Protocol, cast

from torch import Tensor

from kbitc.errors import KbitcError, UsageError
from kbitc.formats.packed import Packed
from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact
from kbitc.pipeline.registry import Registry
from kbitc.quantizers._options import options_of, split_name
from kbitc.sensitivity.evidence import Evidence

AUTO = "auto"
"""The strongest quantizer of `PREFERRED` for which there is evidence."""

PREFERRED = ("feedback", "weighted", "absmax")

QUANTIZERS = Registry("quantizer", "kbitc.quantizers", "QUANTIZER", KbitcError)


class Quantizer(Protocol):
    """Chooses the codes and scales of a weight; a frozen value without state.

    One that takes long may have a method ``estimating() -> Quantizer``: a quicker one whose losses are in
    nearly the same proportions from format to format, by which formats are priced.

    Attributes:
        requires: facts that must be known of a weight, each a mapping by weights' names.
    """

    @property
    def requires(self) -> tuple[Fact[Any], ...]: ...

    def quantize(self, weight: Tensor, spec: Spec, evidence: Evidence) -> Packed:
        """The packed weight.

        Args:
            weight: ``(rows, in_features)`` or ``(experts, rows, in_features)``, any float dtype, any strides.
            spec: its format; not ``fp16``.
            evidence: what is known of it; what ``requires`` names is there.

        Raises:
            UsageError: a weight that cannot be packed.
        """
        ...


def quantizer_names() -> list[str]:
    """The registered quantizers: files of this folder, and entry points of other packages."""
    return QUANTIZERS.names()


@functools.cache
def find_quantizer(name: str) -> Quantizer:
    """The quantizer of that name, with its default options and those in brackets after it.

    Raises:
        UsageError: there is none, or it has no such option.
        KbitcError: its file or entry point is broken.

    >>> find_quantizer("absmax")
    Absmax()
    """
    plain, options = split_name(name)
    kind = QUANTIZERS.load(plain)
    return cast("Quantizer", kind(**options_of(kind, plain, options)))


def choose_quantizer(name: str, evidence: Evidence) -> tuple[str, Quantizer]:
    """The quantizer of a weight, and its name.

    Args:
        name: as a plan's choice has it; "" and "auto" take the strongest one for which there is evidence.
        evidence: what is known of the weight.

    Raises:
        UsageError: no such quantizer, or nothing is known that it needs.
    """
    if name in ("", AUTO):
        return next(
            (known, quantizer)
            for known in PREFERRED
            if not lacking(quantizer := find_quantizer(known), evidence)
        )
    quantizer = find_quantizer(name)
    missing = lacking(quantizer, evidence)
    if missing:
        raise UsageError(
            f"{evidence.name}: the quantizer '{name}' needs the fact '{missing[0]}' of this weight, which "
            "is not known; calibrate (--calibrate self, random or TEXT), or choose another quantizer"
        )
    return name, quantizer


def strongest_quantizer() -> Quantizer:
    """The first of `PREFERRED`, whatever it needs."""
    return find_quantizer(PREFERRED[0])


def settled_quantizer(name: str, evidence: Evidence) -> tuple[str, Quantizer]:
    """The quantizer of that name where there is evidence for it, else the strongest one that there is for.

    For what no name can ask for of a single weight: moments of inputs that the graph does not show.

    Raises:
        UsageError: no such quantizer.
    """
    is_known = name in ("", AUTO) or not lacking(find_quantizer(name), evidence)
    return choose_quantizer(name if is_known else AUTO, evidence)


def lacking(quantizer: Quantizer, evidence: Evidence) -> list[Fact[Any]]:
    """The facts that a quantizer requires and that are not known of a weight."""
    return [fact for fact in quantizer.requires if evidence.get(fact) is None]
