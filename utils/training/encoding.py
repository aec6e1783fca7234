"""Encodes batches with the frozen encoders: VAE moments and text states, in each step or once for the cache."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from utils.config.batch import Batch
from utils.config.options import UserError
from utils.config.terminal import progress_bar
from utils.data.cache import EntryStore, Form, in_shards
from utils.data.encodings import (
    CachedCuts,
    CachedTexts,
    CutPlan,
    EncodedImages,
    ImagesToEncode,
    LatentPlan,
    MaskPlan,
    text_key,
)
from utils.data.workers import make_loader
from utils.models.base import Family, TextStates

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm

logger = logging.getLogger(__name__)
MANY_IMAGES = 20_000
CROPS = ((6,), (torch.float32,))
HALF_LIMIT = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class EncodedBatch:
    """A batch with its encodings, on the device.

    Attributes:
        batch: the noise, timesteps, crops and token ids.
        mean, std: [B, C, h, w] float32, unscaled mean and standard deviation of the VAE's posterior.
        states: the text states, or None if the text encoders train.
    """

    batch: Batch
    mean: Tensor
    std: Tensor
    states: TextStates | None

    def part(self, begin: int, end: int) -> "EncodedBatch":
        """Returns the samples from `begin` to `end`."""
        states = None if self.states is None else {name: state[begin:end] for name, state in self.states.items()}
        return EncodedBatch(self.batch.part(begin, end), self.mean[begin:end], self.std[begin:end], states)

    def bare(self) -> "EncodedBatch":
        """Returns the same without the inputs of the encoders, which no loss reads."""
        return replace(self, batch=replace(self.batch, pixels=None, moments=None, states=None))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in an order that depends only on `shape`."""
        states = self.states or {}
        return [*self.batch.tensors.values(), self.mean, self.std, *(states[name] for name in sorted(states))]

    @property
    def shape(self) -> tuple:
        """A key that is equal for batches that the same recorded computation can process."""
        there = (*self.batch.tensors, *sorted(self.states or ()))
        return there, tuple((each.shape, each.dtype) for each in self.tensors)

    def cloned(self) -> "EncodedBatch":
        """Returns a copy in its own memory."""
        states = None if self.states is None else {name: each.clone() for name, each in self.states.items()}
        return EncodedBatch(self.batch.cloned(), self.mean.clone(), self.std.clone(), states)

    def in_float32(self) -> "EncodedBatch":
        """Returns the same with text states in float32."""
        if self.states is None:
            return self
        states = {name: each.float() if each.is_floating_point() else each for name, each in self.states.items()}
        return replace(self, states=states)


WATCHED = 3  # number of first batches whose encodings are checked
LARGEST_LATENT = 1e4  # largest plausible unscaled latent; those of common VAEs are below 100
CURE = "use --mixed_precision bf16 or no, or another VAE or text encoder"


class Encoder:
    """Adds encodings to batches: cached ones if the batch has them, else computed ones."""

    def __init__(self, family: Family, text_encoders_train: bool):
        self._family = family
        self._text_encoders_train = text_encoders_train
        self._num_watched = WATCHED

    @torch.no_grad()
    def encode(self, batch: Batch) -> EncodedBatch:
        """Returns a batch, which must be on the device, with its encodings."""
        if batch.moments is None:
            mean, std = self._family.latent_space.moments(batch.pixels)
        else:
            mean, std = batch.moments.float().unbind(1)
        states = self._states(batch)
        if self._num_watched:
            self._num_watched -= 1
            self._watch(mean + std, states)
        return EncodedBatch(batch, mean, std, states)

    def _watch(self, moments: Tensor, states: TextStates | None) -> None:
        """Warns if encodings of first batches are not finite or far too large; checking all would block on the device.

        Otherwise only the loss would show it, and the learning rate would be suspected.
        """
        floats = [state for state in (states or {}).values() if state.is_floating_point()]
        for name, values in (("the VAE's encodings", [moments]), ("the text encoders' states", floats)):
            if not all(bool(each.isfinite().all()) for each in values):
                self._num_watched = 0
                logger.warning("%s are NaN or infinite, so no step can train on them; %s", name, CURE)
                return
        largest = float(moments.abs().max())
        if largest > LARGEST_LATENT:
            self._num_watched = 0
            logger.warning(
                "the VAE's encodings are as large as %.3g, so losses overflow at any learning rate; its weights are "
                "damaged or scaled; use another VAE",
                largest,
            )

    def _states(self, batch: Batch) -> TextStates | None:
        if self._text_encoders_train:
            return None
        if batch.states is None:
            return self._family.encode_text(batch.input_ids, batch.caption_dropped)
        dtype = self._family.text_dtype
        return {name: state.to(dtype) if state.is_floating_point() else state for name, state in batch.states.items()}


