"""What of the data is encoded once: which crops of which images, which texts, and where they lie in the cache."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.data.cache import KEY_SIZE, EntryStore, make_key
from utils.data.captions import compose
from utils.data.headers import map_chunks
from utils.data.images import Cut, ImageOptions, make_cut, plan_cut, read_rgb
from utils.data.selection import PlannedImages
from utils.options import first_line
from utils.records import RecordPass


@dataclass(frozen=True)
class LatentPlan:
    """The crops whose moments are cached: of each image in each of its variants.

    Attributes:
        num_variants: K, 1 where every pass cuts alike.
        fingerprint: of the VAE and of how its moments are stored.
    """

    images: PlannedImages = field(repr=False)
    options: ImageOptions
    seed: int
    num_variants: int
    fingerprint: str

    def cut(self, index: int, variant: int, size: tuple[int, int] | None = None) -> Cut:
        """How an image is cut in a variant; `size` where it turned out to be another than its header says."""
        images = self.images
        passing = RecordPass(images.records.identity(index), variant)
        return plan_cut(size or images.size(index), images.target(index), self.options, self.seed, passing)

    @cached_property
    def _common(self) -> bytes:
        """What the keys of all crops are made of: the VAE, and how any image is read and resized."""
        options = self.options
        facts = (self.fingerprint, options.image_interpolation_mode, options.transparency_color)
        return make_key("latents 1", *facts)

    def key(self, index: int, variant: int) -> bytes:
        """Made of all that changes the moments: the image's bytes, how it is cut, and what is common."""
        cut = self.cut(index, variant)
        how = (cut.degrees, *cut.box, cut.mirrored, cut.brightness, cut.contrast, cut.saturation, *cut.crop.row())
        content = self._common + self.images.survey.digests[index] + CUT_FACTS.pack(*how)
        return hashlib.blake2b(content, digest_size=KEY_SIZE).digest()

    def keys(self, show_progress: bool = False) -> np.ndarray:
        """[N * K, 16] uint8; an image's variants stand together."""
        indices = np.arange(len(self.images.records))
        progress = tqdm(total=len(indices), desc="planning crops", disable=not show_progress, leave=False)
        found = []
        if len(indices) < FEW_KEYS:
            return np.frombuffer(_keys_of(self, indices), np.uint8).reshape(-1, KEY_SIZE)
        with progress:
            for keys in map_chunks(_keys_of, self, indices, many=FEW_KEYS):
                found.append(keys)
                progress.update(len(keys) // (KEY_SIZE * self.num_variants))
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, KEY_SIZE)

    def read(self, index: int, variant: int) -> tuple[np.ndarray, list[float]]:
        """([3, H, W] uint8 pixels, the crop's row) of a variant.

        Raises:
            OSError, ValueError: if the image can't be read.
        """
        image = read_rgb(self.images.records.image(index), self.options.transparency_color)
        cut = self.cut(index, variant, image.size)
        return make_cut(image, cut, self.options), cut.crop.row()


FEW_KEYS = 20_000  # of which processes would cost more than they save
CUT_FACTS = struct.Struct("<15d")


def _keys_of(plan: LatentPlan, indices: np.ndarray) -> bytes:
    return b"".join(plan.key(int(index), variant) for index in indices for variant in range(plan.num_variants))


@dataclass(frozen=True)
class EncodedImages:
    """One batch on its way to the VAE.

    Attributes:
        places: of the crops that could be read, their numbers in the plan (image * K + variant).
        pixels: [B, 3, H, W] uint8.
        crops: [B, 6] float32.
        bad: why an image could not be read, by its number.
    """

    places: list[int]
    pixels: Tensor
    crops: Tensor
    bad: dict[int, str]


class ImagesToEncode(Dataset):
    """Maps a list of a plan's places, all of one bucket, to what the VAE takes; for a DataLoader's workers."""

    def __init__(self, plan: LatentPlan, batches: Sequence[Sequence[int]]):
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
            crops.append(crop)
        stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, dtype=torch.uint8)
        return EncodedImages(places, stacked, torch.tensor(crops, dtype=torch.float32), bad)


@dataclass(frozen=True)
class CachedLatents:
    """Where each image's moments lie.

    Attributes:
        places: [N, K, 2] int32 shard and row; -1 of an image that could not be read.
        bad: why not, by the image's number.
    """

    store: EntryStore
    places: np.ndarray = field(repr=False)
    bad: dict[int, str]

    def read(self, index: int, passing: int) -> tuple[Tensor, Tensor]:
        """([2, C, h, w] moments, [6] crop) of an image in one of its passes.

        Raises:
            OSError: if it could not be read.
        """
        place = self.places[index, passing % self.places.shape[1]]
        if place[0] < 0:
            raise OSError(self.bad.get(index, "it is not in the cache"))
        entry = self.store.read(place)
        return entry["moments"], entry["crops"]


@dataclass(frozen=True)
class CachedTexts:
    """Where the text states of each caption lie.

    Attributes:
        fingerprint: of the text encoders and how they are used.
    """

    store: EntryStore
    fingerprint: str

    def read(self, text: str, dropped: bool) -> dict[str, Tensor]:
        """The states of a text, or those of a dropped caption."""
        key = np.frombuffer(text_key(self.fingerprint, text, dropped), np.uint8)[None]
        place = self.store.find(key)[0]
        if place[0] < 0:
            raise KeyError(f"the caption {text!r} is not in the cache")
        return self.store.read(place)


def text_key(fingerprint: str, text: str, dropped: bool) -> bytes:
    """Made of all that changes a caption's states."""
    content = f"text 1 {fingerprint} {int(dropped)} {'' if dropped else text}"
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=KEY_SIZE).digest()


def texts_of(images: PlannedImages, seed: int, num_variants: int | None) -> Iterator[str]:
    """Each distinct text that the images may train on, in order of its first image.

    Args:
        num_variants: orders of shuffled or dropped tags that are kept; None counts only one of each caption.
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
