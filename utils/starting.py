"""What a run settles between its options and its first step: whether it goes on from a checkpoint, how much it takes
at once, and what it records of itself.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.checkpoint import CheckpointOptions, Checkpoints, read_state
from utils.data.buckets import BucketOptions
from utils.data.dataset import LoaderOptions
from utils.data.sampler import GlobalBatches, Pieces
from utils.data.selection import PlannedImages
from utils.data.stream import StreamedBatches, StreamedImages, StreamedPieces
from utils.ema_lengths import has_averages, set_aside_snapshots
from utils.encoding import Encoder
from utils.engines import Engine
from utils.families.vae import LatentSpace
from utils.gradients import Gradients
from utils.optim import LENGTH_SCHEDULES, NamedParameter, OptimizerOptions, ScheduleOptions, build_optimizer
from utils.options import UserError, as_record, without_secrets
from utils.perceptual import PerceptualLoss, PerceptualOptions
from utils.runtime import OutputFolder, versions
from utils.stepping import PerParameter
from utils.terms import LossTerm, TermFacts, TermOptions, load_term
from utils.tracking import TrackingOptions, start_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# what a resumed run may change: its length, intervals and logging, how it is spread, what only saves memory or time,
# and where its data lie, which are compared themselves
FREE_GROUPS = (
    "evaluation",
    "features",
    "controls",
    "length",
    "checkpoint",
    "tracking",
    "hub",
    "validation",
    "stopping",
    "runtime",
    "loader",
    "sampling",
    "speed",
)
FREE_OPTIONS = {
    *("dataset_name", "dataset_config_name", "train_data_dir", "dataset_file", "cache_dir", "mask_dir"),
    *("validation_data_dir", "max_validation_samples", "encoding_cache_dir", "cache_batch_size", "cache_only"),
    *("verify_cache", "use_ema", "offload_ema", "foreach_ema", "ema_lengths", "ema_snapshot_steps"),
    *("gradient_checkpointing", "attention_slicing", "vae_slicing", "sampling_cpu_offload", "export_fused"),
    *("on_bad_image", "fused_adamw", "max_bad_fraction", "bucket_group_size", "loss_module"),
}


def training_options(options: Any, accelerator: "Accelerator", global_batch: int) -> dict[str, object]:
    """The options that change what is trained, by flag, and the arithmetic and batch that they come to.

    Args:
        options: all of a script's, by group.
    """
    groups = (field.name for field in fields(options) if field.name not in FREE_GROUPS)
    record = {name: value for group in groups for name, value in asdict(getattr(options, group)).items()}
    chosen = {name: value for name, value in record.items() if name not in FREE_OPTIONS}
    return chosen | {"mixed_precision": accelerator.mixed_precision, "global_batch": global_batch}


def warn_of_length(start: Path, options: ScheduleOptions, total_steps: int) -> None:
    """Says so where the learning rate would have another course because the run has another length."""
    before = read_state(start).facts.total_steps
    if options.lr_scheduler in LENGTH_SCHEDULES and before != total_steps:
        message = "--lr_scheduler %s depends on the run's length: it was %d steps and is %d, so the rate jumps"
        logger.warning(message, options.lr_scheduler, before, total_steps)


def claim(
    folder: OutputFolder, checkpoints: Checkpoints, start: Path | None, options: CheckpointOptions, overwrite: bool
) -> None:
    """Takes the output folder for this run, and tidies what earlier runs left of checkpoints."""
    is_inside = start is not None and start.resolve().parent == folder.path.resolve()
    resuming = is_inside or options.resume_from_checkpoint == "latest"
    folder.claim(resuming, overwrite)
    checkpoints.clean()
    step = 0 if start is None else read_state(start).step
    checkpoints.set_aside_after(step)
    set_aside_snapshots(folder.path, step if start is not None and has_averages(start) else 0)


def choose_group_size(buckets: BucketOptions, loader: LoaderOptions, global_batch: int, start: Path | None) -> int:
    """How many samples of one bucket stand together: as asked, as the run that goes on had it, or the micro-batch."""
    recorded = None if start is None else read_state(start).facts.structure.get("bucket_group_size")
    chosen = buckets.bucket_group_size or recorded or math.gcd(loader.train_batch_size, global_batch)
    if global_batch % chosen:
        raise UserError(f"--bucket_group_size must divide the global batch of {global_batch}, got {chosen}")
    return chosen


def samples_at_once(buckets: BucketOptions, loader: LoaderOptions, group_size: int) -> int:
    """How many samples a process takes at once, where memory allows: one bucket's, if there are buckets."""
    if not loader.find_batch_size:
        return loader.train_batch_size
    wanted = loader.train_batch_size * loader.gradient_accumulation_steps
    return min(wanted, group_size) if buckets.use_aspect_ratio_buckets else wanted


