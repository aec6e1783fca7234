#!/usr/bin/env python
"""Draws images with any diffusers pipeline, on one or more GPUs, scores them, and writes a report.

accelerate launch evaluate_pipeline.py --pipeline ... --prompts_file ... --reference ... --output_dir ...
"""

from utils.config.first_checks import read_first, run_read
from utils.evaluation.script_options import Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options)

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object
from PIL import Image

from utils.config.options import Stopped, UserError, as_record, first_line, leave, without_secrets
from utils.config.output_folder import check_writable
from utils.config.terminal import json_text, one_line, print_line
from utils.evaluation.findings import Entry, Findings
from utils.evaluation.metrics.base import Case
from utils.evaluation.metrics.comparison import Difference, differences
from utils.evaluation.metrics.distances import NotComputable
from utils.evaluation.metrics.features import Network, Networks, Picture
from utils.evaluation.metrics.image_sets import Reference, Statistics, Subject, Workers, write_statistics
from utils.evaluation.metrics.registry import score
from utils.evaluation.metrics.scores import Score
from utils.evaluation.metrics.table import METRICS
from utils.evaluation.references import drawn_images, folder_images, read_images
from utils.evaluation.report import write_report
from utils.evaluation.wanted import Wanted, everything_wanted, load_adapted
from utils.models.loading import allowing_missing
from utils.runtime.atomic_files import write_text
from utils.runtime.options import RuntimeOptions
from utils.runtime.process_settings import settings_restored
from utils.runtime.processes import (
    OutputFolder,
    ending,
    on_main_process,
    start_processes,
    use_hub_cache_if_offline,
    versions,
    weight_dtype,
)
from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControls
from utils.sampling.drawer import (
    Drawer,
    check_prompts,
    claim_images,
    class_numbers,
    complete_prompts,
    for_init_images,
    invalid_images,
)
from utils.sampling.infotext import DrawnModel
from utils.sampling.pipelines import PipelineSpec, checkpoint_content, indexed_names, load_pipeline, pipeline_class
from utils.sampling.prompts import Prompt, Task, plan_tasks, read_prompts
from utils.sampling.scheduler_choice import set_scheduler
from utils.sampling.scheduler_trials import warn_of_own

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

logger = logging.getLogger("utils.evaluate_pipeline")


@settings_restored()
def evaluate(options: Options) -> None:
    """Draws or reads the images, scores them, and writes the report."""
    # Options: what to score, and which prompts to draw.
    if not all(name is None or Path(name).exists() for name in hub_names(options)):
        use_hub_cache_if_offline()
    wanted = everything_wanted(options)
    prompts = check_before_loading(options, wanted)

    # Session: output folder, processes, stop requests.
    folder = OutputFolder(options.run.output_dir)
    runtime = RuntimeOptions(
        output_dir=options.run.output_dir,
        mixed_precision=options.run.mixed_precision,
        allow_tf32=options.run.allow_tf32,
    )
    accelerator = start_processes(runtime, 1, [], folder.path, "logs")
    requests = StopRequests(folder.path, None)
    allowed = allowing_missing(options.loading)
    with ending(accelerator, folder, runtime.peer_timeout), requests.listening(), allowed:
        on_main_process(accelerator, lambda: folder.claim(True, False))
        loaded = load_adapted(wanted, weight_dtype(accelerator))

        # Reference and training images: compute their features before anything is drawn.
        networks = Networks(options.features, accelerator.device)
        workers = Workers(accelerator, options.features.feature_batch_size, requests)
        reference = prepare_reference(options, accelerator, networks, workers)
        training = prepare_training(options, networks, workers)
        networks.rest()

        # Pipelines or folders, one after another: draw or read the images, and compute their scores.
        entries = []
        for each in wanted:
            images, facts, seconds = obtain(
                each, options, prompts, folder.path, accelerator, requests, loaded.pop(each.name, None)
            )
            subject = Subject(images, networks, workers)
            scores = score(Case(subject, reference, training, options.scores), options.run.names)
            networks.rest()
            invalid = on_main_process(
                accelerator, lambda each=each, images=images: find_invalid(each, images, folder.path)
            )
            place = "" if each.images is not None else f"images/{each.name}"
            entries.append(Entry(each.name, subject, scores, facts, invalid, seconds, each.step, each.scale, place))

        # Report.
        findings = conclude(options, entries, training)
        on_main_process(accelerator, lambda: write_down(options, findings, folder.path, wanted))
        check_outcome(options, entries)


