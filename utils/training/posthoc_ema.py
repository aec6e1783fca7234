"""Moving averages whose length is chosen after training (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3).

Two averages of fixed lengths are kept, with snapshots of both; an average of any other length is approximated by a
linear combination of the snapshots.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from utils.config.options import UserError, first_line
from utils.config.tensor_files import open_safetensors, read_safetensors
from utils.runtime.atomic_files import sync_file, sync_folder, write_tensors
from utils.runtime.background_writer import HostBuffers
from utils.training.ema import MovingAverage
from utils.training.optimizers import NamedParameter
from utils.training.options import EmaOptions

KEPT_LENGTHS = (0.05, 0.10)
FOLDER = "ema_snapshots"
CHECKPOINT_FILE = "ema_lengths.safetensors"
UPDATES = "updates"
SNAPSHOT = re.compile(r"step-[0-9]{8,18}\.safetensors")


def gamma_of(length: float) -> float:
    """Returns the power gamma of the profile tau^gamma whose standard deviation is `length`, a fraction of training.

    The standard deviation is (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-1/2 (equation 123).
    """
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


class PowerAverage(MovingAverage):
    """The average that weights the parameters after update t by t^gamma: theta += (1 - beta) (weights - theta).

    beta = (1 - 1/t)^(gamma + 1) (equation 127). The initial weights are forgotten as training continues.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], options: EmaOptions, length: float):
        super().__init__(parameters, options)
        self.gamma = gamma_of(length)

    def decay(self, update: int) -> float:
        """Returns beta at an update, counted from 1."""
        return (1 - 1 / update) ** (self.gamma + 1)


