"""One tensor quantized: `kbitc.quantize`, and the same without the wrapper."""

from __future__ import annotations

from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats.packed import Packed
from kbitc.formats.spec import Spec, parse
from kbitc.quantizers._finding import find_quantizer, lacking
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.moments import MOMENTS, Moments
from kbitc.tensor.kbit_tensor import KbitTensor


def quantize_weight(
    weight: Tensor,
    spec: Spec | str,
    *,
    quantizer: str = "absmax",
    importance: Tensor | None = None,
    outliers: Tensor | None = None,
    name: str = "weight",
) -> Packed:
    """Quantize a weight block by block and pack it.

    Args:
        weight: ``(rows, in_features)`` or ``(experts, rows, in_features)``, any float dtype, any
            strides. Blocks run along the last dimension.
        spec: format, for example "nf4:64" or "int3:128+zp".
        quantizer: how scales and codes are chosen: "absmax" (the largest magnitude of each block), "weighted"
            (least squared error, weighted by ``importance``), or one of another package.
        importance: ``(in_features,)`` or ``(experts, in_features)``, not negative: what an error in each
            input feature costs, E[x²] as a rule; "weighted" needs it, "absmax" has no use for it.
        outliers: sorted input-feature indices to keep at 16 bits; by default the columns of largest
            standard deviation (the k-bit paper's proxy, taken on the weight itself), as many as
            ``spec`` asks for.
        name: how error messages call the tensor.

    Raises:
        UsageError: a bad spec, shape or dtype, a weight that is not finite, an unknown quantizer, or an
            importance that is missing or of another shape.
    """
    facts = {} if importance is None else {MOMENTS: Moments.of_importance(importance)}
    evidence = Evidence(name, outliers, facts)
    chosen = find_quantizer(quantizer)
    missing = lacking(chosen, evidence)
    if missing == [MOMENTS]:
        raise UsageError(f"{name}: quantizer '{quantizer}' needs the importance of each input feature")
    if missing:
        raise UsageError(
            f"{name}: quantizer '{quantizer}' needs the fact '{missing[0]}'; use it in compiling"
        )
    return chosen.quantize(weight, parse(spec) if isinstance(spec, str) else spec, evidence)


def quantize(
    weight: Tensor,
    spec: Spec | str,
    *,
    quantizer: str = "absmax",
    importance: Tensor | None = None,
    outliers: Tensor | None = None,
    is_transposed: bool = False,
    name: str = "weight",
) -> KbitTensor:
    """Quantize and pack a weight; arguments and errors as for :func:`quantize_weight`.

    Args:
        weight: ``(rows, in_features)`` or ``(experts, rows, in_features)``; any float dtype.
        spec: format, for example "nf4:64" or "int3:128+zp".
        quantizer: how scales and codes are chosen.
        importance: of each input feature, for "weighted".
        outliers: sorted input features to keep at 16 bits.
        is_transposed: weight is ``(..., in_features, rows)``, as in GPT-2's Conv1D.
        name: how error messages call the tensor.

    Returns:
        A tensor of the same logical shape and dtype; ``.dequantize(dtype)`` reads it back.

    >>> import torch
    >>> quantize(torch.eye(2), "int4:32").dequantize().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    source = weight.mT if is_transposed else weight
    packed = quantize_weight(
        source, spec, quantizer=quantizer, importance=importance, outliers=outliers, name=name
    )
    return KbitTensor(packed, weight.dtype, is_transposed=is_transposed)
