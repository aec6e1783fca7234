"""Measures a model on the same few images, captions and noise again and again, image by image, for the verdict."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.config.batch import Noised
from utils.config.seeding import Stream, generator
from utils.config.user_files import lines_of, read_text
from utils.data.plan import PlannedImages
from utils.data.stream import StreamedImages
from utils.runtime.sharding import unsharded
from utils.sampling.samples import Sample
from utils.training.copies import copying_distances
from utils.training.encoding import EncodedBatch
from utils.training.objective import Objective
from utils.training.options import TrainingOptions
from utils.training.session import Session
from utils.training.task import Task
from utils.training.validation_loss import HeldOutSample, at_timesteps, encode_image, fixed_batch, states_of

logger = logging.getLogger(__name__)
TRAINED, HELD_OUT, OUTSIDE = "trained", "held_out", "outside"
PLACES = 4  # timesteps per image, evenly spaced
MOST_IMAGES, FEWEST_IMAGES, MOST_CAPTIONS = 32, 8, 64
SMALL_MODEL = 100_000_000  # parameters, below which a step is so cheap that thrice the fewest images cost little
VALUES = 4096  # values kept of a base prediction: a mean square over them is exact to 1 / sqrt(2048) = 2 %
FIRST_TRAINED = 1 << 40  # numbers that seed the noise of training images: apart from those of held-out images
FIRST_OUTSIDE = 1 << 41
DEFAULT_CAPTIONS = Path(__file__).with_name("plain_captions.txt")
FRACTIONS = (7 / 16, 1 / 4, 5 / 8, 1 / 8, 3 / 8, 13 / 16)  # of the run: where it is measured, first what matters most
SHARE = 0.025  # of a run's computation for all measurements: below the 3 % that they may take


class ProbeSize(NamedTuple):
    """How many images of each kind, and captions outside of the data, a measurement has."""

    images: int
    captions: int


def probe_size(samples: int, parameters: int, measurements: int, share: float) -> ProbeSize:
    """Returns the size of a measurement, so that all of them cost at most `share` of a run's computation.

    A training sample costs three forward passes; an image costs PLACES for its loss if it is held out, and twice that
    with and without its caption if it is trained on.

    Args:
        samples: training samples of the whole run.
        parameters: number of parameters of the denoiser.
        measurements: number of measurements.
        share: fraction of the computation.
    """
    passes = share * 3 * samples / measurements
    fewest = FEWEST_IMAGES * (3 if parameters < SMALL_MODEL else 1)
    images = min(max(int(passes / (5 * PLACES)), fewest), MOST_IMAGES)
    return ProbeSize(images, min(2 * images, MOST_CAPTIONS))


def describe_probes(options: TrainingOptions, task: Task, samples: int) -> str:
    """Describes what the verdict measures and costs, for the plan of a run of `samples` training samples."""
    if options.verdict.no_verdict:
        return "none (--no_verdict)"
    size = _size(task, samples)
    times, trained = len(FRACTIONS) + 2, PLACES * (2 if task.family.text_encoder_names else 1)
    held_out = PLACES if options.held_out.is_asked else 0
    captions = size.captions if task.family.text_encoder_names else 0
    passes = size.images * (trained + held_out) + captions
    share = passes * times / (3 * samples)
    return (
        f"{times} measurements of at most {passes} predictions ({size.images} images of each kind, {captions} captions "
        f"outside the data): {share:.1%} of the computation; fewer measurements where they take over 3 % of the time"
    )


def _size(task: Task, samples: int) -> ProbeSize:
    parameters = sum(each.numel() for each in task.family.denoiser.parameters())
    return probe_size(samples, parameters, len(FRACTIONS) + 2, SHARE)


@dataclass(frozen=True)
class Item:
    """An encoded image of this process, and at which timesteps it is measured.

    Attributes:
        kind: TRAINED, HELD_OUT or OUTSIDE (an image with a caption outside of the data).
        timesteps: [T] int64.
        bare: the same image without its caption; None for other kinds, and for a model without captions.
    """

    kind: str
    sample: HeldOutSample
    timesteps: Tensor
    bare: HeldOutSample | None = None

    @property
    def key(self) -> str:
        """The name of its base prediction."""
        return f"{self.kind}-{self.sample.number}"


class Found(NamedTuple):
    """What was measured of an item, [T] each, or None.

    Attributes:
        loss: mean squared error of the prediction.
        bare: the same without the caption.
        gap: mean squared difference between the predictions with and without the caption.
        moved: mean squared difference from the base's prediction.
        types: error of the prediction relative to the target's power, for each prediction type, [] each.
    """

    kind: str
    number: int
    loss: list[float]
    bare: list[float] | None
    gap: list[float] | None
    moved: list[float] | None
    types: dict[str, float]


class Probes:
    """The images that the verdict measures, encoded once. Each process has its share of them.

    Attributes:
        contrasts: standard deviation of the pixels of this process's training images, from 0 to 127.5.
        prediction_type: what the model is trained to predict.
    """

    def __init__(
        self,
        options: TrainingOptions,
        session: Session,
        task: Task,
        images: PlannedImages | StreamedImages,
        held_out: PlannedImages | None,
        samples: int,
    ):
        """Args:
        samples: training samples of the whole run.
        """
        self._session, self._task, self._still = session, task, options.image.still
        self._accelerator = session.accelerator
        size = _size(task, samples)
        total = task.family.pipeline.scheduler.config.num_train_timesteps
        self._timesteps = torch.tensor([(2 * place + 1) * total // (2 * PLACES) for place in range(PLACES)])
        listed = None if isinstance(images, StreamedImages) else images
        trained = [] if listed is None else self._trained(listed, size.images)
        held = [] if held_out is None else self._held_out(held_out, size.images)
        captions = self._captions(options.verdict.forgetting_prompts, size.captions)
        self._items = [*trained, *held, *self._outside(trained or held, captions)]
        self.contrasts = [item.sample.contrast for item in trained]
        self.prediction_type = task.process.prediction_type
        self._images = (listed, held_out)
        self._base: dict[str, Tensor] = {}

    def _mine(self, chosen: Sequence[int]) -> list[tuple[int, int]]:
        """This process's share of some images: (place, number) each."""
        every = list(enumerate(chosen))
        return every[self._accelerator.process_index :: self._accelerator.num_processes]

    def _choose(self, images: PlannedImages, count: int) -> list[int]:
        """Image numbers, chosen by the seed."""
        order = generator(self._session.seed, len(images.records), 0, Stream.PROBE).permutation(len(images.records))
        return sorted(order[:count].tolist())

    def _held_out(self, images: PlannedImages, count: int) -> list[Item]:
        encoded = [self._encode(images, number, 0) for _, number in self._mine(self._choose(images, count))]
        return [Item(HELD_OUT, sample, self._timesteps) for sample in encoded if sample is not None]

    def _trained(self, images: PlannedImages, count: int) -> list[Item]:
        """Training images, each also without its caption."""
        chosen = self._mine(self._choose(images, count))
        encoded = [self._encode(images, number, FIRST_TRAINED) for _, number in chosen]
        has_captions = self._has_captions
        return [
            Item(TRAINED, sample, self._timesteps, self._without_caption(sample) if has_captions else None)
            for sample in encoded
            if sample is not None
        ]

    def _without_caption(self, sample: HeldOutSample) -> HeldOutSample:
        family = self._task.family
        input_ids = family.tokenizer()([""]) if family.text_encoder_names else sample.input_ids
        states = states_of(self._task, input_ids, self._accelerator.device, dropped=True)
        return replace(sample, input_ids=input_ids, states=states, dropped=True)

    @property
    def _has_captions(self) -> bool:
        """Whether captions or class labels are inputs of the model."""
        family = self._task.family
        if family.text_encoder_names:
            return True
        return bool(family.encode_text(torch.zeros(1, 1, 1, dtype=torch.int64), torch.tensor([False])))

    def _encode(self, images: PlannedImages, number: int, first: int) -> HeldOutSample | None:
        sample = encode_image(self._task, images, number, self._still, self._accelerator.device)
        return None if sample is None else replace(sample, number=first + number)

    def _with_caption(self, sample: HeldOutSample, input_ids: Tensor) -> HeldOutSample:
        states = states_of(self._task, input_ids, self._accelerator.device)
        return replace(sample, input_ids=input_ids, states=states)

    def _captions(self, file: str | None, count: int) -> list[str]:
        """Captions outside of the data; none for a model without text encoders."""
        if not self._task.family.text_encoder_names:
            return []
        text = read_text(file or DEFAULT_CAPTIONS).text
        captions = [line.strip() for line in lines_of(text) if line.strip()]
        return captions[:: max(1, -(-len(captions) // count))][:count]

    def _outside(self, items: Sequence[Item], captions: Sequence[str]) -> list[Item]:
        """This process's images with captions outside of the data, each at one of the noisier half of the timesteps.

        There the caption decides more than what can be seen of the image.
        """
        noisy, found = self._timesteps[PLACES // 2 :], []
        for place, (number, caption) in enumerate(self._mine(captions) if items else []):
            sample = replace(items[place % len(items)].sample, number=FIRST_OUTSIDE + number)
            sample = self._with_caption(sample, self._task.family.tokenizer()([caption]))
            found.append(Item(OUTSIDE, sample, noisy[number % len(noisy)][None]))
        return found

    @property
    def has_any(self) -> bool:
        """Whether any process has anything to measure; all processes must call it."""
        count = torch.tensor(float(len(self._items)), device=self._accelerator.device)
        return bool(self._accelerator.reduce(count).item())

    @torch.no_grad()
    def measure(self, is_base: bool) -> list[Found] | None:
        """Measures all items with the weights that are in place; returns what all processes found, in order.

        Returns None if a signal to any process interrupted it.

        Args:
            is_base: whether the weights are the base's, whose predictions are kept to compare later ones with.
        """
        from accelerate.utils import gather_object

        objective, found = self._task.objective, []
        # without compiled code, which would be compiled again for these batches
        with unsharded(objective.trained.values()), torch.compiler.set_stance("force_eager"):
            for item in self._items:
                if self._session.requests.is_asked:
                    break
                found.append(self._measure(objective, item, is_base))
        together = gather_object([(found, len(found) == len(self._items))])
        if not all(is_whole for _, is_whole in together):
            return None
        return sorted((each for some, _ in together for each in some), key=lambda each: (each.kind, each.number))

    def _measure(self, objective: Objective, item: Item, is_base: bool) -> Found:
        # The prediction, its error, and its distance from the base's.
        whole = self._predict(objective, item.sample, item.timesteps)
        prediction = torch.cat([each.prediction for each in whole])
        losses = [loss for each in whole for loss in each.losses.tolist()]
        kept = _some_values(prediction, self._session.seed)
        if is_base:
            self._base[item.key] = kept
        base = self._base.get(item.key)
        moved = None if base is None else (kept - base).square().mean(1).tolist()
        found = Found(item.kind, item.sample.number, losses, None, None, moved, {})
        if is_base and item.kind == TRAINED:
            found = found._replace(types=_errors_by_type(whole))
        if item.bare is None:
            return found
        # The same without the caption.
        bare = self._predict(objective, item.bare, item.timesteps)
        gap = (prediction - torch.cat([each.prediction for each in bare])).square().flatten(1).mean(1)
        return found._replace(bare=[loss for each in bare for loss in each.losses.tolist()], gap=gap.tolist())

    def _predict(self, objective: Objective, sample: HeldOutSample, timesteps: Tensor) -> "list[Predicted]":
        batch = fixed_batch(sample, timesteps, self._session.seed)
        return at_timesteps(self._accelerator, batch, partial(_predicted, objective))

    def copies(self, samples: Sequence[Sample]) -> list[float]:
        """Returns the distance of each sample to the training images; see `copying_distances`."""
        images, held_out = self._images
        if images is None or held_out is None:
            return []
        return copying_distances(self._task, images, held_out, self._still, samples, self._session.seed)

    def base_predictions(self) -> dict[str, Tensor]:
        """Returns the base's predictions that were kept, of all processes; all of them must call it."""
        from accelerate.utils import gather_object

        return dict(gather_object(list(self._base.items())))

    def load_base(self, predictions: Mapping[str, Tensor]) -> None:
        """Takes the predictions of the base that an earlier run kept."""
        own = {item.key for item in self._items}
        self._base = {key: values for key, values in predictions.items() if key in own}


class Predicted(NamedTuple):
    """A prediction [T, C, h, w], its losses [T], the model's input and target, the noise and the clean latents."""

    prediction: Tensor
    losses: Tensor
    noised: Noised
    noise: Tensor
    latents: Tensor


def _predicted(objective: Objective, encoded: EncodedBatch) -> Predicted:
    prediction, noised, latents = objective.predicted(encoded)
    losses = objective.mean((prediction - noised.target.float()).square(), encoded.batch)
    return Predicted(prediction, losses, noised, encoded.batch.noise, latents)


def _some_values(prediction: Tensor, seed: int) -> Tensor:
    """Returns [T, V] float32 on the CPU: at most VALUES values of each prediction, always the same ones."""
    flat = prediction.flatten(1).float().cpu()
    if flat.shape[1] <= VALUES:
        return flat
    chosen = generator(seed, flat.shape[1], 1, Stream.PROBE).permutation(flat.shape[1])[:VALUES]
    return flat[:, torch.from_numpy(np.sort(chosen))]


def _errors_by_type(parts: Sequence[Predicted]) -> dict[str, float]:
    """Returns the squared error of a prediction relative to its target's power, if it were of each prediction type."""
    errors: dict[str, float] = {}
    for name in ("epsilon", "v_prediction", "sample", "own"):
        error = power = 0.0
        for part in parts:
            snr = part.noised.snr.view(-1, 1, 1, 1)
            signal, spread = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
            targets = {
                "epsilon": part.noise,
                "v_prediction": signal * part.noise - spread * part.latents,
                "sample": part.latents,
                "own": part.noised.target.float(),
            }
            error += float((part.prediction - targets[name]).square().mean((1, 2, 3)).sum())
            power += float(targets[name].square().mean((1, 2, 3)).sum())
        errors[name] = error / max(power, 1e-12)
    return errors
