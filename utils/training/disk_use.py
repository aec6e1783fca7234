"""Estimates what a run writes to disk: checkpoints, snapshots of averages, the result."""

import logging
import math
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from utils.config.options import first_line
from utils.config.user_files import size_text
from utils.data.order import GlobalBatches
from utils.data.stream import StreamedBatches
from utils.training.adaptation import Adaptation
from utils.training.export_options import ExportOptions
from utils.training.optimizer_table import OPTIMIZERS
from utils.training.options import CheckpointOptions, EmaOptions

logger = logging.getLogger(__name__)
FLOAT32 = 4


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run writes.

    Attributes:
        checkpoint: bytes of each checkpoint.
        num_kept: largest number of checkpoints on disk at once.
        snapshots: bytes of all snapshots of `--ema_lengths`.
        result: bytes of the exported pipeline or adapter.
        minutes: minutes between checkpoints whose number is unknown; None if all are counted.
    """

    checkpoint: int
    num_kept: int
    snapshots: int
    result: int
    minutes: float | None = None

    @property
    def total(self) -> int:
        """Largest number of bytes on disk at once."""
        return self.checkpoint * self.num_kept + self.snapshots + self.result

    def __str__(self) -> str:
        kinds = [f"{self.num_kept} checkpoints of {size_text(self.checkpoint)}"] if self.num_kept else []
        if self.minutes is not None:
            kinds.append(f"another {size_text(self.checkpoint)} every {self.minutes:g} minutes of training")
        kinds += [f"snapshots of {size_text(self.snapshots)}"] if self.snapshots else []
        return f"{size_text(self.total)}: {', '.join([*kinds, f'a result of {size_text(self.result)}'])}"


def disk_use(
    adaptation: Adaptation,
    optimizer: str,
    ema: EmaOptions,
    checkpoint: CheckpointOptions,
    steps: range,
    export: ExportOptions | None = None,
    batches: GlobalBatches | StreamedBatches | None = None,
) -> DiskUse:
    """Estimates what a run writes to disk.

    Args:
        adaptation: which weights train.
        optimizer: its name in `OPTIMIZERS`.
        steps: from the first optimizer step (0 or the checkpoint's) to the last.
        export: options of the result.
        batches: the batches of the run, by which --checkpointing_epochs counts.
    """
    num_trained = _num_parameters(adaptation.modules.values(), are_trained=True)
    parts = [part for part in adaptation.family.pipeline.components.values() if isinstance(part, nn.Module)]
    averages = int(ema.use_ema) + 2 * bool(ema.ema_lengths)
    each = num_trained * (FLOAT32 * (1 + averages) + OPTIMIZERS[optimizer].state_bytes)
    count, minutes = _num_checkpoints(checkpoint, steps, batches), checkpoint.checkpointing_minutes
    if checkpoint.checkpoints_total_limit is not None:
        most = checkpoint.checkpoints_total_limit + 1
        count, minutes = (min(count, most) if minutes is None else most), None
    num_snapshots = 0
    if ema.ema_lengths:
        interval = ema.ema_snapshot_steps or checkpoint.snapshot_interval
        num_snapshots = len(_due(interval, steps)) + bool(steps.stop % interval)
    snapshots = num_snapshots * 2 * num_trained * FLOAT32 // 2
    asked = export or ExportOptions()
    num_whole = _num_parameters(parts) - (0 if adaptation.trains_base else num_trained)
    weights = num_whole * _bytes_a_weight(asked) if adaptation.exports_pipeline else 0
    adapters = 0 if adaptation.trains_base else num_trained * _bytes_an_adapter(adaptation.options.lora_format, asked)
    last = steps.stop - 1  # the last step's export is the result
    num_exports = 1 + (0 if asked.export_steps is None else len(_due(asked.export_steps, range(steps.start, last))))
    return DiskUse(each, count, snapshots, (weights + adapters) * num_exports, minutes)


def _num_checkpoints(
    checkpoint: CheckpointOptions, steps: range, batches: GlobalBatches | StreamedBatches | None
) -> int:
    """Counts the checkpoints that are due by steps and epochs, and the final one."""
    planned: Collection[int] = range(0)
    if checkpoint.interval is not None:
        due = _due(checkpoint.interval, steps)
        planned = range(due.start * checkpoint.interval, due.stop * checkpoint.interval, checkpoint.interval)
    if checkpoint.checkpointing_epochs is not None and batches is not None:
        epochs = range(batches.epochs_before(steps.start), batches.epochs_before(steps.stop))
        ended = _due(checkpoint.checkpointing_epochs, epochs)
        planned = {*planned, *(batches.steps_in(number * checkpoint.checkpointing_epochs) for number in ended)}
    return len(planned) + (checkpoint.final_checkpoint and steps.stop not in planned)


def _bytes_a_weight(export: ExportOptions) -> int:
    """Returns the bytes that each weight of an exported pipeline takes in its folder and its single file."""
    return _size_in(export) * (1 + export.export_single_file)


def _bytes_an_adapter(lora_format: str, export: ExportOptions) -> int:
    """Returns the bytes that each weight of an adapter takes, in diffusers' file, the UIs' or both."""
    return FLOAT32 * (lora_format != "kohya") + _size_in(export) * (lora_format != "diffusers")


def _size_in(export: ExportOptions) -> int:
    return FLOAT32 if export.export_dtype == "fp32" else FLOAT32 // 2


def _num_parameters(modules: Iterable[nn.Module], are_trained: bool = False) -> int:
    """Counts the parameters of modules, or only those that train."""
    found = (each for module in modules for each in module.parameters() if each.requires_grad or not are_trained)
    return sum(each.numel() for each in found)


def _due(interval: int, steps: range) -> range:
    """Returns the multiples of an interval after the first step, up to the last, divided by the interval."""
    return range(math.floor(steps.start / interval) + 1, math.floor(steps.stop / interval) + 1)


def describe_disk(use: DiskUse, folder: Path, checkpoint: CheckpointOptions) -> str:
    """Returns the plan's line on disk use and free space; warns if the run does not fit."""
    place = next((path for path in (folder, *folder.resolve().parents) if path.exists()), Path(os.sep))
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return f"\n  {'disk':<14} {use}; free space is unknown: {first_line(error)}"
    if use.total > free:
        cure = "give --checkpoints_total_limit 2" if checkpoint.checkpoints_total_limit is None else "free disk space"
        logger.warning(
            "the disk of %s has %s free, but the run writes up to %s; %s, or the run fails when the disk is full",
            *(folder, size_text(free), use, cure),
        )
    return f"\n  {'disk':<14} {use}; {size_text(free)} free"
