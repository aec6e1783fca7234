"""Sources of pipelines (a folder, the Hub, a single file) and their configs, which are read before any weights."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils.config.library_errors import LOADING_ERRORS
from utils.config.options import UserError, first_line
from utils.models.loading import Download, load_module, load_pipeline_folder, variant_of
from utils.models.options import PICKLES, ModelOptions, PartOptions
from utils.models.single_file import CONFIG_FLAG, SingleFile
from utils.runtime.hub_files import index_file, is_path, read_config, read_config_file, refuse_quantized

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from utils.models.base import Family

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComponentDtypes:
    """The dtypes in which the weights are loaded."""

    denoiser: torch.dtype
    text_encoders: torch.dtype
    frozen: torch.dtype


@dataclass(frozen=True)
class PipelineSource:
    """The source of a pipeline, as the options name it."""

    options: ModelOptions

    @property
    def path(self) -> str:
        """The folder, Hub name or single file."""
        return self.options.pretrained_model_name_or_path

    @property
    def is_single_file(self) -> bool:
        """Whether the source is a single weight file."""
        return _is_file(self.path)

    @cached_property
    def file(self) -> SingleFile:
        """The single weight file."""
        return SingleFile.read(Path(self.path), "--pretrained_model")

    @cached_property
    def config_root(self) -> str | None:
        """The folder or Hub name with the configs of a single file; None for those that diffusers finds on the Hub."""
        if not self.is_single_file:
            return self.options.pretrained_model_config
        return self.options.pretrained_model_config or self.file.configs_beside

    def scheduler_marks(self) -> dict[str, object]:
        """Returns what a single file says about its noise schedule; empty for a folder, whose config says it."""
        return self.file.scheduler_marks if self.is_single_file else {}

    def index(self) -> dict:
        """Returns the pipeline's `model_index.json`."""
        return read_config(index_file(self.path, self.options.revision, "--pretrained_model"), "--pretrained_model")

    def config(self, part: str) -> dict | None:
        """Returns a component's config (unet, vae, scheduler, ...) without loading weights.

        None for a component of a single file whose config is on the Hub.

        Raises:
            UserError: if the config is missing or invalid.
        """

        # Where the config is, and the flag that names the place: a single component's, or the pipeline's.
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        root, flag, revision = self.path, "--pretrained_model", self.options.revision
        if part == "unet" and self.options.unet_config is not None:
            return read_config(Path(self.options.unet_config), "--unet_config")
        given_vae = self.options.pretrained_vae_model_name_or_path
        if part == "vae" and given_vae is not None and not _is_file(given_vae):
            root, revision = given_vae, None
            flag = "--pretrained_vae_model_name_or_path"
            if not (Path(root) / "vae").is_dir():
                part = ""
        elif self.is_single_file:
            is_given = self.options.pretrained_model_config is not None
            root, flag, revision = self.config_root, CONFIG_FLAG if is_given else flag, None
        if root is None:
            return None
        if is_path(root) and not Path(root).is_dir():
            raise UserError(f"{flag} {root} does not exist")

        # Read it. Quantization is not refused where only configs are taken from a folder.
        found = read_config_file(root, str(PurePosixPath(part, file)), revision, flag)
        if not self.is_single_file or root != self.config_root:
            refuse_quantized(found, f"{flag} {root}: {PurePosixPath(part, file)}")
        return found

    def load(self, family: "type[Family]", dtypes: ComponentDtypes) -> "DiffusionPipeline":
        """Loads a family's pipeline for training and sampling, on the CPU, without safety checker and image encoder."""
        pipeline_class = family.pipeline_class()
        parts: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        parts = {name: part for name, part in parts.items() if name in pipeline_class._optional_components}
        if "requires_safety_checker" in pipeline_class.__init__.__annotations__:
            parts["requires_safety_checker"] = False
        parts |= self._own_parts(dtypes)
        if self.is_single_file:
            pipeline = self._load_single_file(pipeline_class, parts)
            for name in family.text_encoder_names:
                getattr(pipeline, name).to(dtypes.text_encoders)
            getattr(pipeline, family.denoiser_name).to(dtypes.denoiser)
            pipeline.vae.to(dtypes.frozen)
            return pipeline
        by_name = dict.fromkeys(family.text_encoder_names, dtypes.text_encoders)
        by_name |= {family.denoiser_name: dtypes.denoiser, "default": dtypes.frozen}
        return self._load_folder(pipeline_class, by_name, parts)

    def load_whole(self, pipeline_class: "type[DiffusionPipeline]", **parts: Any) -> "DiffusionPipeline":
        """Loads the pipeline with all its components, in float32, with some replaced by `parts`."""
        float32 = ComponentDtypes(torch.float32, torch.float32, torch.float32)
        replaced = self._own_parts(float32, with_denoiser="unet" not in parts) | parts
        if self.is_single_file:
            return self._load_single_file(pipeline_class, replaced).to(torch.float32)
        return self._load_folder(pipeline_class, {"default": torch.float32}, replaced)

    def folder(self, pipeline_class: "type[DiffusionPipeline]") -> Path | None:
        """Returns the pipeline's folder, downloaded completely if it is on the Hub; None for a single file."""
        from huggingface_hub.errors import HTTPError

        if self.is_single_file or Path(self.path).is_dir():
            return None if self.is_single_file else Path(self.path)
        options = self.options
        try:
            return Path(
                pipeline_class.download(
                    self.path,
                    revision=options.revision,
                    variant=options.variant,
                    use_safetensors=options.use_safetensors,
                )
            )
        except (HTTPError, *LOADING_ERRORS) as error:
            raise UserError(f"--pretrained_model {self.path} can't be downloaded: {first_line(error)}") from error

    def vae_folder(self) -> Path | None:
        """Returns the local folder of a VAE that replaces the pipeline's own; None if there is none."""
        path = self.options.pretrained_vae_model_name_or_path
        folders = [] if path is None else [Path(path, "vae"), Path(path)]
        return next((folder for folder in folders if (folder / "config.json").is_file()), None)

    def _own_parts(self, dtypes: ComponentDtypes, with_denoiser: bool = True) -> dict[str, nn.Module]:
        """Loads the components that do not come from the pipeline."""
        from diffusers import UNet2DConditionModel

        options, parts = self.options, {}
        if options.pretrained_vae_model_name_or_path is not None:
            parts["vae"] = self._load_vae(options.pretrained_vae_model_name_or_path, dtypes.frozen)
        if with_denoiser and options.unet_config is not None:
            parts["unet"] = _fresh_unet(options.unet_config).to(dtypes.denoiser)
        elif with_denoiser and options.non_ema_revision is not None:
            parts["unet"] = load_module(
                UNet2DConditionModel,
                self.path,
                f"--non_ema_revision {options.non_ema_revision}: unet",
                "unet",
                dtypes.denoiser,
                subfolder="unet",
                revision=options.non_ema_revision,
                use_safetensors=options.use_safetensors,
            )
        return parts

    def _load_vae(self, path: str, dtype: torch.dtype) -> nn.Module:
        """Loads the VAE that replaces the pipeline's; a single file without a config uses the pipeline's."""
        from diffusers import AutoencoderKL

        flag = "--pretrained_vae_model_name_or_path"
        if _is_file(path):
            own = Path(path).with_name("config.json").is_file()
            root = str(Path(path).parent) if own else self.config_root
            if root is None and not self.is_single_file:
                root = self.path
            return SingleFile.read(Path(path), flag).load_vae(root, None if own else "vae", dtype)
        subfolder = "vae" if (Path(path) / "vae" / "config.json").is_file() else None
        what = f"{flag} {path}"
        return load_module(
            AutoencoderKL,
            path,
            what,
            "vae",
            dtype,
            subfolder=subfolder,
            variant=variant_of(Path(path, subfolder or ""), self.options.variant, what),
            use_safetensors=self.options.use_safetensors,
        )

    def _load_folder(
        self, pipeline_class: "type[DiffusionPipeline]", dtypes: Mapping[str, torch.dtype], given: Mapping[str, Any]
    ) -> "DiffusionPipeline":
        options = self.options
        return load_pipeline_folder(
            pipeline_class,
            self.path,
            f"--pretrained_model {self.path}",
            dtypes,
            Download(options.revision, options.variant, options.use_safetensors),
            given,
        )

    def _load_single_file(self, pipeline_class: "type[DiffusionPipeline]", parts: dict) -> "DiffusionPipeline":
        # diffusers takes None for a missing component; leaving it out has the same effect
        given = {name: part for name, part in parts.items() if part is not None}
        return self.file.load(pipeline_class, self.config_root, given)


