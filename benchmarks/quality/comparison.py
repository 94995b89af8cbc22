"""Both comparisons and the ablation: rows of figures, and paired intervals between kbitc and each peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.campaign import Campaign
from benchmarks.quality.kbitc_runs import Setting, linears_outcome, shipped_outcome
from benchmarks.quality.peer_runs import Outcome
from benchmarks.quality.settings import LINEARS, SHIPPED, Peer
from kbitc.evaluation.intervals import Difference, paired

PeerRun = Callable[[Peer], Outcome]


@dataclass(frozen=True)
class Pair:
    """A model and the one that it is held against, at equal bits.

    Attributes:
        view: which comparison.
        base: the peer, or the full quantizer in the ablation.
        ours: kbitc; None where it was not run.
    """

    view: str
    base: Outcome
    ours: Outcome | None

    def differences(self, text: str) -> tuple[Difference, Difference] | None:
        """Ours minus the base's, of loss and of divergence; None where one of them has no figures."""
        if self.ours is None or self.ours.scores is None or self.base.scores is None:
            return None
        ours, base = self.ours.scores[text], self.base.scores[text]
        return paired(ours.loss, base.loss), paired(ours.divergence, base.divergence)


def pairs(
    campaign: Campaign, peers: Sequence[Peer], run_peer: PeerRun, setting: Setting | None
) -> Iterator[Pair]:
    """Each peer in each comparison that it is in; without a setting of kbitc, the peers alone."""
    makers = {SHIPPED: shipped_outcome, LINEARS: linears_outcome}
    for view, compile_to in makers.items():
        for peer in peers:
            if view not in peer.views:
                continue
            base, ours = run_peer(peer), None
            if setting is not None and base.scores is not None:
                ours = compile_to(campaign, setting, base.bits)
            yield Pair(view, base, ours)


def ablation(campaign: Campaign, settings: Sequence[Setting], budgets: Sequence[float]) -> Iterator[Pair]:
    """Each setting at each budget, against the first one."""
    for bits in budgets:
        view = f"ablation at {bits:g} bits"
        base: Outcome | None = None
        for setting in settings:
            found = shipped_outcome(campaign, setting, bits)
            if base is None:
                base = found
                yield Pair(view, base, None)
            else:
                yield Pair(view, base, found)


def to_json(pair: Pair, texts: Sequence[str]) -> Mapping[str, object]:
    """A pair with its intervals."""
    found = {text: pair.differences(text) for text in texts}
    return {
        "view": pair.view,
        "base": pair.base.to_json(),
        "kbitc": None if pair.ours is None else pair.ours.to_json(),
        "differences": {
            text: None if both is None else {"loss": vars(both[0]), "divergence": vars(both[1])}
            for text, both in found.items()
        },
    }
