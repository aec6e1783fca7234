"""Image options: reading, cropping, filtering, aspect-ratio buckets, caching and loading."""

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
"""PIL modes by number of channels."""


@dataclass(frozen=True)
class BucketOptions:
    use_aspect_ratio_buckets: bool = option(
        False,
        "train each image near its own aspect ratio, at an area of --resolution squared, instead of on square crops",
    )
    bucket_step: int | None = option(None, "bucket edges are multiples of this, in pixels (default: 64)")
    min_bucket_size: int | None = option(None, "shortest bucket edge in pixels (default: half of --resolution)")
    max_bucket_size: int | None = option(None, "longest bucket edge in pixels (default: twice --resolution)")
    buckets: list[str] | None = option(
        None, "bucket sizes as WIDTHxHEIGHT, such as 512x768 (default: all sizes near the area of --resolution squared)"
    )
    no_upscale: bool = option(
        False, "never enlarge images: small ones get buckets of their own size, down to --min_bucket_size"
    )
    bucket_group_size: int | None = option(
        None,
        "number of consecutive samples taken from the same bucket (default: --train_batch_size)",
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
                raise UserError(f"--{given[0]} needs --use_aspect_ratio_buckets; give both or neither")
        for text in self.buckets or ():
            _parse(text)

    def sizes(self, resolution: int) -> list[tuple[int, int]]:
        """Returns (width, height) of each bucket: the square, the sizes of --buckets, or all sizes of the area.

        Raises:
            UserError: if `resolution` lies outside the range of bucket edges.
        """
        if not self.use_aspect_ratio_buckets:
            return [(resolution, resolution)]
        if self.buckets is not None:
            return sorted({_parse(text) for text in self.buckets})
        step, least, most = self.step, self.least(resolution), self.most(resolution)
        cure = "set --bucket_step, --min_bucket_size and --max_bucket_size so that --resolution lies in this range"
        if not (least <= resolution <= most):
            raise UserError(
                f"--resolution {resolution}: no bucket fits, bucket edges range from {least} to {most}; {cure}"
            )
        return area_buckets(resolution * resolution, step, least, most)

    @property
    def step(self) -> int:
        """Bucket edges are multiples of this, in pixels."""
        return self.bucket_step or 64

    def least(self, resolution: int) -> int:
        """Returns the shortest bucket edge in pixels, rounded up to a multiple of the step."""
        least = self.min_bucket_size or resolution // 2
        return max(self.step, -(-least // self.step) * self.step)

    def most(self, resolution: int) -> int:
        """Returns the longest bucket edge in pixels, rounded down to a multiple of the step."""
        return (self.max_bucket_size or 2 * resolution) // self.step * self.step


def _parse(text: str) -> tuple[int, int]:
    """Returns (width, height) of a bucket given as text, such as 512x768."""
    width, _, height = text.lower().partition("x")
    is_size = width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0
    require(is_size, "buckets", text, "be sizes such as 512x768")
    require(int(width) % 8 == 0 and int(height) % 8 == 0, "buckets", text, "have edges divisible by 8")
    return int(width), int(height)


def area_buckets(area: int, step: int, least: int, most: int) -> list[tuple[int, int]]:
    """Returns (width, height) of all buckets of an area, landscape and portrait, sorted.

    Each edge is a multiple of `step`; the other edge is the longest multiple that keeps within the area.

    Args:
        area: pixels of a bucket, at most.
        step: edges are multiples of this many pixels.
        least, most: shortest and longest edge in pixels.
    """
    found = set()
    for edge in range(least, most + 1, step):
        other = min(most, area // edge // step * step)
        if other >= least:
            found |= {(edge, other), (other, edge)}
    return sorted(found)


@dataclass(frozen=True)
class CacheOptions:
    cache_latents: bool = option(False, "encode each image once with the VAE, and train on the cached latents")
    cache_text_embeddings: bool = option(False, "encode each distinct caption once, and train on the cached embeddings")
    encoding_cache_dir: str | None = option(
        None,
        "folder of cached encodings, shared by all runs (default: diffusion_fine_tuning in HF_HOME)",
        resume=Resume.SAVING,
    )
    cache_variants: int | None = option(
        None,
        "number of random variants (crops, flips, tag orders) per image; epoch e trains on variant e modulo this "
        "number (default: 1 for cached encodings, new variants every epoch for everything else)",
    )
    cache_dtype: str | None = option(
        None, "dtype of cached encodings (default: the dtype they are computed in)", choices=list(CACHE_DTYPES)
    )
    cache_batch_size: int = option(
        8,
        "number of images or captions per batch when filling the cache",
        resume=Resume.COST,
        acts_with=("cache_latents", "cache_text_embeddings"),
    )
    cache_only: bool = option(False, "fill the cache, then exit", resume=Resume.SAVING)
    verify_cache: bool = option(
        False, "fill the cache, encode everything again, compare both, then exit", resume=Resume.SAVING
    )

    def __post_init__(self) -> None:
        require_positive(self, "cache_variants", "cache_batch_size")
        is_used = self.cache_latents or self.cache_text_embeddings
        for name in ("cache_only", "verify_cache"):
            if getattr(self, name) and not is_used:
                raise UserError(f"--{name} needs --cache_latents or --cache_text_embeddings; give one of them")
        if self.cache_dtype is not None and not is_used:
            raise UserError("--cache_dtype needs --cache_latents or --cache_text_embeddings; give one of them")

    @property
    def ends_when_filled(self) -> bool:
        """Whether the run ends once the cache is filled."""
        return self.cache_only or self.verify_cache

    @property
    def folder(self) -> Path:
        """Folder that stores encodings and the known facts of image files."""
        if self.encoding_cache_dir is not None:
            return Path(self.encoding_cache_dir)
        from huggingface_hub.constants import HF_HOME

        return Path(HF_HOME) / "diffusion_fine_tuning"

    @property
    def cut_variants(self) -> int | None:
        """Number of crops and flips per image; None if each pass draws new ones."""
        return self.cache_variants or (1 if self.cache_latents else None)

    @property
    def text_variants(self) -> int | None:
        """Number of tag orders per caption; None if each pass draws new ones."""
        return self.cache_variants or (1 if self.cache_text_embeddings else None)


WHITE = "white"


def _check_colour(name: str) -> None:
    """Refuses names that Pillow does not know as a colour. The default does not load Pillow."""
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
        None, "edge of the square crops in pixels; with buckets, their area is its square (default: 512, SDXL 1024)"
    )
    center_crop: bool = option(False, "center crop instead of a random crop")
    random_flip: bool = option(False, "mirror images left to right, each with probability 0.5")
    random_rotation: float = option(
        0.0, "rotate images by a random angle of up to this many degrees, and crop away the empty corners"
    )
    color_jitter: float = option(
        0.0, "multiply brightness, contrast and saturation by random factors from 1 - this to 1 + this"
    )
    image_interpolation_mode: str = option("lanczos", "resampling filter for resizing images", choices=INTERPOLATIONS)
    transparency_color: str = option(WHITE, "background colour of transparent images: a name or #rrggbb")

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
        """Number of channels of the images that the model sees."""
        return 3

    @property
    def reading(self) -> tuple[object, ...]:
        """Everything apart from file bytes and crop that affects the pixels read from an image; part of cache keys."""
        return self.image_interpolation_mode, self.transparency_color

    def layers(self, source: str | bytes) -> tuple["Image.Image", "Image.Image | None"]:
        """Returns (the image in the colours that the model sees, its alpha channel or None)."""
        from utils.data.images import read_layers

        return read_layers(source, self.transparency_color)

    @property
    def pixel_type(self) -> type:
        """The numpy type of pixels, whose values range from 0 to 255."""
        import numpy as np

        return np.uint8

    @property
    def varies(self) -> bool:
        """Whether the crop of an image or its colours differ from pass to pass."""
        return not self.center_crop or self.random_flip or self.random_rotation > 0 or self.color_jitter > 0

    @property
    def still(self) -> Self:
        """The same options without random augmentation: center crops only."""
        return replace(self, center_crop=True, random_flip=False, random_rotation=0.0, color_jitter=0.0)


@dataclass(frozen=True)
class PixelOptions(ImageOptions):
    resolution: int | None = option(
        None, "edge of the square crops in pixels (default: 64, or the sample size of the pretrained model)"
    )
    image_channels: int = option(
        3, "image channels: 1 for grey, 3 for colour, 4 for colour with transparency", choices=CHANNELS
    )
    preserve_input_precision: bool = option(
        False,
        "keep the precision of 16-bit colour and of 16-bit, 32-bit and floating-point grey, instead of rounding to "
        "8 bits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preserve_input_precision and self.color_jitter:
            raise UserError(
                "--color_jitter works on 8-bit images and cannot be combined with --preserve_input_precision; give one"
            )

    @property
    def channels(self) -> int:
        """Number of channels of the images that the model sees."""
        return self.image_channels

    @property
    def reading(self) -> tuple[object, ...]:
        """As in `ImageOptions`, and whether images are read in more than 8 bits."""
        return (*super().reading, *(["more than 8 bits, of colours too"] if self.preserve_input_precision else []))

    @property
    def pixel_type(self) -> type:
        """uint8, or float32 with --preserve_input_precision."""
        import numpy as np

        return np.float32 if self.preserve_input_precision else np.uint8

    def layers(self, source: str | bytes) -> tuple["Image.Image", "Image.Image | None"]:
        """Returns (the image with --image_channels channels, its alpha channel or None)."""
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
    train_batch_size: int = option(16, "samples per process and micro-batch", resume=Resume.COMPARED)
    gradient_accumulation_steps: int = option(
        1, "number of micro-batches whose gradients are summed for one optimizer step", resume=Resume.COMPARED
    )
    global_batch_size: int | None = option(
        None,
        "samples per optimizer step over all processes, split as evenly as possible between them; replaces "
        "--gradient_accumulation_steps",
        resume=Resume.COMPARED,
    )
    find_batch_size: bool = option(
        False,
        "use the largest micro-batch that fits in memory: all samples of a step, half of them, a quarter, ...; logs "
        "the size",
        resume=Resume.COST,
        engines={
            "DeepSpeed": "DeepSpeed cannot discard gradients after an out-of-memory error",
            "FSDP2": "processes that gather weights together cannot retry a step independently",
        },
    )
    dataloader_num_workers: int | None = option(
        None,
        "data-loader processes per training process (default: up to 8 per GPU; 0 without a GPU)",
        resume=Resume.COST,
    )
    dataloader_timeout: int = option(
        0,
        "end the run if a data-loader process does not deliver a batch within this many seconds, such as when a disk "
        "hangs; 0 waits forever",
        resume=Resume.COST,
        acts_with=(IsNot("dataloader_num_workers", ("0",)),),
    )

    def __post_init__(self) -> None:
        require_positive(self, "train_batch_size", "gradient_accumulation_steps", "global_batch_size")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise UserError(
                "--global_batch_size and --gradient_accumulation_steps both set the optimizer step's samples; give one"
            )
        require_not_negative(self, "dataloader_num_workers", "dataloader_timeout")

    def global_batch(self, num_processes: int) -> int:
        """Returns the samples per optimizer step, over all processes and accumulated micro-batches.

        Raises:
            UserError: if --global_batch_size is smaller than `num_processes`.
        """
        size = self.global_batch_size
        if size is None:
            return self.train_batch_size * self.gradient_accumulation_steps * num_processes
        require(
            size >= num_processes, "global_batch_size", size, f"be at least {num_processes}, one sample per process"
        )
        return size

    def samples_at_once(self, has_buckets: bool, group_size: int) -> int:
        """Returns the micro-batch size of a process, if it fits in memory.

        Args:
            has_buckets: whether a micro-batch must come from a single bucket.
            group_size: number of consecutive samples from the same bucket.
        """
        if not self.find_batch_size:
            return self.train_batch_size
        wanted = self.train_batch_size * self.gradient_accumulation_steps
        return min(wanted, group_size) if has_buckets else wanted

    def num_workers(self, num_processes: int) -> int:
        """Returns the number of data-loader processes for this training process.

        Args:
            num_processes: training processes on all machines; LOCAL_WORLD_SIZE, if set, counts those of this machine.
        """
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
        "what to do with unreadable images: skip them, or end the run",
        choices=["skip", "error"],
        resume=Resume.COMPARED,
    )
    max_bad_fraction: float = option(
        0.05,
        "end the run if more than this fraction of the images is unreadable",
        resume=Resume.COMPARED,
        acts_with=("on_bad_image=skip",),
    )
    min_image_size: int | None = option(None, "skip images whose shorter edge has fewer pixels than this")
    max_image_size: int | None = option(None, "skip images whose longer edge has more pixels than this")
    max_aspect_ratio: float | None = option(
        None, "skip images whose longer edge exceeds the shorter by more than this factor"
    )
    max_upscale: float | None = option(None, "skip images that would be enlarged by more than this factor")

    def __post_init__(self) -> None:
        require_fraction(self, "max_bad_fraction")
        require_positive(self, "min_image_size", "max_image_size", "max_aspect_ratio", "max_upscale")
        ratio = self.max_aspect_ratio
        require(ratio is None or ratio >= 1, "max_aspect_ratio", ratio, "be 1 or more: longer edge / shorter edge")


@dataclass(frozen=True)
class HeldOutOptions:
    validation_split: str | None = option(
        None, "validate the loss on a held-out fraction of the images, such as 0.05, or on the split of this name"
    )
    validation_data_dir: str | None = option(
        None, "validate the loss on the images of this folder", resume=Resume.COMPARED
    )
    max_validation_samples: int | None = option(
        None,
        "use at most this many validation images, chosen at random by --seed",
        resume=Resume.COMPARED,
        acts_with=HELD_OUT,
    )

    def __post_init__(self) -> None:
        require_positive(self, "max_validation_samples")
        if self.validation_split is not None and self.validation_data_dir is not None:
            raise UserError("--validation_split and --validation_data_dir both set the validation images; give one")
        fraction = self.fraction
        if fraction is not None:
            require(
                0 < fraction < 1, "validation_split", self.validation_split, "be between 0 and 1, or a split's name"
            )
        if self.validation_data_dir is not None:
            require_folder(self.validation_data_dir, "validation_data_dir", or_file=True)

    @property
    def fraction(self) -> float | None:
        """The held-out fraction of the images; None if --validation_split is not a number."""
        value = as_number(self.validation_split)
        return value if isinstance(value, float) else None

    @property
    def is_asked(self) -> bool:
        """Whether any images are held out for validation."""
        return self.validation_split is not None or self.validation_data_dir is not None
