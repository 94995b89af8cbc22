"""``kbitc finetune``: an adapter trained over a compiled model, by PEFT and transformers' Trainer.

The one thing to know: nothing is there under its name before it is whole. Trainer's checkpoints lie beside
the folder that is made, each with a mark once it is complete, so that ``--resume`` goes on from the last one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.loading import load
from kbitc.artifact.reader import Artifact
from kbitc.checkpoint.dense import tokenizer_in
from kbitc.errors import SourceError, UsageError, first_line
from kbitc.evaluation.adapters import RECORD, base_of, check_installed, quiet_peft
from kbitc.evaluation.causality import check_causal
from kbitc.evaluation.perplexity import check_context
from kbitc.graph.context import Progress, silent
from kbitc.report.finetune_page import Losses, finetune_page
from kbitc.system.json_file import read_json
from kbitc.training.adapting import prepare_for_training
from kbitc.training.examples import Example, chat_examples, held_out, mean_loss, text_examples
from kbitc.training.finetune_recipe import INITS, RESIDUAL, FinetuneRecipe, lora_config
from kbitc.version import VERSION


@dataclass(frozen=True)
class Finetuned:
    """What came of it.

    Attributes:
        out: folder of the adapter.
        artifact: that it lies over.
        losses: while training, and held out.
        seconds: a step, the median.
        trained: parameters of the adapter.
        recipe: that was followed.
    """

    out: Path
    artifact: Path
    losses: Losses
    seconds: float
    trained: int
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output of finetune."""
        return {
            "out": str(self.out),
            "artifact": str(self.artifact),
            "held_out_before": self.losses.before,
            "held_out_after": self.losses.after,
            "held_out_examples": self.losses.held,
            "losses": [list(point) for point in self.losses.curve],
            "seconds_per_step": self.seconds,
            "trained_parameters": self.trained,
            "recipe": asdict(self.recipe),
        }


def finetune_to(
    artifact: str | Path,
    out: Path,
    *,
    text: Path | None = None,
    chat: Path | None = None,
    recipe: FinetuneRecipe | None = None,
    source: str | None = None,
    is_forced: bool = False,
    is_resumed: bool = False,
    on_progress: Progress = silent,
) -> Finetuned:
    """Train an adapter over an artifact.

    Args:
        artifact: folder of a compiled causal language model.
        out: folder of the adapter.
        text: UTF-8 file to train on.
        chat: or chats to train on, see `kbitc.training.examples.chat_examples`.
        recipe: how.
        source: for the init "residual", what the artifact was compiled from; by default as recorded.
        is_forced: replace an adapter that is there.
        is_resumed: go on where an interrupted run of the same arguments had come to.
        on_progress: told of each step.

    Raises:
        UsageError: bad arguments, text or folder, or a run that was begun with others.
        SourceError: the artifact or its source cannot be read.
        BackendUnavailable: PEFT or accelerate is not installed.
    """
    check_installed("finetune")
    recipe = recipe or FinetuneRecipe()
    if (text is None) == (chat is None):
        raise UsageError("what to train on: give --text FILE or --chat FILE.jsonl, and one of them")
    if recipe.init not in INITS:
        raise UsageError(f"--init {recipe.init}: expected one of {', '.join(INITS)}")
    opened = Artifact.open(Path(artifact))
    with FolderClaim(
        out, is_forced=is_forced, is_resumed=is_resumed, is_resumable=True, marker=RECORD
    ) as claim:
        model = _base(opened)
        check_context(model, recipe.context, least=2)
        tokenizer = tokenizer_in(opened.folder)
        if tokenizer is None:
            raise SourceError(
                f"{artifact}: has no tokenizer files, so text cannot be read; copy them into it"
            )
        if text is not None:
            examples = text_examples(tokenizer, model, text, recipe.context)
        else:
            assert chat is not None
            examples = chat_examples(tokenizer, chat, recipe.context)
        identity = {"base": base_of(opened), "examples": _digest(examples), "recipe": asdict(recipe)}
        _begin(claim, identity, is_resumed=is_resumed)
        adapted = adapted_model(model, recipe, opened, source, on_progress)
        losses, seconds = _trained(adapted, examples, recipe, claim, on_progress)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        result = Finetuned(out, opened.folder, losses, seconds, trained, recipe)
        _write(adapted, claim, result, identity, opened)
    return result