def hub_names(options: Options) -> list[str | None]:
    """Returns the names that may have to be downloaded from the Hub."""
    features = options.features
    models = {
        "clip": features.clip_model,
        "cmmd": features.cmmd_model,
        "dino": features.dino_model,
        "pickscore": features.pickscore_model,
        "hpsv2": features.hpsv2_model,
    }
    needed = [] if features.no_download else [models.get(METRICS[name].network) for name in options.run.names]
    pipeline, comparison = options.pipeline, options.comparison
    named = [pipeline.pipeline, pipeline.pipeline_config, comparison.baseline, comparison.baseline_config]
    named += [each.source for each in (*pipeline.adapters, *comparison.baseline_adapters)]
    return [*named, options.reference.reference, *needed]


def check_before_loading(options: Options, wanted: Sequence[Wanted]) -> "list[Prompt]":
    """Reads the prompts, and checks pipelines, checkpoints and output paths before any weights are loaded.

    Raises:
        UserError: if a pipeline does not take the prompts, a checkpoint has no weights, or a path can't be written.
    """
    prompts = read_prompts(options.prompts)
    if options.reference.save_reference is not None:
        check_writable("save_reference", Path(options.reference.save_reference), is_folder=False)
    if options.run.export_geneval is not None:
        check_writable("export_geneval", Path(options.run.export_geneval), is_folder=True)
    for each in wanted:
        if each.spec is None:
            continue
        chosen = pipeline_class(each.spec)
        each.spec.check_config()
        if each.spec.parts is not None:
            checkpoint_content(each.spec)
        check_prompts(chosen, prompts, options.prompts.class_labels)
        if options.prompts.class_labels is not None:
            class_numbers(options.prompts.class_labels, indexed_names(each.spec.index))
    return prompts


def prepare_reference(
    options: Options, accelerator: "Accelerator", networks: "Networks", workers: "Workers"
) -> "Reference | None":
    """Reads the reference before anything is drawn, and checks its statistics or computes its features.

    Raises:
        UserError: if it can't be used.
    """
    # Statistics: check that they are of the same network.
    chosen = options.reference
    if chosen.reference is None:
        return None
    if chosen.is_statistics:
        statistics = Statistics.read(Path(chosen.reference))
        try:
            network = networks.get("main")
        except NotComputable as reason:
            logger.warning("--reference %s can't be checked against its network: %s", chosen.reference, reason)
            return statistics
        statistics.check(network, num_features(network, networks), chosen.allow_stats_mismatch)
        return statistics

    # Images: compute the features that the metrics need.
    images = read_images("reference", chosen.reference, chosen, options.run.seed)
    reference = Subject(images, networks, workers)
    needed = [METRICS[name].network for name in options.run.names if METRICS[name].compares]
    for network in dict.fromkeys(needed):
        try:
            networks.get(network)
        except NotComputable:
            continue  # the metrics report it
        try:
            reference.features(network)
        except NotComputable as reason:
            raise UserError(f"--reference {chosen.reference}: {reason}") from reason

    # Save the statistics.
    if chosen.save_reference is not None:
        file = Path(chosen.save_reference)
        try:
            reference.features("main")
        except NotComputable as reason:
            raise UserError(f"--save_reference {file}: {reason}") from reason
        on_main_process(accelerator, lambda: write_statistics(file, reference, "main"))
    return reference


def num_features(network: "Network", networks: "Networks") -> int | None:
    """Returns the number of features of a network; None if it fails on a test image."""
    values = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    try:
        return network([Picture("a trial image", lambda: Image.fromarray(values))], networks.device).shape[1]
    except (NotComputable, RuntimeError, ValueError, IndexError) as error:
        logger.warning("%s fails on a test image: %s", network.name, first_line(error))
        return None


def prepare_training(options: Options, networks: "Networks", workers: "Workers") -> "Subject | None":
    """Reads the training images, and computes their features if a metric needs them; None if they are not given.

    Raises:
        UserError: if an image can't be read.
    """
    name = options.reference.training_images
    if name is None:
        return None
    training = Subject(read_images("training_images", name, options.reference, options.run.seed), networks, workers)
    if "memorisation" not in options.run.names:
        return training
    network = METRICS["memorisation"].network
    try:
        networks.get(network)
    except NotComputable:
        return training  # the metric reports it
    try:
        training.features(network)
    except NotComputable as reason:
        raise UserError(f"--training_images {name}: {reason}") from reason
    return training