def overlap(time: np.ndarray, gamma: np.ndarray, other_time: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """Returns the inner products of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (equation 151)."""
    ratio = time / other_time
    power = np.where(time < other_time, other_gamma, -gamma)
    latest = np.maximum(time, other_time)
    return (gamma + 1) * (other_gamma + 1) * ratio**power / ((gamma + other_gamma + 1) * latest)


def factors_of(times: np.ndarray, gammas: np.ndarray, time: float, gamma: float) -> np.ndarray:
    """Returns the least-squares factors [n] of n profiles that approximate the one of `gamma` ending at `time`."""
    products = overlap(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = overlap(times, gammas, np.float64(time), np.float64(gamma))
    return np.linalg.lstsq(products, wanted, rcond=None)[0]


class AverageLengths:
    """The two averages of `--ema_lengths` and their snapshots in `output_dir/ema_snapshots/`."""

    def __init__(self, named: Sequence[NamedParameter], options: EmaOptions, folder: Path):
        self._names = [each.name for each in named]
        self._parameters = [each.parameter for each in named]
        self._options = options
        self._folder = folder / FOLDER
        self._averages = [PowerAverage(self._parameters, options, length) for length in KEPT_LENGTHS]

    def update(self, is_taken: torch.Tensor | None = None) -> None:
        """Updates both after an optimizer step; `is_taken` as in `MovingAverage.update`."""
        for average in self._averages:
            average.update(is_taken)

    def saving(self, buffers: HostBuffers) -> Callable[[Path], None]:
        """Returns a function that writes copies of both, in float32, into a checkpoint."""
        copies = {name: buffers.copy(f"ema_lengths {name}", tensor) for name, tensor in self._tensors().items()}
        return partial(_write, copies, self._averages[0].num_updates, CHECKPOINT_FILE)

    def snapshot(self, step: int) -> None:
        """Writes a snapshot of both in float16, named by the number of optimizer steps."""
        updates = self._averages[0].num_updates
        if not updates:  # nothing to average yet
            return
        file = self._folder / f"step-{step:08d}.safetensors"
        temporary = file.with_name(f".tmp-{file.name}")
        halves = {name: _halved(tensor.to("cpu")) for name, tensor in self._tensors().items()}
        try:
            self._folder.mkdir(exist_ok=True)
            _write(halves, updates, temporary.name, self._folder)
            sync_file(temporary)
            os.replace(temporary, file)
            sync_folder(self._folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"--ema_lengths: a snapshot can't be written to {self._folder}: {error}") from error

    def load(self, folder: Path) -> bool:
        """Loads both from a checkpoint; returns whether it contains them."""
        file = folder / CHECKPOINT_FILE
        if not has_averages(folder):
            return False
        try:
            tensors, updates = _tensors_like(file, self._names, self._parameters), _updates(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} can't be read: {first_line(error)}") from error
        for number, average in enumerate(self._averages):
            average.load([tensors[f"{number}/{name}"] for name in self._names], updates)
        return True

    def of_length(self, length: float) -> MovingAverage:
        """Returns the average of a length, computed from the snapshots.

        Args:
            length: as a fraction of training.

        Raises:
            UserError: if there is no snapshot, or one is damaged.
        """
        files = snapshots(self._folder)
        if not files:
            raise UserError(f"--ema_lengths needs snapshots, but {self._folder} has none")
        try:
            return self._of_files(files, length)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--ema_lengths: a snapshot in {self._folder} is damaged: {first_line(error)}") from error

    def _of_files(self, files: Sequence[Path], length: float) -> MovingAverage:
        kept = [average.gamma for average in self._averages]
        times = np.repeat([float(_updates(file)) for file in files], len(kept))
        factors = factors_of(times, np.tile(kept, len(files)), times[-1], gamma_of(length))
        totals = [torch.zeros_like(parameter, dtype=torch.float32, device="cpu") for parameter in self._parameters]
        for file, some in zip(files, factors.reshape(len(files), len(kept)), strict=True):
            tensors = _tensors_like(file, self._names, self._parameters)
            for total, name in zip(totals, self._names, strict=True):
                for number, factor in enumerate(some):
                    total.add_(tensors[f"{number}/{name}"].float(), alpha=float(factor))
        found = MovingAverage(self._parameters, self._options)
        found.load(totals, int(times[-1]))
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{number}/{name}": average
            for number, kept in enumerate(self._averages)
            for name, average in zip(self._names, kept.averages, strict=True)
        }


def _write(tensors: dict[str, Tensor], updates: int, name: str, folder: Path) -> None:
    write_tensors(tensors, folder / name, {UPDATES: str(updates)})


def snapshots(folder: Path) -> list[Path]:
    """Returns the snapshots in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.safetensors") if SNAPSHOT.fullmatch(path.name))


def has_averages(checkpoint: Path) -> bool:
    """Whether a checkpoint contains the two averages, so that its run's snapshots can be continued."""
    return (checkpoint / CHECKPOINT_FILE).exists()


def set_aside_snapshots(output_dir: Path, step: int) -> None:
    """Renames the snapshots of later steps than the one a run resumes from; 0 for a new run."""
    for file in snapshots(output_dir / FOLDER):
        if int(file.stem.removeprefix("step-")) > step:
            try:
                file.replace(file.with_name(f"abandoned-{file.name}"))
            except OSError as error:
                raise UserError(f"{file}, of a later step, can't be renamed: {error}") from error


def _halved(values: Tensor) -> Tensor:
    """Returns the values in float16, or in float32 if they exceed its range."""
    return values if values.abs().max() > torch.finfo(torch.float16).max else values.half()


def _updates(file: Path) -> int:
    """Returns the number of updates of the averages in a file.

    Raises:
        UserError: if the file does not record it.
    """
    with open_safetensors(file) as opened:
        updates = (opened.metadata() or {}).get(UPDATES, "")
    if not re.fullmatch(r"[0-9]{1,18}", updates) or int(updates) == 0:
        raise UserError(f"{file} does not record the number of updates of its averages")
    return int(updates)


def _tensors_like(file: Path, names: Sequence[str], like: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of both averages in a file, by name.

    Raises:
        UserError: if one is missing or differs in shape from its weight.
    """
    tensors = read_safetensors(file)
    for name, parameter in zip(names, like, strict=True):
        for number in range(len(KEPT_LENGTHS)):
            found = tensors.get(f"{number}/{name}")
            if found is None or found.shape != parameter.shape:
                raise UserError(f"{file} lacks the averages of {name}, or has them in another shape")
    return tensors
