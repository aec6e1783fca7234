"""The options of train_text_to_image.py, and which combinations are refused."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.models.options import ModelOptions
from utils.sampling.sample_options import ValidationOptions
from utils.training.compatibility import read_checked
from utils.training.options import RECOMPUTING, AdaptationOptions, TrainingOptions

logger = logging.getLogger(__name__)
PURPOSE = "Fine-tunes Stable Diffusion 1.x, 2.x or SDXL on images with captions: all weights or LoRA."


@dataclass(frozen=True)
class Options(TrainingOptions):
    """All options of the script: the shared groups, some replaced with this script's own."""

    model: ModelOptions
    adaptation: AdaptationOptions
    captions: CaptionOptions
    samples: ValidationOptions

    @property
    def memory_savers(self) -> dict[str, bool]:
        """Flags that save memory, in the order to try them, and whether each is given."""
        return {
            RECOMPUTING: self.model.gradient_checkpointing,
            "--cache_latents --cache_text_embeddings": self.cache.cache_latents and self.cache.cache_text_embeddings,
            "--use_8bit_adam": self.optimizer.name != "adamw",
            "--adaptation lora": self.adaptation.adaptation != "full",
            "--quantize_base nf4": self.adaptation.adaptation != "lora" or self.adaptation.quantize_base is not None,
        }


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options; see `read_checked`."""
    return read_checked(Options, argv, PURPOSE, check_options)


def check_options(options: Options) -> None:
    """Refuses options that exclude each other, and warns of those without effect."""
    if options.model.unet_config is not None and options.adaptation.adaptation != "full":
        raise UserError(
            "--unet_config starts from a random UNet, whose weights adapters would not train; leave one out"
        )
    adaptation = options.adaptation
    if options.export.export_single_file and adaptation.adaptation == "lora" and not adaptation.export_fused:
        raise UserError(
            "--export_single_file writes a whole pipeline, which --adaptation lora only exports with --export_fused; "
            "add that"
        )
    check_scales(options)
    text_rates = (options.optimizer.text_encoder_lr, options.optimizer.text_encoder_2_lr)
    if any(rate is not None for rate in text_rates) and not options.adaptation.train_text_encoder:
        raise UserError("--text_encoder_lr goes with --train_text_encoder; give both or neither")
    if options.evaluation.eval_metrics and options.model.sampling_cpu_offload:
        raise UserError("--eval_metrics needs the whole pipeline on the device; leave out --sampling_cpu_offload")
    if options.cache.cache_text_embeddings and options.adaptation.train_text_encoder:
        raise UserError(
            "--cache_text_embeddings would cache text states that --train_text_encoder changes; leave one out"
        )
    if options.adaptation.train_text_encoder and options.model.clip_skip and options.adaptation.adaptation == "full":
        logger.warning("--clip_skip %d: the skipped text encoder layers do not train", options.model.clip_skip)


def check_scales(options: Options) -> None:
    """Refuses prompts that scale an adapter where none trains, or one that can't be scaled."""
    adaptation, samples = options.adaptation, options.samples
    has_adapter = adaptation.adaptation != "full"
    for row in samples.rows:
        if row.lora_scale is None or (has_adapter and (row.lora_scale == 1 or not adaptation.use_dora)):
            continue
        where = f"{samples.prompts_flag} {samples.validation_prompts_file}, {row.place}"
        why = "the norm of a DoRA contains its scale" if has_adapter else "--adaptation full trains no adapter"
        cure = "leave it out" if has_adapter else "leave it out, or give --adaptation lora"
        raise UserError(f"{where}: lora_scale {row.lora_scale:g}: {why}; {cure}")