def obtain(
    wanted: Wanted,
    options: Options,
    prompts: "Sequence[Prompt]",
    folder: Path,
    accelerator: "Accelerator",
    requests: StopRequests,
    loaded: "DiffusionPipeline | None" = None,
) -> tuple:
    """Draws images, or reads them from a folder.

    Args:
        loaded: the pipeline, if it is in memory already.

    Returns:
        (the image set, the settings that it was drawn with, the seconds that drawing took).

    Raises:
        Stopped: if a signal arrives; images already drawn are kept.
    """
    # A folder of images.
    started = time.monotonic()
    if wanted.images is not None:
        texts = [prompt.text for prompt in prompts] or None
        return folder_images(wanted.images, texts), {"images": str(wanted.images)}, 0.0

    # Load the pipeline, and plan its images.
    spec = wanted.spec
    pipeline = loaded or load_pipeline(spec, weight_dtype(accelerator))
    set_scheduler(pipeline, options.generation.scheduler)
    if options.generation.scheduler is None:
        warn_of_own(pipeline.scheduler, options.generation.num_inference_steps, spec.what)
    complete = complete_prompts(pipeline, prompts, options.prompts.class_labels)
    tasks = plan_tasks(complete, options.prompts)
    drawer = Drawer(
        pipeline if options.prompts.init_images is None else for_init_images(pipeline),
        options.generation,
        SamplingControls(options.controls),
        options.run.seed,
        accelerator.device,
        requests,
    )

    # Draw the images that are not there yet.
    images = image_folder(folder, wanted)
    facts = on_main_process(accelerator, lambda: drawer.facts(complete) | scale_facts(spec))
    on_main_process(accelerator, lambda: claim_images(images, facts, options.run.overwrite_output_dir))
    drawer.draw(tasks, images, accelerator, drawn_model(spec))
    signal = max(gather_object([requests.number]))
    if signal:
        there = sum(1 for task in tasks if (images / f"{task.name}.png").is_file())
        raise Stopped(f"stopped after {there} of {len(tasks)} images; run the same command to continue", signal)
    if options.run.export_geneval is not None:
        place = Path(options.run.export_geneval) / wanted.name
        on_main_process(accelerator, lambda: export_geneval(tasks, images, place))
    facts = facts | {"path": spec.path, "adapters": [each._asdict() for each in spec.scaled_adapters]}
    return drawn_images(images, tasks), facts, time.monotonic() - started


def scale_facts(spec: PipelineSpec) -> dict[str, object]:
    """Returns the scales of the adapters that act: the hash of the weights does not cover them."""
    scales = [each.scale for each in spec.scaled_adapters if each.scale != 0]
    is_scaled_checkpoint = spec.parts is not None and spec.scale != 1
    return ({"adapter_scales": scales} if scales else {}) | ({"scale": spec.scale} if is_scaled_checkpoint else {})


def drawn_model(spec: PipelineSpec) -> DrawnModel:
    """Returns what the texts of images call the model; without an adapter that acts, they are those of the base."""
    acting = tuple(each.label for each in spec.scaled_adapters if each.scale != 0)
    return replace(DrawnModel.at(spec.path, spec.parts), adapters=acting)


def image_folder(folder: Path, wanted: Wanted) -> Path:
    """Returns the folder of the images of a pipeline."""
    return folder / "images" / wanted.name


def export_geneval(tasks: "Sequence[Task]", images: Path, folder: Path) -> None:
    """Copies images in GenEval's layout: `00000/metadata.jsonl`, `00000/samples/00000.png`.

    Raises:
        UserError: if they can't be written.
    """
    try:
        for task in tasks:
            samples = folder / f"{task.number:05d}" / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(images / f"{task.name}.png", samples / f"{task.sample:05d}.png")
            facts = task.prompt.facts or {"prompt": task.prompt.text}
            line = json_text(facts) + "\n"
            write_text(samples.parent / "metadata.jsonl", line)
    except OSError as error:
        raise UserError(f"--export_geneval {folder} can't be written: {error.strerror or error}") from error


