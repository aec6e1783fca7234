"""Unconditional and class-conditional model families, in pixels or in the latents of a VAE."""

import inspect
import json
import logging
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from utils.config.batch import Conditioning
from utils.config.options import UserError, first_line, require
from utils.data.class_labels import ClassNumbers, class_numbers, listed_numbers, plain_name
from utils.diffusion.options import ProcessOptions
from utils.diffusion.process import EVERY_PROCESS, check_changes, is_flow, shift_of
from utils.diffusion.samplers import changed_scheduler, exported, sampler_of, warn_of_own_sampler
from utils.models.base import Family, TextStates, fitting_steps
from utils.models.folder_form import FLOAT32, FolderForm
from utils.models.from_scratch import CLASS_SLOTS, SMALLEST_LEVEL, make_denoiser, transformer_config, unet_config
from utils.models.latent_space import LatentSpace, PixelSpace, ReciprocalSpace, ScaledSpace
from utils.models.loading import Download, load_module, load_pipeline_folder, variant_of
from utils.models.options import UnconditionalModelOptions
from utils.models.pipeline_files import copy_part
from utils.models.pipeline_source import check_weight_files
from utils.models.weight_files import loaded_files
from utils.runtime.atomic_files import write_text
from utils.runtime.hub_files import (
    class_name_of,
    index_file,
    read_config,
    read_config_file,
    refuse_quantized,
    require_model,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
CODERS = ("AutoencoderKL", "VQModel")


@dataclass(frozen=True)
class Wanted:
    """What a model is trained for.

    Attributes:
        edge: edge of the square images in pixels, which the exported pipeline will generate.
        channels: number of channels of the images.
        classes: names of the classes, in the order of their numbers; empty without classes.
        is_square: whether all training images have that size.
    """

    edge: int
    channels: int
    classes: tuple[str, ...] = ()
    is_square: bool = True


class UnconditionalFamily(Family):
    """A pipeline without text conditioning.

    Attributes:
        classes: names of the data's classes, by number.
        names: names of all classes of the exported pipeline, by number.
        noisy_name: the denoiser's argument for its noisy input.
        measures_scaling: whether the scaling of its latents must still be measured on the data.
        added_classes: numbers of the data's classes by name, if some were added to those of a pretrained pipeline.
    """

    default_resolution = 64
    default_output_dir = "ddpm-model-64"
    default_validation_epochs = 10
    noisy_name = "sample"
    coder_names: ClassVar[tuple[str, ...]] = ()
    process_kinds = EVERY_PROCESS
    has_classes = False

    def __init__(
        self,
        options: UnconditionalModelOptions,
        noise: ProcessOptions,
        wanted: Wanted,
        dtype: torch.dtype,
        coder_dtype: torch.dtype,
        sampler: str | None,
    ):
        """Args:
        options: options of the model.
        noise: options of the noise schedule.
        wanted: what the model is trained for.
        dtype: dtype of the denoiser.
        coder_dtype: dtype of the VAE.
        sampler: the requested sampler, which the exported pipeline keeps if possible.
        """
        # Components and scheduler: from scratch, or those of a pretrained pipeline.
        self.measures_scaling = False
        known: dict[int, str] = {}  # names of a pretrained pipeline's classes
        self._coder_dtype = coder_dtype
        if options.pretrained_model_name_or_path is None:
            parts = self._fresh_parts(options, wanted)
            scheduler = self._exported(fresh_scheduler(noise, clips=not self.coder_names), sampler)
        else:
            pipeline = load_pipeline(self.pipeline_class(), options)
            parts = {name: pipeline.components[name] for name in (self.denoiser_name, *self.coder_names)}
            self._resize(parts[self.denoiser_name], wanted)
            check_changes(noise, pipeline.scheduler)
            scheduler = changed_scheduler(pipeline.scheduler, noise.scheduler_changes)
            if noise.flow_matching and not is_flow(scheduler):
                scheduler = self._exported(fresh_scheduler(noise, clips=False), sampler)
            known = listed_names(options)
        scheduler = exported(scheduler)

        # Classes: numbers for the data's classes, names for the exported pipeline's.
        self._numbers = self._numbered(wanted.classes, known, parts[self.denoiser_name]) if wanted.classes else {}
        self.names = self._exported_names(known)
        self.classes = {number: self.names[number] for number in sorted(set(self._numbers.values()))}
        # earlier versions numbered all classes anew instead of adding to the known ones
        anew = {name: number for number, name in enumerate(wanted.classes)}
        is_new = bool(known) and not set(self._numbers) <= set(self._by_name(known)) and self._numbers != anew
        self.added_classes = self._numbers if is_new else {}

        # Pipeline.
        for name, part in parts.items():
            wanted_dtype = dtype if name == self.denoiser_name else coder_dtype
            if part.dtype != wanted_dtype:
                part.to(wanted_dtype)
        self._check(parts, wanted)
        pipeline = self._pipeline(scheduler, **parts)
        if self.classes:  # during training the pipeline samples only the data's classes
            pipeline.labels = {name: number for number, name in self.classes.items()}
        warn_of_own_sampler(scheduler, sampler)
        super().__init__(pipeline, self._space(parts), options)

    @classmethod
    def check_before_loading(cls, options: UnconditionalModelOptions, has_classes: bool) -> None:
        """Refuses classes for an unconditional pipeline, and a class-conditional pipeline without classes."""
        name = options.pretrained_model_name_or_path
        if has_classes and not cls.has_classes:
            raise UserError(f"--class_conditional: {name} ({cls.pipeline_class_name}) has no classes; leave one out")
        if cls.has_classes and not has_classes:
            raise UserError(f"{name} ({cls.pipeline_class_name}) is class-conditional; add --class_conditional")

    @classmethod
    def check_shape(cls, options: UnconditionalModelOptions, wanted: Wanted) -> None:
        """Refuses a shape of a denoiser from scratch that does not fit the images, before loading anything."""
        unet_config(options, wanted.edge, wanted.channels, 1 if cls.has_classes else None)

    @abstractmethod
    def _space(self, parts: Mapping[str, nn.Module]) -> LatentSpace:
        """Returns the space in which the model denoises."""

    def _fresh_parts(self, options: UnconditionalModelOptions, wanted: Wanted) -> dict[str, nn.Module]:
        """Creates the denoiser, and loads the other components, for a model from scratch."""
        config = unet_config(options, wanted.edge, wanted.channels, len(wanted.classes) if self.has_classes else None)
        return {"unet": make_denoiser("UNet2DModel", config, options.weight_init)}

    def _resize(self, denoiser: nn.Module, wanted: Wanted) -> None:
        """Sets the image size that a pretrained pipeline will generate."""
        edge = wanted.edge
        levels = len(denoiser.config.block_out_channels)
        require(edge % 2 ** (levels - 1) == 0, "resolution", edge, f"be divisible by {2 ** (levels - 1)} for this UNet")
        if denoiser.config.sample_size != edge:
            logger.info("the pipeline's sample_size was %s, the result's will be %d", denoiser.config.sample_size, edge)
            least = edge // 2 ** (levels - 1)
            if least < SMALLEST_LEVEL:
                said = "its last level is then %dx%d, under %dx%d; a larger --resolution is closer to its pretraining"
                logger.warning(said, least, least, SMALLEST_LEVEL, SMALLEST_LEVEL)
            denoiser.register_to_config(sample_size=edge)

    def _numbered(self, names: Sequence[str], known: Mapping[int, str], denoiser: nn.Module) -> dict[str, int]:
        """Returns the numbers of the data's classes by name; classes of a pretrained pipeline keep theirs."""
        return class_numbers(names, self._by_name(known), self._slots(denoiser))

    def _slots(self, denoiser: nn.Module) -> int:
        """Returns the number of classes that the denoiser supports."""
        return 0

    @staticmethod
    def _by_name(known: Mapping[int, str]) -> dict[str, int]:
        """Returns the numbers of a pretrained pipeline's classes by name."""
        return {name: number for number, name in known.items()}

    def _exported_names(self, known: Mapping[int, str]) -> dict[int, str]:
        """Returns the names of all classes of the exported pipeline, by number."""
        return dict(sorted(({number: name for name, number in self._numbers.items()} | dict(known)).items()))

    def _check(self, parts: Mapping[str, nn.Module], wanted: Wanted) -> None:
        """Refuses components that do not fit the images."""
        config = parts[self.denoiser_name].config
        seen, given = config.in_channels, wanted.channels
        require(seen == given, "image_channels", given, f"be {seen} for this denoiser")
        self._check_output(config)

    @staticmethod
    def _check_output(config: Any) -> None:
        """Refuses a denoiser whose outputs do not match its inputs; twice as many include a learned variance."""
        seen, made = config.in_channels, config.out_channels or config.in_channels
        if made == 2 * seen:
            logger.warning(
                "the denoiser has %d output channels; the last %d, its learned variance, are not trained", made, seen
            )
        elif made != seen:
            raise UserError(
                f"the denoiser has {made} output channels for {seen} input channels; it must have {seen} or {2 * seen}"
            )

    def _pipeline(self, scheduler: Any, **parts: nn.Module) -> "DiffusionPipeline":
        return self.pipeline_class()(scheduler=scheduler, **parts)

    def _exported(self, scheduler: Any, sampler: str | None) -> Any:
        """Returns the scheduler that the exported pipeline keeps."""
        return scheduler

    def tokenizer(self) -> ClassNumbers:
        """Returns a map of class names to numbers, for the loader's workers."""
        return ClassNumbers(self._numbers, self._no_class)

    @property
    def _no_class(self) -> int:
        return 0

    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """Returns an empty dict: there is no text."""
        return {}

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """Returns False: there are no text encoders."""
        return False

    @property
    def text_dtype(self) -> torch.dtype:
        """The dtype of text embeddings, of which there are none."""
        return torch.float32

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the denoiser's prediction [B, C, h, w], without a learned variance; the crops are not used."""
        return denoiser(noisy, timesteps, **conditioning.states).sample[:, : noisy.shape[1]]

    def float32_pipeline(self, **parts: nn.Module) -> "DiffusionPipeline":
        """Returns the pipeline with some components replaced, and its VAE in float32."""
        return self._pipeline(self.pipeline.scheduler, **self._float32_coders(), **parts)

    def _float32_coders(self) -> dict[str, nn.Module]:
        """Returns the VAE in float32 by its name in the pipeline; empty if there is none."""
        return {}

    def as_exported(self) -> "DiffusionPipeline":
        """See `Family.as_exported`; a DDIMPipeline is exported as a DDPMPipeline."""
        return self.float32_pipeline(**{self.denoiser_name: self.denoiser})

    def probe(self, pipeline: "DiffusionPipeline") -> np.ndarray:
        """Draws an image, of the first class if there are classes, in two steps."""
        arguments = {"class_labels": [min(self.classes)]} if self.has_classes else {"batch_size": 1}
        given = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        return pipeline(**arguments, **given).images[0]

    def draw(
        self, seeds: Sequence[int], labels: Sequence[int], scheduler: Any, steps: int, guidance: float, eta: float
    ) -> list[Image.Image]:
        """Samples an image for each seed, as the exported pipeline does.

        Args:
            seeds: a seed for each image.
            labels: a class number for each image; empty without classes.
            scheduler: any scheduler of diffusers that supports the model's prediction type.
            steps: number of denoising steps.
            guidance: classifier-free guidance scale, if above 1.
            eta: fraction of fresh noise per step, for schedulers that support it.
        """
        latents = self._denoise(seeds, labels, scheduler, steps, guidance, eta)
        images = (self.latent_space.pictures(latents) / 2 + 0.5).clamp(0, 1)
        return self.pipeline.numpy_to_pil(images.float().cpu().permute(0, 2, 3, 1).numpy())

    @torch.no_grad()
    def _denoise(
        self, seeds: Sequence[int], labels: Sequence[int], scheduler: Any, steps: int, guidance: float, eta: float
    ) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        # Initial noise, one generator per image.
        unet, edge = self.denoiser, self.denoiser.config.sample_size
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (len(seeds), unet.config.in_channels, *((edge, edge) if isinstance(edge, int) else edge))
        latents = randn_tensor(shape, generator=generators, device=unet.device, dtype=torch.float32)
        scheduler.set_timesteps(steps, device=unet.device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)

        # Inputs of the denoiser and of the scheduler's steps.
        states = self._states_of(labels, guidance, unet.device)
        known = inspect.signature(scheduler.step).parameters
        extra = {name: value for name, value in (("eta", eta), ("generator", generators)) if name in known}
        reads_variance = str(vars(scheduler).get("variance_type")).startswith("learned")

        # Denoising.
        for t in scheduler.timesteps:
            seen = torch.cat([latents] * (2 if guidance > 1 and states else 1))
            if hasattr(scheduler, "scale_model_input"):
                seen = scheduler.scale_model_input(seen, t)
            output = unet(seen, t.expand(len(seen)), **states).sample.float()
            if not reads_variance:  # drop a learned variance, which follows the prediction
                output = output[:, : shape[1]]
            if guidance > 1 and states:
                with_class, without = output.chunk(2)
                output = without + guidance * (with_class - without)
            latents = scheduler.step(output, t, latents, **extra).prev_sample
        return latents

    def _states_of(self, labels: Sequence[int], guidance: float, device: torch.device) -> TextStates:
        return {}

    def example_call(self) -> str:
        """Returns Python code that calls the pipeline, for the model card."""
        return f"pipeline({', '.join(self._example_arguments())})"

    def _example_arguments(self) -> list[str]:
        steps = fitting_steps(self.pipeline)
        return [] if steps is None else [f"num_inference_steps={steps}"]


class Pixels(UnconditionalFamily):
    """A UNet on pixels (Ho et al. 2020)."""

    pipeline_class_name = "DDPMPipeline"

    def _space(self, parts: Mapping[str, nn.Module]) -> LatentSpace:
        return PixelSpace(parts["unet"].config.in_channels)


class ImplicitPixels(Pixels):
    """A UNet on pixels, sampled by DDIM (Song et al. 2021).

    A DDIMPipeline takes inconsistent steps unless its call asks otherwise, so the result is a DDPMPipeline with a
    DDIM scheduler.
    """

    pipeline_class_name = "DDIMPipeline"

    def _exported(self, scheduler: Any, sampler: str | None) -> Any:
        if is_flow(scheduler):
            raise UserError("--flow_matching: a DDIMPipeline only samples by DDIM; leave it out")
        return sampler_of(scheduler, "ddim")

    def _pipeline(self, scheduler: Any, **parts: nn.Module) -> "DiffusionPipeline":
        from diffusers import DDIMScheduler, DDPMPipeline

        if isinstance(scheduler, DDIMScheduler):
            return super()._pipeline(scheduler, **parts)
        return DDPMPipeline(scheduler=scheduler, **parts)


class Score(Pixels):
    """A variance-exploding score model (Song et al. 2021, section 3.4), on pixels in [0, 1]."""

    pipeline_class_name = "ScoreSdeVePipeline"

    def _space(self, parts: Mapping[str, nn.Module]) -> LatentSpace:
        return PixelSpace(parts["unet"].config.in_channels, low=0.0)

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns sigma times the score, about -epsilon for any sigma; the timesteps are the sigmas."""
        return denoiser(noisy, timesteps).sample * timesteps.view(-1, 1, 1, 1)

    def draw(
        self, seeds: Sequence[int], labels: Sequence[int], scheduler: Any, steps: int, guidance: float, eta: float
    ) -> list[Image.Image]:
        """Samples with the pipeline's own predictor and corrector."""
        self.pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.pipeline(batch_size=len(seeds), num_inference_steps=steps, generator=generators).images


class ClassLabelled(UnconditionalFamily):
    """A pipeline whose denoiser is conditioned on a class number, one of which means no class."""

    has_classes = True

    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """Returns {"class_labels": [B] int64}."""
        return {"class_labels": torch.where(dropped, self._no_class, input_ids[:, 0, 0])}

    def _example_arguments(self) -> list[str]:
        """Returns arguments for an image of the first class."""
        return [f"[{min(self.classes)}]", *super()._example_arguments()]

    def _states_of(self, labels: Sequence[int], guidance: float, device: torch.device) -> TextStates:
        numbers = torch.tensor(labels, device=device)
        if guidance > 1:
            numbers = torch.cat([numbers, torch.full_like(numbers, self._no_class)])
        return {"class_labels": numbers}


class LabelledPixels(ClassLabelled, Pixels):
    """A class-conditional UNet on pixels."""

    pipeline_class_name = "ConditionalDDPMPipeline"

    @classmethod
    def pipeline_class(cls) -> "type[DiffusionPipeline]":
        """Returns this toolkit's pipeline class, which is saved with the weights."""
        from utils.models.conditional_ddpm import ConditionalDDPMPipeline

        return ConditionalDDPMPipeline

    def _pipeline(self, scheduler: Any, **parts: nn.Module) -> "DiffusionPipeline":
        return self.pipeline_class()(scheduler=scheduler, id2label=self.names, **parts)

    def _exported(self, scheduler: Any, sampler: str | None) -> Any:
        return sampler_of(scheduler, "ddim") if sampler == "ddim" else scheduler

    def _slots(self, denoiser: nn.Module) -> int:
        return (denoiser.config.num_class_embeds or 1) - 1

    @property
    def _no_class(self) -> int:
        return self.denoiser.config.num_class_embeds - 1

    def save_pipeline(self, folder: Path, form: FolderForm = FLOAT32, **parts: nn.Module) -> None:
        """Writes the pipeline together with its code."""
        super().save_pipeline(folder, form, **parts)
        shutil.copyfile(Path(__file__).with_name("conditional_ddpm.py"), Path(folder) / "pipeline.py")


class Latents(UnconditionalFamily):
    """A UNet on the latents of a VAE (Rombach et al. 2022)."""

    pipeline_class_name = "LDMPipeline"
    coder_names: ClassVar[tuple[str, ...]] = ("vqvae",)

    def _fresh_parts(self, options: UnconditionalModelOptions, wanted: Wanted) -> dict[str, nn.Module]:
        coder = self._load_coder(options)
        config = unet_config(options, self._latent_edge(coder.config, wanted), coder.config.latent_channels, None)
        return {"unet": make_denoiser("UNet2DModel", config, options.weight_init), self.coder_names[0]: coder}

    def _load_coder(self, options: UnconditionalModelOptions) -> nn.Module:
        coder, has_scaling = load_coder(options.vae, options.use_safetensors)
        self.measures_scaling = not has_scaling
        return coder

    @classmethod
    def check_shape(cls, options: UnconditionalModelOptions, wanted: Wanted) -> None:
        """Refuses a shape of a denoiser from scratch that does not fit the VAE's latents."""
        config, _ = coder_config(options.vae)
        cls._check_latents(options, cls._latent_edge(config, wanted), config.get("latent_channels", 4))

    @staticmethod
    def _check_latents(options: UnconditionalModelOptions, edge: int, channels: int) -> None:
        unet_config(options, edge, channels, None)

    @staticmethod
    def _latent_edge(config: Mapping, wanted: Wanted) -> int:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        below = wanted.edge - wanted.edge % factor
        cure = f"try {below or factor} or {below + factor}"
        require(wanted.edge % factor == 0, "resolution", wanted.edge, f"be divisible by {factor} for this VAE", cure)
        return wanted.edge // factor

    def _resize(self, denoiser: nn.Module, wanted: Wanted) -> None:
        pass  # the latents' size depends on the VAE, so `_check` sets it

    def _check(self, parts: Mapping[str, nn.Module], wanted: Wanted) -> None:
        denoiser, coder = parts[self.denoiser_name], parts[self.coder_names[0]]
        require(wanted.channels == 3, "image_channels", wanted.channels, "be 3 with a VAE")
        seen, given = denoiser.config.in_channels, coder.config.latent_channels
        if seen != given:
            raise UserError(f"the denoiser takes {seen} channels but the VAE's latents have {given}")
        self._check_output(denoiser.config)
        self._say_what_is_left_out(coder.config)
        edge = self._latent_edge(coder.config, wanted)
        if denoiser.config.sample_size != edge:
            super()._resize(denoiser, Wanted(edge, given))

    def _say_what_is_left_out(self, config: Mapping) -> None:
        """Warns about settings in a VAE's config that the pipeline ignores."""
        given = [name for name in ("shift_factor", "latents_mean", "latents_std") if config.get(name)]
        if given:
            logger.warning(
                "the VAE's %s: ignored in training, as a %s ignores it when decoding; its latents are only scaled",
                *(", ".join(given), self.pipeline_class_name),
            )

    def _exported(self, scheduler: Any, sampler: str | None) -> Any:
        """Returns a scheduler that samples the same image each time: the pipeline passes no generator to its steps.

        diffusers' flow-matching schedulers lack attributes that the pipeline needs. DPM-Solver of order 1 takes Euler
        steps too, but at other times: it starts at 1 - 1/T, spaces times evenly down to 0, and passes integer timesteps
        to the model, while `FlowMatchEulerDiscreteScheduler` starts at 1 and ends at 1/T.
        """
        from diffusers import DPMSolverMultistepScheduler

        if not is_flow(scheduler):
            return sampler_of(scheduler, "ddim")
        return DPMSolverMultistepScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=shift_of(scheduler.config),
            solver_order=1,
        )

    def _space(self, parts: Mapping[str, nn.Module]) -> LatentSpace:
        return ScaledSpace(parts[self.coder_names[0]])

    def rescale(self, factor: float) -> None:
        """Sets the measured scaling factor of the latents."""
        self.latent_space.rescale(factor)
        self.measures_scaling = False

    def save_pipeline(self, folder: Path, form: FolderForm = FLOAT32, **parts: nn.Module) -> None:
        """Writes the pipeline; the VAE's files are copied from the base if possible, except a measured scaling."""
        super().save_pipeline(folder, form, **parts)
        if not form.is_plain:
            return
        name, options, source = self.coder_names[0], self.options, self._coder_folder()
        coder, config = getattr(self.pipeline, name), folder / name / "config.json"
        ours = read_config(config, "the VAE that was saved")
        if copy_part(name, type(coder).__name__, source, folder / name, variant=options.variant):
            theirs = read_config(config, "the VAE that was copied")
            if theirs.get("scaling_factor") != ours.get("scaling_factor"):
                write_text(config, json.dumps(ours, indent=2, sort_keys=True) + "\n")

    def _coder_folder(self) -> Path:
        """Returns the folder of the VAE's files, if they are local."""
        options = self.options
        if options.vae is None:
            return Path(options.pretrained_model_name_or_path, self.coder_names[0])
        is_local = Path(options.vae).is_dir()
        return Path(options.vae, (coder_config(options.vae)[1] or "") if is_local else "")

    def base_files(self, name: str) -> list[Path]:
        """See `Family.base_files`."""
        options = self.options
        variant = options.variant if options.vae is None else None
        return loaded_files(self._coder_folder(), variant, options.use_safetensors) if name in self.coder_names else []

    def _float32_coders(self) -> dict[str, nn.Module]:
        name, options = self.coder_names[0], self.options
        own = getattr(self.pipeline, name)
        if self._coder_dtype == torch.float32:
            return {name: own}
        if options.vae is not None:
            coder, _ = load_coder(options.vae, options.use_safetensors)
        else:
            coder = load_pipeline(self.pipeline_class(), options).components[name]
        coder.register_to_config(scaling_factor=own.config.scaling_factor)
        return {name: coder}


