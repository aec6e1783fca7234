"""Measures the way of the data: contestants that take turns in one run, and what many records cost.

    python benchmarks/data.py [--parts live peer files workers records headers] [--peer_script PATH] [--live_sd 3]

Times differ between machines and minutes, so what counts are the ratios: each contestant has a turn in every round, and
the median over the rounds is printed with its range. The files are warm: what a disk costs is not measured.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from tests import tiny  # noqa: E402
from utils.data.buckets import BucketOptions  # noqa: E402
from utils.data.cache import KEY_SIZE, EntryStore, in_shards, make_key  # noqa: E402
from utils.data.cached import CachedLatents, CachedTexts, text_key, texts_of  # noqa: E402
from utils.data.captions import CaptionOptions  # noqa: E402
from utils.data.dataset import SampleSpec, TrainingDataset, batches_by_step  # noqa: E402
from utils.data.headers import Survey, survey  # noqa: E402
from utils.data.images import ImageOptions  # noqa: E402
from utils.data.selection import PlannedImages, SelectionOptions, plan_images  # noqa: E402
from utils.data.sources import DataOptions, Records, Source, SourceOptions, read_records  # noqa: E402
from utils.data.tables import ImageTable  # noqa: E402
from utils.noise import ForwardProcess, NoiseDraws, NoiseOptions, SampleDraws  # noqa: E402
from utils.records import Batch  # noqa: E402
from utils.runtime import silence_libraries  # noqa: E402

silence_libraries()

SEED = 0
PICTURE_SIZE = (1280, 1024)
SMALL_SIZE = (96, 64)
SETTLING_SECONDS = 2.5  # files younger than this are not remembered by the survey
FINGERPRINT = "random entries"


@dataclass(frozen=True)
class Shape:
    """What is cached of a sample: latents [C, h, w] of an image of `resolution`, and text states by their names."""

    name: str
    resolution: int
    latents: tuple[int, int, int]
    states: Mapping[str, tuple[int, ...]]


SD = Shape("SD", 512, (4, 64, 64), {"encoder_hidden_states": (77, 768)})
SDXL = Shape("SDXL", 1024, (4, 128, 128), {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)})


# Taking turns

Contestant = Callable[[float], float]
"""Works for at least so many seconds; gives the seconds that one sample took."""


def turn(batches: Iterator[int], seconds: float) -> float:
    """A contestant made of an endless iterator, whose items are how many samples were made."""
    began, samples = time.perf_counter(), 0
    while time.perf_counter() < began + seconds or not samples:
        samples += next(batches)
    return (time.perf_counter() - began) / samples


def take_turns(contestants: Mapping[str, Contestant], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a sample of each contestant, by round; before the first each has a turn that does not count."""
    for contestant in contestants.values():
        contestant(seconds)
    found = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(contestants[name](seconds))
    return found


