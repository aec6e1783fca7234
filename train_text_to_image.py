#!/usr/bin/env python
"""Fine-tunes Stable Diffusion 1.x, 2.x or SDXL on images with captions, whole or by LoRA.

accelerate launch train_text_to_image.py --pretrained_model ... --train_data_dir ... --output_dir ...
"""

import logging
import platform
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.adaptation import ADAPTATIONS, Adaptation, AdaptationOptions
from utils.background import BackgroundWriter
from utils.checkpoint import CheckpointOptions, Checkpoints, RunFacts, check_structure, check_training, read_state
from utils.data.buckets import BucketOptions
from utils.data.cache import CacheOptions
from utils.data.captions import CaptionOptions
from utils.data.dataset import LoaderOptions, SampleSpec, TrainingDataset, Waiting, batches_by_step
from utils.data.images import ImageOptions
from utils.data.sampler import GlobalBatches, Pieces
from utils.data.selection import HeldOutOptions, PlannedImages, SelectionOptions
from utils.data.sources import DataOptions, SourceOptions, source_entries
from utils.data.stream import StreamedBatches, StreamedImages, StreamedPieces
from utils.doctor import (
    SHEET_TILES,
    STREAMED_SAMPLES,
    draw_sheet,
    examine,
    examine_stream,
    first_seen,
    first_streamed,
)
from utils.ema import EmaOptions, MovingAverage
from utils.ema_lengths import AverageLengths, has_averages, set_aside_snapshots
from utils.encoding import Encoder
from utils.engines import Engine, engine_of
from utils.export import CardFacts, HubOptions, upload, write_card
from utils.families.base import Family
from utils.families.registry import pick_family
from utils.families.source import ModelOptions, PipelineSource
from utils.gradients import FREE_CURE, Gradients, setting
from utils.held_out import EarlyStoppingOptions, HeldOut, History, measurement_of
from utils.losses import LossOptions
from utils.noise import ForwardProcess, NoiseDraws, NoiseOptions, timestep_weights
from utils.objective import Objective
from utils.optim import (
    LENGTH_SCHEDULES,
    OPTIMIZER_PACKAGES,
    NamedParameter,
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    rate_factor,
    set_learning_rate,
)
from utils.options import (
    Stopped,
    UserError,
    as_record,
    leave,
    option,
    parse,
    require,
    require_positive,
    run_script,
    without_secrets,
)
from utils.perceptual import PerceptualLoss, PerceptualOptions
from utils.preparation import DataPreparation
from utils.runtime import (
    OutputFolder,
    RuntimeOptions,
    ending,
    on_main_process,
    set_up_logging,
    start_processes,
    use_hub_cache_if_offline,
    weight_dtype,
    write_json,
)
from utils.seeding import model_seed
from utils.state import CheckpointSaver, RunState, evaluating
from utils.stepping import PerParameter
from utils.stopping import StopRequests, agreed, stopped
from utils.terms import LossTerm, TermFacts, TermOptions, load_term
from utils.tracking import RunLog, Sample, StepMetrics, TrackingOptions, start_trackers
from utils.validation import Sampler, ValidationOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("utils.train_text_to_image")
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "datasets", "peft", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class LengthOptions:
    num_train_epochs: int = option(100, "passes over the data")
    max_train_steps: int | None = option(None, "optimizer steps, instead of --num_train_epochs")
    max_train_time: str | None = option(
        None, "HH:MM:SS after which the run saves its state and ends; --resume_from_checkpoint latest goes on"
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_train_epochs", "max_train_steps")
        time = self.max_train_time
        is_time = time is None or re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", time)
        require(bool(is_time), "max_train_time", time, "be HH:MM:SS, such as 11:45:00")

    @property
    def seconds(self) -> float | None:
        """The time after which the run ends."""
        if self.max_train_time is None:
            return None
        hours, minutes, seconds = (int(part) for part in self.max_train_time.split(":"))
        return 3600.0 * hours + 60 * minutes + seconds


@dataclass(frozen=True)
class Options:
    """All options of this script, by group."""

    model: ModelOptions
    adaptation: AdaptationOptions
    data: DataOptions
    source: SourceOptions
    captions: CaptionOptions
    selection: SelectionOptions
    image: ImageOptions
    buckets: BucketOptions
    cache: CacheOptions
    loader: LoaderOptions
    length: LengthOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    loss: LossOptions
    perceptual: PerceptualOptions
    term: TermOptions
    noise: NoiseOptions
    ema: EmaOptions
    held_out: HeldOutOptions
    validation: ValidationOptions
    stopping: EarlyStoppingOptions
    checkpoint: CheckpointOptions
    runtime: RuntimeOptions
    tracking: TrackingOptions
    hub: HubOptions

    @property
    def structure(self) -> dict[str, object]:
        """What a checkpoint can only be resumed with, by flag."""
        term = None if self.term.loss_module is None else Path(self.term.loss_module).name
        shared = {"seed": self.runtime.seed, "optimizer": self.optimizer.name, "loss_module": term}
        return shared | self.adaptation.structure


def run(argv: Sequence[str] | None) -> None:
    """Trains; every step of the way in its order."""
    set_up_logging()
    options: Options = parse(Options, argv, __doc__.splitlines()[0])
    check_together(options)
    network = options.perceptual.perceptual_network
    names = (options.model.pretrained_model_name_or_path, options.source.dataset_name, network)
    if not all(name is None or Path(name).exists() for name in names):
        use_hub_cache_if_offline()
    source = PipelineSource(options.model)
    family_class = pick_family(source)
    resolution = options.image.resolution or family_class.default_resolution
    sizes = options.buckets.sizes(resolution)
    check_before_loading(options, source, family_class, sizes)
    seed = options.runtime.seed
    folder = OutputFolder(options.runtime.output_dir or default_output_dir(options, family_class))
    accelerator = start_processes(
        options.runtime,
        options.loader.gradient_accumulation_steps,
        options.tracking.trackers,
        folder.path,
        options.tracking.logging_dir,
    )
    check_stepping(options, accelerator)
    engine = engine_of(accelerator)
    engine.check_options(as_record(options), options.optimizer.name)
    requests = StopRequests(folder.path, options.length.seconds)
    with ending(accelerator, folder), requests.listening():
        checkpoints = Checkpoints(folder.path, options.checkpoint.checkpoints_total_limit)
        asked_start = options.checkpoint.resume_from_checkpoint
        start = on_main_process(accelerator, lambda: checkpoints.resolve(asked_start))
        group_size = choose_group_size(options, accelerator, start)
        structure = options.structure | {"pretrained_model": family_class.pipeline_class_name}
        structure["bucket_group_size"] = group_size if options.buckets.use_aspect_ratio_buckets else None
        if start is not None:
            check_structure(start, structure)
            check_training(start, training_options(options, accelerator), options.checkpoint.allow_changed_options)
        if not options.runtime.dry_run:
            on_main_process(accelerator, lambda: claim(folder, checkpoints, start, options))
            on_main_process(accelerator, requests.remove_files)
        preparation = prepare_data(options, accelerator, folder, requests)
        images = preparation.choose_images(resolution, group_size)
        held_out_images = preparation.choose_held_out(resolution)
        batches = images.batches(global_batch_size(options, accelerator), group_size, seed)
        total_steps = options.length.max_train_steps or batches.steps_in(options.length.num_train_epochs)
        rates = scaled_rates(options.optimizer, batches.size)
        factor = rate_factor(options.schedule, rates.learning_rate, total_steps)
        data = {"data": images.fingerprint(), **images.describe_sources()}
        facts = RunFacts(structure, training_options(options, accelerator) | data, total_steps)
        if start is not None:
            check_training(start, data, options.checkpoint.allow_changed_options)
            warn_of_length(start, options.schedule, total_steps)

        torch.manual_seed(model_seed(seed, 0, 0))  # LoRA's and a fresh UNet's first weights
        adaptation_class = ADAPTATIONS[options.adaptation.adaptation]
        dtypes = adaptation_class.dtypes(options.adaptation, weight_dtype(accelerator))
        family = family_class(source, dtypes, options.noise.scheduler_changes)
        family.check_sizes(images.plan.sizes, family.pipeline.vae.config)
        if options.adaptation.quantize_base is not None:
            family.quantize_unet(options.adaptation.quantize_base, accelerator.device)
        adaptation = adaptation_class(family, options.adaptation, start)
        family.use_attention()
        family.save_memory()
        requests.check()
        process = forward_process(options.noise, family.pipeline.scheduler.config)
        terms = loss_terms(options, family, process)
        named = adaptation.named_parameters(rates)
        own = own_parameters(options.term, terms, rates, rates.learning_rate / options.optimizer.learning_rate)
        plan = describe(options, accelerator, family, adaptation, images, held_out_images, batches, total_steps)
        if options.runtime.dry_run:
            if accelerator.is_main_process:
                print(plan)
                print(examine_data(options, preparation, family, images, batches, folder.path))
            return

        for part in (family, *terms):
            part.to(accelerator.device)
        if options.model.gradient_checkpointing or engine.checkpoints_activations:
            family.use_gradient_checkpointing(options.adaptation.train_text_encoder, vae=bool(terms))
        num_workers = options.loader.num_workers(accelerator.num_processes)
        requests.check()
        held_out = measure_on(options, accelerator, family, held_out_images, requests)
        encodings = preparation.fill_cache(family, images, num_workers, keep_vae=bool(terms))
        if options.cache.cache_only or options.cache.verify_cache:
            preparation.write_report(images)
            return
        encoder = Encoder(family, options.adaptation.train_text_encoder)
        objective = Objective(family, adaptation.modules, process, options.noise, options.loss, terms)
        model, optimizer = engine.prepare(objective, make_optimizer(options, named + own, rates), rates.clip_norm)
        named = adaptation.named_parameters(rates)  # an engine that spreads weights puts others in their place
        average = MovingAverage([each.parameter for each in named], options.ema) if options.ema.use_ema else None
        lengths = AverageLengths(named, options.ema, folder.path) if options.ema.ema_lengths else None
        state = RunState(engine, adaptation, average, lengths, optimizer, named, own, terms, facts)
        first_step = 0 if start is None else state.load(start)
        history = History(folder.path, first_step, options.stopping)
        validation = Validation(held_out, history, objective, state, folder)
        is_due = first_step in (0, total_steps) or is_validation_due(options, family, batches, first_step)
        if is_due and validation.measure(first_step) is None:
            raise Stopped(f"stopped before step {first_step + 1}", requests.number or signal.SIGTERM)
        total_steps = first_step if history.is_over() else total_steps

        spec = SampleSpec(
            family.latent_space.shape, family.tokenizer(), options.cache.cut_variants, options.cache.text_variants
        )
        draws = NoiseDraws(options.noise, process, seed, batches.size)
        dataset = TrainingDataset(images, batches, spec, options.image, draws, encodings)
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        at_once = options.loader.train_batch_size
        if options.loader.find_batch_size:
            at_once *= options.loader.gradient_accumulation_steps
            at_once = min(at_once, group_size) if options.buckets.use_aspect_ratio_buckets else at_once
        pieces = images.pieces(batches, at_once, rank, num_processes, first_step, total_steps)
        waiting = Waiting()
        loader = batches_by_step(dataset, pieces, num_workers, accelerator.device.type == "cuda", waiting)
        sampler = Sampler(accelerator, family, options.validation, folder.path, resolution, seed, requests)
        open_records(options, accelerator, folder)
        logger.info("training\n%s", plan)
        gradients = make_gradients(options, engine, model, encoder, pieces, at_once, start)
        adaptation.train_mode()
        gradients.rehearse(dataset.largest(at_once, options.perceptual.perceptual_min_timestep))
        if options.loader.find_batch_size:
            groups = f" --bucket_group_size {group_size}" if options.buckets.use_aspect_ratio_buckets else ""
            logger.info("--find_batch_size: keep %s%s", setting(gradients.size, gradients.num_samples), groups)

        preparation.write_report(images)
        unreadable: dict[str, str] = {}  # found by this process and not yet told to the others
        saver = CheckpointSaver(checkpoints, state, BackgroundWriter(options.checkpoint.async_checkpointing))
        gradients.rescue = saver.rescue
        log = RunLog(accelerator, folder.path, first_step, total_steps, batches.size)
        with saver.writer, log:
            for step, micro_batches in loader:
                rate_now = factor(step) * plateau_factor(options.schedule, history)
                set_learning_rate(optimizer, rate_now)
                found = gradients.add_up(step, micro_batches)
                new = {key: why for key, why in found.unreadable.items() if key not in images.bad | unreadable}
                unreadable |= new
                log.layers(((name, parameter) for name, parameter, _ in named), step + 1, options.tracking)
                grad_norm = state.clip(rates.clip_norm)
                state.step(grad_norm)

                done = step + 1
                asked = [float(len(new)), *requests.asked(accelerator.is_main_process)]
                sums = torch.cat([found.loss[None], torch.tensor(asked, device=accelerator.device)])
                total_loss, sums = accelerator.reduce(sums).split([1, len(asked)])
                epoch = float(done * batches.size / batches.samples_per_epoch)
                rate, mean_loss = rates.learning_rate * rate_now, total_loss[0] / batches.size
                by_key = found.loss_by_key if options.tracking.debug_loss else ()
                log.step(
                    StepMetrics(done, epoch, mean_loss, grad_norm, rate, found.keys, by_key, waiting.seconds, sums)
                )
                if any(log.sums[:1]):
                    preparation.share_unreadable(unreadable, images)
                stop_if_diverged(log, options.tracking.max_skipped_steps, checkpoints)
                is_due = done == total_steps or is_validation_due(options, family, batches, done)
                heard = log.sums[1:] if num_processes > 1 else asked[1:]
                if is_due:
                    with log.paused():
                        log.values(validation.measure(done) or {}, done)
                        heard = hear_again(accelerator, requests, heard)  # a signal breaks a measurement off
                    total_steps = done if history.is_over() else total_steps
                wish = agreed(heard)
                if lengths is not None and is_snapshot_due(options, done, total_steps):
                    on_main_process(accelerator, partial(lengths.snapshot, done))
                if wish.saves or options.checkpoint.is_due(done, total_steps):
                    with log.paused():
                        saver.save(done, gradients.shortened(at_once))
                if wish.saves:
                    on_main_process(accelerator, requests.remove_files)
                if wish.number or (wish.ends and done < total_steps):
                    saver.join()
                    raise stopped(wish, done, folder.path)
                if done == total_steps:
                    break
                if is_due:
                    with log.paused(), evaluating(adaptation, average, optimizer):
                        log.images(sampler.draw(f"step-{done}"), done, "validation")

        saver.join()
        if lengths is not None:
            average = choose_length(options.ema.ema_lengths, lengths, validation, requests)
        with evaluating(adaptation, average, optimizer):
            state.export(folder.path)
            samples = sampler.draw("final")
        if requests.is_asked:
            logger.warning("a signal broke off the last samples; the result itself is whole")
        log.images(samples, total_steps, "test")
        preparation.share_unreadable(unreadable, images)
        preparation.write_report(images)
        if accelerator.is_main_process:
            publish(options, folder, family, samples, total_steps, batches.size)
        logger.info("the result is in %s", folder.path)


def make_gradients(
    options: Options,
    engine: Engine,
    model: torch.nn.Module,
    encoder: Encoder,
    pieces: Pieces | StreamedPieces,
    at_once: int,
    start: Path | None,
) -> Gradients:
    """What runs forward and backward; a run that goes on takes no more samples at once than memory allowed before."""
    allowed = None if start is None or options.loader.find_batch_size else read_state(start).samples_at_once
    accelerator = engine.accelerator
    size, batches = global_batch_size(options, accelerator), len(pieces.slots)
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / size
    saving = {
        FREE_CURE: options.model.gradient_checkpointing,
        "--cache_latents --cache_text_embeddings": options.cache.cache_latents and options.cache.cache_text_embeddings,
        "--use_8bit_adam": options.optimizer.name != "adamw",
        "--adaptation lora": options.adaptation.adaptation != "full",
        "--quantize_base nf4": options.adaptation.adaptation != "lora" or options.adaptation.quantize_base is not None,
    }
    cures = [flag for flag, is_given in saving.items() if not is_given]
    return Gradients(
        engine,
        model,
        encoder,
        options.runtime.seed,
        batches,
        sum(len(slots) for slots in pieces.slots),
        scale,
        min(at_once, allowed or at_once),
        engine.can_begin_again and not options.optimizer.optimizer_in_backward,
        cures,
    )


def hear_again(accelerator: "Accelerator", requests: StopRequests, heard: Sequence[float]) -> list[float]:
    """What all processes were asked for, also since then."""
    now = requests.asked(accelerator.is_main_process)
    both = [float(one + other) for one, other in zip(now, heard or [0.0] * len(now), strict=True)]
    return accelerator.reduce(torch.tensor(both, device=accelerator.device)).tolist()


def loss_terms(options: Options, family: Family, process: ForwardProcess) -> list[LossTerm]:
    """What is added to the loss, as the options ask."""
    space = family.latent_space
    facts = TermFacts(space.channels, process.num_timesteps, space.decode)
    terms: list[LossTerm] = []
    if options.perceptual.perceptual_weight is not None:
        terms.append(PerceptualLoss(facts, options.perceptual))
    if options.term.loss_module is not None:
        terms.append(load_term(options.term, facts))
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


def measure_on(
    options: Options,
    accelerator: "Accelerator",
    family: Family,
    images: PlannedImages | None,
    requests: StopRequests,
) -> HeldOut | None:
    """The held-out images, encoded."""
    if images is None:
        return None
    text_encoders_train = options.adaptation.train_text_encoder
    seed = options.runtime.seed
    return HeldOut(accelerator, family, images, options.stopping, options.image, seed, text_encoders_train, requests)


@dataclass(frozen=True)
class Validation:
    """What is measured on the held-out images, if there are any, and kept in `best/`."""

    held_out: HeldOut | None
    history: History
    objective: Objective
    state: RunState
    folder: OutputFolder

    def measure(self, step: int) -> dict[str, float] | None:
        """Measures the validation loss of the weights and of their average; gives what is logged of it.

        Nothing is measured twice. None where a signal to any process broke it off: the resumed run does it.
        """
        if self.held_out is None or any(each.step == step for each in self.history.measurements):
            return {}
        state, curves = self.state, []
        for average in (None, state.average) if state.average is not None and step > 0 else (None,):
            with evaluating(state.adaptation, average, state.optimizer):
                curve = self.held_out.losses(self.objective)
            if curve is None:
                return None
            curves.append(curve)
        measurement = measurement_of(step, *curves)
        self.history.add(measurement, write=self.held_out.is_main_process)
        if step > 0 and self.history.best() is measurement:
            with evaluating(state.adaptation, state.average, state.optimizer):
                write = state.exporting()
                on_main_process(state.accelerator, lambda: self.folder.replace("best", write))
        if self.history.is_over():
            best = self.history.best()
            logger.info("no lower validation loss since step %d (%.5f): the run ends", best.step, best.decisive)
        return self.history.logged(measurement)


def choose_length(
    wanted: Sequence[float], lengths: AverageLengths, validation: Validation, requests: StopRequests
) -> MovingAverage:
    """The average of the length that has the lowest validation loss, all of which `ema_lengths.json` holds."""
    held_out = validation.held_out
    if held_out is None:
        return lengths.of_length(wanted[0])
    measured = {}
    for length in wanted:
        with evaluating(validation.state.adaptation, lengths.of_length(length), optimizer=None):
            curve = held_out.losses(validation.objective)
        if curve is None:
            raise Stopped("stopped while the length of the average was chosen", requests.number or signal.SIGTERM)
        measured[length] = float(curve.mean())
    best = min(measured, key=measured.get)
    logger.info("validation loss by length: %s", ", ".join(f"{name:g}: {loss:.5f}" for name, loss in measured.items()))
    if held_out.is_main_process:
        write_json(validation.folder.path / "ema_lengths.json", {"chosen": best, "validation_loss": measured})
    return lengths.of_length(best)


def is_snapshot_due(options: Options, done: int, total_steps: int) -> bool:
    """Whether the averages among which a length is chosen are written after optimizer step number `done`, from 1."""
    interval = options.ema.ema_snapshot_steps or options.checkpoint.checkpointing_steps
    return done % interval == 0 or done == total_steps


def plateau_factor(options: ScheduleOptions, history: History) -> float:
    """What `reduce_on_plateau` multiplies the learning rate by; 1 under other schedules."""
    if options.lr_scheduler != "reduce_on_plateau":
        return 1.0
    return options.lr_gamma ** history.reductions(options.lr_patience)


def stop_if_diverged(log: RunLog, limit: int, checkpoints: Checkpoints) -> None:
    """Ends a run in which one step after the other had to be skipped."""
    if log.skipped_in_a_row >= limit:
        last = next((path.name for path in reversed(checkpoints.found())), "none was written")
        raise UserError(
            f"{limit} steps in a row had no finite loss and gradient (--max_skipped_steps); lower --learning_rate or "
            f"look at the images named above; the last checkpoint: {last}"
        )


def check_together(options: Options) -> None:
    """Refuses options that don't go together, and warns of those that have no effect."""
    source_entries(options.data, options.source, options.captions)
    if options.model.unet_config is not None and options.adaptation.adaptation != "full":
        raise UserError("--unet_config trains a fresh UNet, which adapters would leave random; leave one out")
    text_rates = (options.optimizer.text_encoder_lr, options.optimizer.text_encoder_2_lr)
    if any(rate is not None for rate in text_rates) and not options.adaptation.train_text_encoder:
        raise UserError("--text_encoder_lr goes with --train_text_encoder; give both or neither")
    if options.schedule.lr_scheduler in ("constant", "one_cycle") and options.schedule.lr_warmup_steps not in (0, 500):
        logger.warning("--lr_warmup_steps is ignored by --lr_scheduler %s", options.schedule.lr_scheduler)
    if options.hub.hub_token is not None and {"wandb", "comet_ml"} & set(options.tracking.trackers):
        raise UserError(
            f"--report_to {options.tracking.report_to} would record the command with its --hub_token; "
            "log in by `hf auth login` instead"
        )
    check_optimizer(options)
    check_masks(options)
    needs_loss = {
        "--early_stopping_patience": options.stopping.early_stopping_patience is not None,
        "--lr_scheduler reduce_on_plateau": options.schedule.lr_scheduler == "reduce_on_plateau",
    }
    if any(needs_loss.values()) and not options.held_out.is_asked:
        flag = next(flag for flag, is_given in needs_loss.items() if is_given)
        raise UserError(f"{flag} goes by the validation loss; give --validation_split or --validation_data_dir")
    named_split = options.held_out.validation_split is not None and options.held_out.fraction is None
    if (named_split and options.data.dataset_file) or (
        options.held_out.fraction is not None and options.data.streaming
    ):
        raise UserError(
            "--validation_split goes with neither --dataset_file nor --streaming; give --validation_data_dir"
        )
    if options.ema.offload_ema and not (options.ema.use_ema or options.ema.ema_lengths):
        raise UserError("--offload_ema goes with --use_ema or --ema_lengths; give one, or leave it out")
    if len(options.ema.ema_lengths or ()) > 1 and not options.held_out.is_asked:
        raise UserError(
            "--ema_lengths: among several the validation loss chooses; give --validation_split or "
            "--validation_data_dir, or a single length"
        )
    if options.data.streaming and (options.cache.cache_latents or options.cache.cache_text_embeddings):
        raise UserError("--streaming does not know its images beforehand, so it has no cache; leave one out")
    frozen = {
        "crop and flip": options.cache.cache_latents and options.image.varies,
        "order of tags": options.cache.cache_text_embeddings and options.captions.varies,
    }
    if options.cache.cache_variants is None and any(frozen.values()):
        what = " and ".join(name for name, is_frozen in frozen.items() if is_frozen)
        logger.warning("each image keeps one %s in the cache; --cache_variants 4 gives it four in turn", what)
    if options.cache.cache_text_embeddings and options.adaptation.train_text_encoder:
        raise UserError(
            "--cache_text_embeddings would keep text states that --train_text_encoder changes; leave one out"
        )
    if options.adaptation.train_text_encoder and options.model.clip_skip and options.adaptation.adaptation == "full":
        logger.warning("--clip_skip %d: the layers left out stay as they are", options.model.clip_skip)


# what a resumed run may change: its length, intervals and logging, how it is spread, what only saves memory or time,
# and where its data lie, which are compared themselves
FREE_GROUPS = ("length", "checkpoint", "tracking", "hub", "validation", "stopping", "runtime", "loader")
FREE_OPTIONS = {
    *("dataset_name", "dataset_config_name", "train_data_dir", "dataset_file", "cache_dir", "mask_dir"),
    *("validation_data_dir", "max_validation_samples", "encoding_cache_dir", "cache_batch_size", "cache_only"),
    *("verify_cache", "use_ema", "offload_ema", "foreach_ema", "ema_lengths", "ema_snapshot_steps"),
    *("gradient_checkpointing", "attention_slicing", "vae_slicing", "sampling_cpu_offload", "export_fused"),
    *("on_bad_image", "max_bad_fraction", "bucket_group_size", "loss_module"),
}


def training_options(options: Options, accelerator: "Accelerator") -> dict[str, object]:
    """The options that change what is trained, by flag, and the arithmetic and batch that they come to."""
    groups = (field.name for field in fields(options) if field.name not in FREE_GROUPS)
    record = {name: value for group in groups for name, value in asdict(getattr(options, group)).items()}
    chosen = {name: value for name, value in record.items() if name not in FREE_OPTIONS}
    precision, size = accelerator.mixed_precision, global_batch_size(options, accelerator)
    return chosen | {"mixed_precision": precision, "global_batch": size}


def warn_of_length(start: Path, options: ScheduleOptions, total_steps: int) -> None:
    """Says so where the learning rate would have another course because the run has another length."""
    before = read_state(start).facts.total_steps
    if options.lr_scheduler in LENGTH_SCHEDULES and before != total_steps:
        message = "--lr_scheduler %s depends on the run's length: it was %d steps and is %d, so the rate jumps"
        logger.warning(message, options.lr_scheduler, before, total_steps)


def check_masks(options: Options) -> None:
    """Refuses what is said of masks where no source has them."""
    asked = {
        "--unmasked_weight": options.loss.unmasked_weight > 0,
        "--normalize_masked_loss": options.loss.normalize_masked_loss,
    }
    entries = source_entries(options.data, options.source, options.captions)
    if any(asked.values()) and not any(entry.source.has_masks for entry in entries):
        flag = next(flag for flag, is_given in asked.items() if is_given)
        raise UserError(f"{flag} is for images with masks; give --alpha_mask, --mask_dir or --mask_column")


def check_optimizer(options: Options) -> None:
    """Refuses an optimizer whose package is missing, or that does not go with the schedule."""
    name, schedule = options.optimizer.name, options.schedule.lr_scheduler
    package = OPTIMIZER_PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        flag = "--use_8bit_adam" if options.optimizer.use_8bit_adam else f"--optimizer {name}"
        raise UserError(f"{flag} needs {package}; pip install {package}")
    if name == "schedule_free_adamw" and schedule not in ("constant", "constant_with_warmup"):
        raise UserError(
            f"--optimizer {name} needs no schedule; --lr_scheduler must be constant or constant_with_warmup"
        )
    if name == "prodigy" and options.term.loss_module_lr not in (None, options.optimizer.learning_rate):
        raise UserError("--optimizer prodigy has one rate for all it trains; leave out --loss_module_lr")
    if name == "prodigy" and options.optimizer.learning_rate < 0.1:
        rate = options.optimizer.learning_rate
        logger.warning("--optimizer prodigy finds its rate itself: --learning_rate %g is a factor on it, try 1", rate)


def make_optimizer(options: Options, named: list[NamedParameter], rates: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer, which steps parameter by parameter where that was asked for."""
    if options.adaptation.pure_bf16 or rates.optimizer_in_backward:
        return PerParameter(named, rates, rates.optimizer_in_backward, options.runtime.seed)
    return build_optimizer(named, rates)


def check_stepping(options: Options, accelerator: "Accelerator") -> None:
    """Refuses what steps parameter by parameter can't do."""
    if options.adaptation.pure_bf16 and accelerator.mixed_precision != "bf16":
        raise UserError(f"--pure_bf16 needs --mixed_precision bf16, got {accelerator.mixed_precision}")
    if options.adaptation.pure_bf16 and options.optimizer.name == "prodigy":
        raise UserError("--optimizer prodigy finds one rate from all gradients; leave out --pure_bf16")
    if not options.optimizer.optimizer_in_backward:
        return
    steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    if steps > 1:
        raise UserError(f"--optimizer_in_backward steps after each batch; --gradient_accumulation_steps is {steps}")
    if processes > 1:
        raise UserError(f"--optimizer_in_backward steps before processes share their gradients; there are {processes}")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--optimizer_in_backward would step by scaled gradients; use --mixed_precision bf16 or no")
    if options.tracking.layer_norm_steps is not None or options.tracking.histogram_steps is not None:
        raise UserError("--optimizer_in_backward leaves no gradients for --layer_norm_steps and --histogram_steps")


def check_before_loading(
    options: Options, source: PipelineSource, family_class: type[Family], sizes: Sequence[tuple[int, int]]
) -> None:
    """Refuses what the pipeline's configs show not to go, before its weights are loaded."""
    family_class.check_before_loading(source, sizes)
    scheduler = source.config("scheduler")
    if scheduler is not None:
        forward_process(options.noise, scheduler)


def forward_process(options: NoiseOptions, scheduler_config: Mapping) -> ForwardProcess:
    """The forward process of a pipeline's scheduler as the options change it, which must go together."""
    process = ForwardProcess(scheduler_config, options.scheduler_changes)
    timestep_weights(options, process.alphas_cumprod.double().numpy())
    if options.dream_training and process.prediction_type != "epsilon":
        raise UserError(f"--dream_training is for epsilon prediction, the pipeline has {process.prediction_type}")
    return process


def default_output_dir(options: Options, family_class: type[Family]) -> str:
    """The diffusers examples' output folder for this family and adaptation."""
    adaptation = options.adaptation.adaptation
    return family_class.default_output_dir if adaptation == "full" else f"sd-model-finetuned-{adaptation}"


def claim(folder: OutputFolder, checkpoints: Checkpoints, start: Path | None, options: Options) -> None:
    """Takes the output folder for this run, and tidies what earlier runs left of checkpoints."""
    is_inside = start is not None and start.resolve().parent == folder.path.resolve()
    resuming = is_inside or options.checkpoint.resume_from_checkpoint == "latest"
    folder.claim(resuming, options.runtime.overwrite_output_dir)
    checkpoints.clean()
    step = 0 if start is None else read_state(start).step
    checkpoints.set_aside_after(step)
    set_aside_snapshots(folder.path, step if start is not None and has_averages(start) else 0)


def choose_group_size(options: Options, accelerator: "Accelerator", start: Path | None) -> int:
    """How many samples of one bucket stand together: as asked, as the run that goes on had it, or the micro-batch."""
    asked, size = options.buckets.bucket_group_size, global_batch_size(options, accelerator)
    recorded = None if start is None else read_state(start).facts.structure.get("bucket_group_size")
    chosen = asked or recorded or options.loader.train_batch_size
    if size % chosen:
        raise UserError(f"--bucket_group_size must divide the global batch of {size}, got {chosen}")
    return chosen


def prepare_data(
    options: Options, accelerator: "Accelerator", folder: OutputFolder, requests: StopRequests
) -> DataPreparation:
    """The options of the data, and what else its preparation needs."""
    return DataPreparation(
        accelerator,
        options.data,
        options.source,
        options.captions,
        options.selection,
        options.image,
        options.buckets,
        options.cache,
        options.held_out,
        options.runtime.seed,
        None if options.runtime.dry_run else folder.path,
        requests,
    )


def global_batch_size(options: Options, accelerator: "Accelerator") -> int:
    """Samples of an optimizer step, over all processes and accumulated batches."""
    loader = options.loader
    return loader.train_batch_size * loader.gradient_accumulation_steps * accelerator.num_processes


def scaled_rates(options: OptimizerOptions, factor: int) -> OptimizerOptions:
    """The options with all learning rates times the factor where `--scale_lr` asks for it."""
    if not options.scale_lr:
        return options
    names = ("learning_rate", "text_encoder_lr", "text_encoder_2_lr")
    rates = {name: getattr(options, name) * factor for name in names if getattr(options, name) is not None}
    return replace(options, **rates)


def is_validation_due(options: Options, family: Family, batches: GlobalBatches | StreamedBatches, done: int) -> bool:
    """Whether samples are drawn after optimizer step number `done`, from 1."""
    default_epochs = 1 if options.adaptation.adaptation != "full" else family.default_validation_epochs
    before, after = batches.epochs_before(done - 1), batches.epochs_before(done)
    return options.validation.is_due(done, before, after, default_epochs)


def describe(
    options: Options,
    accelerator: "Accelerator",
    family: Family,
    adaptation: Adaptation,
    images: PlannedImages | StreamedImages,
    held_out: PlannedImages | None,
    batches: GlobalBatches | StreamedBatches,
    total_steps: int,
) -> str:
    """What trains on what and for how long, a fact a line: what `--dry_run` prints."""
    trained = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in adaptation.modules.items()
    }
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    loader = options.loader
    peak_rate = scaled_rates(options.optimizer, batches.size).learning_rate
    sizes = f"{loader.train_batch_size} x {loader.gradient_accumulation_steps} accumulated"
    epochs = float(total_steps * batches.size / batches.samples_per_epoch)
    facts = {
        "model": f"{options.model.pretrained_model_name_or_path} ({family.pipeline_class_name})",
        "adaptation": f"{options.adaptation.adaptation}, {sum(trained.values()):,} parameters train: {parts}",
        "precision": f"{accelerator.mixed_precision} on {accelerator.num_processes} x {accelerator.device.type}",
        "data": images.describe() + ("" if held_out is None else f"; {len(held_out.records):,} held out"),
        "resolution": ", ".join(f"{width}x{height}" for width, height in images.plan.sizes),
        "global batch": f"{batches.size} = {sizes} x {accelerator.num_processes} processes",
        "length": f"{total_steps:,} optimizer steps = {epochs:.2f} epochs",
        "optimizer": f"{options.optimizer.name}, {options.schedule.lr_scheduler} at {peak_rate:g}",
    }
    return "\n".join(f"  {name:<14} {fact}" for name, fact in facts.items())


def examine_data(
    options: Options,
    preparation: DataPreparation,
    family: Family,
    images: PlannedImages | StreamedImages,
    batches: GlobalBatches | StreamedBatches,
    folder: Path,
) -> str:
    """What the dataset doctor finds, a fact a line; what the model will see is drawn, and all of it written down."""
    sheet, report = folder / "contact_sheet.png", folder / "dry_run_report.json"
    cache, tokenize = options.cache, family.tokenizer()
    variants = cache.cut_variants, cache.text_variants
    if isinstance(images, StreamedImages):
        samples = list(first_streamed(images, batches, STREAMED_SAMPLES))
        draw_sheet(samples, images.plan.sizes, options.image, batches.seed, variants, sheet)
        lines = examine_stream(images, samples, tokenize.num_tokens, tokenize.max_tokens)
        return "\n".join(["data", *lines, f"  seen by the model: {sheet}"])
    texts = preparation.texts(images)
    cache_bytes = preparation.cache_bytes(family, images, len(texts))
    counts = tokenize.num_tokens(texts)
    found = examine(images, batches, texts, counts, tokenize.max_tokens, cache_bytes, cache.folder)
    samples = first_seen(images, batches, SHEET_TILES)
    draw_sheet(samples, images.plan.sizes, options.image, batches.seed, variants, sheet)
    write_json(report, found.record())
    return "\n".join(["data", *found.lines(), f"  seen by the model: {sheet}; all of this: {report}"])


def open_records(options: Options, accelerator: "Accelerator", folder: OutputFolder) -> None:
    """Writes what the run was made with, and opens the trackers."""
    record = as_record(options)
    if accelerator.is_main_process:
        folder.record(record, versions(), without_secrets(sys.argv))
    start_trackers(accelerator, options.tracking, record)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def data_name(options: Options) -> str:
    """What the model card calls the data."""
    source = options.source
    return source.dataset_name or Path(source.train_data_dir or options.data.dataset_file).name


def publish(
    options: Options, folder: OutputFolder, family: Family, samples: list[Sample], total_steps: int, global_batch: int
) -> None:
    """Writes the model card and uploads the result, where that was asked for."""
    if not options.hub.push_to_hub:
        return
    repository = options.hub.hub_model_id or folder.path.resolve().name
    facts = CardFacts(
        base_model=options.model.pretrained_model_name_or_path,
        data=data_name(options),
        is_lora=options.adaptation.adaptation == "lora",
        settings=[
            ("optimizer steps", total_steps),
            ("global batch", global_batch),
            ("learning rate", options.optimizer.learning_rate),
            ("resolution", options.image.resolution or family.default_resolution),
            ("mixed precision", options.runtime.mixed_precision or "as launched"),
            ("seed", options.runtime.seed),
        ],
    )
    write_card(folder.path, repository, facts, samples)
    upload(folder.path, repository, options.hub)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; gives its exit status."""
    return run_script(run, argv)


if __name__ == "__main__":
    leave(main())
