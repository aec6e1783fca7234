"""Measures data loading: compares contestants that take turns in one run, and measures the cost of many records.

    python benchmarks/data.py [--parts live peer files workers records headers] [--peer_script PATH] [--live_sd 3]

Times vary between machines and over time, so it compares ratios: each contestant has a turn in every round, and it
prints the median over the rounds with its range. Files are in the page cache, so disk access is not measured. torch has
one thread, as in a loader worker, except for encoders of true size.
"""

import argparse
import ast
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from benchmarks.launch import import_torchvision  # noqa: E402
from benchmarks.printing import print_machine, print_table  # noqa: E402
from tests import tiny  # noqa: E402
from utils.config.batch import Batch  # noqa: E402
from utils.config.library_messages import hear_libraries  # noqa: E402
from utils.data.cache import KEY_SIZE, EntryStore, in_shards, make_key  # noqa: E402
from utils.data.captions import CaptionOptions  # noqa: E402
from utils.data.encodings import CachedCuts, CachedTexts, Encodings, LatentPlan, text_key, texts_of  # noqa: E402
from utils.data.loader import SampleSpec, TrainingDataset, Waiting, batches_by_step  # noqa: E402
from utils.data.options import BucketOptions, ImageOptions, SelectionOptions  # noqa: E402
from utils.data.order import GlobalBatches  # noqa: E402
from utils.data.plan import PlannedImages, plan_images  # noqa: E402
from utils.data.source_options import DataOptions, SourceOptions  # noqa: E402
from utils.data.sources import Records, Source, read_records  # noqa: E402
from utils.data.survey import Survey, add_digests, survey  # noqa: E402
from utils.data.tables import ImageTable  # noqa: E402
from utils.diffusion.noise import ForwardProcess, NoiseDraws, SampleDraws  # noqa: E402
from utils.diffusion.options import NoiseOptions  # noqa: E402
from utils.models.sdxl import SCALING_FACTOR  # noqa: E402

hear_libraries()

SEED = 0
PICTURE_SIZE = (1280, 1024)
SMALL_SIZE = (96, 64)
SETTLING_SECONDS = 2.5  # the survey does not remember files younger than this
FINGERPRINT = "random entries"
PACKAGES = ("torch", "numpy", "pillow", "safetensors", "datasets", "diffusers", "transformers")


@dataclass(frozen=True)
class Shape:
    """The cached tensors of a sample: latents [C, h, w] of an image of `resolution`, and text states by name."""

    name: str
    resolution: int
    latents: tuple[int, int, int]
    states: Mapping[str, tuple[int, ...]]


SD = Shape("SD", 512, (4, 64, 64), {"encoder_hidden_states": (77, 768)})
SDXL = Shape("SDXL", 1024, (4, 128, 128), {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)})


# Taking turns

Contestant = Callable[[float], float]
"""Runs for at least the given seconds; returns the seconds per sample."""


def turn(batches: Iterator[int], seconds: float) -> float:
    """Runs an endless iterator of sample counts for at least `seconds`; returns the seconds per sample."""
    began, samples = time.perf_counter(), 0
    while time.perf_counter() < began + seconds or not samples:
        samples += next(batches)
    return (time.perf_counter() - began) / samples


