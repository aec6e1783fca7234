"""Single weight files of other tools: reads their headers, and checks that all weights are used."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from utils.config.library_errors import LOADING_ERRORS
from utils.config.options import UserError, first_line
from utils.config.tensor_files import open_safetensors, read_pickle
from utils.config.user_files import FileError
from utils.models.loading import WeightReport, check_read, load_module, loading, make_up, names_of
from utils.models.options import PICKLES
from utils.models.weight_files import Stored, check_finite, stored_in, stored_tensors
from utils.runtime.hub_files import INDEX, class_name_of, hub_file, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

UNET_PREFIX = "model.diffusion_model."
UNET_CONFIG = "unet/config.json"
CONFIG_FLAG = "--pretrained_model_config"
UNET_KEY = f"{UNET_PREFIX}input_blocks.0.0.weight"
SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"
VAE_PREFIXES = ("first_stage_model.", "vae.")
TEXT_PREFIXES = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
EDM_MARKS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
PREDICTION_WORDS = {
    "v": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "velocity": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
    "x0": "sample",
    "sample": "sample",
}
"""Prediction types as tools write them into a file's metadata, and diffusers' names for them."""
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # of sd-scripts and of ComfyUI
V2_KEY = f"{UNET_PREFIX}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
V2_WIDTH = 1024
V2_BIAS = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V2_DEVIATION = 0.09  # standard deviation of that bias: above it in Stable Diffusion 2 at 768 pixels, which predicts v


@dataclass(frozen=True)
class SingleFile:
    """A single weight file.

    Attributes:
        path: path of the file.
        flag: the option that named it.
        weights: its tensors by name, on the meta device.
        stored: their dtypes and shapes as stored, by name.
        metadata: the metadata of its header.
    """

    path: Path
    flag: str
    weights: Mapping[str, Tensor]
    stored: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path, flag: str) -> "SingleFile":
        """Reads the header of a safetensors file, or the tensors of a pickle.

        Raises:
            UserError: if it can't be read.
        """
        if path.suffix in PICKLES:
            held = _weights_in_pickle(path, flag)
            return cls(path, flag, held, stored_tensors(held), {})
        try:
            stored = stored_in(path)
            weights = {name: torch.empty(each.shape, device="meta") for name, each in stored.items()}
            with open_safetensors(path) as file:
                return cls(path, flag, weights, stored, file.metadata() or {})
        except FileError as error:
            raise UserError(f"{flag} {path} {error.reason}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{flag} {path} can't be read as safetensors: {first_line(error)}") from error

    @property
    def what(self) -> str:
        """The flag and the path, for messages."""
        return f"{self.flag} {self.path}"

    @cached_property
    def scheduler_marks(self) -> dict[str, object]:
        """Returns what the file says about its noise schedule, as changes of a scheduler's config.

        Raises:
            UserError: for a model trained with EDM's continuous noise levels.
        """
        # Models without a beta schedule.
        if edm := [name for name in EDM_MARKS if name in self.weights]:
            raise UserError(
                f"{self.what} contains {edm[0]}: it was trained with EDM's noise levels, which are not supported"
            )

        # Prediction type: from the metadata, a marker tensor, or the architecture's name.
        said = next((self.metadata[key] for key in PREDICTION_KEYS if self.metadata.get(key)), None)
        found = None if said is None else PREDICTION_WORDS.get(said.strip().lower())
        if said is not None and found is None:
            logger.warning(
                "%s: its metadata has the prediction type %r, which is unknown; check the prediction type of this run",
                *(self.what, said[:40]),
            )
        if "v_pred" in self.weights or (found is None and self._is_true("ss_v_parameterization")):
            if found not in (None, "v_prediction"):
                logger.warning("%s contains v_pred, but its metadata says %s: using v_prediction", self.what, said)
            found = "v_prediction"
        if found is None and self.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
            found = "v_prediction"

        # Zero terminal SNR.
        marks: dict[str, object] = {} if found is None else {"prediction_type": found}
        if "ztsnr" in self.weights or self._is_true("ss_zero_terminal_snr"):
            marks |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return marks

    def _is_true(self, key: str) -> bool:
        return self.metadata.get(key, "").lower() == "true"

    def looks_like_v2(self) -> str | None:
        """Guesses the prediction type of a Stable Diffusion 2 file from its weights; None for other files."""
        width = self.weights[V2_KEY].shape[-1] if V2_KEY in self.weights else None
        if width != V2_WIDTH or V2_BIAS not in self.weights or self.path.suffix in PICKLES:
            return None
        with open_safetensors(self.path) as file:
            deviation = float(file.get_tensor(V2_BIAS).float().std(correction=0))
        return "v_prediction" if deviation > V2_DEVIATION else "epsilon"

    @property
    def class_name(self) -> str:
        """The class of the pipeline that the weights belong to, by their names.

        Raises:
            UserError: if they are not a complete model.
        """
        if UNET_KEY not in self.weights:
            cures = {
                "--pretrained_model": "a LoRA file to --lora_weights, a VAE to --pretrained_vae_model_name_or_path",
                "--pipeline": "a LoRA file to --lora",
                "--baseline": "a LoRA file to --baseline_lora",
            }
            raise UserError(
                f"{self.what} is not a complete Stable Diffusion model: it has no {UNET_KEY}; give "
                + cures.get(self.flag, "a complete model")
            )
        return "StableDiffusionXLPipeline" if SDXL_KEY in self.weights else "StableDiffusionPipeline"

    @property
    def index(self) -> dict[str, Any]:
        """The `model_index.json` of an equivalent pipeline folder."""
        found = {"_class_name": self.class_name, "unet": ["diffusers", "UNet2DConditionModel"]}
        found |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}
        if self.class_name == "StableDiffusionXLPipeline":
            found["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        return found

    @cached_property
    def configs_beside(self) -> str | None:
        """The folder of the file, if it is that of a pipeline of the file's class, whose configs it then has."""
        folder = self.path.parent
        if UNET_KEY not in self.weights or not all((folder / name).is_file() for name in (INDEX, UNET_CONFIG)):
            return None
        found = class_name_of(read_config(folder / INDEX, self.what))
        if found != self.class_name:
            logger.warning("%s: the configs beside it are not used, as they are those of a %s", self.what, found)
            return None
        logger.info("%s: using the configs beside it, in %s", self.what, folder)
        return str(folder)

    @cached_property
    def hub_configs(self) -> str:
        """The Hub name of the pipeline whose configs diffusers takes, by the names and shapes of the weights."""
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        return fetch_diffusers_config(dict(self.weights))["pretrained_model_name_or_path"]

    def check_configs(self, given: str | None, part: str = "unet") -> None:
        """Checks that the configs of the file are available.

        Args:
            given: folder or Hub name of a pipeline with its configs; None to find one on the Hub.
            part: the component whose config is looked for.

        Raises:
            UserError: with the flag that names a folder of them.
        """
        flag = {"--pipeline": "--pipeline_config", "--baseline": "--baseline_config"}.get(self.flag, CONFIG_FLAG)
        needed = f"{part}/config.json"
        if given is not None and Path(given).is_dir():
            if not Path(given, needed).is_file():
                raise UserError(f"{flag} {given} has no {needed}; give the folder of a pipeline")
            return
        root = given or self.hub_configs
        failure = f"{self.what}: the configs of {root} were not found on the Hub"
        hub_file(root, needed, None, f"{failure}; give {flag} the folder of a pipeline of its kind")

    def load(
        self, kind: "type[DiffusionPipeline]", config: str | None, given: Mapping[str, Any]
    ) -> "DiffusionPipeline":
        """Loads the pipeline on the CPU, in the dtypes of the file.

        Args:
            kind: class of the pipeline.
            config: folder or Hub name of a pipeline with its configs; None to find one on the Hub.
            given: components that come from elsewhere, by name.

        Raises:
            UserError: if it can't be loaded, or weights are missing.
        """
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        # Check the weights before diffusers reads them.
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        for name in (*kinds, *TEXT_PREFIXES):
            if name not in given:
                self._check_numbers(name)
        expected = {name: self._expect(name, each, config, name) for name, each in kinds.items() if name not in given}

        # Load.
        try:
            with loading(self.what):
                # with the library's default, missing weights would stay on the meta device
                arguments = {"low_cpu_mem_usage": False} if any(expected.values()) else {}
                pipeline = kind.from_single_file(str(self.path), config=config, **given, **arguments)
        except (SingleFileComponentError, UserError) as error:
            lacking = self._lacking_encoder(given)
            if lacking is None and isinstance(error, UserError):
                raise
            why = lacking or f"can't be loaded: {first_line(error)}; give the whole model, or a pipeline folder"
            raise UserError(f"{self.what} {why}") from error

        # Text encoders, which diffusers converts itself.
        for name in TEXT_PREFIXES:
            module = getattr(pipeline, name, None)
            if module is None or name in given:
                continue
            if own := _own(name, self.weights):
                make_up(module, self._check_part(name, module, own))
            else:  # diffusers takes it from the config's folder
                what = f"{self.what}: {name} of {config}"
                part = load_module(type(module), str(Path(config, name)), what, name, torch.float32)
                setattr(pipeline, name, part)

        # What is left over, and whether all is finite.
        self._say_what_is_not_used({*TEXT_PREFIXES, *expected})
        for name in (*kinds, *TEXT_PREFIXES):
            if name not in given and isinstance(module := getattr(pipeline, name, None), nn.Module):
                check_finite(module.named_parameters(), f"{self.what}: {name}")
        return pipeline

    def _lacking_encoder(self, given: Collection[str]) -> str | None:
        """Returns a message if the file lacks a text encoder, else None."""
        for name in (name for name in TEXT_PREFIXES if name in self.index and name not in given):
            if not _own(name, self.weights):
                return (
                    f"has no {name}, whose weights start with {' or '.join(TEXT_PREFIXES[name])}; give the whole "
                    "model, or a complete pipeline folder"
                )
        return None

    def _check_numbers(self, part: str) -> None:
        """Refuses a part whose weights can't be used as stored."""
        check_read(f"{self.what}: {part}", part, {name: self.stored[name] for name in _own(part, self.weights)})

    def load_vae(self, config: str | None, subfolder: str | None, dtype: torch.dtype) -> nn.Module:
        """Loads the VAE in the file, which may contain only a VAE or a whole model.

        Args:
            config: folder or Hub name with its config; None to find it on the Hub.
            subfolder: subfolder of the config, or None.
            dtype: dtype to load it in.
        """
        from diffusers import AutoencoderKL

        self._check_numbers("vae")
        is_partial = self._expect("vae", AutoencoderKL, config, subfolder)
        with loading(self.what):
            vae = AutoencoderKL.from_single_file(
                str(self.path), config=config, subfolder=subfolder, low_cpu_mem_usage=not is_partial
            )
        check_finite(vae.to(dtype).named_parameters(), self.what)
        return vae.eval()

    def _expect(self, name: str, kind: Any, config: str | None, subfolder: str | None) -> bool:
        """Checks a part's weights against its config before they are loaded; returns whether some may be missing."""
        if config is None:
            self.check_configs(None, name)
        with loading(f"{self.what}: {name}"):
            if config is not None and Path(config, subfolder or "", "config.json").is_file():
                read_config(Path(config, subfolder or "", "config.json"), self.what)
            root = config or self.hub_configs
            with torch.device("meta"):
                module = kind.from_config(kind.load_config(root, subfolder=subfolder))
        return bool(self._check_part(name, module, _own(name, self.weights)))

    def _check_part(self, name: str, module: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
        """Refuses a part with missing, additional or misshapen weights; returns the missing ones that are allowed."""
        what, state = f"{self.what}: {name}", module.state_dict()
        with loading(what):
            try:
                found = own if name == "vae" and state.keys() <= own.keys() else converted(name, module, own)
            except KeyError as error:  # diffusers looks up some names, and raises this for the first missing one
                raise UserError(f"{what} lacks {error.args[0]}; give a model that has it") from error
        missing = [key for key in state if key not in found]
        left_over = [key for key in found if key not in state]
        mismatched = [
            (key, found[key].shape, each.shape)
            for key, each in state.items()
            if key in found and found[key].shape != each.shape
        ]
        return WeightReport(state.keys(), missing, left_over, mismatched).check(what, name)

    def _say_what_is_not_used(self, parts: set[str]) -> None:
        known = tuple(prefix for part in parts for prefix in prefixes(part))
        left_over = [key for key in self.weights if not key.startswith(known)]
        if left_over:
            kinds = sorted({key.partition(".")[0] for key in left_over})
            logger.info("%s: %d weights are not used: %s", self.what, len(left_over), names_of(kinds))


def _own(part: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a part's weights by their names in the file; all weights if the file contains only a VAE."""
    own = {key: value for key, value in weights.items() if key.startswith(prefixes(part))}
    return dict(weights) if part == "vae" and not own else own


def prefixes(part: str) -> tuple[str, ...]:
    """Returns the prefixes that a component's weights have in single files."""
    return {"unet": (UNET_PREFIX,), "vae": VAE_PREFIXES}.get(part) or TEXT_PREFIXES[part]


def converted(part: str, module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a part's weights as diffusers converts them, under its own names."""
    from diffusers.loaders import single_file_utils as theirs

    weights = dict(weights)
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(weights, config=dict(module.config))
    if part == "vae":
        return theirs.convert_ldm_vae_checkpoint(weights, config=dict(module.config))
    prefix = next(each for each in TEXT_PREFIXES[part] if any(key.startswith(each) for key in weights))
    if prefix.endswith("model."):
        converted = theirs.convert_open_clip_checkpoint(module, weights, prefix=prefix)
    else:
        converted = theirs.convert_ldm_clip_checkpoint(weights)
    if not hasattr(module, "text_model"):
        return {key.removeprefix("text_model."): value for key, value in converted.items()}
    return converted


def _weights_in_pickle(path: Path, flag: str) -> dict[str, Tensor]:
    try:
        held = read_pickle(path, mmap=True)
    except FileError as error:
        raise UserError(f"{flag} {path} {error.reason}") from error
    except (*LOADING_ERRORS, EOFError) as error:
        raise UserError(f"{flag} {path} can't be read as tensors only: {first_line(error)}") from error
    if not isinstance(held, dict):
        raise UserError(f"{flag} {path} contains no weights by name")
    held = held.get("state_dict", held)
    if not isinstance(held, dict):
        raise UserError(f"{flag} {path} contains no weights by name")
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