def _is_file(name: str) -> bool:
    """Whether a name is that of a single weight file."""
    return Path(name).suffix in (".safetensors", *PICKLES) and not Path(name).is_dir()


def check_weight_files(
    folder: Path,
    index: Mapping[str, Any],
    flag: str,
    options: PartOptions,
    replaced: Collection[str] = (),
) -> None:
    """Refuses a local pipeline with a component whose weights are only pickles, or only of another variant.

    Args:
        folder: folder of the pipeline.
        index: content of its `model_index.json`.
        flag: the option and its value that name the folder, for messages.
        options: options that choose the variant and allow pickles.
        replaced: names of components that come from elsewhere.
    """
    for name, entry in index.items():
        part = folder / name
        if name in replaced or not isinstance(entry, list) or not any(entry) or not part.is_dir():
            continue
        variant_of(part, options.variant, f"{flag}: {name}")
        if (part / "config.json").is_file():
            config = read_config(part / "config.json", flag.partition(" ")[0])
            refuse_quantized(config, f"{flag}: {name}/config.json")
        pickles = [file.name for suffix in PICKLES for file in part.glob(f"*{suffix}")]
        if pickles and not options.allow_pickle and not list(part.glob("*.safetensors")):
            raise UserError(
                f"{flag}: {name}/{pickles[0]} needs unpickling, which can run code; convert the pipeline with "
                "save_pretrained(..., safe_serialization=True), or give --allow_pickle"
            )


def _fresh_unet(config_file: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    try:
        return UNet2DConditionModel.from_config(read_config(Path(config_file), "--unet_config"))
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(
            f"--unet_config {config_file} is not a valid UNet2DConditionModel: {first_line(error)}"
        ) from error
