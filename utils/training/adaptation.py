"""Which weights of a pipeline train and how they are saved: all weights, or adapters."""

import json
import logging
import math
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from utils.config.file_names import FUSED, LORA_FILE
from utils.config.options import UserError, first_line, require
from utils.config.tensor_files import read_safetensors
from utils.formats.adapter_files import PEFT_FILE
from utils.formats.adapter_names import WRAPPED, loadable_name, loadable_text_name
from utils.models.adapter_components import components_of_modules, layer_shape
from utils.models.adapter_layers import layers_of_run, merge_layers
from utils.models.base import Family
from utils.models.fused_lora import shorten
from utils.models.loading import load_module
from utils.models.lora_files import load_lora
from utils.models.pipeline_files import save_module
from utils.models.pipeline_source import ComponentDtypes
from utils.runtime.atomic_files import write_tensors
from utils.runtime.background_writer import HostBuffers
from utils.runtime.sharding import plain_class, sharded_parts
from utils.training.adapter_export import UiExport, WrittenAdapter
from utils.training.ema import MovingAverage
from utils.training.exporting import Exporter
from utils.training.optimizer_options import OptimizerOptions
from utils.training.optimizers import NamedParameter
from utils.training.options import AdaptationOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import PeftConfig

logger = logging.getLogger(__name__)
ADAPTER = "default"


