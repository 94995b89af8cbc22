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
from kbitc.errors import SourceError
from kbitc.formats.spec import Spec, parse
from kbitc.graph.plan import Choice
from kbitc.pipeline.records import Fired
from kbitc.system.json_file import mapping, shape, sizes, strings, well_formed
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
        view_of: the matrix that its shape is a view of; None where it is one.
        outlier_features: what was found of its input features, and how many are kept; None where none were
            looked for.
    """

    choice: Choice
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_transposed: bool = False
    aliases: tuple[str, ...] = ()
    outlier_features: Mapping[str, Any] | None = None
    view_of: tuple[int, ...] | None = None

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
        if self.view_of is not None:
            entry["view_of"] = list(self.view_of)
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
        dims, aliases = shape(entry["shape"], "a weight"), strings(entry["aliases"], "aliases")
        features = entry.get("outlier_features")
        checked = None if features is None else _features(features)
        view_of = shape(entry["view_of"], "view_of") if "view_of" in entry else None
        if view_of is not None and (len(view_of) not in (2, 3) or math.prod(view_of) != math.prod(dims)):
            raise ValueError(f"view_of {view_of} is no matrix with the elements of {dims}")
        return WeightEntry(choice, dims, dtype, bool(entry["is_transposed"]), aliases, checked, view_of)


@dataclass(frozen=True)
class LeftAlone:
    """A tensor that is not packed, and why."""

    reason: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"reason": self.reason, "shape": list(self.shape), "aliases": list(self.aliases)}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> LeftAlone:
        """The inverse of :meth:`to_json`."""
        dims, aliases = shape(entry["shape"], "a tensor"), strings(entry["aliases"], "aliases")
        return LeftAlone(str(entry["reason"]), dims, aliases)


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
class Tuning:
    """What was tuned after packing (`kbitc tune`), and what came of it.

    Attributes:
        calibration: how reports call what was tuned on.
        before: divergence from the 16-bit model on held-out windows as packed, nats per position.
        after: the same as tuned.
        windows: that gradients were taken of.
        steps: that were taken.
        tuned: numbers of values by what they are, see `kbitc.training.tunable`.
        flips: codes that were changed.
    """

    calibration: str
    before: float
    after: float
    windows: int = 0
    steps: int = 0
    tuned: Mapping[str, int] = field(default_factory=dict)
    flips: int = 0

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "calibration": self.calibration,
            "held_out_before": self.before,
            "held_out_after": self.after,
            "windows": self.windows,
            "steps": self.steps,
            "tuned": dict(self.tuned),
            "flips": self.flips,
        }

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Tuning:
        """The inverse of :meth:`to_json`."""
        return Tuning(
            str(entry["calibration"]),
            float(entry["held_out_before"]),
            float(entry["held_out_after"]),
            int(entry["windows"]),
            int(entry["steps"]),
            {str(name): int(count) for name, count in mapping(entry["tuned"], "tuned").items()},
            int(entry["flips"]),
        )


@dataclass(frozen=True)
class Merge:
    """An adapter that was packed into the weights (`kbitc merge`).

    Attributes:
        adapter: name of its folder.
        quantizer: that chose codes and scales.
        weights: number that it changed.
        before: held-out loss with the adapter beside the weights, nats per token; None if not measured.
    """

    adapter: str
    quantizer: str
    weights: int
    before: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "adapter": self.adapter,
            "quantizer": self.quantizer,
            "weights": self.weights,
            "held_out_before": self.before,
        }

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Merge:
        """The inverse of :meth:`to_json`."""
        before = _number(entry.get("held_out_before"))
        return Merge(str(entry["adapter"]), str(entry["quantizer"]), int(entry["weights"]), before)


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
        checksums: SHA-256 of the bytes of each stored tensor, by stored name.
        files: SHA-256 of every other file that was written with this one, by name; of files of tensors, of
            the header alone, which says what their bytes mean. None in plan files of versions before.
        budget: bits per parameter that the plan was made for, if any.
        calibration: how reports call what was measured on; None for nothing.
        predicted: None where no score table says something of the plan.
        passes: between capture and pack, in order.
        fusions: what fusion and clean-up passes did and left, by the pass.
        untraced: why the weights were found by module class, without a graph; "" where there was one.
        tuning: after packing; None where nothing was tuned.
        merged: adapters that were packed into the weights, in order.
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
    files: Mapping[str, str] | None = None
    budget: float | None = None
    calibration: str | None = None
    predicted: Prediction | None = None
    passes: Sequence[PassEntry] = ()
    fusions: Mapping[str, Fired] = field(default_factory=dict)
    untraced: str = ""
    tuning: Tuning | None = None
    merged: Sequence[Merge] = ()
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
        data = {
            "format": self.format,
            "kbitc": self.kbitc,
            "source": {"name": self.source, "sha256": self.source_hash},
            "budget": self.budget,
            "calibration": self.calibration,
            "predicted": None if self.predicted is None else self.predicted.to_json(),
            "passes": [entry.to_json() for entry in self.passes],
            **untraced,
            **({} if self.tuning is None else {"tuning": self.tuning.to_json()}),
            **({"merged": [merge.to_json() for merge in self.merged]} if self.merged else {}),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "source_bytes": self.source_bytes,
            "fusions": {name: record.to_json() for name, record in self.fusions.items()},
            "bits_per_param": self.bits_per_param,
            "weights": {name: entry.to_json() for name, entry in self.weights.items()},
            "left_alone": {name: entry.to_json() for name, entry in self.left_alone.items()},
            "checksums": dict(sorted(self.checksums.items())),
        }
        return data if self.files is None else data | {"files": dict(sorted(self.files.items()))}

    @staticmethod
    def from_json(data: Any, path: Path) -> PlanFile:
        """The inverse of :meth:`to_json`; what earlier versions did not write is empty.

        Args:
            data: parsed.
            path: of the file, for messages.

        Raises:
            SourceError: damaged, or of a newer format.
        """
        with well_formed(str(path), "compile the model again"):
            version = mapping(data, "a plan file")["format"]
            if not isinstance(version, int) or version > FORMAT:
                raise SourceError(
                    f"{path.parent}: artifact format {version} (written by kbitc {data.get('kbitc', '?')}), "
                    f"but this kbitc reads up to {FORMAT}; upgrade kbitc"
                )
            predicted, calibration, files = data.get("predicted"), data.get("calibration"), data.get("files")
            tuning = data.get("tuning")
            return PlanFile(
                source=str(data["source"]["name"]),
                source_hash=data["source"]["sha256"],
                parameters=_positive(data["parameters"]),
                nbytes=_positive(data["bytes"]),
                source_bytes=_positive(data["source_bytes"], least=0),
                weights={name: WeightEntry.from_json(entry) for name, entry in data["weights"].items()},
                left_alone={name: LeftAlone.from_json(entry) for name, entry in data["left_alone"].items()},
                checksums={name: str(digest) for name, digest in data["checksums"].items()},
                files=None if files is None else {name: str(digest) for name, digest in files.items()},
                budget=_number(data.get("budget")),
                calibration=None if calibration is None else str(calibration),
                predicted=None if predicted is None else Prediction.from_json(predicted),
                passes=tuple(PassEntry.from_json(entry) for entry in data.get("passes", ())),
                fusions={name: Fired.from_json(record) for name, record in data.get("fusions", {}).items()},
                untraced=str(data.get("untraced", "")),
                tuning=None if tuning is None else Tuning.from_json(mapping(tuning, "tuning")),
                merged=tuple(Merge.from_json(entry) for entry in data.get("merged", ())),
                kbitc=str(data.get("kbitc", "?")),
                format=version,
            )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _positive(value: Any, least: int = 1) -> int:
    count = int(value)
    if count < least:
        raise ValueError(f"{value} where something is counted")
    return count


def _features(data: object) -> dict[str, Any]:
    """Outlier features as `kbitc.sensitivity.outliers.OutlierFeatures.to_json` has them."""
    own = mapping(data, "outlier_features")
    index = sizes(own["index"], "outlier_features")
    made: dict[str, Any] = {}
    for key, value in own.items():
        if key == "index":
            made[key] = list(index)
        elif isinstance(value, list):
            made[key] = [float(figure) for figure in value]
            if len(value) != len(index):
                raise ValueError(f"{len(value)} figures of {len(index)} outlier features")
        else:
            made[key] = int(value) if key == "kept" else str(value)
    return made