def _base(opened: Artifact) -> nn.Module:
    import torch

    model = load(opened.folder, dtype=torch.float32)
    check_causal(model, str(opened.folder))
    return model


def _digest(examples: Sequence[Example]) -> str:
    from kbitc.system.checksums import digest

    return digest(json.dumps(examples).encode())


def _begin(claim: FolderClaim, identity: Mapping[str, Any], *, is_resumed: bool) -> None:
    """Take over what an interrupted run of the same identity left, or make the folder anew."""
    note = claim.state / "begun.json"
    if is_resumed and note.exists():
        if read_json(note) != identity:
            raise UsageError(
                f"{claim.state}: was begun with another model, text or options, so --resume cannot go on; "
                "run again without --resume to start over"
            )
        try:
            claim.go_on()
        except FileNotFoundError:
            claim.begin()
        note.write_text(json.dumps(identity), encoding="utf-8")
        return
    claim.begin()
    note.write_text(json.dumps(identity), encoding="utf-8")


def adapted_model(
    model: nn.Module,
    recipe: FinetuneRecipe,
    artifact: Artifact | None = None,
    source: str | None = None,
    on_progress: Progress = silent,
) -> Any:
    """A ``PeftModel`` over a packed model.

    Args:
        model: packed, float32; changed in place.
        recipe: rank, targets, scale, init and seed of it.
        artifact: of the model; the init "residual" compares it with its source.
        source: of the artifact; by default as recorded.
        on_progress: told of the init's weights.

    Raises:
        UsageError: targets that the model does not have.
    """
    import torch
    from peft import get_peft_model

    prepare_for_training(model, checkpointing=recipe.checkpointing)
    torch.manual_seed(recipe.seed)
    try:
        with quiet_peft():
            adapted = get_peft_model(model, lora_config(recipe))
    except ValueError as error:
        raise UsageError(f"--targets {recipe.targets}: {first_line(error)}") from error
    if recipe.init == RESIDUAL:
        from kbitc.training.residual import fit_residual

        assert artifact is not None
        fit_residual(adapted, artifact, source, on_progress)
    return adapted


def _trained(
    adapted: Any, examples: list[Example], recipe: FinetuneRecipe, claim: FolderClaim, on_progress: Progress
) -> tuple[Losses, float]:
    from kbitc.training.trainer_steps import train

    learned, held = held_out(examples)
    on_progress("held-out loss before", 0, 1)
    before = mean_loss(adapted, held)
    curve, seconds = train(adapted, learned, recipe, claim.state / "steps", on_progress)
    on_progress("held-out loss after", 0, 1)
    return Losses(tuple(curve), before, mean_loss(adapted, held), len(held)), seconds


def _write(
    adapted: Any, claim: FolderClaim, result: Finetuned, identity: Mapping[str, Any], opened: Artifact
) -> None:
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = str(opened.folder)
    adapted.save_pretrained(claim.new)
    record = {"kbitc": VERSION, **identity, **result.to_json()}
    (claim.new / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = finetune_page(opened.plan.source, result.losses, _facts(result))
    (claim.new / "report.html").write_text(page, encoding="utf-8")
    claim.put_in_place()


def _facts(result: Finetuned) -> dict[str, str]:
    recipe = result.recipe
    tokens = recipe.steps * recipe.batch * recipe.accumulate * recipe.context
    return {
        "held-out loss before, nats per token": f"{result.losses.before:.4f}",
        f"after {recipe.steps} steps": f"{result.losses.after:.4f}",
        "parameters trained": f"{result.trained:,}",
        "tokens seen at most": f"{tokens:,}",
        "a step": f"{result.seconds:.2f} s",
    }
