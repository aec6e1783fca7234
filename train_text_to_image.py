#!/usr/bin/env python
"""Fine-tunes Stable Diffusion 1.x, 2.x or SDXL on images with captions, whole or by LoRA.

accelerate launch train_text_to_image.py --pretrained_model ... --train_data_dir ... --output_dir ...
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.options import UserError, leave, parse, run_script
from utils.config.terminal import Lines, print_line, set_up_logging
from utils.data.captions import CaptionOptions
from utils.data.source_options import source_entries
from utils.diffusion.options import NoiseOptions
from utils.models.options import ModelOptions
from utils.runtime.stop_requests import StopRequests
from utils.sampling.options import ValidationOptions
from utils.training.compatibility import (
    announce_run,
    check_cache,
    check_held_out,
    check_masks,
    check_optimizer,
    check_token,
)
from utils.training.options import AdaptationOptions, TrainingOptions

if TYPE_CHECKING:
    from utils.data.order import GlobalBatches
    from utils.data.stream import StreamedBatches
    from utils.diffusion.noise import ForwardProcess
    from utils.models.pipeline_source import PipelineSource
    from utils.models.text_to_image import TextFamily
    from utils.training.model_card import CardFacts

logger = logging.getLogger("utils.train_text_to_image")
# the docstring's first line, which python -OO leaves out
PURPOSE = "Fine-tunes Stable Diffusion 1.x, 2.x or SDXL on images with captions, whole or by LoRA."


@dataclass(frozen=True)
class Options(TrainingOptions):
    """All options of this script: the shared groups, some of them narrowed here."""

    model: ModelOptions
    adaptation: AdaptationOptions
    captions: CaptionOptions
    samples: ValidationOptions


def run(argv: Sequence[str] | None) -> None:
    """Reads the options and refuses those that do not go together, then trains."""
    set_up_logging()
    options: Options = parse(Options, argv, PURPOSE)
    check_together(options)
    announce_run(options)
    train(options)


def train(options: Options) -> None:
    """Trains; every step of the way in its order."""
    # imported here, so that --help and errors of flags come before torch is loaded
    import torch

    from utils.config.seeding import model_seed
    from utils.data.loader import SampleSpec, TrainingDataset, Waiting, batches_by_step
    from utils.diffusion.noise import NoiseDraws
    from utils.evaluation.while_training import TrainingEvaluation
    from utils.models.attention import Attention
    from utils.models.loading import allowing_missing
    from utils.models.pipeline_source import PipelineSource
    from utils.models.registry import pick_family
    from utils.runtime.processes import OutputFolder, ending, use_hub_cache_if_offline, weight_dtype
    from utils.sampling.controls import SamplingControls
    from utils.sampling.prompt_samples import Sampler
    from utils.sampling.scheduler_trials import check_text_trial
    from utils.training.adaptation import ADAPTATIONS
    from utils.training.backward import setting
    from utils.training.bf16_weights import HalfCopy
    from utils.training.checkpoint import step_of
    from utils.training.course import Feed, Settings, Validation, start_course
    from utils.training.disk_use import describe_disk, disk_use
    from utils.training.dry_run import examine_data
    from utils.training.encoding import Encoder
    from utils.training.model_card import publish
    from utils.training.objective import Objective
    from utils.training.optimizers import rate_factor, set_learning_rate
    from utils.training.resume import begin
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
    from utils.training.validation_loss import History

    network = options.perceptual.perceptual_network
    names = (options.model.pretrained_model_name_or_path, options.source.dataset_name, network)
    if not all(name is None or Path(name).exists() for name in names):
        use_hub_cache_if_offline()
    source = PipelineSource(options.model)
    family_class = pick_family(source)
    resolution = options.image.resolution or family_class.default_resolution
    sizes = options.buckets.sizes(resolution)
    was_tried = check_before_loading(options, source, family_class, sizes)
    seed, pure_bf16 = options.runtime.seed, options.adaptation.pure_bf16
    folder = OutputFolder(options.runtime.output_dir or default_output_dir(options, family_class))
    engine = start_engine(options, folder, pure_bf16)
    accelerator = engine.accelerator
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    requests = StopRequests(folder.path, options.length.seconds)
    attention, allowed = Attention(options.speed.attention_backend), allowing_missing(options.loading)
    with ending(accelerator, folder, options.runtime.peer_timeout), requests.listening(), attention, allowed:
        beginning = begin(options, engine, folder, requests, family_class.pipeline_class_name)
        start, group_size = beginning.start, beginning.group_size
        repository = open_repository(options, accelerator, folder)
        by_content = beginning.splits_by_content
        preparation = prepare_data(options, options.captions, accelerator, folder, requests, by_content)
        logger.info("listing the images of %s", data_name(options))
        images = preparation.choose_images(resolution, group_size)
        held_out_images = preparation.choose_held_out(resolution)
        batches = images.batches(options.loader.global_batch(num_processes), group_size, seed)
        total_steps = options.length.max_train_steps or batches.steps_in(options.length.num_train_epochs)
        rates = options.optimizer.scaled(batches.size)
        schedule = beginning.schedule(options.schedule, total_steps)
        factor = rate_factor(schedule, rates.learning_rate, total_steps)
        facts = beginning.facts(images, held_out_images, schedule, total_steps)

        torch.manual_seed(model_seed(seed, 0, 0))  # LoRA's and a fresh UNet's first weights
        adaptation_class = ADAPTATIONS[options.adaptation.adaptation]
        trains_base = adaptation_class.trains_base and not pure_bf16
        options, fast_parts = with_fast(options, engine, trains_base, images)
        dtypes = adaptation_class.dtypes(options.adaptation, weight_dtype(accelerator))
        logger.info(
            "loading the %s of %s", family_class.pipeline_class_name, options.model.pretrained_model_name_or_path
        )
        family = family_class(source, dtypes, options.noise.scheduler_changes)
        family.check_sizes(images.plan.sizes, family.pipeline.vae.config)
        if options.adaptation.quantize_base is not None:
            family.quantize_unet(options.adaptation.quantize_base, accelerator.device)
        adaptation = adaptation_class(family, options.adaptation, start)
        family.use_attention()
        family.save_memory()
        if options.speed.channels_last:
            family.use_channels_last(vae=not options.cache.cache_latents)
        requests.check()
        process = forward_process(options.noise, family.pipeline.scheduler.config)
        if not was_tried:
            check_text_trial(family.pipeline.scheduler, *drawing(options, family.pipeline.scheduler.config))
        terms = loss_terms(options.perceptual, options.term, family.latent_space, process.num_timesteps)
        adaptation.named_parameters(rates)  # which refuses --layer_rates of no weight, on a dry run too
        own = own_parameters(options.term, terms, rates, rates.learning_rate / options.optimizer.learning_rate)
        model_name = f"{options.model.pretrained_model_name_or_path} ({family.pipeline_class_name})"
        counts = images, held_out_images, batches, total_steps
        learning = options.loader, rates, schedule
        plan = describe_run(
            *(model_name, options.adaptation.adaptation, adaptation.modules, process.describe(), accelerator),
            *(*counts, *learning),
        )
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
        if options.model.gradient_checkpointing or engine.checkpoints_activations:
            family.use_gradient_checkpointing(options.adaptation.train_text_encoder, vae=bool(terms))
        num_workers = options.loader.num_workers(num_processes)
        requests.check()
        held_out = measure_on(
            options, accelerator, family, held_out_images, options.adaptation.train_text_encoder, requests
        )
        encodings = preparation.fill_cache(family, images, num_workers, keep_vae=bool(terms))
        if options.cache.cache_only or options.cache.verify_cache:
            preparation.write_report(images)
            return
        encoder = Encoder(family, options.adaptation.train_text_encoder)
        objective = Objective(family, adaptation.modules, process, options.noise, options.loss, terms)
        how = rates, options.ema, folder, facts, seed, attention
        model, state = make_state(engine, adaptation, objective, own, *how)
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
        sampler = Sampler(accelerator, family, options.samples, folder.path, resolution, seed, requests, controls)
        evaluation = TrainingEvaluation(
            *(options.evaluation, options.features, accelerator, folder.path, seed),
            *(options.samples.prompts, controls),
        )
        evaluation.check(family.pipeline)
        beginning.take_over()
        evaluation.begin(first_step)
        open_records(options, accelerator, folder, options.tracking)
        logger.info("training\n%s", Lines(plan))
        half = None
        if options.speed.bf16_weights and adaptation.trains_base:
            half = HalfCopy(family.unet, state.optimizer)
        elif options.speed.bf16_weights:
            logger.info("--bf16_weights is left off: an adapter's weights are few, and the others are bfloat16 already")
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
                is_due = done == course.total_steps or is_validation_due(options, family, batches, done)
                if is_due:
                    course.measure(done)
                if evaluation.is_due(done, course.total_steps):
                    with log.paused(), state.evaluating(), family.awake():
                        log.values(evaluation.scores(family, done, resolution), done)
                course.save(done)
                if done == course.total_steps:
                    break
                if is_due:
                    with log.paused(), state.evaluating():
                        log.images(sampler.draw(f"step-{done}"), done, "validation")

        course.saver.join()
        with course.ended():
            verdict = course.verdict()
            logger.info("writing the result to %s", folder.path)
            state.export(folder.path)
            samples = sampler.draw("final")
        if requests.is_asked:
            logger.warning("a signal broke off the last samples; the result itself is whole")
        log.images(samples, course.total_steps, "test")
        course.share_unreadable()
        preparation.write_report(images)
        if accelerator.is_main_process:
            table = card_settings(options, course.total_steps, batches.size, resolution)
            publish(folder.path, repository, options.hub, card_facts(options, table, verdict), samples)
        course.conclude(verdict)


def memory_savers(options: Options) -> dict[str, bool]:
    """Flags that save memory, in the order to try them, and whether they are given."""
    from utils.training.backward import FREE_CURE

    return {
        FREE_CURE: options.model.gradient_checkpointing,
        "--cache_latents --cache_text_embeddings": options.cache.cache_latents and options.cache.cache_text_embeddings,
        "--use_8bit_adam": options.optimizer.name != "adamw",
        "--adaptation lora": options.adaptation.adaptation != "full",
        "--quantize_base nf4": options.adaptation.adaptation != "lora" or options.adaptation.quantize_base is not None,
    }


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
    options: Options, source: "PipelineSource", family_class: "type[TextFamily]", sizes: Sequence[tuple[int, int]]
) -> bool:
    """Refuses what the pipeline's configs show not to go, before its weights are loaded.

    Returns:
        Whether they said enough of the scheduler to try it.
    """
    from utils.sampling.scheduler_trials import check_trial_of

    family_class.check_before_loading(source, sizes)
    scheduler = source.config("scheduler")
    if scheduler is None:
        return False
    forward_process(options.noise, scheduler)
    entry = None if source.is_single_file else source.index().get("scheduler")
    return check_trial_of(entry, scheduler, options.noise.scheduler_changes, *drawing(options, scheduler))


def drawing(options: Options, scheduler_config: Mapping) -> tuple[int, str, str]:
    """(denoising steps of a sample, what names the pipeline, the flag that says the steps)."""
    steps = options.samples.validation_num_inference_steps
    if not options.samples.prompts:  # then nothing is drawn by so many
        steps = min(10, steps, max(1, (scheduler_config.get("num_train_timesteps") or 1000) // 2))
    where = f"--pretrained_model {options.model.pretrained_model_name_or_path}"
    return steps, where, "validation_num_inference_steps"


def forward_process(options: NoiseOptions, scheduler_config: Mapping) -> "ForwardProcess":
    """The forward process of a pipeline's scheduler as the options change it, which must go together."""
    from utils.diffusion.noise import ForwardProcess, timestep_weights

    process = ForwardProcess(scheduler_config, options.scheduler_changes)
    timestep_weights(options, process.alphas_cumprod.cpu().double().numpy())
    if options.dream_training and process.prediction_type != "epsilon":
        raise UserError(f"--dream_training is for epsilon prediction, the pipeline has {process.prediction_type}")
    return process


def default_output_dir(options: Options, family_class: "type[TextFamily]") -> str:
    """The diffusers examples' output folder for this family and adaptation."""
    adaptation = options.adaptation.adaptation
    return family_class.default_output_dir if adaptation == "full" else f"sd-model-finetuned-{adaptation}"


def is_validation_due(
    options: Options, family: "TextFamily", batches: "GlobalBatches | StreamedBatches", done: int
) -> bool:
    """Whether samples are drawn after optimizer step number `done`, from 1."""
    default_epochs = 1 if options.adaptation.adaptation != "full" else family.default_validation_epochs
    before, after = batches.epochs_before(done - 1), batches.epochs_before(done)
    return options.samples.is_due(done, before, after, default_epochs)


def card_facts(options: Options, settings: Sequence[tuple[str, object]], verdict: str) -> "CardFacts":
    """What the model card says."""
    from utils.training.model_card import CardFacts
    from utils.training.starting import data_name

    is_lora = options.adaptation.adaptation == "lora"
    model = options.model.pretrained_model_name_or_path
    return CardFacts(model, data_name(options), is_lora, settings, verdict=verdict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; gives its exit status."""
    return run_script(run, argv)


if __name__ == "__main__":
    leave(main())
