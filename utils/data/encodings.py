"""Cached encodings: which crops and texts are encoded, their cache keys, and reading them back."""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.config.batch import Crop, RecordPass
from utils.config.options import first_line
from utils.config.terminal import progress_bar
from utils.data.cache import KEY_SIZE, EntryStore, make_key
from utils.data.captions import compose
from utils.data.crop_pixels import cut_out
from utils.data.crop_plan import plan_cut
from utils.data.options import ImageOptions
from utils.data.plan import PlannedImages
from utils.data.survey import map_chunks


@dataclass(frozen=True)
class CutPlan(ABC):
    """The crops whose encodings are cached: K variants of each of N images.

    Attributes:
        images: the N images.
        options: how images are read and cropped.
        seed: of the random crops.
        num_variants: K; 1 if every pass uses the same crop.
    """

    images: PlannedImages = field(repr=False)
    options: ImageOptions
    seed: int
    num_variants: int

    def passing(self, index: int, variant: int) -> RecordPass:
        """Returns the record and variant that seed the crop of an image."""
        return RecordPass(self.images.records.identity(index), variant)

    @property
    @abstractmethod
    def _common(self) -> bytes:
        """The part of the cache key that all crops share."""

    @abstractmethod
    def _content(self, index: int) -> bytes:
        """Returns the part of the cache key that identifies the content of the image's files."""

    @abstractmethod
    def read(self, index: int, variant: int) -> tuple[np.ndarray, Crop]:
        """Reads a variant of an image; returns ([C, H, W] uint8 to encode, the crop).

        Raises:
            OSError, ValueError: if the image can't be read.
        """

    def key(self, index: int, variant: int) -> bytes:
        """Returns the cache key [16 bytes] of a variant: a digest of everything that affects its encoding."""
        images = self.images
        size, target = images.size(index), images.target(index)
        cut = plan_cut(size, target, self.options, self.seed, self.passing(index, variant))
        how = (cut.degrees, *cut.box, cut.mirrored, cut.brightness, cut.contrast, cut.saturation, *cut.crop.row())
        content = self._common + self._content(index) + CUT_FACTS.pack(*how)
        return hashlib.blake2b(content, digest_size=KEY_SIZE).digest()

    def keys(self, show_progress: bool = False) -> np.ndarray:
        """Returns [N * K, 16] uint8 cache keys; the variants of an image are adjacent."""
        indices = np.arange(len(self.images.records))
        if len(indices) < FEW_KEYS:
            return np.frombuffer(_keys_of(self, indices), np.uint8).reshape(-1, KEY_SIZE)
        found = []
        with progress_bar(
            total=len(indices), desc="planning crops", disable=not show_progress, leave=False
        ) as progress:
            for keys in map_chunks(_keys_of, self, indices, many=FEW_KEYS):
                found.append(keys)
                progress.update(len(keys) // (KEY_SIZE * self.num_variants))
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, KEY_SIZE)


@dataclass(frozen=True)
class LatentPlan(CutPlan):
    """The crops whose latents are cached, as mean and standard deviation ("moments").

    Attributes:
        fingerprint: identifies the VAE and how its moments are stored.
    """

    fingerprint: str

    @cached_property
    def _common(self) -> bytes:
        """The VAE, and how images are read and resized."""
        return make_key("latents 1", self.fingerprint, *self.options.reading)

    def _content(self, index: int) -> bytes:
        survey = self.images.survey
        return survey.digests[index] + survey.how_read(index)

    def read(self, index: int, variant: int) -> tuple[np.ndarray, Crop]:
        """Reads a variant of an image; returns ([3, H, W] uint8 pixels, the crop)."""
        image, target = self.images.records.image(index), self.images.target(index)
        found = cut_out(image, None, target, self.options, self.seed, self.passing(index, variant))
        return found.pixels, found.crop


@dataclass(frozen=True)
class MaskPlan(CutPlan):
    """The crops whose masks are cached.

    Attributes:
        latent_shape: maps (width, height) of pixels to the shape [C, h, w] of their latents.
    """

    latent_shape: Callable[[tuple[int, int]], tuple[int, int, int]] = field(repr=False)

    @cached_property
    def _common(self) -> bytes:
        return make_key("masks 1", self.latent_shape((1024, 1024))[1:])

    def _content(self, index: int) -> bytes:
        survey, mask = self.images.survey, self.images.records.mask(index)
        if mask is None:
            return b"everywhere"
        content = b"alpha" + survey.digests[index] if mask.is_alpha else survey.mask_digests[index]
        return content + survey.how_mask_read(index, mask.is_alpha)

    def read(self, index: int, variant: int) -> tuple[np.ndarray, Crop]:
        """Reads the mask of a variant; returns ([1, h, w] uint8 mask at the size of the latents, the crop)."""
        records, target = self.images.records, self.images.target(index)
        passing, shape = self.passing(index, variant), self.latent_shape(target)[1:]
        found = cut_out(records.image(index), records.mask(index), target, self.options, self.seed, passing, shape)
        return found.mask[None], found.crop


