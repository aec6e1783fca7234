"""The loss on held-out images, with the same noise and timesteps at every measurement."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils.config.batch import Batch, RecordPass
from utils.config.options import first_line
from utils.config.seeding import Stream, generator
from utils.config.user_files import read_bytes
from utils.data.captions import compose
from utils.data.crop_pixels import CutOut, cut_out
from utils.data.options import ImageOptions
from utils.data.plan import PlannedImages
from utils.models.base import Family, TextStates
from utils.runtime.atomic_files import or_without, replacing
from utils.runtime.memory import is_out_of_memory
from utils.runtime.processes import autocast
from utils.runtime.sharding import unsharded
from utils.runtime.step_lines import read_line, warn_of_unread
from utils.training.encoding import EncodedBatch
from utils.training.objective import Objective
from utils.training.options import EarlyStoppingOptions, TrainingOptions
from utils.training.session import Session
from utils.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
Computed = TypeVar("Computed")
FILE = "validation.jsonl"
FILE_LIMIT = 1 << 30


class Measurement(NamedTuple):
    """The validation loss after some optimizer steps.

    Attributes:
        loss: mean squared error of the prediction over images and timesteps.
        curve: [T] the same by timestep.
        ema_loss, ema_curve: the same for the averaged weights, if there are any.
        time, samples_seen: when it was measured, see `utils.runtime.step_lines`; None in files of earlier releases.
    """

    step: int
    loss: float
    curve: list[float]
    ema_loss: float | None = None
    ema_curve: list[float] | None = None
    time: float | None = None
    samples_seen: int | None = None

    @property
    def decisive(self) -> float:
        """The loss of the weights that are exported: of the averaged ones if there are any."""
        return self.loss if self.ema_loss is None else self.ema_loss


def measurement_of(step: int, curve: np.ndarray, ema_curve: np.ndarray | None = None) -> Measurement:
    """Returns a measurement from the losses by timestep, [T] each."""
    averaged = () if ema_curve is None else (float(ema_curve.mean()), ema_curve.tolist())
    return Measurement(step, float(curve.mean()), curve.tolist(), *averaged)


def relative_loss(curve: Sequence[float], base: Sequence[float]) -> float:
    """Returns the mean over timesteps of log(loss / base model's loss), so that each timestep has equal weight."""
    return float(np.mean(np.log(np.array(curve) / np.array(base))))


def _measurement_in(line: bytes) -> Measurement | None:
    """Parses a line of the file; None if it is not a measurement."""
    values = read_line(line)
    if values is None:
        return None
    values.pop("relative_loss", None)
    whole = Measurement._field_defaults | values
    is_right = (
        whole.keys() == set(Measurement._fields)
        and type(whole["step"]) is int
        and _are_numbers([whole["loss"]])
        and _are_numbers(whole["curve"])
        and (whole["ema_loss"] is None or _are_numbers([whole["ema_loss"]]))
        and (whole["ema_curve"] is None or _are_numbers(whole["ema_curve"]))
        and (whole["time"] is None or _are_numbers([whole["time"]]))
        and type(whole["samples_seen"]) in (int, type(None))
    )
    return Measurement(**whole) if is_right else None


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) in (int, float) for value in values)