def take_turns(contestants: Mapping[str, Contestant], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Returns the seconds per sample of each contestant, by round, after a warm-up turn of each."""
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
    """Returns the text "median (minimum to maximum)"."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def print_times(title: str, times: Mapping[str, list[float]]) -> None:
    """Prints the speed of each contestant, and its time relative to the first."""
    reference = next(iter(times.values()))
    rows = []
    for name, each in times.items():
        ratios = [other / own for other, own in zip(each, reference, strict=True)]
        rows.append([name, f"{1 / statistics.median(each):.4g}", spread(ratios) if each is not reference else "1"])
    print_table(title, ["", "samples/s", "times as long as the first: median (range)"], rows)


# Data made on the spot


class SyntheticTable(ImageTable):
    """A table of images without files."""

    name = "synthetic"

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def key(self, row: int) -> str:
        """Returns a file name."""
        return f"{row:08d}.jpg"

    def image(self, row: int) -> bytes:
        """Nothing."""
        return b""

    def captions(self, row: int) -> tuple[str, ...]:
        """Returns one caption with the image's number."""
        return (f"a photograph of something, number {row}",)


def synthetic_records(count: int) -> tuple[Records, Survey]:
    """Returns records without files, and a survey of them: sizes from 512 to 2047 pixels, distinct digests."""
    source = Source("synthetic", SyntheticTable(count), CaptionOptions())
    records = Records([source], np.zeros(count, np.uint16), np.arange(count))
    sizes = np.random.default_rng(SEED).integers(512, 2048, (count, 2), dtype=np.int32)
    digests = np.empty(count, object)
    digests[:] = [row.to_bytes(16, "little") for row in range(count)]
    return records, replace(Survey.unknown(count), sizes=sizes, digests=digests)


def planned(
    records: Records, known: Survey, resolution: int, buckets: BucketOptions | None = None, group_size: int = 1
) -> PlannedImages:
    """Plans the images of records, as squares unless buckets are given."""
    options = buckets or BucketOptions()
    return plan_images(records, known, resolution, group_size, options, SelectionOptions(), lambda *_: None)


def plan_folder(folder: Path, resolution: int, memory: Path) -> PlannedImages:
    """Plans the images of a folder as squares, with their digests."""
    records = folder_records(folder)
    known = survey(records, memory)
    add_digests(known, records, np.ones(len(records), bool), memory)
    return planned(records, known, resolution)


def folder_records(folder: Path) -> Records:
    """Returns the records of a folder."""
    return read_records(DataOptions(), SourceOptions(train_data_dir=str(folder)), CaptionOptions(), SEED)


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Writes an imagefolder of JPEG files with file sizes similar to photographs."""
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
    """Returns random bfloat16 values [count, *shape], as with --mixed_precision bf16."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(SEED)).bfloat16()


class Entries:
    """Random encodings of a shape for `count` samples, in stores as in the cache."""

    def __init__(self, shape: Shape, count: int, folder: Path):
        self.shape = shape
        self.images = planned(*synthetic_records(count), shape.resolution)
        self.moments = random_values(count, (2, *shape.latents))
        self.states = {name: random_values(count + 1, each) for name, each in shape.states.items()}
        crops = torch.tensor([0, 0, 0, 0, shape.resolution, shape.resolution]).float().repeat(count, 1)
        texts = list(texts_of(self.images, SEED, 1))
        latent_keys = [make_key(number) for number in range(count)]
        text_keys = [text_key(FINGERPRINT, text, False) for text in texts] + [text_key(FINGERPRINT, "", True)]
        latents = write_entries(folder / "latents", latent_keys, {"moments": self.moments, "crops": crops})
        places = latents.find(np.frombuffer(b"".join(latent_keys), np.uint8).reshape(-1, KEY_SIZE))
        self.latents = CachedCuts(latents, places[:, None], {})
        self.texts = CachedTexts(write_entries(folder / "text", text_keys, self.states), FINGERPRINT)

    def sample(self, number: int) -> dict[str, Tensor]:
        """Returns all cached tensors of a sample."""
        return {"moments": self.moments[number]} | {name: each[number] for name, each in self.states.items()}

    def dataset(self, batch_size: int, with_noise: bool = True) -> TrainingDataset:
        """Returns the loader's dataset over the entries."""
        draws = noise_draws(batch_size) if with_noise else NoDraws()
        batches = self.images.batches(batch_size, batch_size, SEED)
        spec = SampleSpec(lambda _: self.shape.latents, no_tokens, 1, 1)
        return TrainingDataset(
            self.images, batches, spec, ImageOptions(), draws, Encodings(self.latents, None, self.texts)
        )


def write_entries(folder: Path, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> EntryStore:
    """Writes a store with an entry for each key."""
    store = EntryStore(folder)
    store.open()
    for rows in in_shards(range(len(keys)), [0] * len(keys)):
        store.write([keys[row] for row in rows], {name: each[rows.start : rows.stop] for name, each in tensors.items()})
    store.refresh()
    return store


def noise_draws(batch_size: int) -> NoiseDraws:
    """Returns the noise and timesteps of a plain run."""
    return NoiseDraws(NoiseOptions(), ForwardProcess(tiny.scheduler().config, {}), SEED, batch_size)


class NoDraws:
    """Replaces `NoiseDraws`, to measure reading alone."""

    nothing = SampleDraws(np.zeros(0, np.float32), np.zeros(0, np.float32), None, 0)

    def draw(self, step: int, slot: int, shape: tuple[int, int, int]) -> SampleDraws:
        """No noise."""
        return self.nothing


def no_tokens(captions: list[str]) -> Tensor:
    """Replaces a tokenizer: returns zero ids [B, 1, 77]."""
    return torch.randint(0, 49408, (len(captions), 1, 77))


def live_dataset(images: PlannedImages, shape: Shape, batch_size: int) -> TrainingDataset:
    """Returns the loader's dataset that decodes and crops images."""
    spec = SampleSpec(lambda _: shape.latents, no_tokens)
    batches = images.batches(batch_size, batch_size, SEED)
    return TrainingDataset(images, batches, spec, ImageOptions(), noise_draws(batch_size))


def endless(dataset: TrainingDataset, num_workers: int = 0) -> Iterator[Batch]:
    """Yields the loader's global batches from step 0; closing the iterator ends its workers."""
    pieces = dataset.images.pieces(dataset.batches, dataset.batches.size, 0, 1, 0, 10**9)
    for _, batches in batches_by_step(dataset, pieces, num_workers, timeout=0, pin_memory=False, waiting=Waiting()):
        yield from batches


def loading(dataset: TrainingDataset) -> Contestant:
    """Returns a contestant that loads batches in this process."""
    return partial(turn, (len(batch) for batch in endless(dataset)))


# 1. Cache or live encoding


def run_live(args: argparse.Namespace, folder: Path) -> None:
    """Compares a warm cache with decoding, cropping and encoding each time."""
    for name, make in (("SD", tiny.make_sd), ("SDXL", tiny.make_sdxl)):
        times = take_turns(tiny_contestants(make(folder / f"tiny-{name}"), folder / name), args.rounds, args.seconds)
        print_times(f"1. Cached and live: tiny {name} pipeline, {tiny.RESOLUTION} px, through the encoder", times)
    pictures = write_pictures(folder / "pictures", min(args.samples, 64), PICTURE_SIZE)
    for shape in (SD, SDXL):
        entries = Entries(shape, args.samples, folder / f"entries-{shape.name}")
        images = plan_folder(pictures, shape.resolution, folder / "memory")
        contestants = {
            "cached, with noise": loading(entries.dataset(args.batch_size)),
            "cached, without noise": loading(entries.dataset(args.batch_size, with_noise=False)),
            "live, only decoded and cropped, with noise": loading(live_dataset(images, shape, args.batch_size)),
        }
        times = take_turns(contestants, args.rounds, args.seconds)
        print_times(f"1. Cached and live: {shape.name}'s shape, 0 workers, batches of {args.batch_size}", times)
        if shape is SD and args.live_sd:
            contestants = {
                "cached, with noise": contestants["cached, with noise"],
                "live, with SD's VAE and text encoder in float32": partial(turn, encoded_live(images)),
            }
            times = take_turns(contestants, args.live_sd, args.seconds)
            print_times("1. Cached and live: SD's shape, encoders of SD's architecture on this CPU", times)
    if not args.live_sd:
        print("\nEncoders of SD's true size were skipped; use --live_sd 3 to run them.")


def tiny_contestants(pipeline: Path, folder: Path) -> dict[str, Contestant]:
    """Returns contestants that read and compute a tiny pipeline's encodings; both must be equal."""
    from accelerate import Accelerator

    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import ComponentDtypes, PipelineSource
    from utils.models.registry import pick_family
    from utils.training.encoding import CacheFiller, Encoder

    source = PipelineSource(ModelOptions(pretrained_model_name_or_path=str(pipeline)))
    family = pick_family(source)(source, ComponentDtypes(*[torch.float32] * 3), {})
    images = plan_folder(tiny.make_images(folder / "images", 64), tiny.RESOLUTION, folder / "memory")
    filler = CacheFiller(Accelerator(cpu=True), family, None, 8, 0)
    plan = LatentPlan(images, ImageOptions(), SEED, 1, filler.vae_fingerprint())
    latents = filler.latents(plan, EntryStore(folder / "latents"))
    texts = filler.texts(list(texts_of(images, SEED, 1)), filler.text_fingerprint(), EntryStore(folder / "text"))
    spec = SampleSpec(family.latent_space.shape, family.tokenizer(), 1, 1)
    facts = (images, images.batches(16, 16, SEED), spec, ImageOptions(), noise_draws(16))
    encoder = Encoder(family, text_encoders_train=False)
    datasets = {"cached": TrainingDataset(*facts, Encodings(latents, None, texts)), "live": TrainingDataset(*facts)}
    cached, live = (encoder.encode(next(endless(dataset))) for dataset in datasets.values())
    torch.testing.assert_close(cached.mean, live.mean)
    torch.testing.assert_close(cached.states, live.states)
    return {
        name: partial(turn, (len(encoder.encode(batch).batch) for batch in endless(dataset)))
        for name, dataset in datasets.items()
    }


@torch.no_grad()
def encoded_live(images: PlannedImages) -> Iterator[int]:
    """Decodes, crops and encodes one image after another, with SD's encoders with random weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from utils.models.latent_space import LatentSpace

    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    space, text_encoder = LatentSpace(vae.eval()), CLIPTextModel(clip).eval()
    for batch in endless(live_dataset(images, SD, 1)):
        torch.set_num_threads(os.cpu_count() or 1)
        mean, _ = space.moments(batch.pixels)
        states = text_encoder(batch.input_ids[:, 0]).last_hidden_state
        torch.set_num_threads(1)
        assert (mean.shape[1:], states.shape[1:]) == (SD.latents, SD.states["encoder_hidden_states"])
        yield len(batch)


# 2. Cache or the precomputed columns of the diffusers SDXL script


def run_peer(args: argparse.Namespace, folder: Path) -> None:
    """Compares our loader with the loader of the peer's script, after its own precomputation."""
    if args.peer_script is None:
        print("\n2. The diffusers SDXL script was skipped; give its train_text_to_image_sdxl.py as --peer_script.")
        return
    pictures = write_pictures(folder / "peer-pictures", args.samples, PICTURE_SIZE)
    loader = peer_loader(args.peer_script, pictures, folder / "peer", args.batch_size)
    entries = Entries(SDXL, args.samples, folder / "peer-entries")
    theirs, ours = next(iter(loader)), next(endless(entries.dataset(args.batch_size)))
    assert theirs["model_input"].shape == ours.moments[:, 0].shape
    assert theirs["prompt_embeds"].shape == ours.states["encoder_hidden_states"].shape
    assert theirs["pooled_prompt_embeds"].shape == ours.states["text_embeds"].shape
    contestants = {
        "ours, cached, without noise": loading(entries.dataset(args.batch_size, with_noise=False)),
        "ours, cached, with noise": loading(entries.dataset(args.batch_size)),
        "the peer's precomputed dataset, without noise": partial(turn, passes(loader)),
    }
    times = take_turns(contestants, args.rounds, args.seconds)
    print_times(f"2. The diffusers SDXL script's loader: 0 workers, batches of {args.batch_size}, 1024 px", times)
    _, with_noise, theirs = times.values()
    ratios = [other / own for other, own in zip(theirs, with_noise, strict=True)]
    print(
        "\nThe peer draws noise later, on the GPU; compared with ours with noise, it takes "
        f"{spread(ratios)} times as long."
    )


def passes(loader: DataLoader) -> Iterator[int]:
    """Yields the sizes of the peer's batches, pass after pass."""
    while True:
        for batch in loader:
            yield len(batch["model_input"])


def peer_loader(script: Path, pictures: Path, folder: Path, batch_size: int) -> DataLoader:
    """Returns the loader that the peer's code builds for a folder of images.

    It runs the peer's functions, and the part of its `main` from loading the dataset to the finished loader. Its
    encoders are replaced by ones that return noise.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.Assign)
    parts = [node for node in tree.body if isinstance(node, kinds)]
    main = next(node for node in parts if isinstance(node, ast.FunctionDef) and node.name == "main")
    first, last = (
        next(place for place, node in enumerate(main.body) if ast.unparse(node).startswith(beginning))
        for beginning in ("if args.dataset_name is not None", "train_dataloader = ")
    )
    names: dict = {"__name__": "peer"}
    exec(compile(ast.Module(parts, []), str(script), "exec"), names)
    flags = ["--pretrained_model_name_or_path", "none", "--train_data_dir", pictures, "--cache_dir", folder / "cache"]
    flags += ["--output_dir", folder / "out", "--train_batch_size", batch_size, "--resolution", SDXL.resolution]
    names["args"] = names["parse_args"]([str(flag) for flag in flags])
    names["accelerator"] = SimpleNamespace(main_process_first=nullcontext)
    names |= {"vae": NoiseVae(), "vae_path": "none", "tokenizer_one": NoIds(), "tokenizer_two": NoIds()}
    names |= {"text_encoder_one": NoiseEncoder(768), "text_encoder_two": NoiseEncoder(1280)}
    exec(compile(ast.Module(main.body[first : last + 1], []), str(script), "exec"), names)
    return names["train_dataloader"]


class NoIds:
    """Replaces the peer's tokenizer."""

    model_max_length = 77

    def __call__(self, captions: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(len(captions), 77, dtype=torch.int64))


class NoiseEncoder:
    """Replaces the peer's text encoder, which runs in bfloat16."""

    device = torch.device("cpu")

    def __init__(self, width: int):
        self._width = width

    def __call__(self, input_ids: Tensor, **_: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = torch.randn(*input_ids.shape, self._width).bfloat16()
        return hidden[:, 0], (hidden, hidden)


class NoiseVae:
    """Replaces the peer's VAE, which runs in float32."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=SCALING_FACTOR)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        """Returns a posterior to sample from."""
        shape = (len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=partial(torch.randn, shape)))


# 3. Shards or one file per image


def run_files(args: argparse.Namespace, folder: Path) -> None:
    """Compares memory-mapped shards with one file per sample, with the same entries in random order."""
    for shape in (SD, SDXL):
        entries = Entries(shape, args.samples, folder / f"sharded-{shape.name}")
        kinds = {"safetensors": (write_safetensors, load_file), "npz": (write_npz, read_npz)}
        contestants = {
            "ours, without noise": loading(entries.dataset(args.batch_size, with_noise=False)),
            "ours, with noise": loading(entries.dataset(args.batch_size)),
        }
        for kind, (write, read) in kinds.items():
            files = [folder / f"{shape.name}-{number}.{kind}" for number in range(args.samples)]
            for number, file in enumerate(files):
                write(entries.sample(number), file)
            found = read(files[1])["moments"]
            assert torch.equal(found, entries.sample(1)["moments"].to(found.dtype))
            loader = DataLoader(FilePerSample(files, read), args.batch_size, shuffle=True, collate_fn=stack)
            contestants[f"a .{kind} for each sample, without noise"] = partial(turn, sizes_of(loader))
        times = take_turns(contestants, args.rounds, args.seconds)
        print_times(f"3. A file for each sample: {shape.name}'s shape, 0 workers, batches of {args.batch_size}", times)


class FilePerSample(Dataset):
    """A dataset with one file per sample."""

    def __init__(self, files: Sequence[Path], read: Callable[[Path], dict[str, Tensor]]):
        self._files = files
        self._read = read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self._read(self._files[number])


def stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks samples into a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def sizes_of(loader: DataLoader) -> Iterator[int]:
    """Yields the sizes of a loader's batches, pass after pass."""
    while True:
        for batch in loader:
            yield len(batch["moments"])


def write_safetensors(sample: dict[str, Tensor], file: Path) -> None:
    """Writes the file of one sample."""
    save_file({name: tensor.contiguous() for name, tensor in sample.items()}, file)


def write_npz(sample: dict[str, Tensor], file: Path) -> None:
    """Writes the file of one sample in float16, because numpy has no bfloat16; the size is the same."""
    np.savez(file, **{name: tensor.to(torch.float16).numpy() for name, tensor in sample.items()})


def read_npz(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file."""
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


# 4. Loader workers; 6. estimated waiting time of a GPU


def run_workers(args: argparse.Namespace, folder: Path) -> None:
    """Measures the loader with 0, 1 and 2 workers, up to the number of cores, and estimates a GPU's waiting time."""
    counts = [count for count in (0, 1, 2) if count <= (os.cpu_count() or 1)]
    pictures = plan_folder(write_pictures(folder / "pictures-4", 64, PICTURE_SIZE), 1024, folder / "memory")
    datasets = {
        "cached, SD's shape": Entries(SD, args.samples, folder / "workers-SD").dataset(args.batch_size),
        "cached, SDXL's shape": Entries(SDXL, args.samples, folder / "workers-SDXL").dataset(args.batch_size),
        "live, 1280x1024 JPEG to 1024x1024 pixels": live_dataset(pictures, SDXL, 4),
    }
    rates = {}
    for name, dataset in datasets.items():
        contestants = {f"{count} workers": partial(worker_turn, dataset, count) for count in counts}
        times = take_turns(contestants, args.rounds, args.seconds)
        reference = times["0 workers"]
        rows = []
        for label, each in times.items():
            ratios = [own / other for own, other in zip(reference, each, strict=True)]
            rows.append([label, f"{1 / statistics.median(each):.4g}", spread(ratios)])
        print_table(
            f"4. Loader workers: {name}", ["", "samples/s", "throughput by that of 0 workers: median (range)"], rows
        )
        rates[name] = {count: 1 / statistics.median(times[f"{count} workers"]) for count in counts}
    print_waiting(rates["cached, SD's shape"], args.images_per_second)


def worker_turn(dataset: TrainingDataset, num_workers: int, seconds: float) -> float:
    """Returns the seconds per sample of a new loader, after the batches that its workers prefetch."""
    loader = endless(dataset, num_workers)
    for _ in range(2 * num_workers + 2):
        next(loader)
    taken = turn((len(batch) for batch in loader), seconds)
    loader.close()
    return taken


def print_waiting(rates: Mapping[int, float], images_per_second: float) -> None:
    """Prints the share of time that a GPU would wait for data: computed, not measured."""
    step, rows = 1 / images_per_second, []
    for workers, rate in rates.items():
        load = 1 / rate
        share = max(0.0, 1 - step / load) if workers else load / (load + step)  # workers load while the GPU computes
        rows.append([str(workers), f"{rate:.4g}", f"{share:.1%}"])
    title = (
        f"6. Arithmetic, not measured on a GPU: one that trains SD at {images_per_second:g} images/s, from the cache"
    )
    print_table(title, ["workers", "samples/s, from 4", "share of the time that it would wait for data"], rows)


# 5. Many records and files


def run_records(args: argparse.Namespace, folder: Path) -> None:
    """Measures the cost of planning and of cache keys by the number of records."""
    rows = [
        [f"{count:,}", str(num_buckets), *in_fresh_process(planning_cost, count, num_buckets)]
        for count, num_buckets in itertools.product(args.records, (1, 20))
    ]
    head = [
        "records",
        "buckets",
        "plan_images, s",
        "GlobalBatches and first draw, s",
        "a draw, us: median (10 to 90 %)",
    ]
    head += ["first draw of another epoch, ms", "peak memory above imports, MB"]
    print_table("5. Planning records that are listed and not there", head, rows)
    rows = [[f"{count:,}", *in_fresh_process(key_cost, count)] for count in args.records]
    print_table("5. LatentPlan.keys of the same", ["records", "s", "peak memory above imports, MB"], rows)


def in_fresh_process(work: Callable[..., list[str]], *arguments: object) -> list[str]:
    """Returns the result of `work` in a new process, whose memory has only imports."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def planning_cost(count: int, num_buckets: int) -> list[str]:
    """Returns the cells of the table: seconds, microseconds, milliseconds and megabytes."""
    sizes = [(1024 + 64 * step, 1024 - 32 * step) for step in range(num_buckets // 2)]
    names = [f"{width}x{height}" for size in sizes for width, height in (size, size[::-1])]
    buckets = BucketOptions(use_aspect_ratio_buckets=True, buckets=names) if names else BucketOptions()
    before = reset_peak_memory()
    listed = synthetic_records(count)
    images, planning = timed(lambda: planned(*listed, 1024, buckets, 16))
    batches, drawing = timed(lambda: first_draw(images.batches(64, 16, SEED)))
    draws = draw_microseconds(batches, 0, 5000)
    others = [draw_microseconds(batches, epoch, 1)[0] / 1e3 for epoch in (3, 7, 11)]
    low, high = np.quantile(draws, [0.1, 0.9])
    return [
        f"{planning:.3g}",
        f"{drawing:.3g}",
        f"{statistics.median(draws):.3g} ({low:.3g} to {high:.3g})",
        f"{statistics.median(others):.3g}",
        f"{(peak_memory() - before) / 1e6:.4g}",
    ]


def key_cost(count: int) -> list[str]:
    """Returns the cells of the table: seconds and megabytes."""
    before = reset_peak_memory()
    plan = LatentPlan(planned(*synthetic_records(count), 1024), ImageOptions(), SEED, 1, FINGERPRINT)
    _, seconds = timed(plan.keys)
    return [f"{seconds:.3g}", f"{(peak_memory() - before) / 1e6:.4g}"]


def timed(work: Callable[[], object]) -> tuple:
    """(result, seconds)."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def first_draw(batches: GlobalBatches) -> GlobalBatches:
    """Returns `batches` after its first draw."""
    batches.draw(0, 0)
    return batches


def draw_microseconds(batches: GlobalBatches, epoch: int, count: int) -> list[float]:
    """Returns the microseconds of each of `count` draws at random places of an epoch."""
    random, steps = np.random.default_rng(SEED), int(batches.samples_per_epoch) // batches.size
    found = []
    for _ in range(count):
        step = epoch * steps + int(random.integers(steps // 8, steps * 7 // 8))
        slot = int(random.integers(batches.size))
        began = time.perf_counter_ns()
        batches.draw(step, slot)
        found.append((time.perf_counter_ns() - began) / 1e3)
    return found


def reset_peak_memory() -> int:
    """Resets the peak memory if Linux supports it; returns it in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Returns the peak resident memory in bytes: VmHWM, because `ru_maxrss` of a child includes its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_headers(args: argparse.Namespace, folder: Path) -> None:
    """Compares reading the headers of small files with remembering them from an earlier run."""
    records = folder_records(write_pictures(folder / "small", args.header_files, SMALL_SIZE))
    time.sleep(SETTLING_SECONDS)
    memories = (folder / f"memory-{number}" for number in itertools.count())
    survey(records, folder / "memory")
    contestants = {
        "remembered": partial(turn, surveys(records, itertools.repeat(folder / "memory"))),
        "read": partial(turn, surveys(records, memories)),
    }
    times = take_turns(contestants, args.rounds, args.seconds)
    print_times(f"5. Headers of {len(records):,} JPEG files of {SMALL_SIZE[0]}x{SMALL_SIZE[1]} pixels", times)
    read, remembered = (statistics.median(times[name]) * 1e6 for name in ("read", "remembered"))
    print(f"\nEstimate for a million files: {read:.3g} s to read, {remembered:.3g} s if remembered.")


def surveys(records: Records, memories: Iterable[Path]) -> Iterator[int]:
    """Surveys the records with one memory file after another."""
    for memory in memories:
        survey(records, memory)
        yield len(records)


PARTS = {
    "live": run_live,
    "peer": run_peer,
    "files": run_files,
    "workers": run_workers,
    "records": run_records,
    "headers": run_headers,
}


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument, metavar="")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    add("--peer_script", type=Path, help="diffusers' train_text_to_image_sdxl.py; needs torchvision")
    add("--live_sd", type=int, default=0, help="images to encode live at SD's size, about 10 s each (default: 0)")
    add("--samples", type=int, default=256, help="number of entries and images (default: 256)")
    add("--batch_size", type=int, default=16)
    add("--rounds", type=int, default=5, help="turns per contestant (default: 5)")
    add("--seconds", type=float, default=1.0, help="minimum length of a turn in seconds (default: 1)")
    add("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add("--header_files", type=int, default=5000, help="number of files whose headers are read (default: 5000)")
    add(
        "--images_per_second",
        type=float,
        default=150.0,
        help="speed of a GPU, to estimate its waiting time (default: 150)",
    )
    return parser.parse_args()


def main() -> None:
    """Runs the parts, each in its own temporary folder."""
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.peer_script is not None:
        import_torchvision()  # before diffusers does
    print_machine(PACKAGES)
    for name in args.parts:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            PARTS[name](args, Path(folder))


if __name__ == "__main__":
    main()
