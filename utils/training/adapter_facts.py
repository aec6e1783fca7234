"""Collects what the file of an adapter says about its training."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.data.plan import PlannedImages
from utils.formats.adapter_files import AdapterLayer
from utils.formats.adapter_metadata import AdapterFacts, adapter_metadata, count_tags
from utils.formats.modelspec import ModelFacts
from utils.models.single_file_writer import FileFacts
from utils.training.adapter_export import UiExport
from utils.training.data import TrainingData
from utils.training.options import TrainingOptions
from utils.training.task import Task

if TYPE_CHECKING:
    from utils.training.state import TrainingState


def ui_export(options: TrainingOptions, data: TrainingData, task: Task, state: "TrainingState") -> UiExport:
    """Returns the file for UIs that the run of an adapter writes.

    Args:
        state: the run's state, whose step counts when the file is written.
    """
    exporter = task.adaptation.exporter
    tags = cache(partial(_tags, options, data))

    def metadata(layers: Sequence[AdapterLayer]) -> Mapping[str, str]:
        facts = AdapterFacts(
            model=_model_facts(task, exporter.facts),
            base=exporter.facts.merged_from,
            base_file=_file_of(options.model.pretrained_model_name_or_path),
            zero_snr=bool(task.family.pipeline.scheduler.config.get("rescale_betas_zero_snr")),
            trigger_words=options.adaptation.trigger_words or (),
            tags=tags(),
            training=_training(options, data, state.step),
        )
        return adapter_metadata(layers, facts)

    return UiExport(exporter.facts.title, exporter.form.dtype, metadata)


def _model_facts(task: Task, known: FileFacts) -> ModelFacts:
    """Returns what a file says of the model that it is for."""
    family = task.family
    parts = {part: getattr(family.pipeline, part).config for part in (*family.trainable_names(), "scheduler")}
    configs = {part: config.to_dict() if hasattr(config, "to_dict") else config for part, config in parts.items()}
    return ModelFacts(
        architecture=type(family).original_model(configs).architecture,
        title=known.title,
        resolution=known.resolution,
        prediction_type=getattr(task.process, "prediction_type", None),
        licence=known.licence,
        encoder_layer=known.encoder_layer,
    )


def _file_of(base: str) -> Path | None:
    return Path(base) if Path(base).is_file() else None


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