class History:
    """The measurements of a run, in `validation.jsonl`; a resumed run keeps those up to its first step.

    Attributes:
        has_best: whether weights in `best/` are of a step that this run has done.
    """

    def __init__(self, folder: Path, first_step: int, options: EarlyStoppingOptions):
        self._file = folder / FILE
        self._options = options
        self._lines: list[Measurement | bytes] = []  # lines that can't be parsed are kept as bytes
        if first_step and self._file.is_file():
            lines = [line for line in read_bytes(self._file, FILE_LIMIT).split(b"\n") if line.strip()]
            self._lines = [_measurement_in(line) or line for line in lines]
            warn_of_unread(self._file, len(self._lines) - len(self.measurements))
        best = self.best()
        self.has_best = first_step > 0 and (best is None or best.step <= first_step)
        self._lines = [each for each in self._lines if isinstance(each, bytes) or each.step <= first_step]

    @property
    def measurements(self) -> list[Measurement]:
        """The measurements so far."""
        return [each for each in self._lines if isinstance(each, Measurement)]

    @property
    def base(self) -> list[float] | None:
        """The curve before the first step, if it was measured."""
        first = self.measurements[0] if self.measurements else None
        return first.curve if first is not None and first.step == 0 else None

    def add(self, measurement: Measurement, write: bool) -> None:
        """Adds a measurement; the process with `write` rewrites the file."""
        self._lines.append(measurement)
        if write:
            lines = [each if isinstance(each, bytes) else self._line(each) for each in self._lines]
            with or_without(self._file), replacing(self._file) as aside:
                aside.write_bytes(b"\n".join(lines) + b"\n")

    def _line(self, measurement: Measurement) -> bytes:
        return json.dumps(self.values(measurement)).encode()

    def values(self, measurement: Measurement) -> dict[str, object]:
        """Returns a measurement's values, with its loss relative to the base model's."""
        values = {name: value for name, value in measurement._asdict().items() if value is not None}
        curve = measurement.ema_curve or measurement.curve
        if self.base is not None and len(self.base) == len(curve):  # --num_validation_timesteps may have changed
            values["relative_loss"] = relative_loss(curve, self.base)
        return values

    def logged(self, measurement: Measurement) -> dict[str, float]:
        """Returns the values for the trackers: means, the relative loss, and the loss at each timestep."""
        values = self.values(measurement)
        names = {
            "loss": "validation_loss",
            "ema_loss": "validation_loss_ema",
            "relative_loss": "validation_loss_relative",
        }
        curve = {f"validation_loss_at/{place}": loss for place, loss in enumerate(measurement.curve)}
        return {name: values[key] for key, name in names.items() if key in values} | curve

    def best(self) -> Measurement | None:
        """Returns the measurement with the lowest loss, after step 0; ignores decreases below the threshold."""
        best = None
        for each in self.measurements:
            is_lower = best is None or each.decisive < best.decisive - self._options.early_stopping_threshold
            if each.step > 0 and is_lower and math.isfinite(each.decisive):
                best = each
        return best

    def since_best(self) -> int:
        """Returns the number of measurements since the best one."""
        best = self.best()
        return 0 if best is None else len(self.measurements) - 1 - self.measurements.index(best)

    def is_over(self) -> bool:
        """Whether early stopping ends the run."""
        patience = self._options.early_stopping_patience
        return patience is not None and self.since_best() >= patience

    def reductions(self, patience: int) -> int:
        """Returns the reductions by reduce_on_plateau, one per `patience` + 1 measurements without a decrease."""
        best, waited, count = math.inf, 0, 0
        for each in self.measurements:
            if each.decisive < best - self._options.early_stopping_threshold:
                best, waited = each.decisive, 0
            else:
                waited += 1
            if waited > patience:
                count, waited = count + 1, 0
        return count


@dataclass(frozen=True)
class HeldOutSample:
    """A held-out image, encoded once; its tensors are on the CPU.

    Attributes:
        number: its index among the held-out images, which seeds its noise.
        moments: [1, 2, C, h, w] mean and standard deviation of the VAE's posterior.
        crop: [1, 6] SDXL's size and crop conditioning.
        input_ids: token ids of its first caption.
        states: text states, or None if the text encoders train.
        mask: [1, 1, h, w] uint8, or None without masks.
        contrast: standard deviation of its pixels, from 0 to 127.5.
        dropped: whether its states are those of no caption.
    """

    number: int
    moments: Tensor
    crop: Tensor
    input_ids: Tensor
    states: TextStates | None
    mask: Tensor | None
    contrast: float = 0.0
    dropped: bool = False