class LabelledLatents(ClassLabelled, Latents):
    """A class-conditional transformer on latents (DiT, Peebles and Xie 2023)."""

    pipeline_class_name = "DiTPipeline"
    denoiser_name = "transformer"
    noisy_name = "hidden_states"
    coder_names: ClassVar[tuple[str, ...]] = ("vae",)

    def _fresh_parts(self, options: UnconditionalModelOptions, wanted: Wanted) -> dict[str, nn.Module]:
        coder = self._load_coder(options)
        config = transformer_config(options, self._latent_edge(coder.config, wanted), coder.config.latent_channels)
        return {"transformer": make_denoiser("DiTTransformer2DModel", config, options.weight_init), "vae": coder}

    @staticmethod
    def _check_latents(options: UnconditionalModelOptions, edge: int, channels: int) -> None:
        transformer_config(options, edge, channels)

    def _check(self, parts: Mapping[str, nn.Module], wanted: Wanted) -> None:
        if not wanted.is_square:
            raise UserError("--use_aspect_ratio_buckets: a DiT only supports square images; leave it out")
        edge, drawn = self._latent_edge(parts["vae"].config, wanted), parts["transformer"].config.sample_size
        factor = wanted.edge // edge
        require(
            edge == drawn,
            "resolution",
            wanted.edge,
            f"be {drawn * factor}, the only size of this transformer",
        )
        super()._check(parts, wanted)
        for module in parts["transformer"].modules():
            if hasattr(module, "dropout_prob"):  # each block would drop labels by itself; the loader drops them for all
                module.dropout_prob = 0.0

    def _slots(self, denoiser: nn.Module) -> int:
        return CLASS_SLOTS

    @staticmethod
    def _by_name(known: Mapping[int, str]) -> dict[str, int]:
        return listed_numbers(known)

    def _exported_names(self, known: Mapping[int, str]) -> dict[int, str]:
        """Returns names that the pipeline can tell apart, which ends a name at a comma."""
        names = super()._exported_names(known)
        for number in names.keys() - known.keys():
            name, names[number] = names[number], plain_name(names[number])
            if names[number] != name:
                said = "the class %r is called %r in the result, because a DiTPipeline lists names by commas"
                logger.warning(said, name, names[number])
        taken: dict[str, int] = {}
        for number in sorted(names.keys() - known.keys()):
            other = taken.setdefault(names[number], number)
            if other != number or not names[number]:
                raise UserError(
                    f"--class_conditional: a DiTPipeline can't tell two classes called {names[number]!r} apart, after "
                    "replacing commas and stripping spaces around names; rename one of them"
                )
        return names

    def _pipeline(self, scheduler: Any, **parts: nn.Module) -> "DiffusionPipeline":
        pipeline = super()._pipeline(scheduler, id2label=self.names, **parts)
        pipeline.register_to_config(id2label={str(number): name for number, name in self.names.items()})
        return pipeline

    def _space(self, parts: Mapping[str, nn.Module]) -> LatentSpace:
        return ReciprocalSpace(parts["vae"])

    @property
    def _no_class(self) -> int:
        return CLASS_SLOTS