def spread(values: Sequence[float]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def print_times(title: str, times: Mapping[str, list[float]]) -> None:
    """How many times as long each takes as the first."""
    reference = next(iter(times.values()))
    rows = []
    for name, each in times.items():
        ratios = [other / own for other, own in zip(each, reference, strict=True)]
        rows.append([name, f"{1 / statistics.median(each):.4g}", spread(ratios) if each is not reference else "1"])
    print_table(title, ["", "samples/s", "times as long as the first: median (range)"], rows)


# Data made on the spot


class SyntheticTable(ImageTable):
    """Images that are listed and not there."""

    name = "synthetic"

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def key(self, row: int) -> str:
        """A file name."""
        return f"{row:08d}.jpg"

    def image(self, row: int) -> bytes:
        """Nothing."""
        return b""

    def captions(self, row: int) -> tuple[str, ...]:
        """One, the image's own."""
        return (f"a photograph of something, number {row}",)


def plan_synthetic(count: int, resolution: int, buckets: BucketOptions, group_size: int) -> PlannedImages:
    """Records of no files, in sizes from 512 to 2047 pixels, planned."""
    records = Records(
        [Source("synthetic", SyntheticTable(count), CaptionOptions())], np.zeros(count, np.uint16), np.arange(count)
    )
    sizes = np.random.default_rng(SEED).integers(512, 2048, (count, 2), dtype=np.int32)
    digests = np.empty(count, object)
    digests[:] = [row.to_bytes(16, "little") for row in range(count)]
    known = Survey(sizes, np.zeros(count, np.uint16), np.zeros(count, np.int64), digests, {})
    return plan_images(records, known, resolution, group_size, buckets, SelectionOptions(), lambda *_: None)


def plan_folder(folder: Path, resolution: int, memory: Path) -> PlannedImages:
    """The images of a folder, planned in squares."""
    records = read_records(DataOptions(), SourceOptions(train_data_dir=str(folder)), CaptionOptions(), SEED)
    known = survey(records, memory)
    return plan_images(records, known, resolution, 1, BucketOptions(), SelectionOptions(), lambda *_: None)


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """An imagefolder of JPEG files about as large as photographs of their size are."""
    folder.mkdir(parents=True)
    random, lines = np.random.default_rng(SEED), []
    for number in range(count):
        coarse = random.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        fine = random.integers(0, 24, (size[1], size[0], 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) // 2 + fine
        Image.fromarray(picture).save(folder / f"{number:06d}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{number:06d}.jpg", "text": f"a picture, number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def random_values(count: int, shape: tuple[int, ...]) -> Tensor:
    """[count, *shape] bfloat16, as under --mixed_precision bf16."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(SEED)).bfloat16()


class Entries:
    """Random encodings of a shape, for each of `count` samples one, in stores as the cache has them."""

    def __init__(self, shape: Shape, count: int, folder: Path):
        self.shape = shape
        self.images = plan_synthetic(count, shape.resolution, BucketOptions(), 1)
        self.moments = random_values(count, (2, *shape.latents))
        self.states = {name: random_values(count + 1, each) for name, each in shape.states.items()}
        crops = torch.tensor([0, 0, 0, 0, shape.resolution, shape.resolution]).float().repeat(count, 1)
        texts = [text for text in texts_of(self.images, SEED, 1)]
        latent_keys = [make_key(number) for number in range(count)]
        text_keys = [text_key(FINGERPRINT, text, False) for text in texts] + [text_key(FINGERPRINT, "", True)]
        latents = write_entries(folder / "latents", latent_keys, {"moments": self.moments, "crops": crops})
        places = latents.find(np.frombuffer(b"".join(latent_keys), np.uint8).reshape(-1, KEY_SIZE))
        self.latents = CachedLatents(latents, places[:, None], {})
        self.texts = CachedTexts(write_entries(folder / "text", text_keys, self.states), FINGERPRINT)

    def sample(self, number: int) -> dict[str, Tensor]:
        """All that is cached of a sample."""
        return {"moments": self.moments[number]} | {name: each[number] for name, each in self.states.items()}

    def dataset(self, batch_size: int, with_noise: bool = True) -> TrainingDataset:
        """The loader's dataset over them."""
        draws = noise_draws(batch_size) if with_noise else NoDraws()
        batches = self.images.batches(batch_size, batch_size, SEED)
        spec = SampleSpec(lambda _: self.shape.latents, no_tokens, 1, 1)
        return TrainingDataset(self.images, batches, spec, ImageOptions(), draws, self.latents, self.texts)


def write_entries(folder: Path, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> EntryStore:
    """A store with an entry for each key."""
    store = EntryStore(folder)
    store.open()
    for rows in in_shards(range(len(keys)), [0] * len(keys)):
        store.write([keys[row] for row in rows], {name: each[rows.start : rows.stop] for name, each in tensors.items()})
    store.refresh()
    return store


def noise_draws(batch_size: int) -> NoiseDraws:
    """The noise and timesteps of a plain run."""
    return NoiseDraws(NoiseOptions(), ForwardProcess(tiny.scheduler().config, {}), SEED, batch_size)


class NoDraws:
    """In the place of `NoiseDraws`, for the bare read."""

    nothing = SampleDraws(np.zeros(0, np.float32), np.zeros(0, np.float32), None, 0)

    def draw(self, step: int, slot: int, shape: tuple[int, int, int]) -> SampleDraws:
        """No noise."""
        return self.nothing


def no_tokens(captions: list[str]) -> Tensor:
    """In the place of a tokenizer: [B, 1, 77] ids."""
    return torch.randint(0, 49408, (len(captions), 1, 77))


def live_dataset(images: PlannedImages, shape: Shape, batch_size: int) -> TrainingDataset:
    """The loader's dataset that decodes and crops images."""
    spec = SampleSpec(lambda _: shape.latents, no_tokens)
    batches = images.batches(batch_size, batch_size, SEED)
    return TrainingDataset(images, batches, spec, ImageOptions(), noise_draws(batch_size))


@contextmanager
def endless(
    dataset: TrainingDataset, num_workers: int = 0, micro_batch: int | None = None
) -> Iterator[Iterator[Batch]]:
    """The loader's batches, from step 0 on; within it its workers live."""
    pieces = dataset.images.pieces(dataset.batches, micro_batch or dataset.batches.size, 0, 1, 0, 10**9)
    steps = batches_by_step(dataset, pieces, num_workers, pin_memory=False)
    yield (batch for _, batches in steps for batch in batches)
    steps.close()


def loading(dataset: TrainingDataset) -> Contestant:
    """Loads batches, in this process."""
    return partial(turn, (len(batch) for batch in endless_here(dataset)))


def endless_here(dataset: TrainingDataset) -> Iterator[Batch]:
    """The loader's batches without workers."""
    with endless(dataset) as batches:
        yield from batches
