"""kbitc among transformers' quantizers: ``from_pretrained`` compiles, ``save_pretrained`` writes artifacts.

    AutoModelForCausalLM.from_pretrained(source, quantization_config=kbitc.KbitConfig(bits=4))

The one thing to know: a source is compiled into a temporary artifact, tensor by tensor as ``kbitc compile``
does it, and that is what transformers then loads; no dense model is made.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc.artifact.transformers_quantizer import METHOD, quantizer_classes
from kbitc.errors import UsageError
from kbitc.formats.layout import weight_bytes
from kbitc.formats.spec import parse

if TYPE_CHECKING:
    from torch import Tensor, nn

    StoredConfig: Any
    StoredQuantizer: Any
else:
    StoredConfig, StoredQuantizer = quantizer_classes()

OF_A_REQUEST = ("bits", "spec", "plan", "calibrate", "agree", "quantizer")


def register_client() -> None:
    """Make transformers read, compile and write the method ``kbit``; importing this file does it."""
    from transformers.quantizers import auto

    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    configs[METHOD], quantizers[METHOD] = KbitConfig, KbitQuantizer


class KbitConfig(StoredConfig):
    """``quantization_config`` of transformers: how to compile a source, or how an artifact is packed.

    Args:
        bits: see `kbitc.compile`, as the next five; 4 if nothing is given.
        spec: see there.
        plan: see there.
        calibrate: see there.
        agree: see there.
        quantizer: see there.
        stored: what ``config.json`` of an artifact says.
    """

    def __init__(
        self,
        bits: float | None = None,
        *,
        spec: str | None = None,
        plan: Path | Mapping[str, Any] | None = None,
        calibrate: str | Path | Tensor = "auto",
        agree: str = "",
        quantizer: str = "auto",
        **stored: Any,
    ) -> None:
        super().__init__(**stored)
        self.bits, self.spec, self.plan = bits, spec, plan
        self.calibrate, self.agree, self.quantizer = calibrate, agree, quantizer

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``: of what was asked for, what came out."""
        stored: dict[str, Any] = super().to_dict()
        return {name: value for name, value in stored.items() if name not in OF_A_REQUEST}