FRESH_FAMILIES: dict[tuple[bool, bool], type[UnconditionalFamily]] = {
    (False, False): Pixels,
    (False, True): LabelledPixels,
    (True, False): Latents,
    (True, True): LabelledLatents,
}
"""Families for training from scratch, by (has a VAE, has classes)."""
PRETRAINED_FAMILIES: dict[str, type[UnconditionalFamily]] = {
    family.pipeline_class_name: family
    for family in (Pixels, ImplicitPixels, Score, LabelledPixels, Latents, LabelledLatents)
}


def pick_unconditional(
    options: UnconditionalModelOptions, has_classes: bool, sampler: str | None
) -> type[UnconditionalFamily]:
    """Returns the family to train, from the pretrained pipeline's `model_index.json` or the options.

    Raises:
        UserError: if there is no such pipeline, or its class is not supported.
    """
    name = options.pretrained_model_name_or_path
    if name is None:
        family = FRESH_FAMILIES[options.vae is not None, has_classes]
        return ImplicitPixels if family is Pixels and sampler == "ddim" else family
    path = Path(name)
    require_model("pretrained_model", name, "give a pipeline folder or a Hub name")
    index = read_config(index_file(name, options.revision, "--pretrained_model"), "--pretrained_model")
    class_name = class_name_of(index)
    if class_name not in PRETRAINED_FAMILIES:
        raise UserError(f"--pretrained_model {name} is a {class_name}; supported are {', '.join(PRETRAINED_FAMILIES)}")
    if path.is_dir():
        check_weight_files(path, index, f"--pretrained_model {path}", options)
    PRETRAINED_FAMILIES[class_name].check_before_loading(options, has_classes)
    return PRETRAINED_FAMILIES[class_name]