FEW_KEYS = 20_000  # below this, starting worker processes costs more than it saves
CUT_FACTS = struct.Struct("<15d")


def _keys_of(plan: CutPlan, indices: np.ndarray) -> bytes:
    return b"".join(plan.key(int(index), variant) for index in indices for variant in range(plan.num_variants))


@dataclass(frozen=True)
class EncodedImages:
    """A batch of crops to encode.

    Attributes:
        places: indices in the plan (image * K + variant) of the crops that could be read.
        pixels: [B, C, H, W] uint8.
        crops: [B, 6] float32.
        bad: why an image could not be read, by image index.
    """

    places: list[int]
    pixels: Tensor
    crops: Tensor
    bad: dict[int, str]


class ImagesToEncode(Dataset):
    """Dataset of `EncodedImages`; reads lists of a plan's crops, each from one bucket, in data-loader processes."""

    def __init__(self, plan: CutPlan, batches: Sequence[Sequence[int]]):
        self._plan = plan
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> EncodedImages:
        places, pixels, crops, bad = [], [], [], {}
        for place in self._batches[number]:
            index, variant = divmod(int(place), self._plan.num_variants)
            try:
                cut_pixels, crop = self._plan.read(index, variant)
            except (OSError, ValueError) as error:
                bad[index] = first_line(error)
                continue
            places.append(int(place))
            pixels.append(cut_pixels)
            crops.append(crop.row())
        stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, dtype=torch.uint8)
        return EncodedImages(places, stacked, torch.tensor(crops, dtype=torch.float32), bad)


@dataclass(frozen=True)
class CachedCuts:
    """The cached encodings of all crops.

    Attributes:
        places: [N, K, 2] int32 shard and row in the store; -1 for images that could not be read.
        bad: why an image could not be read, by image index.
    """

    store: EntryStore
    places: np.ndarray = field(repr=False)
    bad: dict[int, str]

    def read(self, index: int, passing: int) -> dict[str, Tensor]:
        """Returns the encodings of an image in a pass: "moments" [2, C, h, w] or "masks" [1, h, w], and "crops" [6].

        Raises:
            OSError: if the image could not be read.
        """
        place = self.places[index, passing % self.places.shape[1]]
        if place[0] < 0:
            raise OSError(self.bad.get(index, "it is not in the cache"))
        return self.store.read(place)


@dataclass(frozen=True)
class CachedTexts:
    """The cached text-encoder states of all captions.

    Attributes:
        fingerprint: identifies the text encoders and how they are used.
    """

    store: EntryStore
    fingerprint: str

    def read(self, text: str, dropped: bool) -> dict[str, Tensor]:
        """Returns the states of a text, or of a dropped caption, by name.

        Raises:
            KeyError: if they are not in the cache.
        """
        key = np.frombuffer(text_key(self.fingerprint, text, dropped), np.uint8)[None]
        place = self.store.find(key)[0]
        if place[0] < 0:
            raise KeyError(f"the caption {text!r} is not in the cache")
        return self.store.read(place)


@dataclass(frozen=True)
class Encodings:
    """The cached encodings of each kind; None for kinds that are computed in each training step."""

    latents: CachedCuts | None = None
    masks: CachedCuts | None = None
    texts: CachedTexts | None = None


def text_key(fingerprint: str, text: str, dropped: bool) -> bytes:
    """Returns the cache key [16 bytes] of a caption: a digest of everything that affects its states."""
    content = f"text 1 {fingerprint} {int(dropped)} {'' if dropped else text}"
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=KEY_SIZE).digest()


def texts_of(images: PlannedImages, seed: int, num_variants: int | None) -> Iterator[str]:
    """Yields each distinct text that the images may be trained with, in order of its first image.

    Args:
        num_variants: number of variants of captions with shuffled or dropped tags; None for one.
    """
    seen: set[str] = set()
    records = images.records
    for index, captions in enumerate(records.all_captions()):
        options = records.caption_options(index)
        identity = records.identity(index) if options.varies else 0
        variants = range(num_variants or 1) if options.varies else (0,)
        for caption in captions or records.captions(index):
            for variant in variants:
                text = compose(caption, options, seed, RecordPass(identity, variant))
                if text not in seen:
                    seen.add(text)
                    yield text
