"""Draws images with any pipeline. Each image depends only on the seed, its prompt and its number.

Each image has its own generator on the CPU, seeded by (seed, prompt i, sample j). So batch size, order, number of
processes and interruptions change only the last bits. A pipeline that draws from the global generator is detected, and
then draws one image at a time.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from utils.config.options import (
    ProcessError,
    UserError,
    first_line,
    nearest,
    require,
)
from utils.config.seeding import Stream, generator
from utils.config.terminal import progress_bar
from utils.config.user_files import FileError, read_json
from utils.data.images import BROKEN_FILE_ERRORS, open_image, read_rgb
from utils.diffusion.samplers import check_steps, is_ddim
from utils.models.base import fitting_steps
from utils.models.fingerprint import weights_hash
from utils.models.latent_space import warn_of_nan
from utils.models.not_finite import watching
from utils.runtime.atomic_files import replacing
from utils.runtime.memory import is_out_of_memory
from utils.runtime.processes import write_json
from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControls, drawing_scheduler
from utils.sampling.infotext import Drawing, DrawnModel, call_default, png_texts, sampler_name
from utils.sampling.options import SCHEDULERS, GenerationOptions
from utils.sampling.pipelines import call_parameters, class_names
from utils.sampling.prompts import STATE_KEY, Prompt, Task, drawn_texts, prompts_hash

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
MOST_ON_CPU = 8
MOST_AT_ONCE = 64  # signals are checked only between batches
MEMORY_SHARE = 0.9
RECORD = "generation.json"
FREE_SETTINGS = ("batch_size", "fail_on_invalid", "scheduler")  # not in the facts: those name the scheduler in use


def image_seed(seed: int, number: int, sample: int) -> int:
    """Returns the 32-bit seed of sample `sample` of prompt `number`; all differ below 65,536 prompts and samples.

    torch.Generator keeps 32 bits of its seed. So a keyed Feistel network, which is one-to-one, maps the 32-bit word of
    (number, sample) to the seed; higher bits of both go into the key.
    """
    keys = generator(seed, number >> 16, sample >> 16, Stream.EVALUATION).integers(0, 2**32, 6, np.uint64).tolist()
    left, right = number & 0xFFFF, sample & 0xFFFF
    for key in keys:
        mixed = ((right ^ (key & 0xFFFF)) * 0x9E3779B1 + key) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
        left, right = right, left ^ (mixed >> 16)
    return left << 16 | right


def class_numbers(labels: Sequence[str], names: Mapping[str, int]) -> list[int]:
    """Returns the numbers of classes that are given by name or by number.

    Names take precedence. If all names are numbers, as folder names can be, labels are read only as names.

    Raises:
        UserError: if the pipeline has no class of a name.
    """
    numbers, are_numbers = [], bool(names) and all(name.isdecimal() for name in names)
    for label in labels:
        if label in names:
            if label.isdecimal() and names[label] != int(label):
                said = "--class_labels %s: using the class of this name, which has number %d"
                logger.warning(said, label, names[label])
            numbers.append(names[label])
            continue
        if label.isdecimal() and not are_numbers:
            numbers.append(int(label))
            continue
        if label not in names:
            hint = nearest(label, names)
            cure = f"did you mean {hint}?" if hint else "give numbers" if not names else f"use one such as {min(names)}"
            if are_numbers:
                cure = f"they are {', '.join(sorted(names, key=int)[:20])}"
            raise UserError(f"--class_labels {label} is not one of the pipeline's {len(names)} class names; {cure}")
        numbers.append(names[label])
    return numbers


def check_prompts(pipeline_type: type, prompts: Sequence[Prompt], labels: Sequence[str] | None) -> None:
    """Checks that prompts and classes are given exactly where the pipeline takes them.

    Raises:
        UserError: if it does not take them, or needs prompts and there are none.
    """
    takes, name = call_parameters(pipeline_type), pipeline_type.__name__
    if "class_labels" in takes:
        if prompts:
            raise UserError(f"a {name} draws classes and takes no prompts; give --class_labels")
        return
    if labels is not None:
        raise UserError(f"a {name} has no classes; remove --class_labels")
    if "prompt" in takes and not prompts:
        raise UserError(f"a {name} needs prompts; give --prompts, --prompts_file, --prompts_dataset or --captions_dir")
    if "prompt" not in takes and prompts:
        raise UserError(f"a {name} takes no prompts; remove them")


def complete_prompts(
    pipeline: "DiffusionPipeline", prompts: Sequence[Prompt], labels: Sequence[str] | None
) -> list[Prompt]:
    """Returns the prompts in the form that the pipeline takes: texts, classes, or one empty prompt if it takes neither.

    Raises:
        UserError: if the pipeline does not take what is given.
    """
    check_prompts(type(pipeline), prompts, labels)
    if "class_labels" not in call_parameters(type(pipeline)):
        return list(prompts) or [Prompt(None)]
    known = class_names(pipeline)
    numbers = class_numbers(labels or (), getattr(pipeline, "labels", None) or {})
    wrong = [number for number in numbers if known and number not in known]
    require(not wrong, "class_labels", wrong, f"be among the pipeline's {len(known)} classes")
    chosen = numbers if labels is not None else list(known)
    if not chosen:
        raise UserError(f"the number of classes of this {type(pipeline).__name__} is unknown; give --class_labels")
    return [Prompt(known.get(label), label) for label in chosen]


class BatchSize:
    """The number of images per batch: a given number, or one that doubles until memory is full."""

    def __init__(self, given: int | None, device: torch.device):
        self.at_once = given or 1
        self._most = given or (MOST_ON_CPU if device.type == "cpu" else MOST_AT_ONCE)
        self.grows = given is None
        self._device = device
        if device.type == "cuda":  # the peak must not count the memory of an earlier pipeline
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def worked(self, count: int) -> None:
        """Call after a batch of `count` images: doubles the batch size if there is enough memory."""
        if count < self.at_once or 2 * self.at_once > self._most:
            return
        if self._device.type == "cuda":
            total = torch.cuda.mem_get_info(self._device)[1]
            if 2 * torch.cuda.max_memory_reserved(self._device) > MEMORY_SHARE * total:
                self._most = self.at_once
                return
        self.at_once *= 2

    def failed(self, count: int, error: BaseException) -> None:
        """Call after a batch of `count` images ran out of memory: halves the batch size permanently.

        Raises:
            ProcessError: if the batch was a single image.
        """
        if count == 1:
            raise ProcessError(
                f"out of memory with a single image ({first_line(error)}); try a smaller --height and --width, or "
                "--mixed_precision fp16"
            ) from error
        self.at_once = self._most = count // 2
        logger.warning("%s with a batch of %d images; continuing with %d", first_line(error), count, self.at_once)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def alone(self) -> None:
        """Sets the batch size to 1 permanently."""
        self.at_once = self._most = 1


def state_of(pixels: np.ndarray) -> str:
    """Returns `nan`, `black`, `constant` or `ok` for an image [H, W, 3] of floats in [0, 1]."""
    if not np.isfinite(pixels).all():
        return "nan"
    if pixels.max() < 1 / 255:
        return "black"
    return "constant" if np.ptp(pixels, axis=(0, 1)).max() < 1 / 255 else "ok"


@dataclass(frozen=True)
class InMemory:
    """How to draw with a pipeline that is already on its device, such as one in training.

    Attributes:
        arguments: additional arguments of the pipeline's call.
        encode: encodes a prompt into arguments of the pipeline's call, tensors [1, ...]; by default the pipeline does.
        around: a context to draw in, such as autocast; the VAE decodes outside of it, in its own dtype.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    encode: Callable[[str], Mapping[str, torch.Tensor]] | None = None
    around: Callable[[], AbstractContextManager] = nullcontext


