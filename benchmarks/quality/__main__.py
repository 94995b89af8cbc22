"""kbitc and its peers at equal stored bits, under one evaluator.

    python -m benchmarks.quality MODEL --calibrate VALID --text TEST [--second OTHER] [--work FOLDER]
        [--peers FOLDER] [--only GLOB ...] [--kbitc "ARGUMENTS"] [--no-kbitc]
        [--ablation [QUANTIZER ...]] [--ledger FILE]
        [--json FILE] [--markdown FILE]

Every tool quantizes the same 16-bit model, calibrated on the same text where it takes any; its dequantized
weights go into one float32 model, and every stored byte is counted: codes, scales, zeros, codebooks, and
the rest at 16 bits, tied tensors once. Two comparisons: (i) as shipped, kbitc at the peer's bits per
parameter; (ii) linears alone, the embedding at 16 bits for all. Differences of loss and KL are paired
window by window, with bootstrap intervals. Each tool runs in an environment of its own (made on first
use); one that cannot be had gets a row that says why. `benchmarks/quality/settings.py` has the settings.

Results lie in the work folder by what they depend on (the model, the texts, the setting; for kbitc also
its source), so the same command goes on where an interrupted one stopped; with `--ledger` each row's
figures lie in one small file too, which is enough to go on with on another machine. Minutes of kbitc's
rows leave out what it had measured for an earlier row.

`--ablation "feedback" "feedback(no-target)" ...` holds quantizers, and the steps that their options switch
off, against the first one, at several budgets, in place of the peers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from benchmarks.quality.campaign import Campaign, Sizes, open_campaign
from benchmarks.quality.comparison import Pair, ablation, pairs, to_json
from benchmarks.quality.peer_runs import Outcome, peer_outcome
from benchmarks.quality.report import sections, summary
from benchmarks.quality.settings import ABLATION, ABLATION_BITS, KBITC, PEERS, Peer, named
from benchmarks.tables import markdown, print_section
from kbitc.cache import cache_folder
from kbitc.errors import KbitcError


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a language model: folder of transformers")
    parser.add_argument("--calibrate", type=Path, required=True, help="UTF-8 text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--second", type=Path, help="text of another domain to score too")
    parser.add_argument("--work", type=Path, help="what is kept; by default in the cache folder")
    parser.add_argument("--peers", type=Path, help="environments by tool; by default in the cache folder")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="GLOB", help="labels of peers; '' for none"
    )
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--kbitc", metavar="ARGUMENTS", help=f"of compile; default '{shlex.join(KBITC[1])}'")
    parser.add_argument("--no-kbitc", action="store_true", help="the peers alone")
    parser.add_argument(
        "--ablation",
        nargs="*",
        metavar="QUANTIZER",
        help=f"kbitc alone: the first quantizer against the others; default {' '.join(ABLATION)}",
    )
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--windows", type=int, default=10, help="of each text, to score")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--ledger", type=Path, metavar="FILE", help="rows measured before; new ones are added"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def found_pairs(options: argparse.Namespace, campaign: Campaign) -> Iterator[Pair]:
    """All that was asked for, one at a time."""
    if options.ablation is not None:
        settings = [named(quantizer) for quantizer in options.ablation or ABLATION]
        yield from ablation(campaign, settings, ABLATION_BITS)
        return
    chosen = [peer for peer in PEERS if any(fnmatchcase(peer.label, glob) for glob in options.only)]
    outcomes: dict[str, Outcome] = {}

    def run_peer(peer: Peer) -> Outcome:
        if peer.label not in outcomes:
            outcomes[peer.label] = peer_outcome(campaign, peer, options.peers, is_retried=options.retry)
        return outcomes[peer.label]

    setting = KBITC if options.kbitc is None else (KBITC[0], tuple(shlex.split(options.kbitc)))
    yield from pairs(campaign, chosen, run_peer, None if options.no_kbitc else setting)


def run(options: argparse.Namespace) -> list[Pair]:
    """Measure, and say each row on standard error as it comes.

    Raises:
        KbitcError: a text or the model cannot be used.
    """
    texts = {options.text.stem: options.text}
    if options.second is not None:
        texts[options.second.stem] = options.second
    sizes = Sizes(options.calibration_windows, options.windows, options.context)
    work = options.work or cache_folder() / "benchmark-quality" / "results"
    campaign = open_campaign(
        options.model, work, options.calibrate, texts, sizes, options.threads, options.ledger
    )
    found = []
    for pair in found_pairs(options, campaign):
        print(f"{pair.view}: {described(pair.base)}", file=sys.stderr)
        if pair.ours is not None:
            print(f"  against it {described(pair.ours)}", file=sys.stderr)
        found.append(pair)
    return found


def described(outcome: Outcome) -> str:
    """One line."""
    if outcome.scores is None:
        return f"{outcome.label}: {outcome.reason}"
    parts = [f"{outcome.label}: {outcome.bits:.4f} bits"]
    parts += [
        f"{text} {own.perplexity:.3f} KL {own.mean_divergence:.4f}" for text, own in outcome.scores.items()
    ]
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 2 for what the user can mend."""
    options = parse_options(arguments)
    try:
        found = run(options)
    except KbitcError as error:
        print(error, file=sys.stderr)
        return 2
    texts = [file.stem for file in (options.text, options.second) if file is not None]
    scored = f"{options.windows} x {options.context} tokens of {' and '.join(texts)}"
    calibrated = f"{options.calibration_windows} x {options.context} tokens of {options.calibrate.name}"
    head = f"{options.model.name}: {scored}; calibrated on {calibrated}"
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(head)
    made = sections(found, texts)
    for section in made:
        print_section(console, section)
    lines = summary(found, texts)
    for line in lines:
        console.print(line, highlight=False)
    if options.json:
        data = {"head": head, "pairs": [to_json(pair, texts) for pair in found]}
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    if options.markdown:
        text = markdown(["# Quality at equal bits", head, *lines], made)
        options.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