def find_invalid(wanted: Wanted, images, folder: Path) -> dict[str, list[str]]:
    """Returns the names of unreadable, NaN, black and one-colour images, by state; warns with their number."""
    root = wanted.images or image_folder(folder, wanted)
    found = invalid_images([root / picture.name for picture in images.pictures])
    for state, names in found.items():
        if names:
            logger.warning(
                "%s: %d of %d images are %s: %s", wanted.name, len(names), len(images), state, ", ".join(names[:8])
            )
    return found


def conclude(options: Options, entries: "list[Entry]", training: "Subject | None") -> "Findings":
    """Returns the findings for the report: differences, the best checkpoint, and the record of the run."""
    if options.comparison.labels is not None:
        entries = [replace(each, name=name) for each, name in zip(entries, options.comparison.labels, strict=True)]

    # Differences between the baseline and the pipeline, or each scale of a sweep.
    compared, notes = [], []
    if options.comparison.baseline is not None:
        found = {each.name: from_baseline(options, entries[0], each) for each in entries[1:]}
        notes = [note for _, note in found.values() if note]
        if options.pipeline.lora_scales is None:
            compared, _ = found[entries[-1].name]
        else:
            entries = [entries[0], *(replace(each, differences=found[each.name][0]) for each in entries[1:])]

    # The record of the run, and the best checkpoint.
    record = {"options": as_record(options), "versions": versions(), "command": without_secrets(sys.argv)}
    what = options.comparison.checkpoints or options.pipeline.pipeline or options.pipeline.images
    title = options.run.title or f"Evaluation of {what}"
    best = best_checkpoint(options, entries) if options.comparison.checkpoints is not None else None
    return Findings(title, entries, compared, best, record, training, notes)


def from_baseline(options: Options, before: "Entry", after: "Entry") -> "tuple[list[Difference], str]":
    """Returns the differences of an entry's scores from the baseline's, and a note if they have no intervals."""
    are_paired = before.subject.images.is_like(after.subject.images)
    if options.pipeline.images is not None and after.subject.images.prompts is None:
        are_paired = False  # nothing shows that they have the same prompts
    note = f"{before.name} and {after.name} are not known to have the same prompts: differences have no intervals"
    return differences(before.scores, after.scores, are_paired), "" if are_paired else note


def best_checkpoint(options: Options, entries: "Sequence[Entry]") -> tuple[str, str] | None:
    """Returns (name of the score, name of the best checkpoint by it); None if that score was not computed."""
    usable = [each for each in entries[-1].scores if each.value is not None and each.better]
    name = options.comparison.best_by or next((each.name for each in usable), None)
    known = {each.name: each.better for each in usable}
    if name not in known:
        logger.warning("the best checkpoint is unknown: %s was not computed", name or "a score")
        return None
    found: list[tuple[float, str]] = []
    for entry in entries:
        if entry.name == "base":
            continue
        value: Score | None = entry.score(name)
        if value is not None and value.value is not None:
            found.append((value.value, entry.name))
    choose = max if known[name] == "higher" else min
    return (name, choose(found)[1]) if found else None


def write_down(options: Options, findings: "Findings", folder: Path, wanted: Sequence[Wanted]) -> None:
    """Writes the report and prints its table.

    Raises:
        UserError: if it can't be written.
    """
    try:
        write_report(findings, folder, options.run.report_prompts)
    except OSError as error:
        raise UserError(f"--output_dir {folder} can't be written: {error.strerror or error}") from error
    print_line((folder / "report.md").read_text(encoding="utf-8"))
    print_line(f"report: {one_line(folder / 'report.html')}\nnumbers: {one_line(folder / 'results.json')}")


def check_outcome(options: Options, entries: "Sequence[Entry]") -> None:
    """Raises an error if a metric failed, or with --fail_on_invalid if an image is invalid, after all is written.

    Raises:
        UserError: naming the metrics or the number of images.
    """
    failed = sorted({each.name for entry in entries for each in entry.scores if each.failed})
    if failed:
        raise UserError(f"metrics failed: {', '.join(failed)}; see results.json for the reasons and the other scores")
    num_invalid = sum(len(names) for entry in entries for names in entry.invalid.values())
    if options.generation.fail_on_invalid and num_invalid:
        raise UserError(
            f"--fail_on_invalid: {num_invalid} images are NaN, black, of one colour or unreadable; see results.json "
            "for their names"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit status."""
    return run_read(evaluate, read_options, argv)


if __name__ == "__main__":
    leave(main())
