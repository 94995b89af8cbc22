"""``kbitc merge``: the weights that an adapter changes, packed again with it under the plan that they have.

    W' = pack(dequantize(W) + scaling * B A)       same spec, same bytes

The one thing to know: what is packed lies on levels, and a change smaller than half a step rounds back to
where it was. So with ``--text`` errors are fed back, by second moments that are measured on it: what one
column loses, later ones make up. Without a text codes are the nearest, and a small change is lost for the
most part. An artifact keeps no moments of its own calibration. One weight at a time is dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.loading import load
from kbitc.artifact.plan_file import Merge, PlanFile, WeightEntry
from kbitc.artifact.reader import Artifact
from kbitc.artifact.replacing import write_replaced
from kbitc.artifact.stored import stored_tensors
from kbitc.checkpoint.dense import tokenizer_in
from kbitc.errors import SourceError, UsageError, foreign
from kbitc.evaluation.adapters import check_adapter, check_installed, quiet_peft
from kbitc.formats.packed import Packed
from kbitc.graph.context import Progress, silent
from kbitc.quantizers import Evidence, find_quantizer
from kbitc.sensitivity.gram import GRAM, Gram, equal_groups
from kbitc.sensitivity.moments import MOMENTS, Moments
from kbitc.sensitivity.sampled_error import packed_error, relative_error
from kbitc.system.json_file import read_json
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.training.examples import Example, collated, held_out, mean_loss, text_examples
from kbitc.training.input_moments import chunks, input_moments

MEASURED = 32
"""Windows at the beginning of a text whose inputs are measured."""


@dataclass(frozen=True)
class Merged:
    """What merging did.

    Attributes:
        out: the artifact.
        errors: relative squared error of each weight that was packed again, against the sum of both.
        quantizer: that chose codes and scales: "feedback" with a text, "weighted" without.
        bits_per_param: of the artifact, the same as before.
        before: held-out loss with the adapter beside the weights, nats per token; None without a text.
        after: the same of the artifact.
    """

    out: Path
    errors: Mapping[str, float]
    quantizer: str
    bits_per_param: float
    before: float | None = None
    after: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output of merge."""
        return {
            "out": str(self.out),
            "weights": dict(self.errors),
            "quantizer": self.quantizer,
            "bits_per_param": self.bits_per_param,
            "held_out_before": self.before,
            "held_out_after": self.after,
        }


def merge_to(
    artifact: str | Path,
    adapter: Path,
    out: Path,
    *,
    text: Path | None = None,
    context: int = 128,
    is_forced: bool = False,
    on_progress: Progress = silent,
) -> Merged:
    """Write an artifact with an adapter merged into it.

    Args:
        artifact: folder of a compiled model.
        adapter: PEFT's LoRA or VeRA over it.
        out: folder to write.
        text: UTF-8 file: by its beginning errors are fed back, and its held-out end says what merging cost.
        context: tokens a window of it.
        is_forced: replace an existing ``out``.
        on_progress: told of each weight.

    Raises:
        UsageError: an adapter of another model, of a kind that does not merge, or of one name of a tied
            weight; a text that is too short; or a folder that cannot be written.
        SourceError: artifact or adapter cannot be read.
        BackendUnavailable: PEFT is not installed.
    """
    check_installed("merge")
    opened = Artifact.open(Path(artifact))
    with FolderClaim(out, is_forced=is_forced) as claim:
        model = load(opened.folder, dtype=torch.float32)
        learned, held = _windows(opened, model, text, context)
        adapted = _adapted(model, adapter, opened)
        before = mean_loss(adapted, held) if held else None
        batches = [collated([example]) for example in learned[:MEASURED]]
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        layers = {path: (name, layer) for name, layer, path in _layers(adapted, opened.plan, adapter)}
        for chunk in chunks({path: layer for path, (_, layer) in layers.items()}):
            moments = input_moments(adapted, {path: layers[path][1] for path in chunk}, batches)
            for path in chunk:
                name, layer = layers[path]
                made, errors[name] = _merged(opened.plan.weights.get(name), name, layer, moments.get(path))
                tensors |= made
                on_progress(f"packing {name}", len(errors), len(layers))
        used = "feedback" if batches else "weighted"
        plan = _plan(opened.plan, errors, Merge(adapter.name, used, len(errors), before))
        del adapted, model, layers
        write_replaced(opened, tensors, plan, claim, on_progress)
    after = mean_loss(load(out, dtype=torch.float32), held) if held else None
    return Merged(out, errors, used, opened.bits_per_param, before, after)


