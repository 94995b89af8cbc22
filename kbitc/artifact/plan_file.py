"""`PlanFile`: the contents of an artifact's ``kbit_plan.json``, for whoever writes and whoever reads it.

The one thing to know: it is also a plan that can be edited and given back (``--plan``, `kbitc.graph.plan`),
so what a person edits, a spec and a quantizer for each weight, stands first in each entry. It holds no
times and no paths, so that equal inputs give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kbitc.artifact.folders import FORMAT
from kbitc.errors import SourceError, UsageError
from kbitc.formats.spec import Spec, parse
from kbitc.graph.plan import Choice
from kbitc.pipeline.records import Fired
from kbitc.version import VERSION


@dataclass(frozen=True)
class WeightEntry:
    """One packed weight, or one that the plan leaves at 16 bits.

    Attributes:
        choice: with the error and the bits that packing measured, and the quantizer that it used.
        shape: as the model has it.
        dtype: of the source.
        is_transposed: stored as ``(..., in, out)``.
        aliases: other names of the same parameter.
        outlier_features: what was found of its input features, and how many are kept; None where none were
            looked for.
    """

    choice: Choice
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_transposed: bool = False
    aliases: tuple[str, ...] = ()
    outlier_features: Mapping[str, Any] | None = None

    @property
    def spec(self) -> Spec:
        """Its format."""
        return self.choice.spec

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        entry: dict[str, Any] = self.choice.to_json() | {
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "is_transposed": self.is_transposed,
            "aliases": list(self.aliases),
        }
        if self.outlier_features is not None:
            entry["outlier_features"] = dict(self.outlier_features)
        return entry

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> WeightEntry:
        """The inverse of :meth:`to_json`."""
        choice = Choice(
            parse(entry["spec"]),
            str(entry.get("reason", "")),
            _number(entry.get("error")),
            _number(entry.get("bits")),
            str(entry.get("quantizer", "")),
        )
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"'{entry['dtype']}' is no dtype")
        shape, aliases = tuple(map(int, entry["shape"])), tuple(map(str, entry["aliases"]))
        features = entry.get("outlier_features")
        if features is not None and not isinstance(features, Mapping):
            raise TypeError(f"outlier_features: {features!r}")
        return WeightEntry(choice, shape, dtype, bool(entry["is_transposed"]), aliases, features)


@dataclass(frozen=True)
class LeftAlone:
    """A tensor that stays at 16 bits, and why."""

    reason: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"reason": self.reason, "shape": list(self.shape), "aliases": list(self.aliases)}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> LeftAlone:
        """The inverse of :meth:`to_json`."""
        shape, aliases = tuple(map(int, entry["shape"])), tuple(map(str, entry["aliases"]))
        return LeftAlone(str(entry["reason"]), shape, aliases)


@dataclass(frozen=True)
class Prediction:
    """What the score table says of the plan.

    Attributes:
        cost: predicted increase of the loss, in ``unit``.
        unit: "nats per token" or "relative".
        source: how costs were measured, see `kbitc.sensitivity.score_table.ScoreTable`.
        gap: no plan of this size is predicted better by more than this share; None where nothing was proved.
    """

    cost: float
    unit: str
    source: str = ""
    gap: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"cost": self.cost, "unit": self.unit, "source": self.source, "gap": self.gap}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Prediction:
        """The inverse of :meth:`to_json`."""
        cost, gap = float(entry["cost"]), _number(entry.get("gap"))
        return Prediction(cost, str(entry["unit"]), str(entry.get("source", "")), gap)


@dataclass(frozen=True)
class PassEntry:
    """What one pass did to the graph."""

    name: str
    nodes_before: int
    nodes_after: int
    changes: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        sizes = {"nodes_before": self.nodes_before, "nodes_after": self.nodes_after}
        return {"name": self.name, **sizes, "changes": self.changes}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> PassEntry:
        """The inverse of :meth:`to_json`."""
        before, after = int(entry["nodes_before"]), int(entry["nodes_after"])
        return PassEntry(str(entry["name"]), before, after, str(entry["changes"]))


@dataclass(frozen=True)
class PlanFile:
    """All of it.

    Attributes:
        source: name of what was compiled.
        source_hash: SHA-256 over its tensors; None where they were not read from a source.
        parameters: of the source, tied ones counted once.
        nbytes: of all stored tensors.
        source_bytes: of the same tensors in the source.
        weights: by first name, in the model's order.
        left_alone: everything else that is stored, by first name.
        checksums: SHA-256 of each stored tensor, by stored name.
        budget: bits per parameter that the plan was made for, if any.
        calibration: how reports call what was measured on; None for nothing.
        predicted: None where no score table says something of the plan.
        passes: between capture and pack, in order.
        fusions: what fusion and clean-up passes did and left, by the pass.
        untraced: why the weights were found by module class, without a graph; "" where there was one.
        kbitc: version that wrote it.
        format: of the artifact.
    """

    source: str
    source_hash: str | None
    parameters: int
    nbytes: int
    source_bytes: int
    weights: Mapping[str, WeightEntry]
    left_alone: Mapping[str, LeftAlone]
    checksums: Mapping[str, str]
    budget: float | None = None
    calibration: str | None = None
    predicted: Prediction | None = None
    passes: Sequence[PassEntry] = ()
    fusions: Mapping[str, Fired] = field(default_factory=dict)
    untraced: str = ""
    kbitc: str = VERSION
    format: int = FORMAT

    @property
    def bits_per_param(self) -> float:
        """Stored bits per parameter of the source model, tied ones counted once."""
        return 8 * self.nbytes / self.parameters

    @property
    def packed(self) -> dict[str, WeightEntry]:
        """The weights that are not left at 16 bits."""
        return {name: entry for name, entry in self.weights.items() if not entry.spec.is_left_alone}

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        untraced = {"untraced": self.untraced} if self.untraced else {}
        return {
            "format": self.format,
            "kbitc": self.kbitc,
            "source": {"name": self.source, "sha256": self.source_hash},
            "budget": self.budget,
            "calibration": self.calibration,
            "predicted": None if self.predicted is None else self.predicted.to_json(),
            "passes": [entry.to_json() for entry in self.passes],
            **untraced,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "source_bytes": self.source_bytes,
            "fusions": {name: record.to_json() for name, record in self.fusions.items()},
            "bits_per_param": self.bits_per_param,
            "weights": {name: entry.to_json() for name, entry in self.weights.items()},
            "left_alone": {name: entry.to_json() for name, entry in self.left_alone.items()},
            "checksums": dict(sorted(self.checksums.items())),
        }

    @staticmethod
    def from_json(data: Any, path: Path) -> PlanFile:
        """The inverse of :meth:`to_json`; what earlier versions did not write is empty.

        Args:
            data: parsed.
            path: of the file, for messages.

        Raises:
            SourceError: damaged, or of a newer format.
        """
        try:
            version = data["format"]
            if not isinstance(version, int) or version > FORMAT:
                raise SourceError(
                    f"{path.parent}: artifact format {version} (written by kbitc {data.get('kbitc', '?')}), "
                    f"but this kbitc reads up to {FORMAT}; upgrade kbitc"
                )
            predicted = data.get("predicted")
            return PlanFile(
                source=str(data["source"]["name"]),
                source_hash=data["source"]["sha256"],
                parameters=_positive(data["parameters"]),
                nbytes=int(data["bytes"]),
                source_bytes=int(data["source_bytes"]),
                weights={name: WeightEntry.from_json(entry) for name, entry in data["weights"].items()},
                left_alone={name: LeftAlone.from_json(entry) for name, entry in data["left_alone"].items()},
                checksums={str(name): str(digest) for name, digest in data["checksums"].items()},
                budget=_number(data.get("budget")),
                calibration=data.get("calibration"),
                predicted=None if predicted is None else Prediction.from_json(predicted),
                passes=tuple(PassEntry.from_json(entry) for entry in data.get("passes", ())),
                fusions={name: Fired.from_json(record) for name, record in data.get("fusions", {}).items()},
                untraced=str(data.get("untraced", "")),
                kbitc=str(data.get("kbitc", "?")),
                format=version,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise SourceError(f"{path}: {error}") from error
            raise SourceError(f"{path}: damaged ({error}); compile the model again") from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _positive(value: Any) -> int:
    count = int(value)
    if count <= 0:
        raise ValueError(f"parameters: {value}")
    return count
