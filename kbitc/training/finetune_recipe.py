"""How an adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PLAIN, RESIDUAL = "plain", "residual"
INITS = (PLAIN, RESIDUAL)


@dataclass(frozen=True)
class FinetuneRecipe:
    """How an adapter is trained.

    Attributes:
        rank: of each pair of matrices.
        targets: "all-linear", or names of layers with commas between.
        alpha: products are scaled by alpha / rank; by default twice the rank.
        init: of A and B: "plain" (B = 0), or "residual", the best fit of what quantization lost.
        steps: of the optimizer.
        batch: examples at once.
        accumulate: batches a step.
        context: tokens of an example.
        rate: learning rate, warmed up over the first twentieth and then falling to zero.
        seed: of A, and of the order of examples.
        checkpointing: keep the inputs of layers alone, and compute their insides twice.
        save_every: steps between checkpoints.
    """

    rank: int = 16
    targets: str = "all-linear"
    alpha: float | None = None
    init: str = PLAIN
    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    context: int = 128
    rate: float = 2e-4
    seed: int = 0
    checkpointing: bool = False
    save_every: int = 50


def lora_config(recipe: FinetuneRecipe) -> Any:
    """What PEFT makes adapters by."""
    from peft import LoraConfig

    names = [name.strip() for name in recipe.targets.split(",") if name.strip()]
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank if recipe.alpha is None else recipe.alpha,  # type: ignore[arg-type]
        target_modules="all-linear" if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