class Adaptation(ABC):
    """The trained modules of a pipeline, in float32, and how they are saved.

    Attributes:
        family: the pipeline.
        options: the options of the adaptation.
        modules: the modules with trained weights, by name in the pipeline.
        exporter: writes pipelines in the form of the result.
        trains_base: whether the pipeline's own weights train.
    """

    trains_base: bool

    def __init__(self, family: Family, options: AdaptationOptions, start: Path | None):
        """Args:
        start: checkpoint to load weights from; None starts from the pipeline's weights.
        """
        self.family = family
        self.options = options
        self.exporter = Exporter()
        names = family.trainable_names() if options.train_text_encoder else family.trainable_names()[:1]
        self.modules = {name: getattr(family.pipeline, name) for name in names}
        family.freeze()

    @property
    def exports_pipeline(self) -> bool:
        """Whether the result contains a whole pipeline."""
        return True

    @property
    def exports_lora(self) -> bool:
        """Whether the result contains a file for `load_lora_weights`."""
        return False

    @property
    def is_dora(self) -> bool:
        """Whether the result is a DoRA."""
        return False

    def lora_for_uis(self, folder: Path) -> Path | None:
        """Returns the file for UIs in a result, if diffusers reads all of it too; None otherwise."""
        return None

    @classmethod
    def dtypes(cls, options: AdaptationOptions, frozen: torch.dtype) -> ComponentDtypes:
        """Returns the dtypes to load weights in: float32 for trained weights, `frozen` for frozen ones."""
        trained = torch.bfloat16 if options.pure_bf16 else torch.float32
        unet = trained if cls.trains_base else frozen
        text_encoders = trained if cls.trains_base and options.train_text_encoder else frozen
        return ComponentDtypes(unet, text_encoders, frozen)

    def named_parameters(self, rates: OptimizerOptions) -> list[NamedParameter]:
        """Returns the trained parameters in a fixed order, with names such as `unet.conv_in.weight`.

        Raises:
            UserError: if a rule of --layer_rates matches none of them.
        """
        found = [
            (f"{module_name}.{name}", parameter, rates.rate_of(module_name))
            for module_name, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        for rule in rates.layer_rates or ():
            if not any(re.search(rule.rpartition("=")[0], name) for name, _, _ in found):
                raise UserError(f"--layer_rates {rule} matches no trained weight, such as {found[0][0]}")
        return [NamedParameter(name, parameter, rate * rates.factor_of(name)) for name, parameter, rate in found]

    def train_mode(self) -> None:
        """Puts the trained modules into training mode."""
        for module in self.modules.values():
            module.train()

    def evaluation_mode(self) -> None:
        """Puts the trained modules into evaluation mode."""
        for module in self.modules.values():
            module.eval()

    @abstractmethod
    def save(self, folder: Path, averages: Sequence[MovingAverage]) -> None:
        """Writes the trained weights, and separately their average if there is one, each loadable on its own.

        Args:
            folder: the checkpoint folder.
            averages: none or one.
        """

    @abstractmethod
    def saving(self, averages: Sequence[MovingAverage], buffers: HostBuffers) -> list[Callable[[Path], None]]:
        """Copies what `save` would write, and returns functions that write it later into the folder they are given."""

    @abstractmethod
    def load_average(self, folder: Path, average: MovingAverage, num_updates: int) -> None:
        """Loads the average that `save` wrote, after `num_updates` updates."""

    @abstractmethod
    def exporting(self, buffers: HostBuffers) -> Callable[[Path], None]:
        """Returns a function that exports the current weights for `from_pretrained` or `load_lora_weights`.

        One process runs that function. If weights are sharded, all processes must call this, which gathers them in the
        buffers; otherwise nothing is copied.
        """

    def _freeze_unread(self) -> None:
        """Freezes text encoder weights that the pipeline never uses and that get no gradient."""
        for index, name in enumerate(self.family.text_encoder_names):
            if name in self.modules:
                for parameter_name, parameter in self.modules[name].named_parameters():
                    if parameter.requires_grad and not self.family.reads_text_parameter(index, parameter_name):
                        parameter.requires_grad_(False)


class FullFineTuning(Adaptation):
    """Trains all weights, or those of --train_layers."""

    trains_base = True

    def __init__(self, family: Family, options: AdaptationOptions, start: Path | None):
        super().__init__(family, options, start)
        family.prepare_saving()
        for name, module in self.modules.items():
            if start is not None:
                module.load_state_dict(_saved_like(module, start / name).state_dict())
            for parameter_name, parameter in module.named_parameters():
                parameter.requires_grad_(self._is_trained(f"{name}.{parameter_name}"))
        self._freeze_unread()
        if not any(parameter.requires_grad for module in self.modules.values() for parameter in module.parameters()):
            raise UserError(f"--train_layers {options.train_layers} matches no weight, such as unet.conv_in.weight")

    def _is_trained(self, name: str) -> bool:
        return self.options.train_layers is None or re.search(self.options.train_layers, name) is not None

    def save(self, folder: Path, averages: Sequence[MovingAverage]) -> None:
        """Writes `unet/` (and the trained text encoders) and `unet_ema/`, in diffusers' layout."""
        _write_modules(self.modules, None, folder)
        for average in averages:
            with average.lent():
                _write_modules(self.modules, average.state, folder)

    def saving(self, averages: Sequence[MovingAverage], buffers: HostBuffers) -> list[Callable[[Path], None]]:
        """See `Adaptation.saving`: copies the modules."""
        jobs = [partial(_write_modules, self._copies(buffers, ""), None)]
        for average in averages:
            with average.lent():
                jobs.append(partial(_write_modules, self._copies(buffers, "_ema"), average.state))
        return jobs

    def _copies(self, buffers: HostBuffers, ending: str) -> dict[str, nn.Module]:
        return {name: _copied(module, buffers, name + ending) for name, module in self.modules.items()}

    def load_average(self, folder: Path, average: MovingAverage, num_updates: int) -> None:
        """Loads the average from `unet_ema/` (and likewise for trained text encoders)."""
        averages = [
            saved
            for name, module in self.modules.items()
            for saved, parameter in zip(
                _saved_like(module, folder / f"{name}_ema").parameters(), module.parameters(), strict=True
            )
            if parameter.requires_grad
        ]
        average.load(averages, num_updates)

    def exporting(self, buffers: HostBuffers) -> Callable[[Path], None]:
        """See `Adaptation.exporting`: exports a pipeline folder in float32."""
        is_spread = bool(sharded_parts(self.modules.values()))
        return partial(self._export, self._copies(buffers, "") if is_spread else self.modules)

    def _export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        self.exporter.save(self.family, folder, modules)


class AdapterTuning(Adaptation):
    """Trains PEFT adapters in float32; the pipeline's own weights stay unchanged.

    Attributes:
        ui: what the file for UIs says, once the run is known; None for none.
    """

    trains_base = False
    prefix: str  # in the names of the adapter's parameters
    kind: str | None = None  # lora, loha or lokr: the kinds that other tools have files of
    rank_is_bounded = True  # whether the layers' widths limit the useful rank
    ui: UiExport | None = None

    def __init__(self, family: Family, options: AdaptationOptions, start: Path | None):
        super().__init__(family, options, start)
        if self.exports_pipeline:
            family.prepare_saving()
        self._make_adapters(start)
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if self.prefix in name:
                    parameter.data = parameter.data.float()
                parameter.requires_grad_(self.prefix in name)
        self._freeze_unread()
        named = {tensor.data_ptr(): name for name, tensor in self._named_tensors().items()}
        trained = [each for module in self.modules.values() for each in module.parameters() if each.requires_grad]
        self._names = [
            named[parameter.data_ptr()] for parameter in trained
        ]  # names in a file, in the order of the parameters
        if start is not None:
            for parameter, saved in zip(trained, self._saved_like(trained, start, average=False), strict=True):
                parameter.data.copy_(saved)

    def _make_adapters(self, start: Path | None) -> None:
        """Creates the adapters, those of --lora_weights with its layers' own ranks, alphas and shapes."""
        if self.options.lora_weights is not None:
            self._load_adapters(start or Path(self.options.lora_weights))
            return
        if start is None and self.rank_is_bounded:
            check_rank(self.options.lora_rank, {name: self._widths(name) for name in self.modules})
        for name, module in self.modules.items():
            try:
                module.add_adapter(self._config(self._targets(name)), adapter_name=ADAPTER)
            except ValueError as error:
                raise UserError(f"--lora_target_modules {' '.join(self.options.targets or [])}: {error}") from error

    def _load_adapters(self, source: Path) -> None:
        """Creates the adapters of a file of any format, and fresh ones in modules that train but that it lacks.

        Raises:
            UserError: if it is of another kind, or adapts modules that do not train.
        """
        is_given = Path(self.options.lora_weights or "") == source
        what = f"--lora_weights {source}" if is_given else f"the adapters {source}"
        load_lora(self.family.pipeline, str(source), ADAPTER, what)
        adapted = {
            name
            for name in self.family.trainable_names()
            if ADAPTER in getattr(getattr(self.family.pipeline, name), "peft_config", {})
        }
        if untrained := sorted(adapted - set(self.modules)):
            raise UserError(f"{what} adapt {', '.join(untrained)}; add --train_text_encoder")
        if missing := [name for name in self.modules if name not in adapted]:
            self._add_fresh(missing, what)
        self._set_dropout()

    def _add_fresh(self, names: Sequence[str], what: str) -> None:
        """Adds adapters without effect to modules, with the most frequent rank and alpha of the adapters of others."""
        given = next(each.peft_config[ADAPTER] for name, each in self.modules.items() if name not in names)
        for name in names:
            config = self._config(self._targets(name))
            for key in ("r", "lora_alpha", "alpha", "use_dora", "use_rslora"):
                if hasattr(given, key):
                    setattr(config, key, getattr(given, key))
            self.modules[name].add_adapter(config, adapter_name=ADAPTER)
        logger.warning(
            "%s adapt no layer of %s: fresh adapters of rank %d and alpha %g train there, without effect at the start",
            *(what, " and ".join(names), given.r, getattr(given, "lora_alpha", getattr(given, "alpha", given.r))),
        )

    @abstractmethod
    def _set_dropout(self) -> None:
        """Sets the run's dropout on loaded adapters: it is an option of the run, not of the file."""

    def _targets(self, name: str) -> list[str]:
        """Returns the name suffixes of the layers to adapt in a module."""
        family = self.family
        is_denoiser = name == family.denoiser_name
        default = family.denoiser_lora_targets if is_denoiser else family.text_encoder_lora_targets
        return (self.options.targets if is_denoiser else None) or list(default)

    def _widths(self, name: str) -> list[int]:
        """Returns the largest possible rank of the weight of each adapted layer of a module."""
        targets = self._targets(name)
        return [
            min(shape[0], math.prod(shape[1:]))
            for layer_name, layer in self.modules[name].named_modules()
            if any(f".{layer_name}".endswith(f".{target}") for target in targets)
            and isinstance(getattr(layer, "weight", None), Tensor)
            and len(shape := layer_shape(layer)) > 1
        ]

    @abstractmethod
    def _config(self, targets: list[str]) -> "PeftConfig":
        """Returns the PEFT config of the adapters."""

    @abstractmethod
    def _saved(self, folder: Path, average: bool) -> dict[str, Tensor]:
        """Reads what `save` wrote, adapters or averages, by the names of `_named_tensors`."""

    @abstractmethod
    def _named_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of all adapters by their names in a file; they share the parameters' storage."""

    @abstractmethod
    def _write(self, tensors: dict[str, Tensor], is_average: bool, folder: Path) -> None:
        """Writes the tensors of all adapters, or their averages; both by their names in a file."""

    def save(self, folder: Path, averages: Sequence[MovingAverage]) -> None:
        """Writes the adapters, and their averages into `unet_ema/` (and likewise for trained text encoders)."""
        self._write(self._named_tensors(), False, folder)
        for average in averages:
            with average.lent():
                self._write(self._named_tensors(), True, folder)

    def saving(self, averages: Sequence[MovingAverage], buffers: HostBuffers) -> list[Callable[[Path], None]]:
        """See `Adaptation.saving`: copies the tensors."""
        jobs = [partial(self._write, self._copies(buffers, False), False)]
        for average in averages:
            with average.lent():
                jobs.append(partial(self._write, self._copies(buffers, True), True))
        return jobs

    def _copies(self, buffers: HostBuffers, is_average: bool) -> dict[str, Tensor]:
        tensors = self._named_tensors().items()
        return {name: buffers.copy(f"{name} average" if is_average else name, tensor) for name, tensor in tensors}

    def load_average(self, folder: Path, average: MovingAverage, num_updates: int) -> None:
        """Loads the averages saved beside the adapters."""
        trained = [each for module in self.modules.values() for each in module.parameters() if each.requires_grad]
        average.load(self._saved_like(trained, folder, average=True), num_updates)

    def _saved_like(self, trained: Sequence[nn.Parameter], folder: Path, average: bool) -> list[Tensor]:
        """Reads what `save` wrote for each trained parameter, in their order.

        Raises:
            UserError: if one is missing or has another shape.
        """
        try:
            saved = self._saved(folder, average)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the adapters of {folder} can't be read: {first_line(error)}") from error
        for name, parameter in zip(self._names, trained, strict=True):
            if name not in saved or saved[name].shape != parameter.shape:
                raise UserError(f"the adapters of {folder} lack {name} in this run's shape")
        return [saved[name] for name in self._names]

    def exporting(self, buffers: HostBuffers) -> Callable[[Path], None]:
        """See `Adaptation.exporting`: exports the adapters, and if requested the pipeline with them fused in."""
        return partial(self._export, self._gathered(buffers))

    def _gathered(self, buffers: HostBuffers) -> dict[str, Tensor]:
        """Returns the tensors of all adapters, copied from all processes if they are sharded."""
        is_spread = bool(sharded_parts(self.modules.values()))
        return self._copies(buffers, False) if is_spread else self._named_tensors()

    def _export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Exports the tensors of all adapters, given by their names in a file, in the forms of --lora_format."""
        self._write(tensors, False, folder)
        self._export_merged(tensors, folder)
        if self.kind is None or self.ui is None:
            return
        family, is_sharded = type(self.family), bool(sharded_parts(self.modules.values()))
        layers = layers_of_run(family, self.modules, tensors, ADAPTER)
        written = WrittenAdapter(layers, self.family.pipeline, self.ui, folder, is_sharded)
        if self.options.lora_format != "diffusers":
            written.write_for_uis(components_of_modules(family, self.modules))
        if self.options.lora_format == "kohya" and written.has_ui_file:
            self._remove_own(folder)
        has_own = self.options.lora_format != "kohya" or not written.has_ui_file
        if self.exporter.misread is None:  # it is the same for all exports of a run
            self.exporter.misread = written.misread(has_own)
        if self.exporter.is_checked:
            self.exporter.note_adapter(folder, written.check(has_own), written.describe())

    @abstractmethod
    def _export_merged(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Exports the pipeline with the adapters merged in, if requested or if nothing else has them."""

    @abstractmethod
    def _remove_own(self, folder: Path) -> None:
        """Removes what `_write` wrote."""

    def _base_models(self) -> "DiffusionPipeline":
        """Loads the base pipeline in float32, without the components that are never adapted."""
        others = set(self.family.pipeline.components) - {*self.family.trainable_names(), "scheduler"}
        return self.family.float32_pipeline(**dict.fromkeys(sorted(others)))

    def _save_fused(self, pipeline: "DiffusionPipeline", folder: Path) -> None:
        """Writes the pipeline to `fused/`, with the adapters merged into its adapted modules."""
        self.exporter.save(self.family, folder / FUSED, {name: getattr(pipeline, name) for name in self.modules})


class PeftAdaptation(AdapterTuning):
    """Adapters without a diffusers file format: saved as PEFT adapter folders, and merged into an exported pipeline."""

    config_class_name: str  # name of the config class in peft

    def _config(self, targets: list[str]) -> "PeftConfig":
        import peft

        options = self.options
        return getattr(peft, self.config_class_name)(
            r=options.lora_rank,
            alpha=options.lora_alpha or options.lora_rank,
            rank_dropout=options.lora_dropout,
            target_modules=targets,
        )

    def _saved(self, folder: Path, average: bool) -> dict[str, Tensor]:
        return {
            f"{name}.{key.removeprefix(WRAPPED)}": tensor
            for name in self.modules
            for key, tensor in read_safetensors(folder / (f"{name}_ema" if average else name) / PEFT_FILE).items()
        }

    def _named_tensors(self) -> dict[str, Tensor]:
        from peft.utils import get_peft_model_state_dict

        return {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()
        }

    def _write(self, tensors: dict[str, Tensor], is_average: bool, folder: Path) -> None:
        for name, module in self.modules.items():
            target = folder / (f"{name}_ema" if is_average else name)
            module.peft_config[ADAPTER].save_pretrained(target)
            own = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
            write_tensors({WRAPPED + key: each.contiguous() for key, each in own.items()}, target / PEFT_FILE)

    def _set_dropout(self) -> None:
        for module in self.modules.values():
            module.peft_config[ADAPTER].rank_dropout = self.options.lora_dropout
            for layer in module.modules():
                if ADAPTER in getattr(layer, "rank_dropout", {}):
                    layer.rank_dropout[ADAPTER] = self.options.lora_dropout

    def _export_merged(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Writes the pipeline with the adapters merged in to `fused/`, which diffusers needs to draw with them."""
        from peft import PeftModel

        pipeline = self._base_models()
        if self.kind is not None:
            merge_layers(pipeline, layers_of_run(type(self.family), self.modules, tensors, ADAPTER))
        for name in self.modules if self.kind is None else ():
            PeftModel.from_pretrained(getattr(pipeline, name), folder / name).merge_and_unload()
        self._save_fused(pipeline, folder)

    def _remove_own(self, folder: Path) -> None:
        for name in self.modules:
            shutil.rmtree(folder / name)


class HadamardAdaptation(PeftAdaptation):
    """LoHa: the Hadamard product of two low-rank updates (Hyeon-Woo et al. 2022, FedPara)."""

    prefix = "hada_"
    kind = "loha"
    config_class_name = "LoHaConfig"


class KroneckerAdaptation(PeftAdaptation):
    """LoKr: the Kronecker product of a small and a low-rank matrix (Edalati et al. 2022, KronA)."""

    prefix = "lokr_"
    kind = "lokr"
    config_class_name = "LoKrConfig"
    rank_is_bounded = False  # with a large rank, peft trains full factors


class LowRankAdaptation(AdapterTuning):
    """Trains LoRA (Hu et al. 2021) or DoRA matrices."""

    prefix = "lora_"
    kind = "lora"

    def __init__(self, family: Family, options: AdaptationOptions, start: Path | None):
        super().__init__(family, options, start)
        if options.fused_lora:
            for module in self.modules.values():
                shorten(module, ADAPTER)

    @property
    def exports_pipeline(self) -> bool:
        """Whether --export_fused is given."""
        return self.options.export_fused

    @property
    def exports_lora(self) -> bool:
        """Whether `pytorch_lora_weights.safetensors` is written."""
        return self.options.lora_format != "kohya"

    @property
    def is_dora(self) -> bool:
        """Whether layers have magnitudes: by --use_dora, or as in the file of --lora_weights."""
        return any(module.peft_config[ADAPTER].use_dora for module in self.modules.values())

    def lora_for_uis(self, folder: Path) -> Path | None:
        """See `Adaptation.lora_for_uis`: diffusers reads no DoRA in the names of UIs, nor every layer's alpha."""
        if self.exporter.misread:
            return None
        file = None if self.ui is None or self.is_dora else self.ui.file(folder)
        return file if file is not None and file.is_file() else None

    def _make_adapters(self, start: Path | None) -> None:
        if start is not None:
            self._load_adapters(start)
        else:
            super()._make_adapters(start)

    def _config(self, targets: list[str]) -> "PeftConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=self.options.lora_alpha or self.options.lora_rank,
            lora_dropout=self.options.lora_dropout,
            target_modules=targets,
            init_lora_weights="gaussian",
            use_dora=self.options.use_dora,
            use_rslora=self.options.use_rslora,
        )

    def _set_dropout(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        dropout = self.options.lora_dropout
        for module in self.modules.values():
            module.peft_config[ADAPTER].lora_dropout = dropout
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.lora_dropout[ADAPTER] = nn.Dropout(dropout) if dropout else nn.Identity()

    def _module_tensors(self, name: str) -> dict[str, Tensor]:
        """Returns a module's adapter tensors by their names in a LoRA file; they share the parameters' storage."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        by_peft = get_peft_model_state_dict(self.modules[name], adapter_name=ADAPTER)
        layers = convert_state_dict_to_diffusers(by_peft)
        if set(layers) & set(by_peft):  # only attention layers were renamed, but loaders accept only one style per file
            layers = by_peft
        if name == self.family.denoiser_name:
            return layers
        return {loadable_text_name(key): value for key, value in layers.items()}

    def _saved(self, folder: Path, average: bool) -> dict[str, Tensor]:
        saved = read_safetensors((folder / "unet_ema" if average else folder) / LORA_FILE)
        return {loadable_name(name): tensor for name, tensor in saved.items()}  # earlier releases named some otherwise

    def _named_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name in self.modules for key, tensor in self._module_tensors(name).items()}

    def _write(self, tensors: dict[str, Tensor], is_average: bool, folder: Path) -> None:
        """Writes the LoRA file; averages go to `unet_ema/`."""
        arguments: dict[str, dict] = {}
        for name, module in self.modules.items():
            own = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
            arguments[f"{name}_lora_layers"] = own
            arguments[f"{name}_lora_adapter_metadata"] = _metadata(module.peft_config[ADAPTER])
        self.family.pipeline_class().save_lora_weights(folder / "unet_ema" if is_average else folder, **arguments)

    def _remove_own(self, folder: Path) -> None:
        (folder / LORA_FILE).unlink()

    def _export_merged(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Writes the fused pipeline, if requested."""
        if self.options.export_fused:
            pipeline = self._base_models()
            fuse_lora(pipeline, folder)
            self._save_fused(pipeline, folder)


def check_rank(rank: int, widths: Mapping[str, Sequence[int]]) -> None:
    """Refuses a rank above the width of every adapted layer; warns if it is above that of some.

    Args:
        rank: the rank of the adapters.
        widths: largest possible rank of each adapted layer's weight, by module.
    """
    found = [width for each in widths.values() for width in each]
    if not found:  # peft refuses the names
        return
    must = f"be at most {max(found)}, the width of the widest adapted layer"
    require(rank <= max(found), "rank", rank, must, "4 to 128 are usual")
    num_narrow = sum(width < rank for width in found)
    if num_narrow:
        logger.warning(
            "--rank %d is above the width of %d of the %d adapted layers (the narrowest: %d), where it adds weights "
            "but no capacity",
            *(rank, num_narrow, len(found), min(found)),
        )


def _metadata(config: "PeftConfig") -> dict[str, object]:
    """Returns a LoRA file's adapter metadata, without fields at their defaults, which older releases may lack."""
    default = type(config)().to_dict()
    needed = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")  # diffusers requires these
    values = {name: value for name, value in config.to_dict().items() if name in needed or value != default.get(name)}
    if not isinstance(values["target_modules"], str):  # sort the set, so that files are reproducible
        values["target_modules"] = sorted(values["target_modules"] or ())
    return values


def fuse_lora(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Fuses the LoRA file of a folder into the pipeline's weights."""
    # a diverged run exports its result too, so weights need not be finite
    load_lora(pipeline, str(folder), ADAPTER, f"the LoRA weights {folder}", must_be_finite=False)
    pipeline.fuse_lora(components=pipeline.get_list_adapters().keys())
    pipeline.unload_lora_weights()


def _write_modules(modules: dict[str, nn.Module], average: dict[str, object] | None, folder: Path) -> None:
    """Writes modules in diffusers' layout; given an average's fields, as averages with these in the config."""
    for name, module in modules.items():
        target = folder / (name if average is None else f"{name}_ema")
        save_module(module, target)
        if average is not None:
            config = json.loads((target / "config.json").read_text(encoding="utf-8")) | average
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copied(module: nn.Module, buffers: HostBuffers, name: str) -> nn.Module:
    """Returns a copy of a module, with its weights copied to buffers."""
    kind = plain_class(module)
    make = getattr(kind, "from_config", kind)  # diffusers and transformers construct models differently
    with torch.device("meta"):
        copied = make(module.config)
    tensors = {key: buffers.copy(f"{name} {key}", tensor) for key, tensor in module.state_dict().items()}
    copied.load_state_dict(tensors, assign=True)
    return copied


def _saved_like(module: nn.Module, folder: Path) -> nn.Module:
    """Loads the model saved in a folder, of the class of `module`, in float32 on the CPU."""
    kind, name = plain_class(module), folder.name
    return load_module(kind, str(folder), f"the checkpoint's {folder}", name, torch.float32, use_safetensors=True)