def default_edge(options: UnconditionalModelOptions, family: type[UnconditionalFamily]) -> int:
    """Returns the default edge of images: that of a pretrained pipeline, or 64."""
    name = options.pretrained_model_name_or_path
    if name is None:
        return family.default_resolution
    parts = (family.denoiser_name, *family.coder_names)
    configs = [read_config_file(name, f"{part}/config.json", options.revision, "--pretrained_model") for part in parts]
    size = configs[0].get("sample_size")
    factor = 2 ** (len(configs[-1].get("block_out_channels") or [64]) - 1) if family.coder_names else 1
    return size * factor if isinstance(size, int) else family.default_resolution


def load_pipeline(pipeline_class: "type[DiffusionPipeline]", options: UnconditionalModelOptions) -> "DiffusionPipeline":
    """Loads the pretrained pipeline in float32, on the CPU."""
    name = options.pretrained_model_name_or_path
    return load_pipeline_folder(
        pipeline_class,
        name,
        f"--pretrained_model {name}",
        {"default": torch.float32},
        Download(options.revision, options.variant, options.use_safetensors),
        given={},
    )


def listed_names(options: UnconditionalModelOptions) -> dict[int, str]:
    """Returns the names of a pretrained pipeline's classes by number, from its `model_index.json`."""
    name, flag = options.pretrained_model_name_or_path, "--pretrained_model"
    found = read_config(index_file(name, options.revision, flag), flag).get("id2label")
    try:
        return {int(number): str(label) for number, label in (found or {}).items()}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{flag} {name}: id2label must map numbers to names: {first_line(error)}") from error


