"""The pipeline that train_text_to_image.py fine-tunes: found, and checked, before its weights are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from diffusers import SchedulerMixin

from utils.config.options import UserError
from utils.diffusion.process import process_of
from utils.formats.adapter_files import KINDS
from utils.models.lora_files import kinds_of
from utils.models.pipeline_source import PipelineSource
from utils.models.registry import pick_family
from utils.models.text_to_image import TextFamily
from utils.runtime.processes import use_hub_cache_if_offline
from utils.sampling.scheduler_trials import check_text_trial, check_trial_of
from utils.training.options import AdaptationOptions
from utils.training.text_to_image_options import Options


class FoundPipeline(NamedTuple):
    """A pretrained pipeline, as described by its configs.

    Attributes:
        source: where it is loaded from.
        family: the class of its family.
        resolution: edge of the images in pixels.
        output_dir: the output folder of the run.
        default_epochs: epochs between samples if the options set no interval.
        scheduler_was_tried: whether its scheduler could be tested from the configs alone.
    """

    source: PipelineSource
    family: type[TextFamily]
    resolution: int
    output_dir: str
    default_epochs: int
    scheduler_was_tried: bool


def find_pipeline(options: Options) -> FoundPipeline:
    """Returns the pretrained pipeline, and checks its configs against the options before weights are loaded.

    Raises:
        UserError: if they do not fit.
    """
    model, adaptation = options.model.pretrained_model_name_or_path, options.adaptation.adaptation
    names = (model, options.source.dataset_name, options.perceptual.perceptual_network)
    if not all(name is None or Path(name).exists() for name in names):
        use_hub_cache_if_offline()
    source = PipelineSource(options.model)
    family = pick_family(source)
    resolution = options.image.resolution or family.default_resolution
    family.check_before_loading(source, options.buckets.sizes(resolution))
    _check_kind(options.adaptation, family)
    was_tried = _try_scheduler(options, source, family)
    default_dir = family.default_output_dir if adaptation == "full" else f"sd-model-finetuned-{adaptation}"
    default_epochs = family.default_validation_epochs if adaptation == "full" else 1
    output_dir = options.runtime.output_dir or default_dir
    return FoundPipeline(source, family, resolution, output_dir, default_epochs, was_tried)


def _check_kind(options: AdaptationOptions, family: type[TextFamily]) -> None:
    """Refuses --lora_weights of another kind than the adaptation, which alone says how they train."""
    if options.lora_weights is None:
        return
    what = f"--lora_weights {options.lora_weights}"
    others = sorted(kinds_of(options.lora_weights, family, what) - {options.adaptation})
    if others:
        raise UserError(f"{what} is a {KINDS[others[0]]} file; give --adaptation {others[0]}")


def _try_scheduler(options: Options, source: PipelineSource, family: type[TextFamily]) -> bool:
    """Tests whether the scheduler fits the training noise; returns whether its config was enough to test it.

    Raises:
        UserError: if the scheduler fails.
    """
    scheduler = source.config("scheduler")
    if scheduler is None:
        return False
    process_of(options.noise, scheduler.get("_class_name", "scheduler"), scheduler, family.process_kinds)
    entry = None if source.is_single_file else source.index().get("scheduler")
    changes = options.noise.scheduler_changes
    was_tried = [check_trial_of(entry, scheduler, changes, *each) for each in _drawings(options, scheduler)]
    return all(was_tried)


def try_loaded_scheduler(options: Options, scheduler: SchedulerMixin) -> None:
    """Tests a scheduler whose config was not enough to test it.

    Raises:
        UserError: if it fails.
    """
    for each in _drawings(options, scheduler.config):
        check_text_trial(scheduler, *each)


def _drawings(options: Options, scheduler_config: Mapping) -> list[tuple[int, str, str]]:
    """Returns what to try a scheduler with: each number of denoising steps per sample.

    Returns:
        (steps, the flag and value of the pipeline, the name of the flag for the steps, with its place in a file).
    """
    samples, steps = options.samples, options.samples.validation_num_inference_steps
    where = f"--pretrained_model {options.model.pretrained_model_name_or_path}"
    if not samples.rows:  # no samples are drawn: any number of steps tests the scheduler
        steps = min(10, steps, max(1, (scheduler_config.get("num_train_timesteps") or 1000) // 2))
    names = {steps: "validation_num_inference_steps"}
    for row in samples.rows:
        if row.steps is not None:
            names.setdefault(
                row.steps, f"validation_prompts_file {samples.validation_prompts_file}, {row.place}: steps"
            )
    if samples.rows and all(row.steps is not None for row in samples.rows):
        names = {number: name for number, name in names.items() if number in {row.steps for row in samples.rows}}
    return [(number, where, name) for number, name in names.items()]
