#!/usr/bin/env python
"""Trains an unconditional or class-conditional diffusion model, from scratch or fine-tuned, in pixels or in latents.

accelerate launch train_unconditional.py --train_data_dir ... --output_dir ...
"""

from utils.config.first_checks import read_first, run_read
from utils.training.unconditional_options import OWN_NAMES, Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options, OWN_NAMES)

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from utils.config.options import leave
from utils.config.seeding import model_seed
from utils.diffusion.process import process_of
from utils.evaluation.references import trained_images
from utils.evaluation.while_training import TrainingEvaluation
from utils.runtime.processes import weight_dtype
from utils.training.adaptation import FullFineTuning
from utils.training.backward import Gradients
from utils.training.card_facts import CardFacts
from utils.training.classes import Classes, find_classes
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
from utils.training.unconditional_pipeline import FoundPipeline, find_pipeline
from utils.training.validation import ValidationLoss

logger = logging.getLogger("utils.train_unconditional")


def train(options: Options) -> None:
    """Trains a pipeline and exports it. A resumed run continues bit for bit."""
    # Pipeline: find its family, and check that the options fit it.
    found = find_pipeline(options)

    # Session: processes, output folder, stop requests, and the checkpoint to resume from, if any.
    with Session.start(options, found.output_dir, found.family.pipeline_class_name) as session:
        # Data: list the images, number their classes, and fix their order for all steps.
        data = TrainingData.plan(options, session, found.resolution)
        classes = find_classes(options, session, data)
        rates = LearningRates.fit(options, session.resumption, data.batches.size, data.total_steps)
        facts = session.resumption.facts(data.images, data.held_out_images, rates, classes=classes.names)

        # Model: load the pipeline, or create a new one, and define the loss of a batch.
        options, fast_parts = with_fast(options, session, data)
        task = load_task(options, found, session, data, rates, classes)
        plan = describe_run(options, session, data, rates, task)
        if options.runtime.dry_run:
            return report_dry_run(plan, session, data, task)

        # Encodings: run the frozen VAE once per image, if latents are cached.
        data.encode(options, session, task)
        if options.cache.ends_when_filled:
            return

        # State: everything that an optimizer step changes, initialised or restored from the checkpoint.
        state = TrainingState.create(options, session, data, task, rates, facts)

        # Measurements between steps: samples, validation loss, metrics.
        sampler = RunSamples.of_grid(options, session, task, state)
        validation = ValidationLoss.begin(options, session, data, task, state, sampler.is_due(state.progress()))
        evaluation = make_evaluation(options, session, task, data)
        session.begin(options, plan, [sampler, evaluation])

        # Steps: data feed, gradients, checkpoints, and log.
        feed = Feed.start(options, session, data, task, range(state.step, state.total_steps))
        gradients = Gradients.of_run(options, session, task, state, feed)
        prepare_steps(options, task, state, gradients, feed, fast_parts)
        checkpoints = CheckpointWriter(options, session, state, gradients, feed.at_once, options.samples.is_model_due)
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
                        log.values(evaluation.scores(task.family, progress.step), progress.step)
                if checkpoints.is_due(progress, exchange.wish):
                    with log.paused("checkpoint"):
                        checkpoints.save(progress, exchange.wish)
                checkpoints.stop_if_wished(progress, exchange.wish)
                if progress.is_last:
                    break
                sampler.draw_if_due(progress, log)

        # Result: exported pipeline, last samples, model card.
        with exported_weights(options, session, state, validation):
            samples = sampler.draw_last(log)
        finish(options, session, data, state, card_facts(options, task), samples)


def load_task(
    options: Options, found: FoundPipeline, session: Session, data: TrainingData, rates: LearningRates, classes: Classes
) -> Task:
    """Loads the pipeline, or creates a new one, and defines the loss."""
    torch.manual_seed(model_seed(session.seed, 0, 0))  # initial weights of a new denoiser
    dtypes = FullFineTuning.dtypes(options.adaptation, weight_dtype(session.accelerator))
    wanted = found.wanted(options, classes.names, data.images.plan.sizes)
    logger.info("loading the model, %s", options.model.origin)
    family = found.family(options.model, options.noise, wanted, dtypes.denoiser, dtypes.frozen, options.samples.sampler)
    adaptation = FullFineTuning(family, options.adaptation, session.checkpoint)
    process = process_of(options.noise, type(family.pipeline.scheduler).__name__, family.pipeline.scheduler.config)
    options.samples.steps_of(family.pipeline.scheduler)
    origin = f"{options.model.origin} ({type(family.pipeline).__name__}, {family.latent_space.describe()})"
    task = Task.define(options, adaptation, process, rates, origin, method=classes.describe())
    return replace(task, structure={"class_numbers": family.added_classes} if family.added_classes else {})


def make_evaluation(options: Options, session: Session, task: Task, data: TrainingData) -> TrainingEvaluation:
    """Returns the evaluation that computes metrics during training, by default against the training images."""
    pipeline = task.family.pipeline
    trained_on = None if options.data.streaming else trained_images(data.images, options.image)
    scores = options.evaluation.with_steps(options.samples.steps_of(pipeline.scheduler))
    return TrainingEvaluation(scores, options.features, session.surroundings, pipeline, trained_on=trained_on)


def card_facts(options: Options, task: Task) -> CardFacts:
    """Returns the facts for the model card."""
    model, tag = options.model.pretrained_model_name_or_path, "unconditional-image-generation"
    return CardFacts(model, options.data_name, call=task.family.example_call(), tag=tag)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit status."""
    return run_read(train, read_options, argv, OWN_NAMES)


if __name__ == "__main__":
    leave(main())
