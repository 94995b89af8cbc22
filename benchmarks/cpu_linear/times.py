"""What was measured of one contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.peers import Sample

ENOUGH = 3  # undisturbed samples for a median


@dataclass
class Times:
    """Samples of one contender, by mode."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def middle(self, mode: str = "cold") -> float:
        """Median seconds a call."""
        return undisturbed(self.samples[mode])

    def least(self, mode: str = "cold") -> float:
        """Least seconds a call."""
        return min(seconds for seconds, _ in self.samples[mode])

    def is_clean(self, mode: str = "cold") -> bool:
        """Whether the median is of undisturbed samples."""
        return sum(is_clean for _, is_clean in self.samples.get(mode, [])) >= ENOUGH

    def clean_share(self) -> float:
        """Share of samples in which no other process took a core."""
        flags = [is_clean for samples in self.samples.values() for _, is_clean in samples]
        return sum(flags) / len(flags)


def undisturbed(samples: Sequence[Sample]) -> float:
    """Median seconds of the samples that nobody disturbed; of all if those are too few."""
    clean = [seconds for seconds, is_clean in samples if is_clean]
    return median(clean if len(clean) >= ENOUGH else [seconds for seconds, _ in samples])
