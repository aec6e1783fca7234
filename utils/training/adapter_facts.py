"""Collects what the file of an adapter says about its training."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.data.plan import PlannedImages
from utils.formats.adapter_files import AdapterLayer
from utils.formats.adapter_metadata import AdapterFacts, adapter_metadata, count_tags
from utils.formats.modelspec import ModelFacts
from utils.training.adapter_export import UiExport
from utils.training.data import TrainingData
from utils.training.options import TrainingOptions
from utils.training.task import Task

if TYPE_CHECKING:
    from utils.training.state import TrainingState


def ui_export(
    options: TrainingOptions, folder: Path, data: TrainingData, task: Task, state: "TrainingState"
) -> UiExport:
    """Returns the file for UIs that the run of an adapter writes.

    Args:
        folder: the run's output folder.
        state: the run's state, whose step counts when the file is written.
    """
    name = folder.resolve().name
    tags = cache(partial(_tags, options, data))

    def metadata(layers: Sequence[AdapterLayer]) -> Mapping[str, str]:
        return adapter_metadata(layers, _facts(options, name, data, task, state.step, tags()))

    return UiExport(name, torch.float32, metadata)


def _facts(
    options: TrainingOptions,
    name: str,
    data: TrainingData,
    task: Task,
    step: int,
    tags: Mapping[str, Mapping[str, int]],
) -> AdapterFacts:
    """Returns what is known of a run after some optimizer steps."""
    family, model = task.family, options.model.pretrained_model_name_or_path
    scheduler = family.pipeline.scheduler.config
    parts = {part: getattr(family.pipeline, part).config for part in (*family.trainable_names(), "scheduler")}
    configs = {part: config.to_dict() if hasattr(config, "to_dict") else config for part, config in parts.items()}
    original = type(family).original_model(configs)
    base = Path(model)
    resolution = data.resolution
    facts = ModelFacts(
        architecture=original.architecture,
        title=name,
        resolution=(resolution, resolution),
        prediction_type=task.process.prediction_type,
        encoder_layer=None if options.model.clip_skip is None else options.model.clip_skip + 1,
    )
    return AdapterFacts(
        model=facts,
        base=base.name if base.exists() else model,
        base_file=base if base.is_file() else None,
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        trigger_words=options.adaptation.trigger_words or (),
        tags=tags,
        training=_training(options, data, step),
    )


def _training(options: TrainingOptions, data: TrainingData, step: int) -> dict[str, object]:
    """Returns the run's settings by sd-scripts' names."""
    images = data.images
    rate, text_rate = options.optimizer.learning_rate, options.optimizer.text_encoder_lr
    trains_text = options.adaptation.train_text_encoder
    return {
        "steps": step,
        "max_train_steps": data.total_steps,
        "num_train_images": len(images.records) if isinstance(images, PlannedImages) else images.num_listed,
        "total_batch_size": data.batches.size,
        "batch_size_per_device": options.loader.train_batch_size,
        "gradient_accumulation_steps": options.loader.gradient_accumulation_steps,
        "learning_rate": rate,
        "unet_lr": rate,
        "text_encoder_lr": (text_rate or rate) if trains_text else None,
        "optimizer": options.optimizer.name,
        "lr_scheduler": options.schedule.lr_scheduler,
        "lr_warmup_steps": options.schedule.lr_warmup_steps,
        "seed": options.runtime.seed,
        "mixed_precision": options.runtime.mixed_precision,
        "noise_offset": options.noise.noise_offset or None,
        "min_snr_gamma": options.loss.snr_gamma,
        "clip_skip": None if options.model.clip_skip is None else options.model.clip_skip + 1,
        "network_dropout": options.adaptation.lora_dropout or None,
        "enable_bucket": data.sizes_vary,
    }


def _tags(options: TrainingOptions, data: TrainingData) -> dict[str, dict[str, int]]:
    """Counts the tags of the captions by folder, if asked for; of a stream nothing is known beforehand."""
    if not options.adaptation.export_tag_frequency or not isinstance(data.images, PlannedImages):
        return {}
    return count_tags(_captions(data.images, options.data_name))


def _captions(images: PlannedImages, name: str) -> Iterator[tuple[str, str]]:
    """Yields (folder, caption) of the images; images in no folder below the source's are of its name."""
    records = images.records
    for index in range(len(records)):
        folder = records.source(index).table.key(int(records.rows[index])).replace("\\", "/").rpartition("/")[0]
        yield folder.rpartition("/")[2] or name, records.captions(index)[0]