class HeldOut:
    """The held-out images of this process, and their loss."""

    def __init__(self, options: TrainingOptions, session: Session, task: Task, images: PlannedImages):
        accelerator, family = session.accelerator, task.family
        self._requests = session.requests
        self.is_main_process = accelerator.is_main_process
        self._accelerator = accelerator
        self._seed = session.seed
        steps = options.stopping.num_validation_timesteps
        total = family.pipeline.scheduler.config.num_train_timesteps
        self._timesteps = torch.tensor([(2 * number + 1) * total // (2 * steps) for number in range(steps)])
        still = options.image.still
        mine = range(accelerator.process_index, len(images.records), accelerator.num_processes)
        self._samples = [
            sample
            for number in mine
            if (sample := encode_image(task, images, number, still, accelerator.device)) is not None
        ]

    @torch.no_grad()
    def losses(self, objective: Objective) -> np.ndarray | None:
        """Returns the mean squared error at each timestep over the images of all processes, [T] float64.

        Each image is its own batch, so that the result does not depend on the number of processes. Returns None if a
        signal to any process interrupted it.
        """
        from accelerate.utils import gather_object

        found = []
        with unsharded(objective.trained.values()):
            for sample in self._samples:
                if self._requests.is_asked:
                    break
                losses = torch.cat(at_timesteps(self._accelerator, self._batch(sample), objective.plain_losses))
                found.append((sample.number, losses.cpu().double().numpy()))
        together = gather_object([(found, len(found) == len(self._samples))])
        if not all(is_whole for _, is_whole in together):
            return None
        every = sorted((pair for some, _ in together for pair in some), key=lambda pair: pair[0])
        return np.mean([losses for _, losses in every], axis=0)

    def _batch(self, sample: HeldOutSample) -> Batch:
        return fixed_batch(sample, self._timesteps, self._seed)


def at_timesteps(
    accelerator: "Accelerator", batch: Batch, compute: Callable[[EncodedBatch], Computed]
) -> list[Computed]:
    """Computes on an image at all timesteps of a `fixed_batch` at once; when out of memory, one after the other."""
    batch = batch.to(accelerator.device)
    mean, std = batch.moments.float().unbind(1)
    encoded = EncodedBatch(batch, mean, std, batch.states)
    with autocast(accelerator):
        try:
            return [compute(encoded)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        return [compute(encoded.part(place, place + 1)) for place in range(len(batch))]


def fixed_batch(sample: HeldOutSample, timesteps: Tensor, seed: int) -> Batch:
    """Returns a batch of an encoded image at each of [T] timesteps, each with its own fixed noise."""
    count, shape = len(timesteps), sample.moments.shape[2:]

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:])

    def noise(stream: Stream) -> Tensor:
        drawn = [
            generator(seed, sample.number, place, stream).standard_normal(shape, dtype=np.float32)
            for place in range(count)
        ]
        return torch.from_numpy(np.stack(drawn))

    # One sample per timestep; nothing else varies.
    states = None if sample.states is None else {name: repeated(state) for name, state in sample.states.items()}
    return Batch(
        step=0,
        slots=(0,) * count,
        keys=("",) * count,
        pixels=None,
        moments=repeated(sample.moments),
        input_ids=repeated(sample.input_ids),
        states=states,
        caption_dropped=torch.full((count,), sample.dropped),
        crops=repeated(sample.crop),
        loss_weights=torch.ones(count),
        posterior_noise=noise(Stream.HELD_OUT_POSTERIOR),
        noise=noise(Stream.HELD_OUT_NOISE),
        input_perturbation=None,
        timesteps=timesteps,
        masks=None if sample.mask is None else repeated(sample.mask),
    )


@torch.no_grad()
def encode_image(
    task: Task, images: PlannedImages, number: int, options: ImageOptions, device: torch.device
) -> HeldOutSample | None:
    """Encodes an image with its first caption; None if it can't be read."""
    family = task.family
    found = read_crop(family, images, number, options)
    if found is None:
        return None
    # Encode the image and its caption.
    mean, std = family.latent_space.moments(torch.from_numpy(found.pixels)[None].to(device))
    input_ids = caption_ids(task, images, number)
    moments = torch.stack([mean, std], dim=1).cpu()
    mask = None if found.mask is None else torch.from_numpy(found.mask)[None, None]
    states = states_of(task, input_ids, device)
    contrast = float(found.pixels.std())
    return HeldOutSample(number, moments, torch.tensor([found.crop.row()]), input_ids, states, mask, contrast)


def read_crop(family: Family, images: PlannedImages, number: int, options: ImageOptions) -> CutOut | None:
    """Reads an image and crops it as in sampling, without augmentation; None if it can't be read."""
    records, passing = images.records, RecordPass(images.records.identity(number), 0)
    target = images.target(number)
    shape = family.latent_space.shape(target)[1:] if records.has_masks else None
    try:
        return cut_out(records.image(number), records.mask(number), target, options, 0, passing, shape)
    except (OSError, ValueError) as error:
        logger.warning("not measured: %s: %s", records.key(number), first_line(error))
        return None


def caption_ids(task: Task, images: PlannedImages, number: int) -> Tensor:
    """Returns the token ids [1, text encoders, tokens] of an image's first caption, without augmentation."""
    records = images.records
    plain = replace(records.caption_options(number), shuffle_tags=False, tag_dropout=0.0)
    passing = RecordPass(records.identity(number), 0)
    return task.family.tokenizer()([compose(records.captions(number)[0], plain, 0, passing)])


@torch.no_grad()
def states_of(task: Task, input_ids: Tensor, device: torch.device, dropped: bool = False) -> TextStates | None:
    """Returns the text states of token ids, or of no caption, on the CPU; None if the text encoders train."""
    if task.trains_text_encoders:
        return None
    encoded = task.family.encode_text(input_ids.to(device), torch.tensor([dropped], device=device))
    return {name: state.cpu() for name, state in encoded.items()}
