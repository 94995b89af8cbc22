"""`Plan`: a spec for each weight, with its reason; a JSON file that a person can edit and give back.

The one thing to know: a key of ``weights`` is a weight's name or a glob pattern; an exact name wins
over patterns, and of several patterns the first one in the file. A key that names nothing and a
weight that no key names are both errors, so that a plan never means less than it says.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbitc.errors import SourceError, UsageError, did_you_mean
from kbitc.formats.spec import Spec, Wish, parse_wish
from kbitc.system.json_file import read_any_json

PLAN_FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """The decision about one weight.

    Attributes:
        spec: its format.
        reason: why, in a few words.
        error: relative error ``||W - dequantize(quantize(W))|| / ||W||``, once measured.
        bits: stored bits a parameter of this weight, once known.
        keeps_outliers: those outlier features that are found stay at 16 bits; ``apply_plan`` puts them
            into the spec.
        quantizer: name of what chooses its scales and codes; "" for the strongest one that there is
            evidence for.
    """

    spec: Spec
    reason: str = ""
    error: float | None = None
    bits: float | None = None
    quantizer: str = ""
    keeps_outliers: bool = False

    def to_json(self) -> dict[str, object]:
        """As it stands in a plan file."""
        entry: dict[str, object] = {"spec": str(Wish(self.spec, self.keeps_outliers))}
        if self.bits is not None:
            entry["bits"] = round(self.bits, 6)
        if self.error is not None:
            entry["error"] = round(self.error, 8)
        if self.quantizer:
            entry["quantizer"] = self.quantizer
        return entry | {"reason": self.reason}


@dataclass(frozen=True)
class Plan:
    """Specs by weight name.

    Attributes:
        weights: a choice for every packable weight, in the model's order.
        budget: the bits per parameter that the plan was made for, if any.
    """

    weights: Mapping[str, Choice] = field(default_factory=dict)
    budget: float | None = None

    def to_json(self) -> dict[str, object]:
        """As it stands in a plan file."""
        weights = {name: choice.to_json() for name, choice in self.weights.items()}
        return {"format": PLAN_FORMAT, "budget": self.budget, "weights": weights}

    @classmethod
    def from_json(cls, data: object, names: Iterable[str], *, label: str = "plan") -> Plan:
        """An edited plan's parsed JSON, for a model whose packable weights are ``names``.

        Raises:
            UsageError: not a plan, a newer format, a key that names no weight, a weight without a
                key, or a bad spec.
        """
        rules = {key: _choice(label, key, entry) for key, entry in checked(data, label)["weights"].items()}
        known = list(names)
        for key in rules:
            if not fnmatch.filter(known, key) and key not in known:
                raise UsageError(f"{label}: " + did_you_mean("weight", key, known))
        chosen = {name: _match(label, name, rules) for name in known}
        budget = checked(data, label).get("budget")
        return cls(chosen, budget if isinstance(budget, (int, float)) else None)


def checked(data: object, label: str) -> Mapping[str, Any]:
    """A plan's parsed JSON, if it is one; its entries are not looked at.

    Raises:
        UsageError: not a plan, or of a newer format.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("weights"), Mapping):
        raise UsageError(f'{label}: not a plan; expected an object like {{"weights": {{"*": "nf4:64"}}}}')
    version = data.get("format", PLAN_FORMAT)
    if not isinstance(version, int) or version > PLAN_FORMAT:
        raise UsageError(
            f"{label}: plan format {version}, but this kbitc reads up to {PLAN_FORMAT}; upgrade kbitc"
        )
    return data


def read_rules(path: Path) -> Mapping[str, Any]:
    """The parsed contents of a plan file, whose entries are not yet looked at.

    Raises:
        UsageError: missing, not JSON, or not a plan.
    """
    try:
        data = read_any_json(path)
    except SourceError as error:
        raise UsageError(f"{path}: cannot be read as a plan: {error}") from error
    return checked(data, str(path))


def _choice(label: str, key: str, entry: object) -> Choice:
    text = entry.get("spec") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise UsageError(f'{label}: {key}: expected a spec such as "nf4:64", got {entry!r}')
    try:
        wish = parse_wish(text)
    except UsageError as error:
        raise UsageError(f"{label}: {key}: {error}") from error
    reason = entry.get("reason") if isinstance(entry, dict) else None
    quantizer = entry.get("quantizer", "") if isinstance(entry, dict) else ""
    if not isinstance(quantizer, str):
        raise UsageError(f"{label}: {key}: expected the name of a quantizer, got {quantizer!r}")
    known = reason if isinstance(reason, str) and reason else "given by the plan"
    return Choice(wish.spec, known, quantizer=quantizer, keeps_outliers=wish.keeps_outliers)


def _match(label: str, name: str, rules: Mapping[str, Choice]) -> Choice:
    if name in rules:
        return rules[name]
    for key, choice in rules.items():
        if fnmatch.fnmatchcase(name, key):
            return choice
    raise UsageError(f"{label}: no rule matches '{name}' and the plan has no '*' rule")
