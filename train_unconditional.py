#!/usr/bin/env python
"""Trains a diffusion model that draws without words: from scratch or fine-tuned, in pixels or latents, of classes too.

accelerate launch train_unconditional.py --train_data_dir ... --output_dir ...
"""

import sys

from utils.config import first_checks as prelude

if __name__ == "__main__":
    prelude.start(sys.argv[1:])

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from utils.config.options import UserError, leave, option, parse, run_script
from utils.config.seeding import model_seed
from utils.config.terminal import Lines, print_line, set_up_logging
from utils.config.training_length import LengthOptions
from utils.data.buckets import BucketOptions
from utils.data.cache import CacheOptions
from utils.data.class_folders import describe_counts, same_text, warn_of_twins
from utils.data.class_labels import LabelledSource, LabelOptions, count_classes, in_order
from utils.data.folders import ALL_SPLIT_WORDS
from utils.data.loader import LoaderOptions, SampleSpec, TrainingDataset, Waiting, batches_by_step
from utils.data.pixels import PixelOptions
from utils.data.plan import HeldOutOptions, PlannedImages, SelectionOptions
from utils.data.sources import DataOptions, source_entries
from utils.diffusion.losses import LossOptions
from utils.diffusion.noise import NoiseDraws
from utils.diffusion.process import ProcessOptions, process_of
from utils.evaluation.metrics.features import FeatureOptions
from utils.evaluation.references import trained_images
from utils.evaluation.while_training import EvaluationOptions, TrainingEvaluation
from utils.models.attention import Attention
from utils.models.latent_scaling import known_scaling, measured_scaling, remember_scaling
from utils.models.loading import LoadingOptions, allowing_missing
from utils.models.loss_terms import TermOptions
from utils.models.perceptual_loss import PerceptualOptions
from utils.models.unconditional import (
    UnconditionalFamily,
    UnconditionalModelOptions,
    Wanted,
    default_edge,
    fresh_scheduler,
    pick_unconditional,
)
from utils.runtime.processes import (
    OutputFolder,
    RuntimeOptions,
    ending,
    on_main_process,
    use_hub_cache_if_offline,
    weight_dtype,
)
from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControlOptions, SamplingControls
from utils.sampling.grid_samples import GridSampler, SamplingOptions
from utils.training.adaptation import FullFineTuning, TrainedOptions
from utils.training.backward import FREE_CURE, setting
from utils.training.bf16_weights import HalfCopy
from utils.training.checkpoint import CheckpointOptions, step_of
from utils.training.compatibility import check_cache, check_held_out, check_masks, check_optimizer, check_token
from utils.training.course import Feed, Settings, Validation, start_course
from utils.training.disk_use import describe_disk, disk_use
from utils.training.dry_run import examine_data
from utils.training.ema import EmaOptions
from utils.training.encoding import Encoder
from utils.training.log import TRACKERS, TrackingOptions
from utils.training.model_card import CardFacts, HubOptions, publish
from utils.training.objective import Objective
from utils.training.optimizers import SCHEDULES, OptimizerOptions, ScheduleOptions, rate_factor, set_learning_rate
from utils.training.resume import begin
from utils.training.speed import SpeedOptions
from utils.training.starting import (
    card_settings,
    data_name,
    describe_run,
    hasten,
    loss_terms,
    make_gradients,
    make_state,
    measure_on,
    open_records,
    open_repository,
    own_parameters,
    prepare_data,
    samples_at_once,
    start_engine,
    with_fast,
)
from utils.training.validation_loss import EarlyStoppingOptions, History

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("utils.train_unconditional")
# the docstring's first line, which python -OO leaves out
PURPOSE = (
    "Trains a diffusion model that draws without words: "
    "from scratch or fine-tuned, in pixels or latents, of classes too."
)
OWN_NAMES = {"caption_column": "label_column"}  # flags that the shared parts call otherwise
IMAGE_LEFT = 0.15  # a schedule that ends with more of it begins its samples where it never was


@dataclass(frozen=True)
class Length(LengthOptions):
    num_train_epochs: int = option(100, "passes over the data", aliases=["--num_epochs"])


@dataclass(frozen=True)
class Optimizer(OptimizerOptions):
    adam_beta1: float = option(0.95, "decay of the mean gradient")
    adam_weight_decay: float = option(1e-6, "decoupled weight decay, of all but biases and norms")


@dataclass(frozen=True)
class Schedule(ScheduleOptions):
    lr_scheduler: str = option("cosine", "course of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int | None = option(
        None, "optimizer steps over which the rate rises from 0; by default a tenth of the run, at most 500"
    )