class KbitQuantizer(StoredQuantizer):
    """Reads artifacts, compiles other sources first, and gives models a ``save_pretrained`` of ours."""

    requires_calibration = False
    quantization_config: KbitConfig

    def __init__(self, quantization_config: KbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._source: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be loaded.

        Raises:
            UsageError: a source to compile with weights that stay on the disk.
        """
        super().validate_environment(*args, device_map=device_map, **kwargs)
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if not self.pre_quantized and on_disk:
            raise UsageError(
                "a model that is compiled while it is loaded has no files to leave weights on the disk in: "
                "compile it first (kbitc compile MODEL -o OUT) and load OUT with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.pre_quantized:
            super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
            self._rename(model)
            return model
        if not checkpoint_files:
            raise UsageError(
                "KbitConfig compiles a folder or a hub id; kbitc.compile(model) packs a model in memory"
            )
        self._source = checkpoint_files
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The conversions that read packed weights.

        transformers asks for them once it has left the contexts in which it makes its skeleton (a device, a
        dtype), and before it reads the files that it listed: here a source is compiled, and the list becomes
        that of the artifact's files.
        """
        if not self.pre_quantized:
            self._compile(model)
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return conversions

    def _compile(self, model: Any) -> None:
        from kbitc.artifact.reader import Artifact
        from kbitc.artifact.transformers_quantizer import quantization_config
        from kbitc.compiler.driver import compile_to
        from kbitc.compiler.request import Request

        wanted: Any = self.quantization_config
        request = Request.of(
            wanted.bits,
            wanted.spec,
            wanted.plan,
            calibrate=wanted.calibrate,
            agree=wanted.agree,
            quantizer=wanted.quantizer,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="kbitc-")
        out = Path(self._folder.name) / "model"
        compile_to(Path(self._source[0]).parent, out, request)
        artifact = Artifact.open(out)
        self.quantization_config = KbitConfig(**quantization_config(artifact.plan))
        self.pre_quantized = True
        self._source[:] = sorted(str(path) for path in out.glob("*.safetensors"))
        super()._process_model_before_weight_loading(model, checkpoint_files=self._source)
        self._rename(model)

    def _rename(self, model: Any) -> None:
        """Names as this model has them: a base model lacks the prefix that one with a head has."""
        own, prefix = {name for name, _ in model.named_parameters()}, f"{model.base_model_prefix}."

        def named(name: str) -> str:
            others = (name.removeprefix(prefix), prefix + name)
            return next((other for other in (name, *others) if other in own), name)

        config = self.quantization_config
        config.weights = {named(name): spec for name, spec in config.weights.items()}
        config.transposed = [named(name) for name in config.transposed]
        if hasattr(config, "view_of"):
            config.view_of = {named(name): size for name, size in config.view_of.items()}

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Stored bytes of an element, by which transformers places modules on devices."""
        del model
        spec = self.quantization_config.weights.get(param_name)
        if spec is None:
            return float(param.element_size())
        config = self.quantization_config
        *lead, rows, columns = getattr(config, "view_of", {}).get(param_name, param.shape)
        rows, columns = (columns, rows) if param_name in config.transposed else (rows, columns)
        return weight_bytes(parse(spec), (*lead, rows), columns) / param.numel()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        self.__dict__.pop("_folder", None)  # read by now; the files go
        self._source = []
        model.save_pretrained = SavePretrained(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """What transformers itself would write is no artifact; see `SavePretrained`."""
        return False


class SavePretrained:
    """``model.save_pretrained`` of a packed model: an artifact, in files that the folder may hold already."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __reduce__(self) -> tuple[type[SavePretrained], tuple[nn.Module | None]]:
        return SavePretrained, (self.model(),)

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """Write the artifact; adapters that transformers holds are saved as transformers does it.

        Args:
            save_directory: other files in it stay.
            options: of transformers' ``save_pretrained``.

        Raises:
            UsageError: an option that an artifact has no place for, or a folder that cannot be written.
        """
        model: Any = self.model()
        if getattr(model, "_hf_peft_config_loaded", False):
            type(model).save_pretrained(model, save_directory, **options)
            return
        if not options.get("is_main_process", True):
            return
        for name in ("push_to_hub", "variant", "state_dict"):
            if options.get(name):
                raise UsageError(
                    f"save_pretrained of a packed model takes no {name}; save it to a folder, which "
                    "huggingface_hub.upload_folder uploads"
                )
        _save_into(model, Path(save_directory))


def _save_into(model: nn.Module, folder: Path) -> None:
    """An artifact beside other files of a folder, in the place of weights that it held."""
    from kbitc.compiler.saving import save

    if folder.is_file():
        raise UsageError(f"{folder}: is a file; name a folder to save to")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kbitc-", dir=folder) as scratch:
        made = Path(scratch) / "model"
        save(model, made)
        for pattern in ("model*.safetensors", "model*.safetensors.index.json", "generation_config.json"):
            for old in folder.glob(pattern):
                old.unlink()
        for path in sorted(made.iterdir()):
            path.replace(folder / path.name)


def as_loaded(model: nn.Module) -> nn.Module:
    """A model of transformers that was packed in memory, marked as ``from_pretrained`` marks it."""
    from transformers import PreTrainedModel

    from kbitc.tensor.kbit_tensor import KbitTensor

    if not isinstance(model, PreTrainedModel):
        return model
    packed = {name: weight for name, weight in model.named_parameters() if isinstance(weight, KbitTensor)}
    config = KbitConfig(
        weights={name: str(weight.spec) for name, weight in packed.items()},
        transposed=[name for name, weight in packed.items() if weight.is_transposed],
    )
    quantizer = KbitQuantizer(config)
    marked: Any = model
    marked.is_quantized, marked.quantization_method = True, METHOD
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    quantizer._process_model_after_weight_loading(model)
    return model


register_client()
