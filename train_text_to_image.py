#!/usr/bin/env python
"""Fine-tunes Stable Diffusion 1.x, 2.x or SDXL on images with captions, whole or by LoRA.

accelerate launch train_text_to_image.py --pretrained_model ... --train_data_dir ... --output_dir ...
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.adaptation import ADAPTATIONS, AdaptationOptions
from utils.background import BackgroundWriter
from utils.checkpoint import CheckpointOptions, Checkpoints, RunFacts, check_structure, check_training
from utils.checks import check_cache, check_held_out, check_masks, check_optimizer, check_stepping, check_token
from utils.course import Course, Feed, Settings, Validation, choose_length
from utils.data.buckets import BucketOptions
from utils.data.cache import CacheOptions
from utils.data.captions import CaptionOptions
from utils.data.dataset import LoaderOptions, SampleSpec, TrainingDataset, Waiting, batches_by_step
from utils.data.images import ImageOptions
from utils.data.sampler import GlobalBatches
from utils.data.selection import HeldOutOptions, PlannedImages, SelectionOptions
from utils.data.sources import DataOptions, SourceOptions, source_entries
from utils.data.stream import StreamedBatches
from utils.doctor import examine_data
from utils.ema import EmaOptions, MovingAverage
from utils.ema_lengths import AverageLengths
from utils.encoding import Encoder
from utils.engines import engine_of
from utils.export import CardFacts, HubOptions, upload, write_card
from utils.families.registry import pick_family
from utils.families.source import ModelOptions, PipelineSource
from utils.families.text import TextFamily
from utils.gradients import FREE_CURE, setting
from utils.held_out import EarlyStoppingOptions, HeldOut, History
from utils.length import LengthOptions
from utils.losses import LossOptions
from utils.metrics.features import FeatureOptions
from utils.noise import ForwardProcess, NoiseDraws, NoiseOptions, timestep_weights
from utils.objective import Objective
from utils.optim import OptimizerOptions, ScheduleOptions, rate_factor, set_learning_rate
from utils.options import UserError, as_record, leave, parse, run_script
from utils.perceptual import PerceptualOptions
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
)
from utils.sampling_controls import SamplingControlOptions, SamplingControls
from utils.seeding import model_seed
from utils.starting import (
    choose_group_size,
    claim,
    describe_run,
    loss_terms,
    make_gradients,
    make_optimizer,
    open_records,
    own_parameters,
    samples_at_once,
    training_options,
    warn_of_length,
)
from utils.state import CheckpointSaver, RunState, evaluating
from utils.stopping import StopRequests
from utils.terms import TermOptions
from utils.tracking import RunLog, Sample, TrackingOptions
from utils.training_evaluation import EvaluationOptions, TrainingEvaluation
from utils.validation import Sampler, ValidationOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("utils.train_text_to_image")


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
    evaluation: EvaluationOptions
    features: FeatureOptions
    controls: SamplingControlOptions

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
    seed, pure_bf16 = options.runtime.seed, options.adaptation.pure_bf16
    folder = OutputFolder(options.runtime.output_dir or default_output_dir(options, family_class))
    accelerator = start_processes(
        options.runtime,
        options.loader.gradient_accumulation_steps,
        options.tracking.trackers,
        folder.path,
        options.tracking.logging_dir,
    )
    check_stepping(options.optimizer, options.tracking, pure_bf16, accelerator)
    engine = engine_of(accelerator)
    engine.check_options(as_record(options), options.optimizer.name)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    global_batch = options.loader.global_batch(num_processes)
    engine.check_batch(global_batch)
    requests = StopRequests(folder.path, options.length.seconds)
    with ending(accelerator, folder, options.runtime.peer_timeout), requests.listening():
        checkpoints = Checkpoints(folder.path, options.checkpoint.checkpoints_total_limit)
        asked_start = options.checkpoint.resume_from_checkpoint
        start = on_main_process(accelerator, lambda: checkpoints.resolve(asked_start))
        group_size = choose_group_size(options.buckets, options.loader, global_batch, start)
        structure = options.structure | {"pretrained_model": family_class.pipeline_class_name}
        structure["bucket_group_size"] = group_size if options.buckets.use_aspect_ratio_buckets else None
        training = training_options(options, accelerator, global_batch)
        if start is not None:
            check_structure(start, structure)
            check_training(start, training, options.checkpoint.allow_changed_options)
        if not options.runtime.dry_run:
            overwrite = options.runtime.overwrite_output_dir
            on_main_process(accelerator, lambda: claim(folder, checkpoints, start, options.checkpoint, overwrite))
            on_main_process(accelerator, requests.remove_files)
        preparation = prepare_data(options, accelerator, folder, requests)
        images = preparation.choose_images(resolution, group_size)
        held_out_images = preparation.choose_held_out(resolution)
        batches = images.batches(global_batch, group_size, seed)
        total_steps = options.length.max_train_steps or batches.steps_in(options.length.num_train_epochs)
        rates = options.optimizer.scaled(batches.size)
        factor = rate_factor(options.schedule, rates.learning_rate, total_steps)
        data = {"data": images.fingerprint(), **images.describe_sources()}
        facts = RunFacts(structure, training | data, total_steps)
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
        terms = loss_terms(options.perceptual, options.term, family.latent_space, process.num_timesteps)
        named = adaptation.named_parameters(rates)
        own = own_parameters(options.term, terms, rates, rates.learning_rate / options.optimizer.learning_rate)
        model_name = f"{options.model.pretrained_model_name_or_path} ({family.pipeline_class_name})"
        counts = images, held_out_images, batches, total_steps
        learning = options.loader, rates, options.schedule
        plan = describe_run(
            model_name, options.adaptation.adaptation, adaptation.modules, accelerator, *counts, *learning
        )
        if options.runtime.dry_run:
            if accelerator.is_main_process:
                print(plan)
                print(examine_data(preparation, family, images, batches, folder.path))
            return

        for part in (family, *terms):
            part.to(accelerator.device)
        if options.model.gradient_checkpointing or engine.checkpoints_activations:
            family.use_gradient_checkpointing(options.adaptation.train_text_encoder, vae=bool(terms))
        num_workers = options.loader.num_workers(num_processes)
        requests.check()
        held_out = measure_on(options, accelerator, family, held_out_images, requests)
        encodings = preparation.fill_cache(family, images, num_workers, keep_vae=bool(terms))
        if options.cache.cache_only or options.cache.verify_cache:
            preparation.write_report(images)
            return
        encoder = Encoder(family, options.adaptation.train_text_encoder)
        objective = Objective(family, adaptation.modules, process, options.noise, options.loss, terms)
        optimizer = make_optimizer(named + own, rates, pure_bf16, seed)
        model, optimizer = engine.prepare(objective, optimizer, rates.clip_norm)
        named = adaptation.named_parameters(rates)  # an engine that spreads weights puts others in their place
        average = MovingAverage([each.parameter for each in named], options.ema) if options.ema.use_ema else None
        lengths = AverageLengths(named, options.ema, folder.path) if options.ema.ema_lengths else None
        state = RunState(engine, adaptation, average, lengths, optimizer, named, own, terms, facts)
        first_step = 0 if start is None else state.load(start)
        history = History(folder.path, first_step, options.stopping)
        validation = Validation(held_out, history, objective, state, folder)
        if first_step in (0, total_steps) or is_validation_due(options, family, batches, first_step):
            validation.begin(first_step, requests)
        total_steps = first_step if history.is_over() else total_steps

        spec = SampleSpec(
            family.latent_space.shape, family.tokenizer(), options.cache.cut_variants, options.cache.text_variants
        )
        draws = NoiseDraws(options.noise, process, seed, batches.size)
        dataset = TrainingDataset(images, batches, spec, options.image, draws, encodings)
        at_once = samples_at_once(options.buckets, options.loader, group_size)
        pieces = images.pieces(batches, at_once, rank, num_processes, first_step, total_steps)
        waiting, controls = Waiting(), SamplingControls(options.controls)
        loader = batches_by_step(
            dataset, pieces, num_workers, options.loader.dataloader_timeout, accelerator.device.type == "cuda", waiting
        )
        sampler = Sampler(accelerator, family, options.validation, folder.path, resolution, seed, requests, controls)
        evaluation = TrainingEvaluation(
            *(options.evaluation, options.features, accelerator, folder.path, seed),
            *(options.validation.prompts, first_step, controls),
        )
        evaluation.check(family.pipeline)
        open_records(options, accelerator, folder, options.tracking)
        logger.info("training\n%s", plan)
        steps_in_backward, saving = rates.optimizer_in_backward, memory_savers(options)
        gradients = make_gradients(
            engine, model, encoder, pieces, options.loader, at_once, start, seed, steps_in_backward, saving
        )
        adaptation.train_mode()
        gradients.rehearse(dataset.largest(at_once, options.perceptual.perceptual_min_timestep))
        if options.loader.find_batch_size:
            groups = f" --bucket_group_size {group_size}" if options.buckets.use_aspect_ratio_buckets else ""
            logger.info("--find_batch_size: keep %s%s", setting(gradients.size, gradients.num_samples), groups)

        preparation.write_report(images)
        saver = CheckpointSaver(checkpoints, state, BackgroundWriter(options.checkpoint.async_checkpointing))
        gradients.rescue = saver.rescue
        log = RunLog(accelerator, folder.path, first_step, total_steps, batches.size)
        feed = Feed(preparation, images, batches, waiting)
        settings = Settings(rates, options.schedule, options.ema, options.checkpoint, options.tracking, at_once)
        course = Course(state, validation, gradients, saver, checkpoints, log, requests, feed, settings, total_steps)
        with saver.writer, log:
            for step, micro_batches in loader:
                done, rate_now = step + 1, course.rate_now(factor(step))
                set_learning_rate(optimizer, rate_now)
                found = gradients.add_up(step, micro_batches)
                log.layers(((name, parameter) for name, parameter, _ in named), done, options.tracking)
                grad_norm = state.clip(rates.clip_norm)
                state.step(grad_norm)
                course.record(done, found, grad_norm, rate_now)
                is_due = done == course.total_steps or is_validation_due(options, family, batches, done)
                if is_due:
                    course.measure(done)
                if evaluation.is_due(done, course.total_steps):
                    with log.paused(), evaluating(adaptation, average, optimizer), family.awake():
                        log.values(evaluation.scores(family, done, resolution), done)
                course.save(done)
                if done == course.total_steps:
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
        log.images(samples, course.total_steps, "test")
        course.share_unreadable()
        preparation.write_report(images)
        if accelerator.is_main_process:
            publish(options, folder, family, samples, course.total_steps, batches.size)
        logger.info("the result is in %s", folder.path)


def memory_savers(options: Options) -> dict[str, bool]:
    """Flags that save memory, in the order to try them, and whether they are given."""
    return {
        FREE_CURE: options.model.gradient_checkpointing,
        "--cache_latents --cache_text_embeddings": options.cache.cache_latents and options.cache.cache_text_embeddings,
        "--use_8bit_adam": options.optimizer.name != "adamw",
        "--adaptation lora": options.adaptation.adaptation != "full",
        "--quantize_base nf4": options.adaptation.adaptation != "lora" or options.adaptation.quantize_base is not None,
    }


def measure_on(
    options: Options,
    accelerator: "Accelerator",
    family: TextFamily,
    images: PlannedImages | None,
    requests: StopRequests,
) -> HeldOut | None:
    """The held-out images, encoded."""
    if images is None:
        return None
    text_encoders_train = options.adaptation.train_text_encoder
    seed = options.runtime.seed
    return HeldOut(accelerator, family, images, options.stopping, options.image, seed, text_encoders_train, requests)


def check_together(options: Options) -> None:
    """Refuses options that don't go together, and warns of those that have no effect."""
    entries = source_entries(options.data, options.source, options.captions)
    if options.model.unet_config is not None and options.adaptation.adaptation != "full":
        raise UserError("--unet_config trains a fresh UNet, which adapters would leave random; leave one out")
    text_rates = (options.optimizer.text_encoder_lr, options.optimizer.text_encoder_2_lr)
    if any(rate is not None for rate in text_rates) and not options.adaptation.train_text_encoder:
        raise UserError("--text_encoder_lr goes with --train_text_encoder; give both or neither")
    check_token(options.hub, options.tracking)
    if options.optimizer.optimizer_in_backward and options.loader.global_batch_size is not None:
        raise UserError("--optimizer_in_backward steps after each batch; leave out --global_batch_size")
    if options.evaluation.eval_metrics and options.model.sampling_cpu_offload:
        raise UserError("--eval_metrics draws with the whole pipeline on the device; leave out --sampling_cpu_offload")
    check_optimizer(options.optimizer, options.schedule, options.term.loss_module_lr)
    check_masks(options.loss, entries)
    check_held_out(options.held_out, options.data, options.stopping, options.schedule, options.ema)
    check_cache(options.cache, options.data, options.image, options.captions)
    if options.cache.cache_text_embeddings and options.adaptation.train_text_encoder:
        raise UserError(
            "--cache_text_embeddings would keep text states that --train_text_encoder changes; leave one out"
        )
    if options.adaptation.train_text_encoder and options.model.clip_skip and options.adaptation.adaptation == "full":
        logger.warning("--clip_skip %d: the layers left out stay as they are", options.model.clip_skip)


def check_before_loading(
    options: Options, source: PipelineSource, family_class: type[TextFamily], sizes: Sequence[tuple[int, int]]
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


def default_output_dir(options: Options, family_class: type[TextFamily]) -> str:
    """The diffusers examples' output folder for this family and adaptation."""
    adaptation = options.adaptation.adaptation
    return family_class.default_output_dir if adaptation == "full" else f"sd-model-finetuned-{adaptation}"


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


def is_validation_due(
    options: Options, family: TextFamily, batches: GlobalBatches | StreamedBatches, done: int
) -> bool:
    """Whether samples are drawn after optimizer step number `done`, from 1."""
    default_epochs = 1 if options.adaptation.adaptation != "full" else family.default_validation_epochs
    before, after = batches.epochs_before(done - 1), batches.epochs_before(done)
    return options.validation.is_due(done, before, after, default_epochs)


def data_name(options: Options) -> str:
    """What the model card calls the data."""
    source = options.source
    return source.dataset_name or Path(source.train_data_dir or options.data.dataset_file).name


def publish(
    options: Options,
    folder: OutputFolder,
    family: TextFamily,
    samples: list[Sample],
    total_steps: int,
    global_batch: int,
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
