"""The ``kbit`` quantizer of transformers: it reads artifacts through ``from_pretrained``."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc.artifact.plan_file import PlanFile

if TYPE_CHECKING:
    import torch

METHOD = "kbit"


def register_reader() -> None:
    """Make transformers read the method ``kbit``, if it knows nothing of it yet."""
    from transformers.quantizers import auto

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    configs[METHOD], quantizers[METHOD] = quantizer_classes()


def quantization_config(plan: PlanFile) -> dict[str, Any]:
    """The ``quantization_config`` entry of an artifact's ``config.json``."""
    packed = plan.packed.items()
    views = {name: list(entry.view_of) for name, entry in packed if entry.view_of is not None}
    return {
        "quant_method": METHOD,
        "format": plan.format,
        "bits_per_param": plan.bits_per_param,
        "weights": {name: str(entry.spec) for name, entry in plan.packed.items()},
        "transposed": [name for name, entry in plan.packed.items() if entry.is_transposed],
        **({"view_of": views} if views else {}),
    }


@functools.cache
def quantizer_classes() -> tuple[type, type]:
    """The config and quantizer classes; made here because their bases need transformers."""
    import torch
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from kbitc.artifact import verifying
    from kbitc.artifact.folders import FORMAT
    from kbitc.artifact.initialization import hide_packed, show_packed
    from kbitc.artifact.mixed_floats import run_in_one_dtype
    from kbitc.artifact.reader import ADVICE, read_shared
    from kbitc.artifact.stored import assemble
    from kbitc.checkpoint.float32_names import float32_names
    from kbitc.errors import SourceError
    from kbitc.formats.layout import SHARED
    from kbitc.formats.packed import TENSOR_FIELDS
    from kbitc.formats.spec import parse
    from kbitc.system.json_file import mapping, sizes, strings, well_formed
    from kbitc.system.large_pages import LargePages
    from kbitc.tensor.unpacking import dequantized

    class KbitConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
        """Which weights are packed, and how."""

        def __init__(
            self,
            weights: dict[str, str] | None = None,
            transposed: Sequence[str] = (),
            bits_per_param: float | None = None,
            **kwargs: Any,
        ) -> None:
            self.quant_method = METHOD  # type: ignore[assignment]  # any string will do
            with well_formed("config.json: its quantization_config", ADVICE):
                self.format = int(kwargs.get("format", FORMAT))
                self.weights = dict(mapping({} if weights is None else weights, "weights"))
                strings([*self.weights.values()], "weights")
                given = [*transposed] if isinstance(transposed, tuple) else transposed
                self.transposed = [*strings(given, "transposed")]
                views = {} if kwargs.get("view_of") is None else mapping(kwargs["view_of"], "view_of")
                # Only of weights that are no matrices as the model has them; transformers writes what is set.
                if views:
                    self.view_of = {name: sizes([*size], "view_of") for name, size in views.items()}
                self.bits_per_param = None if bits_per_param is None else float(bits_per_param)

    class KbitDeserialize(ConversionOps):  # type: ignore[misc]
        """The stored tensors of one weight to one packed parameter."""

        def __init__(self, hf_quantizer: KbitQuantizer) -> None:
            self.hf_quantizer = hf_quantizer

        def __deepcopy__(self, memo: dict[int, Any]) -> KbitDeserialize:
            # transformers copies it for each weight: with the quantizer, every codebook and all specs.
            return KbitDeserialize(memo.get(id(self.hf_quantizer), self.hf_quantizer))

        def convert(self, input_dict: dict[str, Any], *_: Any, **kwargs: Any) -> dict[str, Any]:
            full_layer_name, model = kwargs["full_layer_name"], kwargs["model"]
            parts = {pattern.rpartition(".")[2]: tensors[0] for pattern, tensors in input_dict.items()}
            shape = tuple(model.get_parameter(full_layer_name).shape)
            weight = self.hf_quantizer.assemble(full_layer_name, parts, shape)
            return {full_layer_name: torch.nn.Parameter(weight, requires_grad=False)}

    class KbitQuantizer(HfQuantizer):  # type: ignore[misc]
        """Reads kbitc artifacts; compiling is ``kbitc compile``."""

        quantization_config: KbitConfig
        dtype = torch.get_default_dtype()
        pages: LargePages | None = None
        requires_calibration = True  # transformers: only pre-quantized checkpoints

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs
            if self.quantization_config.format > FORMAT:
                raise SourceError(
                    f"artifact format {self.quantization_config.format}, but this kbitc reads up to "
                    f"{FORMAT}; upgrade kbitc"
                )

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            self.dtype = dtype
            return dtype

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
        ) -> Any:
            self.wide = float32_names(model, self.dtype)
            files = [Path(file) for file in checkpoint_files or ()]
            if self.pre_quantized and files and verifying.is_wanted():
                verifying.verify_files(files, model.config)
            self.shared = read_shared(files)
            self.pages = LargePages()
            ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, "^" + re.escape(SHARED)}
            hide_packed(model)
            return model

        def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
            # What an artifact holds unpacked at 32 bits would lose at 16.
            is_wide = hasattr(param, "get_dtype") and param.get_dtype() in ("F32", "F64")
            return None if is_wide else super().get_new_dtype(converter, param, dtype)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            show_packed(model)
            pages = self.pages or LargePages()
            self.pages = None  # they can be neither copied nor pickled, and the model keeps this object
            for tensor in (*model.parameters(), *model.buffers()):
                if type(tensor.data) is torch.Tensor and tensor.untyped_storage().nbytes() > tensor.nbytes:
                    tensor.data = pages.place(tensor.data)  # of the mapped file, which can now go
            run_in_one_dtype(model, self.dtype)
            return model

        def assemble(self, name: str, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
            config = self.quantization_config
            if name not in config.weights:
                raise SourceError(f"'{name}' is stored packed but config.json names no spec for it")
            return assemble(
                parts,
                parse(config.weights[name]),
                shape,
                self.shared,
                torch.float32 if name in self.wide else self.dtype,
                is_transposed=name in config.transposed,
                view_of=getattr(config, "view_of", {}).get(name),
                pages=self.pages,
            )

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            del model
            return param_name in self.quantization_config.weights

        def _leaves(self) -> list[str]:
            return sorted({name.rpartition(".")[2] for name in self.quantization_config.weights})

        def get_weight_conversions(self) -> list[Any]:
            return [
                WeightConverter(
                    source_patterns=[f"{leaf}.{field}" for field in TENSOR_FIELDS],
                    target_patterns=leaf,
                    operations=[KbitDeserialize(self)],
                )
                for leaf in self._leaves()
            ]

        def update_weight_conversions(self, weight_conversions: list[Any], *_: Any, **__: Any) -> list[Any]:
            # An artifact has the model's own names: rules for older ones could change them once more.
            given = weight_conversions if not self.pre_quantized else []
            return [*given, *self.get_weight_conversions()]

        @property
        def is_trainable(self) -> bool:
            return True  # adapters train over it; the base stays frozen

        @property
        def is_compileable(self) -> bool:
            return True

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            return dequantized(model, dtype)

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

    # What a model keeps of how it was loaded; pickle looks for its name here.
    KbitDeserialize.__qualname__ = KbitDeserialize.__name__
    globals()[KbitDeserialize.__name__] = KbitDeserialize
    return KbitConfig, KbitQuantizer


def __getattr__(name: str) -> Any:
    if name != "KbitDeserialize":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    quantizer_classes()
    return globals()[name]
