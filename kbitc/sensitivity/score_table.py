"""The score table: what each weight would cost in bytes and in loss under each spec.

The one thing to know: it is all that the allocator looks at. Saved beside an artifact, it answers any
other budget in a second, without the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kbitc.errors import SourceError, UsageError
from kbitc.formats.spec import Spec, parse
from kbitc.graph.facts import Fact
from kbitc.graph.queries import NameGroups
from kbitc.system.checksums import SEAL, check_seal, sealed
from kbitc.system.json_file import read_json, strings, well_formed

FORMAT = 3  # from 2 on with a checksum, from 3 on with a target
SCORES_FILE = "kbit_scores.json"  # in an artifact


@dataclass(frozen=True)
class Option:
    """One way to store a weight.

    Attributes:
        nbytes: stored bytes, without shared codebooks.
        cost: predicted share of the loss, in the table's unit.
        error: relative error ``||W - dequantize(quantize(W))|| / ||W||`` on sampled rows.
    """

    spec: Spec
    nbytes: int
    cost: float
    error: float


@dataclass(frozen=True)
class ScoreTable:
    """Options of every weight.

    Attributes:
        options: by weight name, in the model's order.
        numel: parameters of each weight.
        fixed: bytes that no choice changes.
        parameters: of the whole model, tied ones once.
        source: how costs were measured: "fisher" (gradients on calibration text) or "error" (weights alone).
        unit: of a cost: "nats per token" or "relative".
        quantizer: that the prices are of; "" for the strongest one that there was evidence for.
        groups: by kind, the weights that a plan may be asked to give one spec (`kbitc.graph.queries.KINDS`).
        target: whose bytes they are (`kbitc.planning.target`); "" for those of kbitc's own artifact.
    """

    options: Mapping[str, tuple[Option, ...]]
    numel: Mapping[str, int]
    fixed: int
    parameters: int
    source: str
    unit: str
    quantizer: str = ""
    groups: Mapping[str, NameGroups] = field(default_factory=dict)
    target: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file, with its checksum."""
        data = {
            "format": FORMAT,
            "source": self.source,
            "unit": self.unit,
            "quantizer": self.quantizer,
            **({"target": self.target} if self.target else {}),
            "fixed_bytes": self.fixed,
            "parameters": self.parameters,
            "groups": {kind: [list(names) for names in groups] for kind, groups in self.groups.items()},
            "weights": {
                name: {
                    "parameters": self.numel[name],
                    "options": [
                        [str(o.spec), o.nbytes, float(f"{o.cost:.6g}"), float(f"{o.error:.5g}")]
                        for o in options
                    ],
                }
                for name, options in self.options.items()
            },
        }
        return sealed(data)

    @staticmethod
    def open(path: Path) -> ScoreTable:
        """The score table of an artifact's folder, or in a file.

        Raises:
            UsageError: none there, or a damaged one.
            SourceError: it does not match its checksum.
        """
        path = path / SCORES_FILE if path.is_dir() else path
        try:
            data = read_json(path)
        except SourceError as error:
            raise UsageError(
                f"{path}: cannot be read as a table of scores ({error}). 'kbitc compile MODEL --bits B' "
                "writes one into its artifact"
            ) from error
        table = ScoreTable.from_json(data, str(path))
        if int(data["format"]) > 1 or SEAL in data:
            check_seal(data, str(path), "compile the model again")
        return table

    @staticmethod
    def from_json(data: Any, label: str = "scores") -> ScoreTable:
        """The inverse of :meth:`to_json`.

        Raises:
            UsageError: not a score table, or of a newer format.
        """
        with well_formed(label, "compile the model again", UsageError):
            if int(data["format"]) > FORMAT:
                raise UsageError(
                    f"{label}: score format {data['format']}, but this kbitc reads up to {FORMAT}; "
                    "upgrade kbitc"
                )
            options = {
                name: tuple(_option(*option) for option in entry["options"])
                for name, entry in data["weights"].items()
            }
            numel = {name: int(entry["parameters"]) for name, entry in data["weights"].items()}
            groups = {kind: [strings(names, kind) for names in own] for kind, own in data["groups"].items()}
            table = ScoreTable(
                options,
                numel,
                int(data["fixed_bytes"]),
                int(data["parameters"]),
                str(data["source"]),
                str(data["unit"]),
                str(data.get("quantizer", "")),
                groups,
                str(data.get("target", "")),
            )
            named = {name for own in groups.values() for names in own for name in names}
            if min([table.parameters, *numel.values()]) <= 0 or table.fixed < 0:
                raise ValueError("a weight without parameters")
            if not all(options.values()) or not named <= options.keys():
                raise ValueError("a weight without options")
            return table


def _option(spec: str, nbytes: int, cost: float, error: float) -> Option:
    option = Option(parse(spec), int(nbytes), float(cost), float(error))
    if option.nbytes < 0 or math.isnan(option.cost):
        raise ValueError(f"{spec} of {nbytes} bytes and cost {cost}")
    return option


SCORES: Fact[ScoreTable] = Fact("scores")
"""Options of every weight."""


def monotone(options: tuple[Option, ...]) -> tuple[Option, ...]:
    """Of formats that differ in bits alone, more bits never cost more: noise must not buy fewer of them."""
    least: dict[tuple[object, ...], float] = {}
    smoothed = {}
    for option in sorted(options, key=lambda o: o.spec.bits):
        spec = option.spec
        stored = (spec.block, spec.has_zero_point, spec.has_double_quant, spec.scale_bits, spec.outliers)
        kind = (spec.family, spec.variant, *stored)
        least[kind] = min(least.get(kind, option.cost), option.cost)
        smoothed[option.spec] = replace(option, cost=least[kind])
    return tuple(smoothed[option.spec] for option in options)
