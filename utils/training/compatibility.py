"""Checks that both training scripts share: which options exclude each other or have no effect."""

import atexit
import logging
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from utils.config.first_checks import announce
from utils.config.options import UserError, parse
from utils.config.output_folder import refuse_same_folder
from utils.config.terminal import set_up_logging
from utils.data.captions import CaptionOptions
from utils.data.options import CacheOptions, HeldOutOptions, ImageOptions
from utils.data.source_options import DataOptions, SourceEntry, source_entries
from utils.diffusion.options import LossOptions
from utils.models.options import ATTENTION, CPU_ATTENTION, PartOptions
from utils.runtime.prometheus_options import check_server
from utils.sampling.sample_options import SamplingOptions, ValidationOptions
from utils.training.optimizer_options import WITHOUT_WARMUP, OptimizerOptions, ScheduleOptions
from utils.training.options import (
    EarlyStoppingOptions,
    EmaOptions,
    HubOptions,
    SpeedOptions,
    TrackingOptions,
    TrainingOptions,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
Checked = TypeVar("Checked", bound=TrainingOptions)
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK")
ACCELERATE = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")


def read_checked(kind: type[Checked], argv: Sequence[str] | None, purpose: str, check: Callable) -> Checked:
    """Returns the given options; refuses invalid combinations before torch is loaded.

    Args:
        kind: class of the script's options.
        argv: the arguments; None: those of the command line.
        purpose: what `--help` says of the script.
        check: refuses options that exclude each other, beside those of `check_together`.

    Raises:
        UserError: for an unknown flag, an invalid value, or flags that exclude each other.
    """
    set_up_logging()
    options: Checked = parse(kind, argv, purpose)
    check_together(options)
    check(options)
    announce_run(options)
    return options


def announce_run(options: TrainingOptions) -> None:
    """Refuses a used output folder and logs which model and data are used, before torch is loaded."""
    source, runtime = options.source, options.runtime
    sources = {
        "model": options.model.pretrained_model_name_or_path,
        "data": source.train_data_dir or source.dataset_name or options.data.dataset_file,
    }
    takes_used = bool(options.checkpoint.resume_from_checkpoint) or runtime.overwrite_output_dir
    if runtime.dry_run and not takes_used:
        _refuse_model_folder(options)
    may_be_used = takes_used or runtime.dry_run
    announce(sources, runtime.output_dir, may_be_used)


def _refuse_model_folder(options: TrainingOptions) -> None:
    """Refuses a dry run whose output folder is the model's folder, as the real run would overwrite the model."""
    output, model = options.runtime.output_dir, options.model.pretrained_model_name_or_path
    if output and model and os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(output):
        raise UserError(
            f"--output_dir {output} is the folder of --pretrained_model: the model would be overwritten; choose "
            "another folder"
        )


def check_output_folder(options: TrainingOptions, output: Path) -> None:
    """Refuses an output or cache folder inside the data, where the next run would read this run's results as data.

    Args:
        output: the output folder of the run.
    """
    data = {"validation_data_dir": [options.held_out.validation_data_dir], "eval_reference": []}
    data["eval_reference"].append(options.evaluation.eval_reference)
    entries = source_entries(options.data, options.source, CaptionOptions())
    for name in ("train_data_dir", "dataset_name", "mask_dir"):
        data[name] = [getattr(entry.source, name) for entry in entries]
    written = {
        "output_dir": output,
        "encoding_cache_dir": options.cache.encoding_cache_dir,
        "cache_dir": options.data.cache_dir,
    }
    refuse_same_folder(written, data)


def check_together(options: TrainingOptions) -> None:
    """Refuses options of either training script that exclude each other, and warns of those without effect."""
    captions = options.caption_options
    entries = source_entries(options.data, options.source, captions)
    check_token(options.hub, options.tracking)
    if not (options.runtime.dry_run or options.cache.ends_when_filled):
        check_server(options.tracking)
    if options.optimizer.optimizer_in_backward and options.loader.global_batch_size is not None:
        raise UserError("--optimizer_in_backward updates weights after each batch; leave out --global_batch_size")
    check_optimizer(options.optimizer, options.schedule, options.term.loss_module_lr)
    check_masks(options.loss, entries)
    check_held_out(options.held_out, options.data, options.stopping, options.schedule, options.ema)
    check_timers(options.samples, options.schedule)
    check_cache(options.cache, options.data, options.image, captions)


def check_timers(samples: ValidationOptions | SamplingOptions, schedule: ScheduleOptions) -> None:
    """Refuses a learning rate that would depend on the clock, so that no run could be repeated or resumed exactly."""
    if samples.minutes is not None and schedule.lr_scheduler == "reduce_on_plateau":
        raise UserError(
            f"{samples.minutes_flag} {samples.minutes:g} measures the validation loss by the clock, and --lr_scheduler "
            "reduce_on_plateau follows these measurements, so that no run could be repeated; give an interval in steps "
            "or epochs"
        )


def check_optimizer(options: OptimizerOptions, schedule: ScheduleOptions, term_rate: float | None) -> None:
    """Refuses an optimizer whose package is missing, or that excludes the schedule or `--loss_module_lr`."""
    name, spec = options.name, options.spec
    if spec.package is not None and find_spec(spec.package) is None:
        flag = "--use_8bit_adam" if options.use_8bit_adam else f"--optimizer {name}"
        raise UserError(f"{flag} needs {spec.package}; pip install {spec.package}")
    if spec.schedules is not None and schedule.lr_scheduler not in spec.schedules:
        raise UserError(
            f"--optimizer {name} replaces the schedule; --lr_scheduler must be {' or '.join(spec.schedules)}"
        )
    if spec.has_one_rate and term_rate not in (None, options.learning_rate):
        raise UserError(f"--optimizer {name} uses one learning rate for all weights; leave out --loss_module_lr")
    if spec.has_one_rate and options.learning_rate < 0.1:
        said = "--optimizer %s finds its learning rate itself, and --learning_rate %g multiplies it; try 1"
        logger.warning(said, name, options.learning_rate)
    if schedule.lr_scheduler in WITHOUT_WARMUP and schedule.lr_warmup_steps not in (None, 0, 500):
        logger.warning("--lr_warmup_steps is ignored by --lr_scheduler %s", schedule.lr_scheduler)


def check_stepping(
    options: OptimizerOptions, tracking: TrackingOptions, pure_bf16: bool, accelerator: "Accelerator"
) -> None:
    """Refuses options that can't be combined with updates of one parameter at a time."""
    if pure_bf16 and accelerator.mixed_precision != "bf16":
        raise UserError(f"--pure_bf16 needs --mixed_precision bf16, got {accelerator.mixed_precision}")
    if pure_bf16 and options.spec.has_one_rate:
        raise UserError(f"--optimizer {options.name} needs all gradients at once; leave out --pure_bf16")
    if not options.optimizer_in_backward:
        return
    steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    if steps > 1:
        raise UserError(
            f"--optimizer_in_backward updates after each batch; --gradient_accumulation_steps must be 1, is {steps}"
        )
    if processes > 1:
        raise UserError(f"--optimizer_in_backward works in one process only; there are {processes}")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--optimizer_in_backward can't unscale fp16 gradients; use --mixed_precision bf16 or no")
    if tracking.layer_norm_steps is not None or tracking.histogram_steps is not None:
        raise UserError("--optimizer_in_backward frees the gradients that --layer_norm_steps and --histogram_steps log")


def check_speed(
    options: SpeedOptions, model: PartOptions, steps_in_backward: bool, pure_bf16: bool, accelerator: "Accelerator"
) -> None:
    """Refuses speed options that the device lacks, or that another option rules out."""
    backend, device = options.attention_backend, accelerator.device.type
    if options.compiled is not None and steps_in_backward:
        raise UserError("--optimizer_in_backward frees the gradients that --compile compares; leave one out")
    if options.cuda_graphs and device != "cuda":
        raise UserError(f"--cuda_graphs needs a CUDA device, found {device}; leave it out")
    kernels = {"cuda": tuple(ATTENTION), "cpu": CPU_ATTENTION}.get(device, ())
    if backend is not None and backend not in kernels:
        cure = f"give {' or '.join(kernels)}, or leave it out" if kernels else "leave it out"
        raise UserError(f"--attention_backend {backend} is not available on {device}; {cure}")
    others = ("enable_xformers_memory_efficient_attention", "enable_npu_flash_attention", "attention_slicing")
    other = next((name for name in others if getattr(model, name, False)), None)
    if backend is not None and other is not None:
        raise UserError(f"--attention_backend {backend} has no effect with --{other}; leave one out")
    if options.bf16_weights and (pure_bf16 or accelerator.mixed_precision != "bf16"):
        found = "--pure_bf16" if pure_bf16 else accelerator.mixed_precision
        raise UserError(f"--bf16_weights goes with --mixed_precision bf16, got {found}; leave one out")


def check_token(hub: HubOptions, tracking: TrackingOptions) -> None:
    """Refuses a token on the command line if a tracker would record it or a launcher would print it."""
    if hub.hub_token is None:
        return
    if any(name in os.environ for name in LAUNCHED):
        atexit.unregister(_end_launcher)
        atexit.register(_end_launcher, hub.hub_token)
        raise UserError(
            "--hub_token: launchers print the command line, including the token, when a run fails; leave it out, and "
            "set HF_TOKEN in the environment or run `hf auth login`"
        )
    if set(tracking.trackers) - {"tensorboard"}:
        raise UserError(
            f"--report_to {tracking.report_to} would record the command line with its --hub_token; "
            "run `hf auth login` instead"
        )


def _end_launcher(token: str) -> None:
    """Terminates accelerate's single-process launcher, if its command line contains the token.

    It would print its command line when this process fails, and this process has no other way to prevent that. No
    other process is touched: a shell, torchrun, or a launcher without the token in its command line.
    """
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
            is_accelerate = any(Path(word).name in ACCELERATE for word in words[:3])
            if is_accelerate and any(word in (token, f"--hub_token={token}", f"--hub-token={token}") for word in words):
                parent.terminate()
                return
        except psutil.Error:
            return


def check_masks(options: LossOptions, entries: list[SourceEntry]) -> None:
    """Refuses mask options if no data source has masks."""
    asked = {"--unmasked_weight": options.unmasked_weight > 0, "--normalize_masked_loss": options.normalize_masked_loss}
    if any(asked.values()) and not any(entry.source.has_masks for entry in entries):
        flag = next(flag for flag, is_given in asked.items() if is_given)
        raise UserError(f"{flag} needs images with masks; give --alpha_mask, --mask_dir or --mask_column")


def check_held_out(
    options: HeldOutOptions,
    data: DataOptions,
    stopping: EarlyStoppingOptions,
    schedule: ScheduleOptions,
    ema: EmaOptions,
) -> None:
    """Refuses options that need a validation loss without held-out images, and splits of data that can't be split."""
    needs_loss = {
        "--early_stopping_patience": stopping.early_stopping_patience is not None,
        "--lr_scheduler reduce_on_plateau": schedule.lr_scheduler == "reduce_on_plateau",
    }
    if any(needs_loss.values()) and not options.is_asked:
        flag = next(flag for flag, is_given in needs_loss.items() if is_given)
        raise UserError(f"{flag} needs a validation loss; give --validation_split or --validation_data_dir")
    named_split = options.validation_split is not None and options.fraction is None
    if (named_split and data.dataset_file) or (options.fraction is not None and data.streaming):
        raise UserError(
            "--validation_split goes with neither --dataset_file nor --streaming; give --validation_data_dir"
        )
    if ema.offload_ema and not (ema.use_ema or ema.ema_lengths):
        raise UserError("--offload_ema goes with --use_ema or --ema_lengths; give one, or leave it out")
    if len(ema.ema_lengths or ()) > 1 and not options.is_asked:
        raise UserError(
            "--ema_lengths: choosing among several lengths needs a validation loss; give --validation_split or "
            "--validation_data_dir, or a single length"
        )


def check_cache(cache: CacheOptions, data: DataOptions, image: ImageOptions, captions: CaptionOptions) -> None:
    """Refuses a cache of streamed data, and warns of augmentations that a cache would fix."""
    if data.streaming and (cache.cache_latents or cache.cache_text_embeddings):
        raise UserError("--streaming can't be cached, as its images are not known in advance; leave one out")
    frozen = {
        "crop and flip": cache.cache_latents and image.varies,
        "order of tags": cache.cache_text_embeddings and captions.varies,
    }
    if cache.cache_variants is None and any(frozen.values()):
        what = " and ".join(name for name, is_frozen in frozen.items() if is_frozen)
        logger.warning("the cache fixes one %s per image; --cache_variants 4 alternates between four", what)
