"""What a study may do to a weight: any spec, and two things that the k-bit paper tries and no artifact has.

The one thing to know: `+mean` and `+flat` are of studies alone. A weight goes to its codes and back in
memory, and its stored bits are counted as if it were stored.

    +mean   m = mean(W);  W -> dequantize(quantize(W - m)) + m        centring, 2212.09720 Eq. 7 and 8
    +flat   the rows of W one after another, cut into blocks          one-dimensional blocks, Eq. 3 and 4
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats.dequantize import dequantize
from kbitc.formats.layout import stored_plain, weight_bytes
from kbitc.formats.scales import to_16_bits
from kbitc.formats.spec import LEFT_ALONE, Spec, parse
from kbitc.quantizers import Evidence, find_quantizer

MEAN_BYTES = 4
"""Of the mean of a tensor, float32."""
INDEX_BYTES = 4
"""Of one outlier feature's index, int32."""


@dataclass(frozen=True)
class Format:
    """How a study stores one weight.

    Attributes:
        spec: the format of its codes; ``fp16`` for 16 bits.
        has_mean: ``+mean``: the tensor's mean is subtracted before, and added after.
        is_flat: ``+flat``: blocks run over the ends of rows.
    """

    spec: Spec
    has_mean: bool = False
    is_flat: bool = False

    def __post_init__(self) -> None:
        if self.is_of_studies and self.spec.is_left_alone:
            raise UsageError(f"{self}: 16 bits have neither blocks nor a mean; leave the flags away")

    @property
    def is_of_studies(self) -> bool:
        """Whether no artifact can have it."""
        return self.has_mean or self.is_flat

    def __str__(self) -> str:
        return f"{self.spec}{'+mean' if self.has_mean else ''}{'+flat' if self.is_flat else ''}"

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight takes, without the codebooks that it shares.

        Args:
            shape: ``(*lead, rows, in_features)``.
        """
        in_features = shape[-1]
        if not self.is_flat:
            nbytes = weight_bytes(self.spec, shape[:-1], in_features)
        else:
            rows, columns = torch.Size(shape[:-1]).numel(), self.spec.outlier_count(in_features)
            nbytes = weight_bytes(replace(self.spec, outliers=0.0), (1,), rows * in_features)
            nbytes += columns * (2 * rows + INDEX_BYTES)
        return nbytes + (MEAN_BYTES if self.has_mean else 0)

    def paper_bits(self, shape: tuple[int, ...]) -> float:
        """Bits of a weight as the k-bit paper counts them: n (k + 16 / B + p (16 - k)), section 2.3 and 5.2.

        Zero points, which the paper has not, count as a second constant of a block; double quantization as
        8 bits a constant.
        """
        count, spec = torch.Size(shape).numel(), self.spec
        if spec.is_left_alone:
            return 16.0 * count
        constant = (8 if spec.has_double_quant else 16) + (16 if spec.has_zero_point else 0)
        share = spec.outlier_count(shape[-1]) / shape[-1]
        return count * (spec.bits + constant / spec.block + share * (16 - spec.bits))


def parse_format(text: str) -> Format:
    """The format that a string names; ``parse_format(str(format)) == format``.

    >>> parse_format("nf4:64+mean").has_mean
    True

    Raises:
        UsageError: not a spec.
    """
    flags = text.split("+")
    has_mean, is_flat = (flag in flags[1:] for flag in ("mean", "flat"))
    plain = "+".join(flag for flag in flags if flag not in ("mean", "flat"))
    return Format(parse(plain), has_mean, is_flat)


def round_trip(weight: Tensor, form: Format, outliers: Tensor | None = None, name: str = "weight") -> Tensor:
    """A weight as reading it back would give it, under absmax scales.

    Args:
        weight: ``(*lead, rows, in_features)``, any float dtype.
        form: its format.
        outliers: sorted input features at 16 bits; by default those of largest standard deviation, as many as
            the format has.
        name: how errors call the weight.

    Returns:
        The same shape, float32.

    Raises:
        UsageError: a weight that cannot be quantized.
    """
    if form.spec.is_left_alone:
        return stored_plain(weight).float()
    source = weight.detach().float()
    mean = source.mean() if form.has_mean else torch.zeros(())
    centred = source - mean if form.has_mean else source
    if not form.is_flat:
        return _absmax(centred, form.spec, outliers, name) + mean
    kept = _kept(source, form.spec, outliers)
    flat = centred.clone(memory_format=torch.contiguous_format)
    flat[..., kept] = 0.0  # they do not take part in a block's largest magnitude
    back = _absmax(flat.view(1, -1), replace(form.spec, outliers=0.0), None, name).view(weight.shape) + mean
    back[..., kept] = to_16_bits(source[..., kept]).float()
    return back


def _absmax(weight: Tensor, spec: Spec, outliers: Tensor | None, name: str) -> Tensor:
    return dequantize(find_quantizer("absmax").quantize(weight, spec, Evidence(name, outliers)))


def _kept(weight: Tensor, spec: Spec, outliers: Tensor | None) -> Tensor:
    """Indices of the input features that stay at 16 bits, chosen as packing does."""
    count = spec.outlier_count(weight.shape[-1])
    if outliers is not None or not count:
        return torch.zeros(0, dtype=torch.long) if outliers is None else outliers.long()
    deviation = weight.flatten(0, -2).std(dim=0, correction=0)
    return torch.sort(deviation, descending=True, stable=True).indices[:count]


SIXTEEN_BITS = Format(LEFT_ALONE)