class Drawer:
    """Draws tasks into a folder; each process draws its share. A stopped run continues where it was."""

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        options: GenerationOptions,
        controls: SamplingControls,
        seed: int,
        device: torch.device,
        requests: StopRequests | None = None,
        in_memory: InMemory | None = None,
    ):
        """Args:
        requests: stop requests, checked between batches.
        in_memory: given if the pipeline is already on its device.

        Raises:
            UserError: if the pipeline does not take the options.
        """
        self.pipeline = pipeline
        self._options = options
        self._controls = controls
        self._seed = seed
        self._device = device
        self._requests = requests
        self._model: DrawnModel | None = None
        self._is_placed, live = in_memory is not None, in_memory or InMemory()
        self._more, self._encode, self._around = dict(live.arguments), live.encode, live.around
        self._eta = options.eta or 0.0
        self._takes = inspect.signature(type(self.pipeline).__call__).parameters
        self._batch_size = BatchSize(options.batch_size, device)
        self._fitting_steps = fitting_steps(self.pipeline) if options.num_inference_steps is None else None
        if self._fitting_steps is not None:
            logger.info("using %d denoising steps, the length of the noise schedule", self._fitting_steps)
        self._check()
        self._check_steps()
        controls.check(self.pipeline.scheduler)
        if "image" in self._takes and "strength" in self._takes and controls.noise_scale != 1.0:
            raise UserError("--initial_noise_scale would also scale the images of --init_images; remove one of them")

    def _check(self) -> None:
        """Checks that the pipeline takes the options."""
        # Arguments of the pipeline's call.
        options, name = self._options, type(self.pipeline).__name__
        for flag in ("guidance_scale", "guidance_rescale", "negative_prompt", "height", "width"):
            if getattr(options, flag) is not None and flag not in self._takes:
                raise UserError(f"--{flag} is not supported by a {name}; remove it")
        default = self._takes.get("guidance_scale")
        guidance = options.guidance_scale if default is None or options.guidance_scale is not None else default.default
        if options.negative_prompt is not None and isinstance(guidance, int | float) and guidance <= 1:
            logger.warning("--negative_prompt has no effect: it needs a guidance scale above 1, got %g", guidance)

        # Configs of the models: what they leave open must be given.
        vae, unet = (getattr(self.pipeline, part, None) for part in ("vae", "unet"))
        if vae is not None and vae.config.get("scaling_factor", 1.0) is None:
            raise UserError("the config of the pipeline's VAE has no scaling_factor; add it")
        is_sized = options.height is not None and options.width is not None
        if vae is not None and unet is not None and unet.config.get("sample_size") is None and not is_sized:
            raise UserError("the config of the pipeline's UNet has no sample_size; give --height and --width")

        # Flags that need other flags or a certain scheduler.
        if options.strength is not None and "strength" not in self._takes:
            raise UserError("--strength applies to image-to-image; give --init_images")
        if options.eta is not None and not is_ddim(self.pipeline.scheduler):
            raise UserError(f"--eta applies to DDIM only, the scheduler is {type(self.pipeline.scheduler).__name__}")

    def _check_steps(self) -> None:
        """Checks that the scheduler can take the number of denoising steps exactly."""
        own = self._takes.get("num_inference_steps")
        steps = self._options.num_inference_steps or self._fitting_steps or (own.default if own else None)
        if isinstance(steps, int) and "strength" in self._takes:
            strength = self._options.strength or self._takes["strength"].default
            if int(steps * strength) < 1:
                raise UserError(
                    f"--strength {strength:g} leaves none of {steps} denoising steps; raise --num_inference_steps or "
                    "--strength"
                )
        scheduler = drawing_scheduler(self.pipeline, self._eta)
        known = {class_name for class_name, _ in SCHEDULERS.values()} | {"ConsistentDDIMScheduler"}
        longest = scheduler.config.get("num_train_timesteps") or 0
        if not isinstance(steps, int) or steps > longest or type(scheduler).__name__ not in known:
            return  # too many steps for the schedule are refused when drawing
        try:
            check_steps(type(scheduler).from_config(scheduler.config), steps)
        except ValueError as error:
            name = type(self.pipeline.scheduler).__name__
            raise UserError(f"--num_inference_steps {steps} does not work with {name}: {first_line(error)}") from error

    def facts(self, prompts: Sequence[Prompt]) -> dict[str, object]:
        """Returns what the images depend on, as JSON: a resumed run must have the same facts as the one before."""
        pipeline = self.pipeline
        weights = {
            name: weights_hash(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
        text, used = json.dumps(config, sort_keys=True, default=str), drawing_scheduler(pipeline, self._eta)
        settings = {name: value for name, value in asdict(self._options).items() if name not in FREE_SETTINGS}
        return {
            "pipeline": type(pipeline).__name__,
            "weights": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
            "scheduler": type(used).__name__,
            "scheduler_config": hashlib.sha256(text.encode()).hexdigest(),
            "dtype": str(pipeline.dtype),
            "prompts": prompts_hash(prompts),
            "seed": self._seed,
            "safety_checker": getattr(pipeline, "safety_checker", None) is not None,
            "controls": self._controls.facts(),
            **settings,
        }

    def draw(
        self,
        tasks: Sequence[Task],
        folder: Path,
        accelerator: "Accelerator | None" = None,
        model: DrawnModel | None = None,
    ) -> None:
        """Draws the missing images of the tasks into `{prompt}_{sample}.png`; a signal stops it between batches.

        Args:
            model: what the texts of the images call the model; by default they don't name it.

        Raises:
            ProcessError: if an image can't be drawn or written.
        """
        self._model = model
        rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        left = [task for task in tasks[rank::count] if not is_whole(folder / f"{task.name}.png")]
        if not self._is_placed:
            self.pipeline.to(self._device)
        bar = progress_bar(
            total=len(left),
            desc=f"drawing {folder.name}",
            unit="image",
            disable=rank != 0 or not left,
        )
        with bar:
            while left:
                if self._requests is not None and self._requests.is_asked:
                    return
                batch = left[: self._batch_size.at_once]
                images = self._try(batch)
                if images is None:
                    continue
                for task, pixels in zip(batch, images, strict=True):
                    self._save(pixels, task, folder / f"{task.name}.png")
                left = left[len(batch) :]
                bar.update(len(batch))
                self._batch_size.worked(len(batch))

    def _try(self, batch: Sequence[Task]) -> np.ndarray | None:
        """The images [B, H, W, 3] of a batch; None if it ran out of memory: the next batch is smaller."""
        try:
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                return self.call(batch)
        except (RuntimeError, MemoryError) as error:
            # large batches can also exceed limits of CUDA kernels, whose errors do not mention memory
            if not is_out_of_memory(error) and (len(batch) == 1 or not self._batch_size.grows):
                raise ProcessError(f"the pipeline can't draw with these settings: {first_line(error)}") from error
            self._batch_size.failed(len(batch), error)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ProcessError(f"the pipeline can't draw with these settings: {first_line(error)}") from error
        return None

    def call(self, batch: Sequence[Task]) -> np.ndarray | None:
        """Draws a batch of tasks with one call of the pipeline.

        Returns:
            [B, H, W, 3] floats; None if the batch must be drawn again one image at a time, because its prompts have
            different lengths or the pipeline drew from the global generator.
        """
        # Draw, each image from its own generator.
        seeds = [image_seed(self._seed, task.number, task.sample) for task in batch]
        torch.manual_seed(seeds[0])
        before = _global_state(self._device)
        attached = self._controls.attached(self.pipeline, eta=self._eta)
        with torch.no_grad(), attached, decoding_apart(self.pipeline), self._around():
            given = self._arguments(batch, seeds) | self._encoded(batch)
            if None in given.values():
                self._batch_size.alone()
                return None
            images = self.pipeline(**given).images

        # The global generator has moved if the pipeline drew from it: images would depend on their batch.
        drew = any(not torch.equal(*pair) for pair in zip(before, _global_state(self._device), strict=True))
        if drew and len(batch) > 1:
            said = "%s draws from the global generator; drawing one image at a time from now on"
            logger.warning(said, _names(self.pipeline))
            self._batch_size.alone()
            return None
        pixels = np.stack([np.asarray(image, np.float32) for image in images])
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels

    def _arguments(self, batch: Sequence[Task], seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of the pipeline's call for a batch."""
        # Settings.
        options, takes = self._options, self._takes
        given: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "np",
            **self._more,
        }
        for name in ("num_inference_steps", "guidance_scale", "guidance_rescale", "eta", "strength"):
            if getattr(options, name) is not None and (name != "eta" or "eta" in takes):
                given[name] = getattr(options, name)
        if self._fitting_steps is not None:
            given.setdefault("num_inference_steps", self._fitting_steps)

        # What to draw: classes, prompts, or a number of images.
        if "class_labels" in takes:
            given["class_labels"] = [task.prompt.label for task in batch]
        elif self._encode is not None:
            pass
        elif "prompt" in takes:
            given["prompt"] = [task.prompt.text for task in batch]
            if options.negative_prompt is not None:
                given["negative_prompt"] = [options.negative_prompt] * len(batch)
        else:
            given["batch_size"] = len(batch)

        # The size, or the images that drawing starts from.
        if batch[0].prompt.init_image is not None:
            size = self._init_size()
            given["image"] = [_init_image(task.prompt.init_image, size) for task in batch]
        else:
            given |= {
                name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None
            }
        return given

    def _encoded(self, batch: Sequence[Task]) -> dict[str, torch.Tensor | None]:
        """The encoded prompts; None if they have different lengths and can't form a batch."""
        if self._encode is None:
            return {}
        each = [self._encode(task.prompt.text) for task in batch]
        return {
            name: torch.cat([one[name] for one in each]) if len({one[name].shape for one in each}) == 1 else None
            for name in each[0]
        }

    def _init_size(self) -> tuple[int, int]:
        """Width and height of the initial image, in pixels."""
        pipeline = self.pipeline
        sample = (
            pipeline.unet.config.sample_size if hasattr(pipeline, "unet") else pipeline.transformer.config.sample_size
        )
        edge = (sample if isinstance(sample, int) else sample[0]) * getattr(pipeline, "vae_scale_factor", 1)
        return self._options.width or edge, self._options.height or edge

    def _drawing(self, task: Task, size: tuple[int, int]) -> Drawing:
        """The settings of an image; `size` is its width and height in pixels."""
        options, prompt, pipeline = self._options, task.prompt, self.pipeline
        given = {"num_inference_steps": options.num_inference_steps or self._fitting_steps}
        given |= {name: getattr(options, name) for name in ("guidance_scale", "strength")}
        known = {name: call_default(pipeline, name) if value is None else value for name, value in given.items()}
        is_class = prompt.label is not None
        more = [
            ("Denoising strength", known["strength"] if prompt.init_image is not None else None),
            ("Eta DDIM", self._eta or None),
            ("Class", prompt.text or prompt.label if is_class else None),
        ]
        return Drawing(
            seed=image_seed(self._seed, task.number, task.sample),
            size=size,
            sampler=sampler_name(drawing_scheduler(pipeline, self._eta)),
            steps=known["num_inference_steps"],
            guidance=known["guidance_scale"],
            prompt="" if is_class else prompt.text or "",
            negative_prompt=options.negative_prompt or "",
            model=self._model,
            more=more,
        )

    def _save(self, pixels: np.ndarray, task: Task, path: Path) -> None:
        """Writes a PNG atomically, with its prompt, class, seed and state as PNG text."""
        prompt, (height, width) = task.prompt, pixels.shape[:2]
        facts = {
            "prompt": prompt.text,
            "class": prompt.label,
            "seed": image_seed(self._seed, task.number, task.sample),
            STATE_KEY: state_of(pixels),
            "lora": ", ".join(self._model.adapters if self._model is not None else ()) or None,
        }
        text = png_texts(facts, self._drawing(task, (width, height)))
        finite = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0)
        rounded = (finite.clip(0, 1) * 255).round().astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as aside:
                Image.fromarray(rounded).save(aside, "PNG", pnginfo=text, compress_level=1)
        except OSError as error:
            raise ProcessError(f"can't write {path}: {error.strerror or error}") from error


@contextmanager
def decoding_apart(pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Context manager: the VAE decodes in its own dtype, outside of any autocast, in which it could overflow."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return
    own, device = vae.decode, pipeline.device.type

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            found = own(latents.to(vae.dtype), *args, **kwargs)
        warn_of_nan(latents, found[0], vae, vae, watch.blame)
        return found

    vae.decode = decode
    try:
        with watching(pipeline) as watch:
            yield
    finally:
        del vae.decode


def _names(pipeline: "DiffusionPipeline") -> str:
    return f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}"


def _global_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def for_init_images(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """Returns the image-to-image pipeline with the same components.

    Raises:
        UserError: if diffusers has none for this class.
    """
    from diffusers import AutoPipelineForImage2Image

    try:
        found = AutoPipelineForImage2Image.from_pipe(pipeline)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--init_images: diffusers has no image-to-image pipeline for a {type(pipeline).__name__}; remove it"
        ) from error
    found.set_progress_bar_config(disable=True)
    return found


def _init_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image, centre-cropped to the aspect ratio of `size` (width, height) and resized."""
    try:
        return ImageOps.fit(read_rgb(str(path)), size, Image.Resampling.LANCZOS)
    except (OSError, ValueError) as error:
        raise UserError(f"--init_images {path} can't be read: {first_line(error)}") from error


def is_whole(path: Path) -> bool:
    """Whether a path is an image file that can be decoded completely."""
    if not path.is_file():
        return False
    try:
        with open_image(str(path)) as image:
            image.load()
    except (OSError, ValueError, *BROKEN_FILE_ERRORS):
        return False
    return True


def claim_images(folder: Path, facts: dict[str, object], overwrite: bool) -> None:
    """Prepares a folder for images of these facts.

    Raises:
        UserError: if it has images of other facts and not `overwrite`; it names what differs.
    """
    # Facts of the images that are already there.
    record, images = folder / RECORD, list(folder.glob("[!.]*.png"))
    known: dict[str, object] = {}
    if record.is_file():
        try:
            read = read_json(record)
        except (OSError, FileError):
            read = None
        known = read if isinstance(read, dict) else {}
    differing = [name for name, value in facts.items() if known.get(name) != json.loads(json.dumps(value))]
    if images and differing and not overwrite:
        names = ", ".join(differing)
        raise UserError(
            f"--output_dir: {folder} has images drawn with another {names}; choose another folder, or give "
            "--overwrite_output_dir"
        )

    # Remove images of other facts and unfinished files, then write the facts.
    if differing:
        for image in images:
            image.unlink()
    for left in folder.glob(".tmp-*.png"):
        left.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, facts)
    except OSError as error:
        raise UserError(f"--output_dir: {folder} can't be written: {error.strerror or error}") from error


def invalid_images(paths: Sequence[Path], note: Callable[[int], None] | None = None) -> dict[str, list[str]]:
    """Returns the names of images that are unreadable, NaN, black, or of one colour, by state.

    Args:
        note: called with 1 after each image.
    """
    found: dict[str, list[str]] = {"unreadable": [], "nan": [], "black": [], "constant": []}
    for path in paths:
        try:
            with open_image(str(path)) as image:
                state = drawn_texts(image.info).get(STATE_KEY)
            pixels = read_rgb(str(path))
        except (OSError, ValueError):
            state = "unreadable"
        else:
            state = state or state_of(np.asarray(pixels, np.float32) / 255)
        if state in found:
            found[state].append(path.name)
        if note is not None:
            note(1)
    return found