@dataclass(frozen=True)
class Averages(EmaOptions):
    ema_decay: float = option(0.9999, "the largest decay of the average", aliases=["--ema_max_decay"])
    use_ema_warmup: bool = option(True, "let the decay rise as 1 - (1 + n / inv_gamma)^-power up to it")


@dataclass(frozen=True)
class Tracking(TrackingOptions):
    report_to: str = option(
        "tensorboard", "where metrics and samples go", choices=(*TRACKERS, "all", "none"), aliases=["--logger"]
    )
    tracker_project_name: str = option("train_unconditional", "name of the project in the trackers", is_text=True)


@dataclass(frozen=True)
class Evaluation(EvaluationOptions):
    needs_reference: ClassVar[bool] = False

    eval_reference: str | None = option(
        None,
        "real images to compare with: a folder, a dataset, or statistics in an .npz file; by default those trained on, "
        "cut in the middle",
    )
    eval_num_inference_steps: int | None = option(None, "denoising steps; by default --num_inference_steps")

    def with_steps(self, steps: int) -> "Evaluation":
        """The same, of so many denoising steps where none were named."""
        return replace(self, eval_num_inference_steps=self.eval_num_inference_steps or steps)


@dataclass(frozen=True)
class Options:
    """All options of this script, by group."""

    model: UnconditionalModelOptions
    loading: LoadingOptions
    trained: TrainedOptions
    data: DataOptions
    source: LabelledSource
    labels: LabelOptions
    selection: SelectionOptions
    image: PixelOptions
    buckets: BucketOptions
    cache: CacheOptions
    loader: LoaderOptions
    length: Length
    optimizer: Optimizer
    schedule: Schedule
    loss: LossOptions
    perceptual: PerceptualOptions
    term: TermOptions
    noise: ProcessOptions
    ema: Averages
    held_out: HeldOutOptions
    sampling: SamplingOptions
    stopping: EarlyStoppingOptions
    checkpoint: CheckpointOptions
    runtime: RuntimeOptions
    speed: SpeedOptions
    tracking: Tracking
    hub: HubOptions
    evaluation: Evaluation
    features: FeatureOptions
    controls: SamplingControlOptions

    @property
    def structure(self) -> dict[str, object]:
        """What a checkpoint can only be resumed with, by flag."""
        term = None if self.term.loss_module is None else Path(self.term.loss_module).name
        shared = {"seed": self.runtime.seed, "optimizer": self.optimizer.name, "loss_module": term}
        return shared | self.trained.structure | self.model.structure


