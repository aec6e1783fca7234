#!/usr/bin/env python
"""Fine-tunes Stable Diffusion 1.x, 2.x or SDXL on images with captions: all weights or LoRA.

accelerate launch train_text_to_image.py --pretrained_model ... --train_data_dir ... --output_dir ...
"""

from utils.config.first_checks import read_first, run_read
from utils.training.text_to_image_options import Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options)

import logging
from collections.abc import Sequence

import torch

from utils.config.options import leave
from utils.config.seeding import model_seed
from utils.diffusion.process import process_of
from utils.evaluation.while_training import TrainingEvaluation
from utils.models.text_to_image import TextFamily
from utils.runtime.processes import weight_dtype
from utils.training.backward import Gradients
from utils.training.card_facts import CardFacts, quoted
from utils.training.data import Feed, TrainingData
from utils.training.description import describe_run, report_dry_run
from utils.training.exchange import Exchange
from utils.training.learning_rates import LearningRates
from utils.training.result import exported_weights, finish
from utils.training.run_samples import RunSamples
from utils.training.saving import CheckpointWriter
from utils.training.session import Session
from utils.training.speed_up import prepare_steps, with_fast
from utils.training.state import TrainingState
from utils.training.task import Task
from utils.training.text_to_image_pipeline import FoundPipeline, find_pipeline, try_loaded_scheduler
from utils.training.validation import ValidationLoss

logger = logging.getLogger("utils.train_text_to_image")


def train(options: Options) -> None:
    """Fine-tunes a pipeline and exports it. A resumed run continues bit for bit."""
    # Pipeline: find its family by its configs, and check that the options fit it.
    found = find_pipeline(options)

    # Session: processes, output folder, stop requests, and the checkpoint to resume from, if any.
    with Session.start(options, found.output_dir, found.family.pipeline_class_name) as session:
        # Data: list the images, assign them to buckets, and fix their order for all steps.
        data = TrainingData.plan(options, session, found.resolution)
        rates = LearningRates.fit(options, session.resumption, data.batches.size, data.total_steps)
        facts = session.resumption.facts(data.images, data.held_out_images, rates)

        # Model: load the pipeline, choose which weights train, and define the loss of a batch.
        options, fast_parts = with_fast(options, session, data)
        task = load_task(options, found, session, data, rates)
        plan = describe_run(options, session, data, rates, task)
        if options.runtime.dry_run:
            return report_dry_run(plan, session, data, task)

        # Encodings: run the frozen encoders once per image and caption, if these are cached.
        data.encode(options, session, task)
        if options.cache.ends_when_filled:
            return

        # State: everything that an optimizer step changes, initialised or restored from the checkpoint.
        state = TrainingState.create(options, session, data, task, rates, facts)

        # Measurements between steps: samples, validation loss, metrics.
        sampler = RunSamples.of_prompts(options, found, session, data, task, state)
        validation = ValidationLoss.begin(options, session, data, task, state, sampler.is_due(state.progress()))
        evaluation = make_evaluation(options, session, task)
        session.begin(options, plan, [sampler, evaluation])

        # Steps: data feed, gradients, checkpoints, and log.
        feed = Feed.start(options, session, data, task, range(state.step, state.total_steps))
        gradients = Gradients.of_run(options, session, task, state, feed)
        prepare_steps(options, task, state, gradients, feed, fast_parts)
        checkpoints = CheckpointWriter(options, session, state, gradients, feed.at_once)
        exchange = Exchange(options.tracking, session, data, feed, state)

        with checkpoints, exchange.log as log:
            sampler.draw_first(log)
            for step, micro_batches in feed.steps:
                state.set_learning_rate(step, validation.reductions)

                # Gradients, summed over micro-batches; out of memory, halve the micro-batches and repeat the step.
                sums = gradients.add_up(step, micro_batches)
                log.layers(state.parameters, step + 1, options.tracking)

                # Update weights and EMA; skip it on every process if a gradient is not finite.
                grad_norm = state.clip(rates.optimizer.clip_norm)
                state.update(grad_norm)
                exchange.step(sums, grad_norm)

                # When due: validation loss (may make this step the last), verdict, metrics, checkpoint, samples.
                progress = validation.measure(exchange, sampler.is_due)
                if evaluation.is_due(progress):
                    with log.paused("evaluation"), state.evaluating(), task.family.awake():
                        log.values(evaluation.scores(task.family, progress.step, found.resolution), progress.step)
                if checkpoints.is_due(progress, exchange.wish):
                    with log.paused("checkpoint"):
                        checkpoints.save(progress, exchange.wish)
                checkpoints.stop_if_wished(progress, exchange.wish)
                if progress.is_last:
                    break
                sampler.draw_if_due(progress, log)

        # Result: exported pipeline or adapter, last samples, model card.
        with exported_weights(options, session, state, validation):
            samples = sampler.draw_last(log)
        finish(options, session, data, state, card_facts(options, task.family), samples)


