"""Scales that lose least by weighted squared error: the definition, in plain torch.

    given codes c of the values w of a block, with weights m:
    scale = sum(m w c) / sum(m c²)                         the best scale for them, in closed form
    loss  = sum(m w²) - scale * sum(m w c)                 what is left then
    (with a zero point: the same least squares in two unknowns)

Each candidate, the first scale times a ratio, assigns codes and is refitted to them; the best is refitted
a few rounds more. With m = E[x²] of the input features the loss is the squared error of the layer's output
for uncorrelated features. Plain squared error (all m equal) is *worse* than absmax for language models: it
clips the large weights that matter. The search without weights therefore does not exist here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbitc.formats.encoder import Encoder

TILE = 2**18  # values at a time
SEARCH_ROUNDS = 2


def search_ratios(bits: int) -> Tensor:
    """Candidates as parts of the first scale, 1 among them: few bits clip more."""
    least = {2: 0.3, 3: 0.5, 4: 0.65}.get(bits, 0.8)
    count = 16 if bits <= 4 else 8
    return torch.cat([torch.linspace(least, 1.0, count), torch.tensor([1.06])])


def search_scales(
    rows: Tensor,
    importance: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor,
    ratios: Tensor,
    block: int,
    rounds: int,
) -> tuple[Tensor, Tensor | None]:
    """Better scales, and zeros where there are some.

    Args:
        rows: ``(rows, in_features)``, any float dtype.
        importance: ``(groups, in_features)`` not negative; group g weighs its ``rows / groups`` rows.
        scales: ``(rows, blocks)`` to start from; a block whose scale is 0 keeps it.
        zeros: ``(rows, blocks)`` to start from; or None.
        codebook: ``(levels,)`` float32, sorted.
        ratios: ``(candidates,)`` float32.
        block: weights a scale.
        rounds: further refits of the best candidate at most.

    Returns:
        Float32 scales, of the sign of the first ones, and zeros.
    """
    count, width = rows.shape
    short = -width % block
    encode = Encoder(codebook)
    scales = scales.to(torch.float32, copy=True)
    zeros = None if zeros is None else zeros.to(torch.float32, copy=True)
    groups = torch.arange(count) * importance.shape[0] // count
    step = max(1, TILE // width)
    for start in range(0, count, step):
        here = slice(start, min(start + step, count))
        x = torch.nn.functional.pad(rows[here].float(), (0, short)).view(-1, scales.shape[1], block)
        m = torch.nn.functional.pad(importance[groups[here]].float(), (0, short)).view(x.shape)
        first, middle = scales[here], None if zeros is None else zeros[here]
        best = (torch.zeros_like(first, dtype=torch.float64), first, middle)
        for ratio in ratios:
            best = _better(best, _refit(encode, codebook, x, m, first * ratio, middle), first)
        for _ in range(rounds):
            best = _better(best, _refit(encode, codebook, x, m, best[1], best[2]), first)
        scales[here] = best[1]
        if zeros is not None and best[2] is not None:
            zeros[here] = best[2]
    return scales, zeros


Fit = tuple[Tensor, Tensor, Tensor | None]  # how much of sum(m w²) is explained, scale, zero: (rows, blocks)


def _refit(
    encode: Encoder, codebook: Tensor, x: Tensor, m: Tensor, scale: Tensor, zero: Tensor | None
) -> Fit:
    centred = x if zero is None else x - zero.unsqueeze(-1)
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0).nan_to_num(0.0, 0.0, 0.0)
    c = codebook[encode((centred * inverse.unsqueeze(-1)).clamp(-2, 2)).int()].double()
    m, x = m.double(), x.double()
    wc, cc = (m * x * c).sum(-1), (m * c * c).sum(-1)
    if zero is None:
        fitted = torch.where(cc > 0, wc / cc, 0.0)
        return fitted * wc, fitted.float(), None
    total, first, w = m.sum(-1), (m * c).sum(-1), (m * x).sum(-1)
    det = total * cc - first * first
    is_solvable = det > 1e-12 * total * cc
    fitted = torch.where(is_solvable, (total * wc - w * first) / det, 0.0)
    shift = torch.where(is_solvable, (cc * w - first * wc) / det, 0.0)
    return fitted * wc + shift * w, fitted.float(), shift.float()


def _better(best: Fit, other: Fit, first: Tensor) -> Fit:
    """Of each block the one that explains more, the earlier of equals; never a scale of another sign."""
    wins = (other[0] > best[0]) & (other[1] * first > 0) & other[1].isfinite()
    zero = None if best[2] is None or other[2] is None else torch.where(wins, other[2], best[2])
    return torch.where(wins, other[0], best[0]), torch.where(wins, other[1], best[1]), zero
