"""A model that is studied: loaded once, its weights replaced by what a treatment makes of them, and scored.

The one thing to know: weights are dequantized before the model runs, in float32, so a job costs one way
through the text whatever its format. Quantizers that need evidence get it from the compiler's own passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact.pack import packed_tensors
from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.dense import dense_model, tokenizer_of
from kbitc.checkpoint.finite import check_finite
from kbitc.compiler.source_path import run_passes
from kbitc.errors import SourceError
from kbitc.evaluation.causality import check_causal
from kbitc.evaluation.perplexity import window_losses, windows
from kbitc.formats.layout import shared_bytes, stored_plain
from kbitc.graph.program import Program, Weight
from kbitc.graph.stored import rest_bytes
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.registry import Pass
from kbitc.replay import choice, ordered
from kbitc.sensitivity.moments import CALIBRATION
from kbitc.sensitivity.outliers import OUTLIERS
from kbitc.study.formats import Format, round_trip
from kbitc.study.grid import ABSMAX, ALL, Treatment
from kbitc.study.zero_shot import Hits, Tasks
from kbitc.system.checksums import digest


@dataclass(frozen=True)
class Scored:
    """What text says of a treated model.

    Attributes:
        losses: of each window, nats per token.
        loss: their mean; None where it is not finite.
        error: its standard error; None of one window, or without a loss.
    """

    losses: tuple[float, ...]
    loss: float | None
    error: float | None

    @staticmethod
    def of(losses: Tensor) -> Scored:
        """Of ``(windows,)`` losses."""
        mean = float(losses.mean())
        if not math.isfinite(mean):
            return Scored((), None, None)
        count = len(losses)
        error = float(losses.std()) / math.sqrt(count) if count > 1 else None
        return Scored(tuple(losses.tolist()), mean, error)


@dataclass(frozen=True)
class Subject:
    """One model, ready for jobs.

    Attributes:
        model: dense, float32; its weights change from job to job.
        program: canonical, with the facts that treatments need.
        ids: ``(windows, context)``.
        family: of models whose losses can be compared with this one's.
        fixed_bytes: of all that no treatment changes.
        scope: which weights treatments are for.
        tokenizer: the model's own.
        label: of the model, for messages.
    """

    model: nn.Module
    program: Program
    ids: Tensor
    family: str
    fixed_bytes: int
    scope: str
    tokenizer: Any
    label: str

    @property
    def treated(self) -> Mapping[str, Weight]:
        """The weights that treatments are for."""
        weights = self.program.weights
        return {name: weight for name, weight in weights.items() if self.scope == ALL or is_inner(weight)}

    @property
    def calibration(self) -> str:
        """What was measured on; "" for nothing."""
        return self.program.get(CALIBRATION) or ""

    @torch.no_grad()
    def treat(self, treatment: Treatment) -> None:
        """Put into the model what a treatment makes of its weights, and 16 bits into the others.

        Raises:
            UsageError: a weight that cannot be quantized so.
        """
        read = self.program.read
        assert read is not None
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        made = dict(self._quantized(treatment))
        for name in self.program.weights:
            value = made[name] if name in made else stored_plain(read(name)).float()
            parameters[name].copy_(value)

    def _quantized(self, treatment: Treatment) -> Iterator[tuple[str, Tensor]]:
        """The treated weights as the model has them, by name."""
        form, read = treatment.form, self.program.read
        assert read is not None
        if form.spec.is_left_alone:
            return
        if treatment.quantizer == ABSMAX:
            features = self.program.get(OUTLIERS) or {}
            for name, weight in self.treated.items():
                picked = features[name].picked(form.spec) if name in features else None
                data = weight.oriented(read(name))
                check_finite(name, data)
                yield name, weight.turned_back(round_trip(data, form, picked, name))
            return
        treated = self.treated
        rules = {name: str(form.spec) if name in treated else "fp16" for name in self.program.weights}
        planned = PassManager([ApplyPlan({"weights": rules}, quantizer=treatment.quantizer)]).run(
            self.program
        )
        for name, packed in packed_tensors(planned, read):
            yield name, packed.dequantize(torch.float32)

    def score(self) -> Scored:
        """The loss of the model as it is now."""
        return Scored.of(window_losses(self.model, self.ids))

    def solve(self, tasks: Tasks) -> Hits:
        """The outcome of each example of tasks, for the model as it is now."""
        return tasks.score(self.model, self.tokenizer, self.label)

    def total_bits(self, form: Format) -> int:
        """Stored bits of the whole model, everything counted."""
        plain = Format(replace(form.spec, outliers=0.0)) if form.is_of_studies else form
        shared = 0 if form.spec.is_left_alone else sum(shared_bytes(plain.spec).values())
        treated = self.treated
        sizes = (
            form.stored_bytes(weight.oriented_shape) if name in treated else 2 * weight.numel
            for name, weight in self.program.weights.items()
        )
        return 8 * (self.fixed_bytes + shared + sum(sizes))

    def paper_bits(self, form: Format) -> float:
        """Bits of the treated weights alone, as the paper counts them."""
        return math.fsum(form.paper_bits(weight.oriented_shape) for weight in self.treated.values())

    @property
    def treated_parameters(self) -> int:
        """How many weights treatments are for."""
        return sum(weight.numel for weight in self.treated.values())


def is_inner(weight: Weight) -> bool:
    """Whether it is a matrix of attention or a feed-forward layer: neither embeds tokens nor gives logits."""
    return "embedding" not in weight.kinds and not weight.is_head


def open_subject(
    checkpoint: Checkpoint,
    text: str,
    context: int,
    limit: int | None,
    scope: str,
    treatments: list[Treatment],
    calibrate: str | Path,
) -> Subject:
    """Load a model, cut the text, and find out what the treatments need to know.

    Args:
        checkpoint: open, and kept open while the subject is used.
        text: to score.
        context: tokens a window.
        limit: tokens of the text that count; None for all.
        scope: see `kbitc.study.grid.SCOPES`.
        treatments: that will be asked for.
        calibrate: on what, for quantizers that need evidence; as ``kbitc compile --calibrate``.

    Raises:
        UsageError: no causal language model, or too short a text.
        SourceError: it has no tokenizer, or is damaged.
    """
    model = dense_model(checkpoint, torch.float32)
    check_causal(model, checkpoint.label)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise SourceError(
            f"{checkpoint.label}: has no tokenizer files, so text cannot be read; copy them there"
        )
    ids = windows(model, tokenizer, text, context, limit)
    quantizers = {treatment.quantizer for treatment in treatments} - {ABSMAX}
    passes: list[Pass] = [Canonicalize()]
    if any(treatment.form.spec.outliers for treatment in treatments):
        passes.append(FindOutliers())  # before anything is measured: by weights alone, the paper's proxy
    if quantizers:
        passes.append(MeasureMoments())
    in_order = any(map(choice.goes_in_order, quantizers))
    run = run_passes(
        checkpoint,
        PassManager(passes),
        calibrate if quantizers else "none",
        is_measured=bool(quantizers),
        most=lambda _: ordered.FITTED + ordered.HELD_OUT if in_order else None,
    )
    program = run.program
    config: Any = getattr(model, "config", None)
    cut = digest(ids.numpy().tobytes())[:8]
    family = f"{getattr(config, 'model_type', type(model).__name__)}-{cut}"
    return Subject(model, program, ids, family, rest_bytes(program), scope, tokenizer, checkpoint.label)
