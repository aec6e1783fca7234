"""The options of images: how they are read, cut, selected, put into buckets, cached and loaded."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from utils.config.flag_rules import IsNot, Resume
from utils.config.options import (
    UserError,
    as_number,
    option,
    require,
    require_fraction,
    require_not_negative,
    require_positive,
)
from utils.config.user_files import require_folder

if TYPE_CHECKING:
    from PIL import Image

HELD_OUT = ("validation_split", "validation_data_dir")
CACHE_DTYPES = ("float32", "float16", "bfloat16")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""PIL's modes by the number of channels."""


@dataclass(frozen=True)
class BucketOptions:
    use_aspect_ratio_buckets: bool = option(
        False, "train each image near its own aspect ratio, at the area of --resolution, instead of on square crops"
    )
    bucket_step: int | None = option(None, "edges of the buckets are multiples of this; by default 64")
    min_bucket_size: int | None = option(None, "shortest edge of a bucket; by default half of --resolution")
    max_bucket_size: int | None = option(None, "longest edge of a bucket; by default twice --resolution")
    buckets: list[str] | None = option(None, "the buckets themselves, as WIDTHxHEIGHT, instead of all of that area")
    no_upscale: bool = option(False, "enlarge no image: small ones get buckets of their own size, down to the minimum")
    bucket_group_size: int | None = option(
        None,
        "samples of one bucket that stand together; by default --train_batch_size",
        resume=Resume.COMPARED,
    )

    def __post_init__(self) -> None:
        require_positive(self, "bucket_step", "min_bucket_size", "max_bucket_size", "bucket_group_size")
        if self.bucket_step is not None:
            require(self.bucket_step % 8 == 0, "bucket_step", self.bucket_step, "be divisible by 8", "try 64")
        if not self.use_aspect_ratio_buckets:
            names = ("bucket_step", "min_bucket_size", "max_bucket_size", "buckets", "bucket_group_size")
            given = [name for name in names if getattr(self, name) is not None] + ["no_upscale"] * self.no_upscale
            if given:
                raise UserError(f"--{given[0]} goes with --use_aspect_ratio_buckets; give both or neither")
        for text in self.buckets or ():
            _parse(text)

    def sizes(self, resolution: int) -> list[tuple[int, int]]:
        """Width and height of each bucket: of the square alone, of a given list, or all of the resolution's area."""
        if not self.use_aspect_ratio_buckets:
            return [(resolution, resolution)]
        if self.buckets is not None:
            return sorted({_parse(text) for text in self.buckets})
        step, least, most = self.step, self.least(resolution), self.most(resolution)
        cure = "set --bucket_step, --min_bucket_size and --max_bucket_size to multiples that --resolution lies between"
        if not (least <= resolution <= most):
            raise UserError(f"no bucket fits: edges from {least} to {most}, resolution {resolution}; {cure}")
        return area_buckets(resolution * resolution, step, least, most)

    @property
    def step(self) -> int:
        """What the buckets' edges are multiples of."""
        return self.bucket_step or 64

    def least(self, resolution: int) -> int:
        """The shortest edge, a multiple of the step."""
        least = self.min_bucket_size or resolution // 2
        return max(self.step, -(-least // self.step) * self.step)

    def most(self, resolution: int) -> int:
        """The longest edge, a multiple of the step."""
        return (self.max_bucket_size or 2 * resolution) // self.step * self.step


def _parse(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    is_size = width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0
    require(is_size, "buckets", text, "be sizes such as 512x768")
    require(int(width) % 8 == 0 and int(height) % 8 == 0, "buckets", text, "have edges divisible by 8")
    return int(width), int(height)


def area_buckets(area: int, step: int, least: int, most: int) -> list[tuple[int, int]]:
    """For each edge, a multiple of the step, the longest other edge within the area; both ways round."""
    found = set()
    for edge in range(least, most + 1, step):
        other = min(most, area // edge // step * step)
        if other >= least:
            found |= {(edge, other), (other, edge)}
    return sorted(found)


@dataclass(frozen=True)
class CacheOptions:
    cache_latents: bool = option(False, "encode each image once, and train on what the VAE made of it")
    cache_text_embeddings: bool = option(False, "encode each distinct caption once, and train on that")
    encoding_cache_dir: str | None = option(
        None,
        "where encodings are kept, for this and later runs; by default diffusion_fine_tuning in HF_HOME",
        resume=Resume.SAVING,
    )
    cache_variants: int | None = option(
        None,
        "crops, flips and tag orders that an image has: epoch e trains on number e modulo this; by default 1 of what "
        "is cached, and new ones each epoch of what is not",
    )
    cache_dtype: str | None = option(
        None, "how encodings are stored; by default as they are computed", choices=list(CACHE_DTYPES)
    )
    cache_batch_size: int = option(
        8,
        "images or captions encoded at once when the cache is filled",
        resume=Resume.COST,
        acts_with=("cache_latents", "cache_text_embeddings"),
    )
    cache_only: bool = option(False, "fill the cache and stop", resume=Resume.SAVING)
    verify_cache: bool = option(
        False, "fill the cache, encode everything again, compare, and stop", resume=Resume.SAVING
    )

    def __post_init__(self) -> None:
        require_positive(self, "cache_variants", "cache_batch_size")
        is_used = self.cache_latents or self.cache_text_embeddings
        for name in ("cache_only", "verify_cache"):
            if getattr(self, name) and not is_used:
                raise UserError(f"--{name} goes with --cache_latents or --cache_text_embeddings; give one of them")
        if self.cache_dtype is not None and not is_used:
            raise UserError("--cache_dtype goes with --cache_latents or --cache_text_embeddings; give one of them")

    @property
    def ends_when_filled(self) -> bool:
        """Whether the run ends once the cache is filled."""
        return self.cache_only or self.verify_cache

    @property
    def folder(self) -> Path:
        """Where encodings and what is known of image files are kept."""
        if self.encoding_cache_dir is not None:
            return Path(self.encoding_cache_dir)
        from huggingface_hub.constants import HF_HOME

        return Path(HF_HOME) / "diffusion_fine_tuning"

    @property
    def cut_variants(self) -> int | None:
        """Crops and flips of an image, or None where each pass has its own."""
        return self.cache_variants or (1 if self.cache_latents else None)

    @property
    def text_variants(self) -> int | None:
        """Orders of a caption's tags, or None where each pass has its own."""
        return self.cache_variants or (1 if self.cache_text_embeddings else None)


WHITE = "white"


def _check_colour(name: str) -> None:
    """Refuses what Pillow does not know as a colour; Pillow is not loaded for the default."""
    if name == WHITE:
        return
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError as error:
        raise UserError(f"--transparency_color must be a colour, such as black or #808080, got {name}") from error


@dataclass(frozen=True)
class ImageOptions:
    resolution: int | None = option(
        None, "edge of the square crops in pixels, or that of a square of the buckets' area; by default 512, SDXL 1024"
    )
    center_crop: bool = option(False, "crop the middle instead of a random part")
    random_flip: bool = option(False, "mirror half of the images")
    random_rotation: float = option(0.0, "turn images by up to this many degrees; the corners are cropped away")
    color_jitter: float = option(
        0.0, "change brightness, contrast and saturation by a factor of up to 1 - this to 1 + this"
    )
    image_interpolation_mode: str = option("lanczos", "how images are resized", choices=INTERPOLATIONS)
    transparency_color: str = option(WHITE, "what transparent images are laid on: a name, or #rrggbb")

    def __post_init__(self) -> None:
        require_fraction(self, "color_jitter")
        require(0 <= self.random_rotation <= 45, "random_rotation", self.random_rotation, "be from 0 to 45 degrees")
        _check_colour(self.transparency_color)
        if self.resolution is None:
            return
        require_positive(self, "resolution")
        below = self.resolution - self.resolution % 8
        cure = f"try {below} or {below + 8}" if below else "try 8"
        require(self.resolution % 8 == 0, "resolution", self.resolution, "be divisible by 8", cure)

    @property
    def channels(self) -> int:
        """Channels of what the model sees."""
        return 3

    @property
    def reading(self) -> tuple[object, ...]:
        """What, beside its bytes and its cut, decides on what is read of an image."""
        return self.image_interpolation_mode, self.transparency_color

    def layers(self, source: str | bytes) -> tuple["Image.Image", "Image.Image | None"]:
        """(an image as the model sees its colours, its alpha channel or None)."""
        from utils.data.images import read_layers

        return read_layers(source, self.transparency_color)

    @property
    def pixel_type(self) -> type:
        """In which numbers pixels come, from 0 to 255."""
        import numpy as np

        return np.uint8

    @property
    def varies(self) -> bool:
        """Whether the same image is cut another way each time."""
        return not self.center_crop or self.random_flip or self.random_rotation > 0 or self.color_jitter > 0

    @property
    def still(self) -> Self:
        """The same options, but for what varies: each image is cut in its middle."""
        return replace(self, center_crop=True, random_flip=False, random_rotation=0.0, color_jitter=0.0)


@dataclass(frozen=True)
class PixelOptions(ImageOptions):
    resolution: int | None = option(None, "edge of the square crops in pixels; by default 64, or what the model draws")
    image_channels: int = option(3, "channels of the images: grey, colour, colour with transparency", choices=CHANNELS)
    preserve_input_precision: bool = option(
        False,
        "read 16-bit colour and grey, and 32-bit and floating-point grey, as they are: they would be rounded to 8 bits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preserve_input_precision and self.color_jitter:
            raise UserError("--color_jitter works in 8 bits, which --preserve_input_precision goes beyond; give one")

    @property
    def channels(self) -> int:
        """Channels of what the model sees."""
        return self.image_channels

    @property
    def reading(self) -> tuple[object, ...]:
        """As of all images, and whether they are read in more than 8 bits."""
        return (*super().reading, *(["more than 8 bits, of colours too"] if self.preserve_input_precision else []))

    @property
    def pixel_type(self) -> type:
        """Eight bits, or float32."""
        import numpy as np

        return np.float32 if self.preserve_input_precision else np.uint8

    def layers(self, source: str | bytes) -> tuple["Image.Image", "Image.Image | None"]:
        """(the image with as many channels as asked for, its alpha channel or None)."""
        from utils.data.images import decode, eight_bits, read_layers
        from utils.data.pixels import read_deep

        if self.preserve_input_precision:
            return read_deep(source, self.image_channels, self.transparency_color)
        if self.image_channels == 4:
            image = eight_bits(decode(source)).convert("RGBA")
            return image, image.getchannel("A")
        image, alpha = read_layers(source, self.transparency_color)
        return image.convert(CHANNELS[self.image_channels]), alpha


@dataclass(frozen=True)
class LoaderOptions:
    train_batch_size: int = option(16, "samples a process trains on at once", resume=Resume.COMPARED)
    gradient_accumulation_steps: int = option(
        1, "batches whose gradients are added up to one optimizer step", resume=Resume.COMPARED
    )
    global_batch_size: int | None = option(
        None,
        "samples of an optimizer step over all processes, instead of --gradient_accumulation_steps; each process takes "
        "an equal part, one more or less",
        resume=Resume.COMPARED,
    )
    find_batch_size: bool = option(
        False,
        "take all samples of a step at once, or as many as memory allows: half, a quarter, ...; and say how many",
        resume=Resume.COST,
        engines={
            "DeepSpeed": "gradients that DeepSpeed has taken can't be given back",
            "FSDP2": "processes that gather weights can't try again one by one",
        },
    )
    dataloader_num_workers: int | None = option(
        None,
        "processes that load and draw; by default up to 8 for each GPU, and 0 without one",
        resume=Resume.COST,
    )
    dataloader_timeout: int = option(
        0,
        "seconds to wait for a batch of these processes before the run ends, for disks that may hang; 0 waits on",
        resume=Resume.COST,
        acts_with=(IsNot("dataloader_num_workers", ("0",)),),
    )

    def __post_init__(self) -> None:
        require_positive(self, "train_batch_size", "gradient_accumulation_steps", "global_batch_size")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise UserError("--global_batch_size and --gradient_accumulation_steps are two ways to say it; give one")
        require_not_negative(self, "dataloader_num_workers", "dataloader_timeout")

    def global_batch(self, num_processes: int) -> int:
        """Samples of an optimizer step, over all processes and accumulated batches."""
        size = self.global_batch_size
        if size is None:
            return self.train_batch_size * self.gradient_accumulation_steps * num_processes
        require(size >= num_processes, "global_batch_size", size, f"be at least {num_processes}, one for each process")
        return size

    def samples_at_once(self, has_buckets: bool, group_size: int) -> int:
        """How many samples a process takes at once, where memory allows it.

        Args:
            has_buckets: whether they must be of one bucket, of which `group_size` stand together.
        """
        if not self.find_batch_size:
            return self.train_batch_size
        wanted = self.train_batch_size * self.gradient_accumulation_steps
        return min(wanted, group_size) if has_buckets else wanted

    def num_workers(self, num_processes: int) -> int:
        """Loader processes for this process, of `num_processes`, which may be on several machines."""
        num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        import torch

        if not torch.cuda.is_available():
            return 0
        return min(8, max(1, (os.cpu_count() or 1) // num_local_processes - 1))


@dataclass(frozen=True)
class SelectionOptions:
    on_bad_image: str = option(
        "skip",
        "images that can't be read: train without them, or end the run",
        choices=["skip", "error"],
        resume=Resume.COMPARED,
    )
    max_bad_fraction: float = option(
        0.05,
        "portion of the images from which on bad ones end the run in any case",
        resume=Resume.COMPARED,
        acts_with=("on_bad_image=skip",),
    )
    min_image_size: int | None = option(None, "leave out images whose shorter edge has fewer pixels")
    max_image_size: int | None = option(None, "leave out images whose longer edge has more pixels")
    max_aspect_ratio: float | None = option(None, "leave out images whose longer edge is more times the shorter one")
    max_upscale: float | None = option(None, "leave out images that would be enlarged by more than this factor")

    def __post_init__(self) -> None:
        require_fraction(self, "max_bad_fraction")
        require_positive(self, "min_image_size", "max_image_size", "max_aspect_ratio", "max_upscale")
        ratio = self.max_aspect_ratio
        require(ratio is None or ratio >= 1, "max_aspect_ratio", ratio, "be 1 or more: the longer edge by the shorter")


@dataclass(frozen=True)
class HeldOutOptions:
    validation_split: str | None = option(
        None, "measure the loss on images that are not trained on: a portion of them, such as 0.05, or a split's name"
    )
    validation_data_dir: str | None = option(None, "or on those of another folder", resume=Resume.COMPARED)
    max_validation_samples: int | None = option(
        None, "at most this many of them, drawn by the seed", resume=Resume.COMPARED, acts_with=HELD_OUT
    )

    def __post_init__(self) -> None:
        require_positive(self, "max_validation_samples")
        if self.validation_split is not None and self.validation_data_dir is not None:
            raise UserError("--validation_split and --validation_data_dir are two ways to say the same; give one")
        fraction = self.fraction
        if fraction is not None:
            require(
                0 < fraction < 1, "validation_split", self.validation_split, "be between 0 and 1, or a split's name"
            )
        if self.validation_data_dir is not None:
            require_folder(self.validation_data_dir, "validation_data_dir", or_file=True)

    @property
    def fraction(self) -> float | None:
        """The portion of the images that is held out, if it was given so."""
        value = as_number(self.validation_split)
        return value if isinstance(value, float) else None

    @property
    def is_asked(self) -> bool:
        """Whether any image is held out."""
        return self.validation_split is not None or self.validation_data_dir is not None