def fingerprint(modules: Sequence[nn.Module], *facts: object) -> str:
    """Returns a SHA-256 over the weights, buffers and architecture configs of modules, and further facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for module in modules:
        config = {name: value for name, value in _config(module).items() if not name.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


NOT_OF_THE_VALUE = (
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "sample_size",
    "transformers_version",
)


def _config(module: nn.Module) -> Mapping:
    config = module.config
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {name: value for name, value in values.items() if name not in NOT_OF_THE_VALUE}


@dataclass(frozen=True)
class CacheFiller:
    """Fills the cache; each process encodes its share of the shards.

    Attributes:
        dtype: dtype to store floating-point values in; None stores them as computed.
        batch_size: images or captions encoded at once.
        num_workers: loader workers of this process.
        check: called before each batch; may raise to interrupt the work.
    """

    accelerator: "Accelerator"
    family: Family
    dtype: torch.dtype | None
    batch_size: int
    num_workers: int
    check: Callable[[], None] = lambda: None

    @property
    def latent_dtype(self) -> torch.dtype:
        """The dtype that moments are stored in: --cache_dtype, or the VAE's own, which is lossless."""
        return self.dtype or self.family.latent_space.dtype

    def vae_fingerprint(self) -> str:
        """Returns the fingerprint of the VAE, its dtype and the stored dtype."""
        vae = self.family.latent_space.vae
        return fingerprint([vae], str(vae.dtype), str(self.latent_dtype), getattr(vae, "use_tiling", False))

    def text_fingerprint(self) -> str:
        """Returns the fingerprint of the text encoders, tokenizers, their use and the stored dtype."""
        family = self.family
        return fingerprint(family.text_encoders, *family.text_facts(), str(family.text_dtype), str(self.dtype))

    def latents(self, plan: LatentPlan, store: EntryStore) -> CachedCuts:
        """Encodes the crops of a plan that are not in the store yet, and returns all of them."""

        def form(size: tuple[int, int]) -> Form:
            dtypes = (self.latent_dtype, torch.float32)
            return {"moments": ((2, *self.family.latent_space.shape(size)), dtypes), "crops": CROPS}

        return self._cuts(plan, store, "moments", self.moments, form)

    def masks(self, plan: MaskPlan, store: EntryStore) -> CachedCuts:
        """Crops the masks of a plan that are not in the store yet, and returns all of them."""

        def form(size: tuple[int, int]) -> Form:
            return {"masks": ((1, *plan.latent_shape(size)[1:]), (torch.uint8,)), "crops": CROPS}

        return self._cuts(plan, store, "masks", lambda masks: masks, form)

    def _cuts(
        self,
        plan: CutPlan,
        store: EntryStore,
        name: str,
        encode: Callable[[Tensor], Tensor],
        form: Callable[[tuple[int, int]], Form],
    ) -> CachedCuts:
        """Args:
        name: name of the tensor that `encode` returns.
        encode: encodes pixels, [B, C, H, W] uint8.
        form: returns the form that entries of a (width, height) must have.
        """
        # Remove damaged entries.
        keys = self._of_main(lambda: plan.keys(show_progress=len(plan.images.records) > MANY_IMAGES))
        store.open()
        by_bucket = np.repeat(plan.images.plan.bucket_of, plan.num_variants)
        sizes = enumerate(plan.images.plan.sizes)
        self._drop_damaged(store, [(keys[by_bucket == number], form(size)) for number, size in sizes])
        # Encode the missing ones, by bucket.
        missing = self._of_main(lambda: first_of_each(keys, np.flatnonzero(store.find(keys)[:, 0] < 0)))
        buckets = plan.images.plan.bucket_of[missing // plan.num_variants]
        missing = missing[np.argsort(buckets, kind="stable")]
        shards = list(in_shards(missing, np.sort(buckets)))
        bad = self._gather(self._encode_images(plan, keys, store, self._share(shards), name, encode))
        # Look up all entries, also those that other processes wrote.
        store.refresh()
        places = store.find(keys).reshape(-1, plan.num_variants, 2)
        lost = set(np.flatnonzero((places[:, :, 0] < 0).any(1)).tolist()) - bad.keys()
        self._check_shared(len(lost), store)
        return CachedCuts(store, places, bad)

    def texts(self, texts: Sequence[str], text_fingerprint: str, store: EntryStore) -> CachedTexts:
        """Encodes the texts that are not in the store yet, and the encoding of a dropped caption."""
        wanted = [("", True), *((text, False) for text in texts)]
        keys = [text_key(text_fingerprint, text, dropped) for text, dropped in wanted]
        table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        # Remove damaged entries.
        store.open()
        if (self._of_main(lambda: store.find(table)[:, 0]) >= 0).any():
            dropped_caption = self.states([("", True)])
            form = {
                name: (tuple(state.shape[1:]), (state.dtype, torch.float32)) for name, state in dropped_caption.items()
            }
            self._drop_damaged(store, [(table, form)])
        # Encode the missing ones.
        missing = self._of_main(lambda: np.flatnonzero(store.find(table)[:, 0] < 0))
        shards = list(in_shards(missing, np.zeros(len(missing), np.uint8)))
        self._encode_texts(wanted, keys, store, self._share(shards))
        self._gather({})
        store.refresh()
        self._check_shared(int((store.find(table)[:, 0] < 0).sum()), store)
        return CachedTexts(store, text_fingerprint)

    def moments(self, pixels: Tensor) -> Tensor:
        """Encodes [B, 3, H, W] uint8 pixels; returns moments [B, 2, C, h, w] on the CPU, as stored."""
        mean, std = self.family.latent_space.moments(pixels.to(self.accelerator.device))
        return stored(torch.stack([mean, std], dim=1).cpu(), self.latent_dtype)

    def states(self, wanted: Sequence[tuple[str, bool]]) -> TextStates:
        """Encodes (text, whether dropped) pairs; returns text states on the CPU, as stored."""
        ids = self.family.tokenizer()([text for text, _ in wanted]).to(self.accelerator.device)
        dropped = torch.tensor([is_dropped for _, is_dropped in wanted], device=self.accelerator.device)
        with torch.no_grad():
            states = self.family.encode_text(ids, dropped)
        return {name: stored(state.cpu(), self.dtype) for name, state in states.items()}

    def _drop_damaged(self, store: EntryStore, wanted: Sequence[tuple[np.ndarray, Form]]) -> None:
        """Removes shards in which a wanted entry is damaged; each process verifies its share of the shards.

        Args:
            wanted: keys, with the form that their entries must have.
        """
        from accelerate.utils import broadcast_object_list

        rows = [store.places_by_shard(keys) for keys, _ in wanted] if self.accelerator.is_main_process else None
        shares = [self._share_of(each) for each in broadcast_object_list([rows])[0]]
        damaged = {}
        with self._progress(sum(map(len, shares)), "checking the cache") as progress:
            for share, (_, form) in zip(shares, wanted, strict=True):
                for name, reason in store.damaged(share, form):
                    self.check()
                    progress.update()
                    damaged |= {name: reason} if reason else {}
        damaged = self._gather(damaged)
        if self.accelerator.is_main_process:
            store.remove(damaged)
        self.accelerator.wait_for_everyone()
        store.refresh()

    def _share_of(self, shards: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: shards[name] for name in self._share(list(shards))}

    def _of_main(self, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the main process's result on all processes, which might see different states of a shared folder."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([compute() if self.accelerator.is_main_process else None])[0]

    def _share(self, shards: list) -> list:
        return shards[self.accelerator.process_index :: self.accelerator.num_processes]

    def _encode_images(
        self,
        plan: CutPlan,
        keys: np.ndarray,
        store: EntryStore,
        shards: list[np.ndarray],
        name: str,
        encode: Callable[[Tensor], Tensor],
    ) -> dict[int, str]:
        """Encodes and writes this process's shards; returns unreadable images, reason by number."""
        # Load the crops of each shard in batches.
        size = self.batch_size
        cuts = [[shard[at : at + size] for at in range(0, len(shard), size)] for shard in shards]
        images = ImagesToEncode(plan, [batch for batches in cuts for batch in batches])
        encoded, bad = iter(make_loader(images, self.num_workers if len(shards) else 0)), {}
        # Encode a shard while the one before is written.
        with ShardWriter(store) as writer, self._progress(sum(map(len, shards)), f"encoding {name}") as progress:
            for batches in cuts:
                parts: list[tuple[EncodedImages, Tensor]] = []
                for _ in batches:
                    self.check()
                    batch = next(encoded)
                    bad |= batch.bad
                    progress.update(len(batch.places) + len(batch.bad))
                    if batch.places:
                        parts.append((batch, encode(batch.pixels)))
                entries = _finite(parts, plan, bad)
                if entries:
                    places = [place for place, _, _ in entries]
                    values = joined([value for _, value, _ in entries])
                    crops = torch.stack([crop for _, _, crop in entries])
                    writer.write([keys[place].tobytes() for place in places], {name: values, "crops": crops})
        return bad

    def _encode_texts(
        self, wanted: list[tuple[str, bool]], keys: list[bytes], store: EntryStore, shards: list[np.ndarray]
    ) -> None:
        with ShardWriter(store) as writer, self._progress(sum(map(len, shards)), "encoding captions") as progress:
            for shard in shards:
                parts = []
                for at in range(0, len(shard), self.batch_size):
                    self.check()
                    batch = [wanted[number] for number in shard[at : at + self.batch_size]]
                    parts.append(self.states(batch))
                    progress.update(len(batch))
                states = {name: joined([row for part in parts for row in part[name]]) for name in parts[0]}
                _refuse_not_finite(states, [wanted[number][0] for number in shard])
                writer.write([keys[number] for number in shard], states)

    def _progress(self, total: int, what: str) -> "tqdm":
        is_main = self.accelerator.is_main_process
        return progress_bar(total=total, desc=what, disable=not is_main or total == 0, leave=False)

    def _gather(self, bad: dict) -> dict:
        """Merges the findings of all processes once they are done."""
        from accelerate.utils import gather_object

        return dict(gather_object(list(bad.items())))

    def _check_shared(self, num_lost: int, store: EntryStore) -> None:
        if num_lost:
            raise UserError(
                f"--encoding_cache_dir: {num_lost} entries written by other processes are missing in {store.folder}; "
                "it must be on a disk that all machines share"
            )


def first_of_each(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns the numbers, in order, whose key no earlier one has, so that identical crops are encoded once."""
    _, first = np.unique(keys[numbers], axis=0, return_index=True)
    return numbers[np.sort(first)]


def stored(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns the values in a storage dtype, or in float32 if they exceed float16's range."""
    if dtype is None or not values.is_floating_point():
        return values
    if dtype == torch.float16 and bool((values.abs() > HALF_LIMIT).any()):
        logger.warning(
            "values up to %.3g exceed the range of float16; storing them in float32", float(values.abs().max())
        )
        return values.float()
    return values.to(dtype)


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Stacks rows, in float32 if one of them is."""
    dtype = torch.float32 if any(row.dtype == torch.float32 for row in rows) else rows[0].dtype
    return torch.stack([row.to(dtype) for row in rows])


def _finite(
    parts: list[tuple[EncodedImages, Tensor]], plan: CutPlan, bad: dict[int, str]
) -> list[tuple[int, Tensor, Tensor]]:
    """Returns (place, value, crop) of each crop with a finite value; adds the images of others to `bad`."""
    entries = []
    for batch, values in parts:
        for place, value, crop in zip(batch.places, values, batch.crops, strict=True):
            if torch.isfinite(value).all():
                entries.append((place, value, crop))
            else:
                bad[place // plan.num_variants] = "the VAE's encoding of it is not finite"
    return entries


def _refuse_not_finite(states: Mapping[str, Tensor], texts: Sequence[str]) -> None:
    """Raises a `UserError` with the caption if text states are not finite."""
    for state in states.values():
        is_finite = torch.isfinite(state.float()).flatten(1).all(1)
        if not is_finite.all():
            text = texts[int((~is_finite).nonzero()[0])]
            raise UserError(f"the text encoders' states of {text!r} are not finite; try --mixed_precision bf16 or no")


class ShardWriter:
    """Writes shards on a thread, one after the other, while the next is encoded."""

    def __init__(self, store: EntryStore):
        self._store = store
        self._pool = ThreadPoolExecutor(1)
        self._last: Future | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Starts writing; raises the error of the previous shard, if any."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._store.write, keys, tensors)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if self._last is not None and kind is None:
            self._last.result()


@dataclass(frozen=True)
class Verification:
    """The result of comparing a cache with what the encoders compute now.

    Attributes:
        num_entries: number of entries compared.
        different: names of images and captions whose entries differ by more than rounding.
        worst: largest difference, relative to the entry's largest value.
        peak_signal_to_noise: mean PSNR of decoded latents against the pixels, in dB; None for captions.
    """

    num_entries: int
    different: list[str]
    worst: float
    peak_signal_to_noise: float | None


def verify_latents(filler: CacheFiller, plan: LatentPlan, cached: CachedCuts) -> Verification:
    """Encodes every cached crop again and compares it, also decoded with its pixels; each process does its share."""
    # This process's share of the crops.
    count = len(cached.places) * plan.num_variants
    mine = np.arange(count)[filler.accelerator.process_index :: filler.accelerator.num_processes]
    different, worst, decibels, num_entries = [], 0.0, [], 0
    is_main = filler.accelerator.is_main_process
    for place in progress_bar(mine, desc="verifying images", disable=not is_main, leave=False):
        index, variant = divmod(int(place), plan.num_variants)
        filler.check()
        if cached.places[index, variant, 0] < 0:
            continue
        entry = cached.read(index, variant)
        moments, crop = entry["moments"], entry["crops"]
        try:
            pixels, crop_now = plan.read(index, variant)
        except (OSError, ValueError):
            different.append(plan.images.records.key(index))
            continue
        now = filler.moments(torch.from_numpy(pixels)[None])[0]
        error = relative_error(moments, now)
        worst, num_entries = max(worst, error), num_entries + 1
        if not error <= TOLERANCES[moments.dtype] or crop.tolist() != crop_now.row():
            different.append(plan.images.records.key(index))
        decibels.append(_decibels(filler, moments[0].float(), torch.from_numpy(pixels)))
    return _together(different, worst, num_entries, decibels)


def verify_texts(filler: CacheFiller, texts: Sequence[str], cached: CachedTexts) -> Verification:
    """Encodes every cached caption again and compares; each process does its share."""
    wanted = [("", True), *((text, False) for text in texts)]
    wanted = wanted[filler.accelerator.process_index :: filler.accelerator.num_processes]
    different, worst = [], 0.0
    for text, dropped in wanted:
        now, then = filler.states([(text, dropped)]), cached.read(text, dropped)
        errors = [(relative_error(then[name], now[name][0]), TOLERANCES.get(then[name].dtype, 0.0)) for name in then]
        worst = max(worst, *(error for error, _ in errors))
        if not all(error <= tolerance for error, tolerance in errors):
            different.append(repr(text))
    return _together(different, worst, len(wanted), [])


# relative to the largest value: rounding of the storage, and of batches of another size
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}


def relative_error(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference relative to the largest value; infinite if a value is not finite."""
    one, other = one.cpu().double(), other.cpu().double()
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return math.inf
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _decibels(filler: CacheFiller, mean: Tensor, pixels: Tensor) -> float:
    """Returns the PSNR in dB of the decoded mean [C, h, w] against its pixels [3, H, W] uint8."""
    space, none = filler.family.latent_space, torch.zeros_like(mean)[None].to(filler.accelerator.device)
    with torch.no_grad():
        decoded = space.decode(space.latents(mean[None].to(none.device), none, none))[0].cpu().clamp(-1, 1)
    error = float((decoded - (pixels.float() / 127.5 - 1)).square().mean())
    return 10 * math.log10(4 / max(error, 1e-12))


def _together(different: list[str], worst: float, num_entries: int, decibels: list[float]) -> Verification:
    """Merges the findings of all processes."""
    from accelerate.utils import gather_object

    found = gather_object([(different, worst, num_entries, decibels)])
    every = [value for _, _, _, values in found for value in values]
    return Verification(
        num_entries=sum(count for _, _, count, _ in found),
        different=sorted({name for names, _, _, _ in found for name in names}),
        worst=max(value for _, value, _, _ in found),
        peak_signal_to_noise=float(np.mean(every)) if every else None,
    )