def load_task(
    options: Options, found: FoundPipeline, session: Session, data: TrainingData, rates: LearningRates
) -> Task:
    """Loads the pipeline, chooses the weights to train, and defines the loss."""
    # The pipeline, with its frozen and trained weights.
    torch.manual_seed(model_seed(session.seed, 0, 0))  # initial weights of LoRA and of a new UNet
    adaptation_class = options.adaptation.spec.kind.value
    dtypes = adaptation_class.dtypes(options.adaptation, weight_dtype(session.accelerator))
    model = options.model.pretrained_model_name_or_path
    logger.info("loading the %s of %s", found.family.pipeline_class_name, model)
    family = found.family(found.source, dtypes, options.noise.scheduler_changes)
    family.check_sizes(data.images.plan.sizes, family.pipeline.vae.config)
    if options.adaptation.quantize_base is not None:
        family.quantize_unet(options.adaptation.quantize_base, session.device)
    adaptation = adaptation_class(family, options.adaptation, session.checkpoint)

    # The loss, with the noise of the pipeline's scheduler.
    scheduler = family.pipeline.scheduler
    process = process_of(options.noise, type(scheduler).__name__, scheduler.config, family.process_kinds)
    if not found.scheduler_was_tried:
        try_loaded_scheduler(options, scheduler)
    origin = f"{model} ({family.pipeline_class_name})"
    return Task.define(options, adaptation, process, rates, origin, method=options.adaptation.adaptation)


def make_evaluation(options: Options, session: Session, task: Task) -> TrainingEvaluation:
    """Returns the evaluation that computes metrics of the pipeline during training."""
    pipeline, prompts = task.family.pipeline, options.samples.prompts
    return TrainingEvaluation(options.evaluation, options.features, session.surroundings, pipeline, prompts)


def card_facts(options: Options, family: TextFamily) -> CardFacts:
    """Returns the facts for the model card."""
    model, adaptation = options.model, options.adaptation
    prompt = next(iter(options.samples.prompts), "a prompt")
    skip = "" if model.clip_skip is None else f", clip_skip={model.clip_skip}"
    return CardFacts(
        model.pretrained_model_name_or_path,
        options.data_name,
        adaptation.adaptation,
        pipeline_class=family.pipeline_class_name,
        base_arguments={
            "revision": model.revision,
            "variant": model.variant,
            "config": family.source.config_root,
        },
        scheduler_class=type(family.pipeline.scheduler).__name__,
        scheduler_changes={**family.source.scheduler_marks(), **options.noise.scheduler_changes},
        call=f"pipeline({quoted(prompt)}{skip})",
        negative_prompt=options.samples.shared_negative_prompt,
        ui_notes=family.ui_notes,
        trigger_words=adaptation.trigger_words or (),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit status."""
    return run_read(train, read_options, argv)


if __name__ == "__main__":
    leave(main())