def coder_config(name: str) -> tuple[dict, str | None]:
    """Returns (a VAE's config, its subfolder if the folder is a pipeline's, else None).

    Raises:
        UserError: if there is none, or its class is not supported.
    """
    subfolder = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
    require_model("vae", name, "give the folder or Hub name of a VAE")
    config = read_config_file(name, f"{subfolder}/config.json" if subfolder else "config.json", None, "--vae")
    class_name = config.get("_class_name")
    if class_name not in CODERS:
        raise UserError(f"--vae {name} is a {class_name}; supported are {', '.join(CODERS)}")
    refuse_quantized(config, f"--vae {name}: config.json")
    return config | {"block_out_channels": config.get("block_out_channels") or [64]}, subfolder


def load_coder(name: str, use_safetensors: bool | None) -> tuple[nn.Module, bool]:
    """Loads a VAE in float32; returns it, and whether its config has a scaling factor."""
    import diffusers

    config, subfolder = coder_config(name)
    kind, what = getattr(diffusers, config["_class_name"]), f"--vae {name}"
    variant_of(Path(name, subfolder or ""), None, what)
    coder = load_module(kind, name, what, "vae", torch.float32, subfolder=subfolder, use_safetensors=use_safetensors)
    has_scaling = config.get("scaling_factor") is not None
    if not has_scaling:
        coder.register_to_config(scaling_factor=1.0)  # until it is measured; the config may have null
    return coder, has_scaling


def fresh_scheduler(noise: ProcessOptions, clips: bool) -> Any:
    """Creates the scheduler of a model from scratch.

    Args:
        noise: options of the noise schedule.
        clips: whether to clip the predicted clean sample to [-1, 1], as for pixels but not for latents.
    """
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    count = noise.ddpm_num_steps or 1000
    if noise.flow_matching:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=noise.flow_shift)
    settings = {"num_train_timesteps": count, "beta_schedule": "linear", "clip_sample": clips}
    settings["timestep_spacing"] = "trailing"  # start at the noisiest timestep even with few steps (Lin et al. 2024)
    return DDPMScheduler(**settings | noise.scheduler_changes)
