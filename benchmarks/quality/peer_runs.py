"""Peers: a worker process in the environment of each, whose result is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer_environment import environment
from benchmarks.peers import last_line
from benchmarks.quality.campaign import Campaign, dense_weights, digest, run, whole, write_json
from benchmarks.quality.counting import bits_per_param
from benchmarks.quality.evaluator import Scores
from benchmarks.quality.settings import TOOLS, Peer
from kbitc.cache import cache_folder
from kbitc.evaluation.opening import open_model
from kbitc.system.json_file import read_json


@dataclass(frozen=True)
class Outcome:
    """A row: what one setting reached, or why there is nothing.

    Attributes:
        label: of the row.
        bits: stored bits per parameter of the whole model.
        scores: by text.
        seconds: of quantization.
        peak_bytes: most memory of the process.
        notes: for the reader.
        reason: why it has no figures; "" if it has.
    """

    label: str
    bits: float = 0.0
    scores: Mapping[str, Scores] | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a result file."""
        return asdict(self)


def remembered(campaign: Campaign, what: Any, make: Callable[[], Outcome]) -> Outcome:
    """The ledger's row, or one that is made now and, if it has figures, kept there.

    Args:
        campaign: with the ledger.
        what: all that the row depends on beside model, calibration and texts, as JSON.
        make: it.
    """
    key = digest(campaign.key, campaign.evaluator.keys, what)
    row = campaign.ledger.rows.get(key)
    if row is not None:
        scores = {label: Scores(**own) for label, own in row["scores"].items()}
        return Outcome(**{**row, "scores": scores, "notes": tuple(row["notes"])})
    outcome = make()
    if outcome.scores is not None:
        campaign.ledger.put(key, outcome.to_json())
    return outcome


def peer_outcome(
    campaign: Campaign, peer: Peer, environments: Path | None, *, is_retried: bool = False
) -> Outcome:
    """Quantize with a peer and score it; both only where it was not done before.

    Args:
        campaign: model, texts, work folder.
        peer: the setting.
        environments: folder with an environment a tool; by default in the cache folder.
        is_retried: try again what failed before.
    """
    what = [peer.tool, dict(peer.options), list(TOOLS[peer.tool].pins)]
    return remembered(
        campaign, what, lambda: _peer_outcome(campaign, peer, environments, what, is_retried=is_retried)
    )


def _peer_outcome(
    campaign: Campaign, peer: Peer, environments: Path | None, what: Any, *, is_retried: bool
) -> Outcome:
    folder = campaign.kept(peer.tool, what)
    failure = folder.with_name(f"{folder.name}.failed.json")
    if is_retried:
        failure.unlink(missing_ok=True)
    if failure.exists():
        return Outcome(peer.label, reason=str(read_json(failure)["reason"]))
    try:
        if not folder.exists():
            _quantize(campaign, peer, environments, folder)
    except (OSError, RuntimeError) as error:
        write_json(failure, {"label": peer.label, "reason": last_line(error)})
        return Outcome(peer.label, reason=last_line(error))
    result = read_json(folder / "result.json")
    return Outcome(
        peer.label,
        bits_per_param(open_model(str(campaign.model), torch.float32).model, result["nbytes"]),
        campaign.scores(folder, partial(dense_weights, folder)),
        result["seconds"],
        result["peak_bytes"],
        (*result["notes"], " ".join(f"{name} {version}" for name, version in result["versions"].items())),
    )


def _quantize(campaign: Campaign, peer: Peer, environments: Path | None, folder: Path) -> None:
    tool = TOOLS[peer.tool]
    base = environments or cache_folder() / "benchmark-quality"
    python = environment(
        None, torch.__version__, pins=tool.pins, folder=base / peer.tool, options=tool.options
    )
    job = {
        "tool": peer.tool,
        "package": tool.package,
        "options": dict(peer.options),
        "model": str(campaign.model),
        "tokens": str(campaign.tokens),
        "threads": campaign.threads,
    }
    # Not from the repository's root: its folder "kernels" would pass for Hugging Face's package.
    variables = {
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": str(campaign.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with whole(folder) as partial_folder:
        partial_folder.mkdir()
        write_json(partial_folder / "job.json", job)
        command = [str(python), "-P", "-m", "workers", str(partial_folder / "job.json"), str(partial_folder)]
        run(command, variables)