def loss_terms(
    perceptual: PerceptualOptions, own: TermOptions, space: LatentSpace, num_timesteps: int
) -> list[LossTerm]:
    """What is added to the loss, as the options ask."""
    facts = TermFacts(space.channels, num_timesteps, space.decode)
    terms: list[LossTerm] = []
    if perceptual.perceptual_weight is not None:
        terms.append(PerceptualLoss(facts, perceptual))
    if own.loss_module is not None:
        terms.append(load_term(own, facts))
    return terms


def own_parameters(
    options: TermOptions, terms: Sequence[LossTerm], rates: OptimizerOptions, scale: float
) -> list[NamedParameter]:
    """What the terms themselves train; `scale` is what `--scale_lr` multiplies learning rates by."""
    rate = rates.learning_rate if options.loss_module_lr is None else options.loss_module_lr * scale
    return [
        NamedParameter(f"loss_module.{name}", parameter, rate)
        for term in terms
        for name, parameter in term.named_parameters()
        if parameter.requires_grad
    ]


def make_optimizer(
    named: list[NamedParameter], rates: OptimizerOptions, pure_bf16: bool, seed: int
) -> torch.optim.Optimizer:
    """The optimizer, which steps parameter by parameter where that was asked for."""
    if pure_bf16 or rates.optimizer_in_backward:
        return PerParameter(named, rates, rates.optimizer_in_backward, seed)
    return build_optimizer(named, rates)


def make_gradients(
    engine: Engine,
    model: torch.nn.Module,
    encoder: Encoder,
    pieces: Pieces | StreamedPieces,
    loader: LoaderOptions,
    at_once: int,
    start: Path | None,
    seed: int,
    steps_in_backward: bool,
    saving: Mapping[str, bool],
) -> Gradients:
    """What runs forward and backward; a run that goes on takes no more samples at once than memory allowed before.

    Args:
        saving: flags that save memory, in the order to try them, and whether they are given.
    """
    allowed = None if start is None or loader.find_batch_size else read_state(start).samples_at_once
    accelerator = engine.accelerator
    size, batches = loader.global_batch(accelerator.num_processes), len(pieces.slots)
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / size
    return Gradients(
        engine,
        model,
        encoder,
        seed,
        batches,
        sum(len(slots) for slots in pieces.slots),
        scale,
        min(at_once, allowed or at_once),
        engine.can_begin_again and not steps_in_backward,
        [flag for flag, is_given in saving.items() if not is_given],
    )


def describe_run(
    model: str,
    adaptation: str,
    modules: Mapping[str, torch.nn.Module],
    accelerator: "Accelerator",
    images: PlannedImages | StreamedImages,
    held_out: PlannedImages | None,
    batches: GlobalBatches | StreamedBatches,
    total_steps: int,
    loader: LoaderOptions,
    rates: OptimizerOptions,
    schedule: ScheduleOptions,
) -> str:
    """What trains on what and for how long, a fact a line: what `--dry_run` prints.

    Args:
        model, adaptation: what is trained from and how, in words.
        modules: those that train.
    """
    trained = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in modules.items()
    }
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    sizes = f"{loader.train_batch_size} x {loader.gradient_accumulation_steps} accumulated"
    if loader.global_batch_size is not None:
        sizes = f"at most {loader.train_batch_size} at once"
    epochs = float(total_steps * batches.size / batches.samples_per_epoch)
    facts = {
        "model": model,
        "adaptation": f"{adaptation}, {sum(trained.values()):,} parameters train: {parts}",
        "precision": f"{accelerator.mixed_precision} on {accelerator.num_processes} x {accelerator.device.type}",
        "data": images.describe() + ("" if held_out is None else f"; {len(held_out.records):,} held out"),
        "resolution": ", ".join(f"{width}x{height}" for width, height in images.plan.sizes),
        "global batch": f"{batches.size} = {sizes} x {accelerator.num_processes} processes",
        "length": f"{total_steps:,} optimizer steps = {epochs:.2f} epochs",
        "optimizer": f"{rates.name}, {schedule.lr_scheduler} at {rates.learning_rate:g}",
    }
    return "\n".join(f"  {name:<14} {fact}" for name, fact in facts.items())


def open_records(options: Any, accelerator: "Accelerator", folder: OutputFolder, tracking: TrackingOptions) -> None:
    """Writes what the run was made with, and opens the trackers.

    Args:
        options: all of a script's, by group.
    """
    record = as_record(options)
    if accelerator.is_main_process:
        folder.record(record, versions(), without_secrets(sys.argv))
    start_trackers(accelerator, tracking, record)
