"""The metrics of evaluate_pipeline.py during training, on images drawn with the pipeline in memory."""

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from utils.config.options import UserError, flags_as
from utils.config.progress import Progress
from utils.evaluation.metrics.base import Case
from utils.evaluation.metrics.distances import NotComputable
from utils.evaluation.metrics.features import Networks
from utils.evaluation.metrics.image_sets import ImageSet, Reference, Statistics, Subject, Workers
from utils.evaluation.metrics.registry import score
from utils.evaluation.metrics.scores import Score
from utils.evaluation.metrics.table import METRICS
from utils.evaluation.options import REFERENCE_FLAGS, EvaluationOptions, FeatureOptions, ReferenceOptions, ScoreOptions
from utils.evaluation.references import drawn_images, read_images
from utils.models.base import Family
from utils.models.text_to_image import TextFamily
from utils.runtime.processes import autocast, on_main_process
from utils.runtime.sharding import unsharded
from utils.runtime.step_lines import JsonLines, SampleCount, keep_steps
from utils.sampling.controls import controllable
from utils.sampling.drawer import Drawer, InMemory, complete_prompts
from utils.sampling.options import GenerationOptions, PromptOptions
from utils.sampling.prompts import Prompt, plan_tasks, read_prompts
from utils.sampling.samples import Surroundings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
RECORD = "evaluation.jsonl"


class TrainingEvaluation:
    """Draws images with a pipeline in memory, scores them, and saves both in `output_dir/evaluation/`."""

    def __init__(
        self,
        options: EvaluationOptions,
        features: FeatureOptions,
        surroundings: Surroundings,
        pipeline: "DiffusionPipeline",
        prompts: list[str] | None = None,
        trained_on: ImageSet | None = None,
    ):
        """Reads the prompts, loads the networks, and computes the features of the reference.

        Args:
            pipeline: the pipeline in training; it must take the prompts.
            prompts: the prompts to draw if the options give no file.
            trained_on: the training images, used as the reference if the options give none.

        Raises:
            UserError: if the prompts or the reference can't be used.
        """
        self._options = options
        self._accelerator, self._controls = surroundings.accelerator, surroundings.controls
        self._folder, self._seed = surroundings.folder / "evaluation", surroundings.seed
        self._seen = surroundings.seen
        self._networks = Networks(features, self._accelerator.device)
        self._workers = Workers(self._accelerator, features.feature_batch_size)
        self._prompts = [Prompt(text) for text in prompts or ()]
        if options.eval_prompts_file is not None:
            given = PromptOptions(prompts_file=options.eval_prompts_file, text_encoding=options.eval_prompts_encoding)
            self._prompts = read_prompts(given)
        self._load_networks()
        self._reference = self._read_reference(trained_on) if options.eval_metrics else None
        if options.eval_metrics:
            complete_prompts(pipeline, self._prompts, None)

    def begin(self, first_step: int) -> None:
        """Removes scores of steps after the one from which the run resumes."""
        on_main_process(self._accelerator, partial(keep_steps, self._folder / RECORD, first_step))

    def _load_networks(self) -> None:
        """Loads all networks, so that a missing one ends the run before its first step."""
        for name in self._options.eval_metrics or ():
            try:
                self._networks.get(METRICS[name].network)
            except NotComputable as reason:
                raise UserError(f"--eval_metrics {name}: {reason}") from reason
        self._networks.rest()

    def _read_reference(self, trained_on: ImageSet | None) -> Reference | None:
        """Reads the reference and computes its features; None if no metric compares with one."""
        name, chosen = self._options.eval_reference, ReferenceOptions(reference=self._options.eval_reference)
        compared = [METRICS[each] for each in self._options.eval_metrics or () if METRICS[each].compares]
        if not compared:
            return None
        if name is None and trained_on is None:
            raise UserError("--eval_metrics can't compare with streamed training images; give --eval_reference")
        try:
            with flags_as(REFERENCE_FLAGS):
                if chosen.is_statistics:
                    statistics = Statistics.read(Path(name))
                    network = self._networks.get("main")
                    size = None if network.class_weights is None else network.class_weights.shape[1]
                    statistics.check(network, size, False)
                    return statistics
                images = trained_on if name is None else read_images("reference", name, chosen, self._seed)
                reference = Subject(images, self._networks, self._workers)
                for network_name in dict.fromkeys(metric.network for metric in compared):
                    reference.features(network_name)
                return reference
        except NotComputable as reason:
            where = "the training images" if name is None else f"--eval_reference {name}"
            raise UserError(f"{where}: {reason}") from reason
        finally:
            self._networks.rest()

    def is_due(self, progress: Progress) -> bool:
        """Whether metrics are due after a step."""
        return self._options.is_due(progress)

    def scores(self, family: "Family", step: int, resolution: int | None = None) -> dict[str, float]:
        """Returns the scores to log after `step`, by `eval/{name}`; the pipeline must hold the weights to draw with.

        Args:
            resolution: edge of the images in pixels; None if the pipeline draws a single size.
        """
        encode = partial(family.prompt_arguments, negative_prompt=None) if isinstance(family, TextFamily) else None
        size = {} if resolution is None else {"height": resolution, "width": resolution}
        around = partial(autocast, self._accelerator)
        with unsharded(family.pipeline.components.values()), controllable(self._controls, family.pipeline):
            found = self.measure(family.pipeline, step, encode, size, around)
        return {f"eval/{name}": value for name, value in found.items()}

    def measure(
        self,
        pipeline: "DiffusionPipeline",
        step: int,
        encode: Callable[[str], Mapping[str, Tensor]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> dict[str, float]:
        """Draws images and returns their scores by name; the pipeline must hold the weights to draw with.

        All processes must call it. It appends a line to `evaluation.jsonl`, with all details of each score and the
        reason for each score that could not be computed.

        Args:
            encode: encodes a prompt into arguments of the pipeline's call, tensors [1, ...]; by default the pipeline
                does.
            arguments: additional arguments of the pipeline's call.
            around: a context to draw in, such as the accelerator's autocast; the VAE decodes outside of it.
        """
        # Draw.
        options = self._options
        generation = GenerationOptions(
            num_inference_steps=options.eval_num_inference_steps,
            guidance_scale=options.eval_guidance_scale,
            batch_size=options.eval_sampling_batch_size,
        )
        complete = complete_prompts(pipeline, self._prompts, None)
        tasks = plan_tasks(complete, PromptOptions(num_images=options.eval_num_images))
        images = self._folder / f"step-{step}"
        logger.info("drawing %d images for --eval_metrics: %s", len(tasks), images)
        on_main_process(self._accelerator, partial(_empty, images))
        drawer = Drawer(
            pipeline,
            generation,
            self._controls,
            self._seed,
            self._accelerator.device,
            in_memory=InMemory(arguments or {}, encode, around),
        )
        drawer.draw(tasks, images, self._accelerator)
        self._accelerator.wait_for_everyone()

        # Score, on all processes; the main process saves the scores.
        subject = Subject(drawn_images(images, tasks), self._networks, self._workers)
        scores = score(Case(subject, self._reference, None, ScoreOptions()), options.eval_metrics or ())
        self._networks.rest()
        on_main_process(self._accelerator, partial(_append, self._folder / RECORD, step, scores, self._seen))
        return {each.name: each.value for each in scores if each.value is not None}


def _empty(folder: Path) -> None:
    """Empties a folder: images that an earlier run drew at this step are of other weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _append(file: Path, step: int, scores: list[Score], seen: SampleCount) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(file)
    lines.write({"step": step, "scores": {each.name: each.record() for each in scores}} | seen.stamp(step))
    lines.close()