def run(argv: Sequence[str] | None) -> None:
    """Trains; every step of the way in its order."""
    set_up_logging()
    options: Options = parse(Options, argv, PURPOSE)
    check_together(options)
    model_options = options.model
    names = (model_options.pretrained_model_name_or_path, model_options.vae, options.source.dataset_name)
    if not all(name is None or Path(name).exists() for name in names):
        use_hub_cache_if_offline()
    family_class = pick_unconditional(model_options, options.labels.class_conditional, options.sampling.sampler)
    check_family(options, family_class)
    resolution = options.image.resolution or default_edge(model_options, family_class)
    seed, pure_bf16 = options.runtime.seed, options.trained.pure_bf16
    folder = OutputFolder(options.runtime.output_dir or family_class.default_output_dir)
    engine = start_engine(options, folder, pure_bf16)
    accelerator = engine.accelerator
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    requests = StopRequests(folder.path, options.length.seconds)
    attention, allowed = Attention(options.speed.attention_backend), allowing_missing(options.loading)
    with ending(accelerator, folder, options.runtime.peer_timeout), requests.listening(), attention, allowed:
        beginning = begin(options, engine, folder, requests, family_class.pipeline_class_name)
        start, group_size = beginning.start, beginning.group_size
        repository = open_repository(options, accelerator, folder)
        captions, by_content = options.labels.captions(options.source, beginning.classes), beginning.splits_by_content
        preparation = prepare_data(options, captions, accelerator, folder, requests, by_content)
        logger.info("listing the images of %s", data_name(options))
        images = preparation.choose_images(resolution, group_size)
        held_out_images = preparation.choose_held_out(resolution)
        class_counts = count_classes(images.records) if options.labels.class_conditional else Counter()
        classes = beginning.class_order(class_names(options, images, class_counts))
        beginning = beginning.having(classes=classes)
        batches = images.batches(options.loader.global_batch(num_processes), group_size, seed)
        total_steps = options.length.max_train_steps or batches.steps_in(options.length.num_train_epochs)
        rates = options.optimizer.scaled(batches.size)
        schedule = beginning.schedule(options.schedule, total_steps)
        factor = rate_factor(schedule, rates.learning_rate, total_steps)
        facts = beginning.facts(images, held_out_images, schedule, total_steps)

        options, fast_parts = with_fast(options, engine, not pure_bf16, images)
        torch.manual_seed(model_seed(seed, 0, 0))  # a fresh denoiser's first weights
        dtypes = FullFineTuning.dtypes(options.trained, weight_dtype(accelerator))
        wanted = Wanted(resolution, options.image.channels, tuple(classes), images.plan.sizes == [(resolution,) * 2])
        logger.info("loading the model, %s", model_options.origin)
        family = family_class(
            model_options, options.noise, wanted, dtypes.unet, dtypes.frozen, options.sampling.sampler
        )
        if family.added_classes:
            beginning = beginning.having(class_numbers=family.added_classes)
        adaptation = FullFineTuning(family, options.trained, start)
        family.use_attention()
        family.save_memory()
        if options.speed.channels_last:
            family.use_channels_last(vae=not options.cache.cache_latents)
        requests.check()
        process = process_of(options.noise, family.pipeline.scheduler)
        options.sampling.steps_of(family.pipeline.scheduler)
        terms = loss_terms(options.perceptual, options.term, family.latent_space, process.num_timesteps)
        adaptation.named_parameters(rates)  # which refuses --layer_rates of no weight, on a dry run too
        own = own_parameters(options.term, terms, rates, rates.learning_rate / options.optimizer.learning_rate)
        model_name = f"{model_options.origin} ({type(family.pipeline).__name__}, {family.latent_space.describe()})"
        how = describe_counts(classes, class_counts) if classes else "no classes"
        counts = images, held_out_images, batches, total_steps
        learning = options.loader, rates, schedule
        plan = describe_run(model_name, how, adaptation.modules, process.describe(), accelerator, *counts, *learning)
        steps = range(0 if start is None else step_of(start) or 0, total_steps)
        use = disk_use(adaptation, rates.name, options.ema, options.checkpoint, steps)
        plan += describe_disk(use, folder.path, options.checkpoint)
        if options.runtime.dry_run:
            if accelerator.is_main_process:
                print_line(plan)
                print_line(examine_data(preparation, family, images, batches, folder.path))
            return

        logger.info("moving the model to %s", accelerator.device)
        for part in (family, *terms):
            part.to(accelerator.device)
        if family.measures_scaling:
            settle_scaling(options, accelerator, family, images, start, folder)
        if model_options.gradient_checkpointing or engine.checkpoints_activations:
            family.use_gradient_checkpointing(text_encoders=False, vae=bool(terms) and bool(family.coder_names))
        num_workers = options.loader.num_workers(num_processes)
        requests.check()
        held_out = measure_on(options, accelerator, family, held_out_images, False, requests)
        encodings = preparation.fill_cache(family, images, num_workers, keep_vae=bool(terms))
        if options.cache.cache_only or options.cache.verify_cache:
            preparation.write_report(images)
            return
        encoder = Encoder(family, text_encoders_train=False)
        objective = Objective(family, adaptation.modules, process, options.noise, options.loss, terms)
        how = rates, options.ema, folder, facts, seed, attention
        model, state = make_state(engine, adaptation, objective, own, *how)
        first_step = 0 if start is None else state.load(start)
        history = History(folder.path, first_step, options.stopping)
        validation = Validation(held_out, history, objective, state, folder)
        ended = batches.epochs_before(first_step - 1) if first_step else 0, batches.epochs_before(first_step)
        if first_step in (0, total_steps) or options.sampling.is_due(first_step, *ended):
            validation.begin(first_step, requests)
        total_steps = first_step if history.is_over() else total_steps

        spec = SampleSpec(family.latent_space.shape, family.tokenizer(), options.cache.cut_variants)
        draws = NoiseDraws(options.noise, process, seed, batches.size, family.latent_space.has_posterior)
        dataset = TrainingDataset(images, batches, spec, options.image, draws, encodings)
        at_once = samples_at_once(options.buckets, options.loader, group_size)
        pieces = images.pieces(batches, at_once, rank, num_processes, first_step, total_steps)
        waiting, controls = Waiting(), SamplingControls(options.controls)
        loader = batches_by_step(
            dataset, pieces, num_workers, options.loader.dataloader_timeout, accelerator.device.type == "cuda", waiting
        )
        sampler = GridSampler(accelerator, family, options.sampling, folder.path, seed, requests, controls)
        trained_on = None if options.data.streaming else trained_images(images, options.image)
        scores = options.evaluation.with_steps(options.sampling.steps_of(family.pipeline.scheduler))
        evaluation = TrainingEvaluation(
            *(scores, options.features, accelerator, folder.path, seed, None, controls, trained_on)
        )
        evaluation.check(family.pipeline)
        beginning.take_over()
        sampler.begin(first_step)
        evaluation.begin(first_step)
        open_records(options, accelerator, folder, options.tracking)
        logger.info("training\n%s", Lines(plan))
        half = HalfCopy(family.unet, state.optimizer) if options.speed.bf16_weights else None
        steps_in_backward, saving = rates.optimizer_in_backward, memory_savers(options)
        gradients = make_gradients(
            engine, model, encoder, pieces, options.loader, at_once, start, seed, steps_in_backward, saving, half
        )
        adaptation.train_mode()
        largest = dataset.largest(at_once, options.perceptual.perceptual_min_timestep)
        logger.info("running the largest batch once, to see that it fits")
        gradients.rehearse(largest, state.holding_optimizer_state)
        draw_batch, sizes_vary = partial(dataset.with_draws, largest), len(images.plan.sizes) > 1
        hasten(options, gradients, family.unet, state, num_workers, draw_batch, sizes_vary, fast_parts)
        if options.loader.find_batch_size:
            groups = f" --bucket_group_size {group_size}" if options.buckets.use_aspect_ratio_buckets else ""
            logger.info("--find_batch_size: keep %s%s", setting(gradients.size, gradients.num_samples), groups)

        preparation.write_report(images)
        feed = Feed(preparation, images, batches, waiting)
        settings = Settings(rates, schedule, options.ema, options.checkpoint, options.tracking, at_once)
        course = start_course(state, validation, gradients, requests, feed, settings, first_step, total_steps)
        log = course.log
        with course.saver.writer, log:
            for step, micro_batches in loader:
                done, rate_now = step + 1, course.rate_now(factor(step))
                set_learning_rate(state.optimizer, rate_now)
                found = gradients.add_up(step, micro_batches)
                log.layers(((name, parameter) for name, parameter, _ in state.parameters), done, options.tracking)
                grad_norm = state.clip(rates.clip_norm)
                state.step(grad_norm)
                course.record(done, found, grad_norm, rate_now)
                ended = batches.epochs_before(step), batches.epochs_before(done)
                is_due = done == course.total_steps or options.sampling.is_due(done, *ended)
                if is_due:
                    course.measure(done)
                if evaluation.is_due(done, course.total_steps):
                    with log.paused(), state.evaluating(), family.awake():
                        log.values(evaluation.scores(family, done), done)
                course.save(done)
                if done == course.total_steps:
                    break
                is_model_due = options.sampling.is_model_due(*ended)
                if not (is_due or is_model_due):
                    continue
                with log.paused(), state.evaluating():
                    if is_due:
                        log.images(sampler.draw(done), done, "test_samples")
                    if is_model_due:
                        state.export(folder.path)

        course.saver.join()
        with course.ended():
            verdict = course.verdict()
            logger.info("writing the result to %s", folder.path)
            state.export(folder.path)
            samples = sampler.draw(course.total_steps, is_last=True)
        if requests.is_asked:
            logger.warning("a signal broke off the last samples; the result itself is whole")
        log.images(samples, course.total_steps, "test_samples")
        course.share_unreadable()
        preparation.write_report(images)
        if accelerator.is_main_process:
            table = card_settings(options, course.total_steps, batches.size, resolution)
            publish(folder.path, repository, options.hub, card_facts(options, family, table, verdict), samples)
        course.conclude(verdict)