def _windows(
    opened: Artifact, model: nn.Module, text: Path | None, context: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    if text is None:
        return [], []
    tokenizer = tokenizer_in(opened.folder)
    if tokenizer is None:
        raise SourceError(f"{opened.folder}: has no tokenizer files, so --text cannot be read")
    return held_out(text_examples(tokenizer, model, text, context))


def _adapted(model: nn.Module, adapter: Path, opened: Artifact) -> Any:
    """A ``PeftModel`` of a kind that merges."""
    from peft import PeftModel

    check_adapter(model, adapter, opened)
    config = read_json(adapter / "adapter_config.json")
    kind = "DoRA" if config.get("use_dora") else str(config.get("peft_type"))
    if kind not in ("LORA", "VERA") or config.get("lora_bias"):
        raise UsageError(
            f"{adapter}: is {kind}, which is more than a sum with the weights; LoRA and VeRA merge, others "
            "run with --adapter"
        )
    with quiet_peft(), foreign(f"{adapter}: PEFT cannot load it"):
        adapted: Any = PeftModel.from_pretrained(model, str(adapter))  # type: ignore[arg-type]
    return adapted.eval()


def _layers(adapted: Any, plan: PlanFile, adapter: Path) -> Iterator[tuple[str, Any, str]]:
    """The stored name of each weight that is changed, the layer of PEFT over it, and its module's path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = {alias: name for name, entry in plan.weights.items() for alias in entry.aliases}
    base = adapted.get_base_model()
    seen: dict[str, str] = {}
    for path, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        bare = ".".join(part for part in path.split(".") if part != "base_layer")
        shown = f"{bare}.{getattr(layer, 'parameter_name', 'weight')}"
        name = tied.get(shown, shown)
        aliases = plan.weights[name].aliases if name in plan.weights else ()
        if name not in plan.weights and name not in plan.left_alone:
            raise UsageError(f"{adapter}: changes '{shown}', which the artifact does not hold")
        if aliases or name in seen:
            other = seen.get(name) or next(iter({name, *aliases} - {shown}))
            raise UsageError(
                f"{adapter}: changes '{shown}', which is one weight with '{other}' (tied): merged, it would "
                "change both. Train without it in --targets, or use --adapter"
            )
        seen[name] = shown
        yield name, layer, bare


def _merged(
    entry: WeightEntry | None, name: str, layer: Any, moments: Gram | None
) -> tuple[dict[str, Tensor], float]:
    """The stored tensors of a weight with its adapter added, and the relative squared error of that."""
    base = layer.get_base_layer()
    weight = getattr(base, getattr(layer, "parameter_name", "weight")).detach()
    delta = layer.get_delta_weight(layer.active_adapters[0]).detach().float()
    if not isinstance(weight, KbitTensor):
        wanted = weight.float() + delta
        kept = wanted.to(torch.float16 if entry is None else entry.dtype)
        kept = wanted.to(torch.bfloat16) if not bool(kept.isfinite().all()) else kept
        return {name: kept}, relative_error(wanted, kept)
    wanted = weight.dequantize(torch.float32) + delta.view(weight.shape)
    wanted = wanted.reshape(weight.view_of() or weight.shape)
    oriented = wanted.mT if weight.is_transposed else wanted
    packed = _packed(oriented, weight.packed, name, moments)
    stored = {f"{name}.{field}": tensor for field, tensor in stored_tensors(packed).items()}
    return stored, packed_error(oriented, packed)


def _packed(oriented: Tensor, was: Packed, name: str, moments: Gram | None) -> Packed:
    """A weight in the format that it had, its outlier features as they were."""
    *lead, rows, features = oriented.shape
    outliers = None if was.outlier_index is None else was.outlier_index.long()
    if moments is None or lead:
        facts: dict[Any, object] = {MOMENTS: Moments.of_importance(torch.ones(*lead, features))}
        quantizer = find_quantizer("weighted")
    else:
        facts = {MOMENTS: Moments.of_importance(moments.inputs.diagonal().clamp_min(1e-12))}
        facts[GRAM] = equal_groups([moments], rows)
        quantizer = find_quantizer("feedback")
    return quantizer.quantize(oriented.contiguous(), was.spec, Evidence(name, outliers, facts))


def _plan(plan: PlanFile, errors: Mapping[str, float], merge: Merge) -> PlanFile:
    """The plan file of the merged artifact: what was measured of the old weights no longer holds."""
    weights = {
        name: entry
        if name not in errors
        else replace(entry, choice=replace(entry.choice, error=errors[name], quantizer=merge.quantizer))
        for name, entry in plan.weights.items()
    }
    return replace(plan, weights=weights, merged=(*plan.merged, merge))
