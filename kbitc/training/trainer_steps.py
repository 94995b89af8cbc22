"""Steps of transformers' Trainer over an adapted model, which go on where they were interrupted.

The one thing to know: a checkpoint counts once its mark is written, which is last; what a kill left half
written is removed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kbitc.graph.context import Progress
from kbitc.system import files
from kbitc.training.examples import Example, collated

if TYPE_CHECKING:
    from kbitc.training.finetune_recipe import FinetuneRecipe

MARK = "whole"


def train(
    adapted: Any, examples: Sequence[Example], recipe: FinetuneRecipe, folder: Path, on_progress: Progress
) -> tuple[list[tuple[int, float]], float]:
    """Train what requires a gradient.

    Args:
        adapted: a ``PeftModel``; changed in place.
        examples: to learn from.
        recipe: steps, batches, learning rate, seed.
        folder: of checkpoints; where there are whole ones, it goes on from the last.
        on_progress: told of each step.

    Returns:
        The loss of each step, and the median time of a step in seconds (0 where none was left to do).
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            del args
            times.append(perf_counter() - self.started)
            on_progress("training step", state.global_step, recipe.steps)

        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK).touch()

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        warmup_steps=max(1, recipe.steps // 20),
        seed=recipe.seed,
        logging_steps=1,
        save_steps=recipe.save_every,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=next(adapted.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=list(examples),  # type: ignore[arg-type]  # whatever has a length and items
        data_collator=collated,  # type: ignore[arg-type]
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    last = last_whole(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    history = trainer.state.log_history
    curve = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    return curve, statistics.median(times) if times else 0.0


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that is whole, others removed; None where there is none."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / MARK).exists():
            files.remove(path)
    return next((path for path in reversed(found) if (path / MARK).exists()), None)
