"""Describes a run: the plan printed before it starts, its record in run.json, and the settings of its model card."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from utils.config.terminal import one_line, print_line
from utils.data.plan import PlannedImages
from utils.data.stream import StreamedImages
from utils.reports.records import SHEET
from utils.training.data import TrainingData
from utils.training.disk_use import describe_disk, disk_use
from utils.training.dry_run import draw_quickly, examine_data
from utils.training.learning_rates import LearningRates
from utils.training.model_summary import ModelSummary, summarize
from utils.training.optimizer_options import WITHOUT_WARMUP
from utils.training.options import TrainingOptions
from utils.training.probes import describe_probes
from utils.training.session import Session
from utils.training.task import Task

PASSES_A_SAMPLE = 3  # a training step computes forward and backward: about three passes a sample
MOST_RATES = 1000  # steps at which the planned learning rate is computed for run.json
LITTLE = 0.002  # of the peak rate: points that lie this close to a line between others are left out


@dataclass(frozen=True)
class RunPlan:
    """What a run is about to do.

    Attributes:
        text: the plan as `--dry_run` prints it: model, data and length, one fact per line.
        record: what run.json records of it: data, length, and the planned learning rates.
        write_files: writes to a folder what is known before the first step: the summary of the model, and the contact
            sheet of the training images if they are no stream.
        summary: the summary of the model; None for a run that writes no report.
    """

    text: str
    record: Mapping[str, object]
    write_files: Callable[[Path], None]
    summary: ModelSummary | None = None


def describe_run(
    options: TrainingOptions, session: Session, data: TrainingData, rates: LearningRates, task: Task
) -> RunPlan:
    """Returns the plan of a run."""
    summary = None
    if session.accelerator.is_main_process and (options.tracking.report or options.runtime.dry_run):
        summary = summarize(options, task, data.images.plan.sizes, data.batches.size)
    text = plan_text(options, session, data, rates, task)
    return RunPlan(text, plan_record(session, data, rates), partial(_write_files, summary, data), summary)


def _write_files(summary: ModelSummary | None, data: TrainingData, folder: Path) -> None:
    """Writes the summary of the model and the contact sheet."""
    if summary is not None:
        summary.write(folder)
    if not isinstance(data.images, StreamedImages):
        draw_quickly(data.preparation, data.images, data.batches, folder / SHEET)


def plan_record(session: Session, data: TrainingData, rates: LearningRates) -> dict[str, object]:
    """Returns what run.json records of a plan beyond the options.

    The fingerprint of the data changes with the images, their order and their buckets. The planned learning rates are
    the corners of a line over the steps, without what reduce_on_plateau may do.
    """
    held_out, total = data.held_out_images, rates.total_steps
    count = None if isinstance(data.images, StreamedImages) else len(data.images.records)
    steps = sorted({1 + place * (total - 1) // (MOST_RATES - 1) for place in range(MOST_RATES)})
    planned = corners(steps, [rates.optimizer.learning_rate * rates.factor(step - 1) for step in steps])
    return {
        "data": {
            "description": data.images.describe(),
            "fingerprint": data.images.fingerprint(),
            "images": count,
            "held_out_images": 0 if held_out is None else len(held_out.records),
            "sizes": [list(size) for size in data.images.plan.sizes],
        },
        "total_steps": total,
        "first_step": session.resumption.first_step,
        "global_batch": data.batches.size,
        "planned_learning_rates": {"steps": [step for step, _ in planned], "rates": [rate for _, rate in planned]},
    }


def corners(steps: Sequence[int], rates: Sequence[float]) -> list[tuple[int, float]]:
    """Returns those (step, rate) between which the others lie on straight lines, within LITTLE of the largest rate.

    The algorithm is that of Douglas and Peucker (1973), with vertical distances.
    """
    most, kept, open_parts = LITTLE * max(map(abs, rates)), {0, len(steps) - 1}, [(0, len(steps) - 1)]
    while open_parts:
        first, last = open_parts.pop()
        inner = np.arange(first + 1, last)
        if len(inner) == 0:
            continue
        ends = [steps[first], steps[last]], [rates[first], rates[last]]
        off = np.abs(np.interp([steps[place] for place in inner], *ends) - [rates[place] for place in inner])
        if off.max() > most:
            place = int(inner[off.argmax()])
            kept.add(place)
            open_parts += [(first, place), (place, last)]
    return [(steps[place], rates[place]) for place in sorted(kept)]


def plan_text(options: TrainingOptions, session: Session, data: TrainingData, rates: LearningRates, task: Task) -> str:
    """Returns the plan of a run as `--dry_run` prints it: model, data and length, one fact per line."""
    accelerator, loader, schedule, batches = session.accelerator, options.loader, rates.schedule, data.batches
    # Trained parameters and batch size.
    trained = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in task.modules.items()
    }
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    sizes = f"{loader.train_batch_size} x {loader.gradient_accumulation_steps} accumulated"
    if loader.global_batch_size is not None:
        sizes = f"at most {loader.train_batch_size} at once"
    # Length, and the learning-rate schedule.
    has_warmup = schedule.lr_scheduler not in WITHOUT_WARMUP and schedule.lr_warmup_steps
    warmup = f" after {schedule.lr_warmup_steps} steps of warm-up" if has_warmup else ""
    epochs = float(rates.total_steps * batches.size / batches.samples_per_epoch)
    held_out = "" if data.held_out_images is None else f"; {len(data.held_out_images.records):,} held out"
    optimizer = rates.optimizer
    # One line per fact, then what the run writes to disk.
    facts = {
        "model": task.origin,
        "adaptation": f"{task.method}, {sum(trained.values()):,} parameters train: {parts}",
        "noise": task.process.describe(),
        "precision": f"{accelerator.mixed_precision} on {accelerator.num_processes} x {accelerator.device.type}",
        "data": data.images.describe() + held_out,
        "resolution": ", ".join(f"{width}x{height}" for width, height in data.images.plan.sizes),
        "global batch": f"{batches.size} = {sizes} x {accelerator.num_processes} processes",
        "length": f"{rates.total_steps:,} optimizer steps = {epochs:.2f} epochs",
        "optimizer": f"{optimizer.name}, {schedule.lr_scheduler} at {optimizer.learning_rate:g}{warmup}",
    }
    if samples := describe_samples(options, task, batches.size):
        facts["samples"] = samples
    if data.held_out_images is not None or isinstance(data.images, PlannedImages):
        facts["verdict"] = describe_probes(options, task, rates.total_steps * batches.size)
    lines = [f"  {name:<14} {one_line(fact)}" for name, fact in facts.items()]
    steps = range(session.resumption.first_step, rates.total_steps)
    use = disk_use(task.adaptation, optimizer.name, options.ema, options.checkpoint, steps, options.export, batches)
    return "\n".join(lines) + describe_disk(use, session.folder.path, options.checkpoint)


def describe_samples(options: TrainingOptions, task: Task, batch: int) -> str:
    """Returns the plan's line on the samples, with what those before the first step cost; empty if none are drawn.

    Args:
        batch: the global batch.
    """
    work = options.samples.work(task.family.pipeline.scheduler)
    if not work.count:
        return ""
    each = f"{work.count} images of {work.num_steps / work.count:.4g} denoising steps each time"
    if not options.samples.sample_at_start:
        return f"{each}, none before the first step"
    as_steps = math.ceil(work.num_passes / (PASSES_A_SAMPLE * batch))
    return f"{each}, also before the first step: as long as about {as_steps:,} optimizer steps (--no_sample_at_start)"


def report_dry_run(plan: RunPlan, session: Session, data: TrainingData, task: Task) -> None:
    """Prints the plan and the findings on the data, and draws a contact sheet of what the model will see."""
    if session.accelerator.is_main_process:
        print_line(plan.text)
        if plan.summary is not None:
            lines = [f"  {name:<14} {one_line(fact)}" for name, fact in plan.summary.facts().items()]
            print_line("\n".join(["model", *lines]))
        print_line(examine_data(data.preparation, task.family, data.images, data.batches, session.folder.path))
        if plan.summary is not None:
            print_line(f"  layers of the model: {plan.summary.write(session.folder.path)}")


def card_settings(options: TrainingOptions, data: TrainingData, steps: int) -> list[tuple[str, object]]:
    """Returns the (name, value) settings that a model card lists."""
    chosen = {name: value for name, value in options.adaptation.structure.items() if value not in (None, False)}
    noise = {name: value for name, value in options.noise.scheduler_changes.items() if value is not None}
    is_averaged = options.ema.use_ema or options.ema.ema_lengths
    return [
        ("data", data.images.describe()),
        ("optimizer steps", steps),
        ("global batch", data.batches.size),
        ("optimizer", options.optimizer.name),
        ("learning rate", options.optimizer.learning_rate),
        ("learning-rate schedule", options.schedule.lr_scheduler),
        *((name.replace("_", " "), _listed(value)) for name, value in {**chosen, **noise}.items()),
        *([("weights", "exponential moving average")] if is_averaged else []),
        ("resolution", data.resolution),
        ("mixed precision", options.runtime.mixed_precision or "as launched"),
        ("seed", options.runtime.seed),
    ]


def _listed(value: object) -> object:
    """A setting as a card shows it."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