def check_together(options: Options) -> None:
    """Refuses options that don't go together, and warns of those that have no effect."""
    captions = options.labels.captions(options.source)
    entries = source_entries(options.data, options.source, captions)
    check_token(options.hub, options.tracking)
    if options.optimizer.optimizer_in_backward and options.loader.global_batch_size is not None:
        raise UserError("--optimizer_in_backward steps after each batch; leave out --global_batch_size")
    check_optimizer(options.optimizer, options.schedule, options.term.loss_module_lr)
    check_masks(options.loss, entries)
    check_held_out(options.held_out, options.data, options.stopping, options.schedule, options.ema)
    check_cache(options.cache, options.data, options.image, captions)
    if options.cache.cache_text_embeddings:
        raise UserError("--cache_text_embeddings: there are no captions here; leave it out")
    if options.optimizer.text_encoder_lr is not None or options.optimizer.text_encoder_2_lr is not None:
        raise UserError("--text_encoder_lr: there are no text encoders here; leave it out")
    if options.labels.class_conditional and options.data.streaming:
        raise UserError("--class_conditional numbers all classes beforehand, which --streaming does not know")
    if options.source.caption_column is not None and not options.labels.class_conditional:
        raise UserError("--label_column goes with --class_conditional; give both or neither")
    if options.sampling.guidance_scale > 1 and not options.labels.class_conditional:
        raise UserError("--guidance_scale goes with --class_conditional; give both or neither")


