"""`StableEmbedding`, of *8-bit Optimizers via Block-wise Quantization*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.kernels.training import WHOLE
from kbitc.optim.moments import MARK


class StableEmbedding(nn.Embedding):
    """An embedding followed by a layer norm, before position embeddings are added; see `torch.nn.Embedding`.

    Rows start from Xavier's uniform distribution, whose largest values are near the others, and the
    optimizers of `kbitc.optim` keep float32 states of them: gradients of rare tokens vary most.

    Takes integer ids ``(...)`` and gives ``(..., embedding_dim)`` of the weight's dtype.

    Example:
        >>> layer = StableEmbedding(100, 32)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 32])
        >>> layer.weight.optim_bits
        32
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=device, dtype=dtype)
        self._mark()

    def reset_parameters(self) -> None:
        """Xavier's uniform distribution; zeros in the padding row."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Embedding's name
        """``(...)`` ids to ``(..., embedding_dim)``."""
        normed: Tensor = self.norm(super().forward(input))
        return normed

    def _mark(self) -> None:
        setattr(self.weight, MARK, WHOLE)

    # A parameter loses its attributes when it is copied, unpickled or moved to another kind of device.
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StableEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self