def check_family(options: Options, family_class: type[UnconditionalFamily]) -> None:
    """Refuses what a model in pixels, or one of latents, can't do, before data and weights are read."""
    if options.model.pretrained_model_name_or_path is None:
        edge = options.image.resolution or family_class.default_resolution
        family_class.check_shape(options.model, Wanted(edge, options.image.channels))
        scheduler = fresh_scheduler(options.noise, clips=True)
        left = float(process_of(options.noise, scheduler).alphas_cumprod[-1]) ** 0.5
        if left > IMAGE_LEFT:
            logger.warning(
                "the noise schedule ends with %.0f %% of the image, samples begin with none; try more "
                "--ddpm_num_steps, or --beta_schedule cosine",
                100 * left,
            )
        options.sampling.steps_of(scheduler)
    if options.perceptual.perceptual_weight is not None and options.image.image_channels != 3:
        raise UserError("--perceptual_weight compares colours, so --image_channels must be 3; leave one out")
    if family_class.coder_names:
        return
    asked = {
        "--cache_latents": options.cache.cache_latents,
        "--vae_slicing": options.model.vae_slicing,
        "--vae_tiling": options.model.vae_tiling,
    }
    flag = next((flag for flag, is_given in asked.items() if is_given), None)
    if flag is not None:
        raise UserError(f"{flag} is of the latents of a VAE, and this model has none; leave it out, or give --vae")


def memory_savers(options: Options) -> dict[str, bool]:
    """Flags that save memory, in the order to try them, and whether they are given."""
    return {
        FREE_CURE: options.model.gradient_checkpointing,
        "--cache_latents": options.model.vae is None or options.cache.cache_latents,
        "--use_8bit_adam": options.optimizer.name != "adamw",
    }


def class_names(options: Options, images: PlannedImages, counts: Mapping[str, int]) -> list[str]:
    """The names of the classes, in the order of their numbers; none without classes.

    Args:
        counts: how many images have each.

    Raises:
        UserError: if there are fewer than two.
    """
    if not options.labels.class_conditional:
        return []
    orders = [tuple(map(same_text, source.table.classes)) for source in images.records.sources]
    names = in_order(list(counts), orders)
    if len(names) < 2:
        found = f"one, {names[0]}" if names else "none"
        split = images.records.key(0).split("/")[0] if len(images.records) else ""
        is_split = split.lower() in ALL_SPLIT_WORDS and options.source.caption_column is None
        taken = f", as the folder {split} is taken for a split" if is_split else ""
        raise UserError(
            f"--class_conditional needs at least two classes, got {found}{taken}; put images into a folder for each, "
            "or name a --label_column"
        )
    warn_of_twins(names)
    return names


def settle_scaling(
    options: Options,
    accelerator: "Accelerator",
    family: UnconditionalFamily,
    images: PlannedImages,
    start: Path | None,
    folder: OutputFolder,
) -> None:
    """Scales latents whose VAE says no scaling by what was measured on the data, in this run or before."""

    def settle() -> float:
        known = None if start is None else known_scaling(start.parent)
        factor = known or measured_scaling(family, images, options.image, accelerator.device, options.runtime.seed)
        remember_scaling(folder.path, factor)
        return factor

    family.rescale(on_main_process(accelerator, settle))


def card_facts(
    options: Options, family: UnconditionalFamily, settings: Sequence[tuple[str, object]], verdict: str
) -> CardFacts:
    """What the model card says."""
    model, tag = options.model.pretrained_model_name_or_path, "unconditional-image-generation"
    return CardFacts(model, data_name(options), False, settings, family.example_call(), tag, verdict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; gives its exit status."""
    return run_script(run, argv, OWN_NAMES)


if __name__ == "__main__":
    leave(main())
