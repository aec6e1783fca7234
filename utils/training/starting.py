"""The parts of a run, made of its options before the first step, and what it records of itself."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.config.batch import Batch
from utils.config.options import UserError, as_record, require, without_secrets
from utils.config.terminal import one_line
from utils.data.captions import CaptionOptions
from utils.data.file_listing import OWN, Fate
from utils.data.options import BucketOptions, LoaderOptions
from utils.data.order import GlobalBatches, Pieces
from utils.data.plan import PlannedImages
from utils.data.stream import StreamedBatches, StreamedImages, StreamedPieces
from utils.models.attention import Attention, Recorder, race
from utils.models.base import Family
from utils.models.fused_lora import num_shortened
from utils.models.latent_space import LatentSpace
from utils.models.loss_terms import LossTerm, TermFacts, load_term
from utils.models.options import PerceptualOptions, TermOptions
from utils.models.perceptual_loss import PerceptualLoss
from utils.runtime.engines import Engine, engine_of
from utils.runtime.memory import keep_freed_memory
from utils.runtime.processes import OutputFolder, is_tf32_allowed, on_main_process, start_processes, versions
from utils.runtime.stop_requests import StopRequests
from utils.training.adaptation import Adaptation
from utils.training.backward import Gradients
from utils.training.bf16_weights import HalfCopy
from utils.training.checkpoint import RunFacts, read_state
from utils.training.compatibility import check_output_folder, check_speed, check_stepping
from utils.training.ema import MovingAverage
from utils.training.encoding import Encoder
from utils.training.fast import Part, circumstances, hastened, offer, paying_parts
from utils.training.log import start_trackers
from utils.training.model_card import create_repository
from utils.training.objective import Objective
from utils.training.optimizer_options import WITHOUT_WARMUP, OptimizerOptions, ScheduleOptions
from utils.training.optimizers import STATE_BYTES, NamedParameter, build_optimizer, unwrapped
from utils.training.options import EmaOptions, TrackingOptions
from utils.training.per_parameter import PerParameter
from utils.training.posthoc_ema import AverageLengths
from utils.training.preparation import DataPreparation
from utils.training.speed import Compilation, Passes, as_before, compile_checked, compile_denoiser, compiled_part
from utils.training.state import RunState
from utils.training.step_graph import CudaRecorder, StepGraph, obstacle
from utils.training.validation_loss import HeldOut

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
RACED_ON = ("cuda",)  # devices that have several good kernels for attention


def start_engine(options: Any, folder: OutputFolder, pure_bf16: bool) -> Engine:
    """Joins the processes of the run, and takes the engine it was launched with.

    Args:
        options: all of a script's, by group.

    Raises:
        UserError: if an option does not go with the engine, the processes or the precision.
    """
    loader, tracking = options.loader, options.tracking
    check_output_folder(options, folder.path)
    accelerator = start_processes(
        options.runtime,
        loader.gradient_accumulation_steps,
        tracking.trackers,
        folder.path,
        tracking.logging_dir,
    )
    check_stepping(options.optimizer, tracking, pure_bf16, accelerator)
    check_speed(options.speed, options.model, options.optimizer.optimizer_in_backward, pure_bf16, accelerator)
    engine = engine_of(accelerator)
    engine.check_options(options, options.optimizer.name)
    engine.check_batch(loader.global_batch(accelerator.num_processes))
    return engine


def open_repository(options: Any, accelerator: "Accelerator", folder: OutputFolder) -> str | None:
    """The repository on the Hub that the result is to be uploaded to, created by the main process; for all to call.

    Args:
        options: all of a script's, by group.

    Raises:
        UserError: if it can't be created or written to.
    """
    cache = options.cache
    if options.runtime.dry_run or cache.cache_only or cache.verify_cache:
        return None
    return on_main_process(accelerator, partial(create_repository, folder.path, options.hub))


def prepare_data(
    options: Any,
    captions: CaptionOptions,
    accelerator: "Accelerator",
    folder: OutputFolder,
    requests: StopRequests,
    splits_by_content: bool,
) -> DataPreparation:
    """The options of the data, and what else its preparation needs.

    Args:
        options: all of a script's, by group.
        splits_by_content: whether a portion is held out so that copies of an image stay together.
    """
    return DataPreparation(
        accelerator,
        options.data,
        options.source,
        captions,
        options.selection,
        options.image,
        options.buckets,
        options.cache,
        options.held_out,
        options.runtime.seed,
        None if options.runtime.dry_run else folder.path,
        requests,
        own_folders(options, folder),
        splits_by_content,
    )


def own_folders(options: Any, folder: OutputFolder) -> dict[Path, Fate]:
    """The folders that the run itself writes to, whose files are no data.

    Args:
        options: all of a script's, by group.
    """
    found = {folder.path: Fate(OWN, "the output of this run"), options.cache.folder: Fate(OWN, "the cache of this run")}
    if options.data.cache_dir is not None:
        found[Path(options.data.cache_dir)] = Fate(OWN, "the folder of --cache_dir")
    return found


def measure_on(
    options: Any,
    accelerator: "Accelerator",
    family: Family,
    images: PlannedImages | None,
    text_encoders_train: bool,
    requests: StopRequests,
) -> HeldOut | None:
    """The held-out images, encoded, if there are any.

    Args:
        options: all of a script's, by group.
    """
    if images is None:
        return None
    seed = options.runtime.seed
    return HeldOut(accelerator, family, images, options.stopping, options.image, seed, text_encoders_train, requests)


def samples_at_once(buckets: BucketOptions, loader: LoaderOptions, group_size: int) -> int:
    """How many samples a process takes at once, where memory allows: one bucket's, if there are buckets."""
    if not loader.find_batch_size:
        return loader.train_batch_size
    wanted = loader.train_batch_size * loader.gradient_accumulation_steps
    return min(wanted, group_size) if buckets.use_aspect_ratio_buckets else wanted


def loss_terms(
    perceptual: PerceptualOptions, own: TermOptions, space: LatentSpace, num_timesteps: int
) -> list[LossTerm]:
    """What is added to the loss, as the options ask."""
    facts = TermFacts(space.channels, num_timesteps, space.decode)
    terms: list[LossTerm] = []
    if perceptual.perceptual_weight is not None:
        terms.append(PerceptualLoss(facts, perceptual))
    if own.loss_module is not None:
        terms.append(load_term(own, facts))
    return terms


def own_parameters(
    options: TermOptions, terms: Sequence[LossTerm], rates: OptimizerOptions, scale: float
) -> list[NamedParameter]:
    """What the terms themselves train; `scale` is what `--scale_lr` multiplies learning rates by."""
    rate = rates.learning_rate if options.loss_module_lr is None else options.loss_module_lr * scale
    return [
        NamedParameter(f"loss_module.{name}", parameter, rate)
        for term in terms
        for name, parameter in term.named_parameters()
        if parameter.requires_grad
    ]


def make_optimizer(
    named: list[NamedParameter], rates: OptimizerOptions, pure_bf16: bool, seed: int
) -> torch.optim.Optimizer:
    """The optimizer, which steps parameter by parameter where that was asked for."""
    if pure_bf16 or rates.optimizer_in_backward:
        return PerParameter(named, rates, rates.optimizer_in_backward, seed)
    return build_optimizer(named, rates)


def make_state(
    engine: Engine,
    adaptation: Adaptation,
    objective: Objective,
    own: list[NamedParameter],
    rates: OptimizerOptions,
    ema: EmaOptions,
    folder: OutputFolder,
    facts: RunFacts,
    seed: int,
    attention: Attention,
) -> tuple[torch.nn.Module, RunState]:
    """The model to call for losses, and the state that its steps change.

    Args:
        own: what loss terms train themselves.
        attention: what computes attention.
    """
    named = adaptation.named_parameters(rates)
    optimizer = make_optimizer(named + own, rates, adaptation.options.pure_bf16, seed)
    model, optimizer = engine.prepare(objective, optimizer, rates.clip_norm)
    named = adaptation.named_parameters(rates)  # an engine that spreads weights puts others in their place
    if ema.use_ema:
        limit = f"be at most the run's {facts.total_steps} optimizer steps"
        require(ema.ema_every <= facts.total_steps, "ema_every", ema.ema_every, limit)
    average = MovingAverage([each.parameter for each in named], ema) if ema.use_ema else None
    lengths = AverageLengths(named, ema, folder.path) if ema.ema_lengths else None
    terms = list(objective.terms)
    num_bytes = STATE_BYTES[rates.name] * sum(each.parameter.numel() for each in named + own)
    parts = engine, adaptation, average, lengths, optimizer, named, own, terms, facts, num_bytes
    return model, RunState(*parts, attention=attention)


def make_gradients(
    engine: Engine,
    model: torch.nn.Module,
    encoder: Encoder,
    pieces: Pieces | StreamedPieces,
    loader: LoaderOptions,
    at_once: int,
    start: Path | None,
    seed: int,
    steps_in_backward: bool,
    saving: Mapping[str, bool],
    half_copy: HalfCopy | None,
) -> Gradients:
    """What runs forward and backward; a resumed run takes no more samples at once than memory allowed before.

    Args:
        saving: flags that save memory, in the order to try them, and whether they are given.
    """
    allowed = None if start is None or loader.find_batch_size else read_state(start).samples_at_once
    accelerator = engine.accelerator
    size, batches = loader.global_batch(accelerator.num_processes), len(pieces.slots)
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / size
    return Gradients(
        engine,
        model,
        encoder,
        seed,
        batches,
        sum(len(slots) for slots in pieces.slots),
        scale,
        min(at_once, allowed or at_once),
        engine.can_begin_again and not steps_in_backward,
        [flag for flag, is_given in saving.items() if not is_given],
        half_copy,
    )


def with_fast(
    options: Any, engine: Engine, trains_base: bool, images: PlannedImages | StreamedImages
) -> tuple[Any, list[Part]]:
    """The options with what `--fast` turns on, and the parts that it has turned on, or would.

    Args:
        options: all of a script's, by group.
        trains_base: whether the denoiser's own weights train, in float32.
    """
    here = circumstances(engine, trains_base, len(images.plan.sizes) > 1, options.optimizer.optimizer_in_backward)
    parts = paying_parts(options.speed, here)
    return replace(options, speed=hastened(options.speed, parts)), parts


def hasten(
    options: Any,
    gradients: Gradients,
    denoiser: torch.nn.Module,
    state: RunState,
    num_workers: int,
    draw_batch: Callable[[], Batch],
    sizes_vary: bool,
    fast_parts: Sequence[Part] = (),
) -> None:
    """Compiles the denoiser where that was asked for, has the host keep memory, and names all that is active for speed.

    Args:
        options: all of a script's, by group.
        num_workers: processes that load data for this one.
        draw_batch: gives that by which a compiled denoiser is compared with the plain one.
        sizes_vary: whether batches are of several sizes.
        fast_parts: what `--fast` has turned on, or would.
    """
    speed, accelerator = options.speed, gradients.accelerator
    has_tf32 = accelerator.device.type == "cuda" and is_tf32_allowed()
    draw_once = cache(draw_batch)
    if speed.fast:
        _choose_attention(options, state, lambda: gradients.of(draw_once()), sizes_vary)
    compiled = compiled_part(speed.compiled, denoiser, accelerator.num_processes)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    times_convolutions = speed.cudnn_benchmark and not sizes_vary and not is_deterministic
    if speed.cudnn_benchmark and not times_convolutions:
        why = "images of several sizes" if sizes_vary else "--deterministic"
        logger.warning("--cudnn_benchmark is left off: it does not go with %s", why)
    torch.backends.cudnn.benchmark = times_convolutions
    whole_step = _step_graph(gradients, state, options.optimizer.clip_norm) if speed.cuda_graphs else None
    if compiled is not None:
        is_exact, graphs = accelerator.mixed_precision == "no" and not has_tf32, speed.cuda_graphs and not whole_step
        batch, how = draw_once(), Compilation(compiled, sizes_vary, graphs, speed.activation_memory)
        gradients.settle_gate_scale(batch)
        passes = partial(gradients.of, batch)
        is_optional = speed.fast and any(part.name == "compile" for part in fast_parts)
        if not _compiles(accelerator, denoiser, how, passes, is_exact, is_optional):
            compiled = None
        gradients.owns_memory = graphs and compiled is not None
    gradients.whole_step = whole_step
    inner, num_fused = unwrapped(state.optimizer), num_shortened(gradients.model)
    active = {
        "--cache_latents": options.cache.cache_latents,
        "--cache_text_embeddings": options.cache.cache_text_embeddings,
        f"--dataloader_num_workers {num_workers}": num_workers > 0,
        f"--compile {compiled}": compiled is not None,
        f"--activation_memory {speed.activation_memory}": speed.activation_memory is not None,
        "--cudnn_benchmark": times_convolutions and accelerator.device.type == "cuda",
        "--cuda_graphs (whole steps)": whole_step is not None,
        "--cuda_graphs (passes)": gradients.owns_memory,
        f"--attention_backend {speed.attention_backend}": speed.attention_backend is not None,
        f"attention by {state.attention.raced}": bool(state.attention.raced),
        f"--mixed_precision {accelerator.mixed_precision}": accelerator.mixed_precision != "no",
        "--bf16_weights": speed.bf16_weights,
        "--channels_last": speed.channels_last,
        "--allow_tf32": has_tf32,
        "--keep_freed_memory": _keeps_memory(speed.keep_freed_memory, accelerator.device.type),
        f"--fused_lora ({num_fused} layers)": num_fused > 0,
        "--fused_adamw": isinstance(inner, torch.optim.AdamW) and bool(inner.defaults.get("fused")),
        "--foreach_ema": options.ema.use_ema and options.ema.foreach_ema,
        f"--ema_every {options.ema.ema_every}": options.ema.ema_every > 1,
        f"--logging_steps {options.tracking.logging_steps}": options.tracking.logging_steps > 1,
        "DDP's static graph, gradients as bucket views": gradients.has_static_graph,
    }
    logger.info("active for speed: %s", ", ".join(name for name, is_active in active.items() if is_active) or "nothing")
    offer(speed, fast_parts)


def _step_graph(gradients: Gradients, state: RunState, max_norm: float) -> StepGraph | None:
    """What takes whole steps by CUDA graphs, if they can be recorded."""
    why = obstacle(gradients, state)
    if why:
        logger.warning("--cuda_graphs: steps are not recorded as a whole: %s", why)
        return None
    return StepGraph(CudaRecorder(), gradients, state, max_norm)


def _choose_attention(options: Any, state: RunState, passes: Passes, sizes_vary: bool) -> None:
    """Takes the kernel that is the fastest at this run's attention on a GPU, or that which was when the run began.

    Args:
        options: all of a script's, by group.
        passes: runs a batch forward and backward.
    """
    accelerator, attention = state.accelerator, state.attention
    is_asked = options.speed.attention_backend is not None or torch.are_deterministic_algorithms_enabled()
    if accelerator.device.type not in RACED_ON or is_asked or state.engine.spreads:
        return
    winner = attention.raced
    if winner is None:
        with Recorder() as recorder, passes():
            pass
        kernels = [name for name in ("flash", "efficient", "cudnn") if not (name == "cudnn" and sizes_vary)]
        run = partial(race, recorder.calls, kernels, accelerator.device)
        winner = on_main_process(accelerator, run) if recorder.calls else ""
    if winner:
        logger.info("--fast takes the kernel %s for attention, the fastest at these sizes", winner)
    attention.take(winner)


def _compiles(
    accelerator: "Accelerator",
    denoiser: torch.nn.Module,
    how: Compilation,
    passes: Passes,
    is_exact: bool,
    is_optional: bool,
) -> bool:
    """Compiles a denoiser in all processes; gives whether that could be done, where it is optional.

    Raises:
        UserError: as `compile_checked`, where it is not.
    """
    try:
        on_main_process(accelerator, partial(compile_checked, denoiser, how, passes, is_exact))
    except UserError as error:
        if not is_optional:
            raise
        logger.warning("--fast leaves out --compile %s: %s", how.what, str(error).removeprefix("--compile: "))
        as_before(denoiser)
        return False
    if not accelerator.is_main_process:  # where gradients would be the same, and host memory is shared
        compile_denoiser(denoiser, how)
        with passes():
            pass
    return True


def _keeps_memory(asked: bool | None, device: str) -> bool:
    """Has the host keep what is freed, as asked for, or by itself where training is on a CPU; whether it does."""
    if asked is False or (asked is None and device != "cpu"):
        return False
    is_kept = keep_freed_memory()
    if asked and not is_kept:
        logger.warning("--keep_freed_memory does nothing here: it is for glibc")
    return is_kept


def describe_run(
    model: str,
    adaptation: str,
    modules: Mapping[str, torch.nn.Module],
    noise: str,
    accelerator: "Accelerator",
    images: PlannedImages | StreamedImages,
    held_out: PlannedImages | None,
    batches: GlobalBatches | StreamedBatches,
    total_steps: int,
    loader: LoaderOptions,
    rates: OptimizerOptions,
    schedule: ScheduleOptions,
) -> str:
    """What trains on what and for how long, a fact a line: what `--dry_run` prints.

    Args:
        model, adaptation: what is trained from and how, in words.
        modules: those that train.
        noise: what is predicted and how noise is added, in words.
    """
    trained = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in modules.items()
    }
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    sizes = f"{loader.train_batch_size} x {loader.gradient_accumulation_steps} accumulated"
    if loader.global_batch_size is not None:
        sizes = f"at most {loader.train_batch_size} at once"
    has_warmup = schedule.lr_scheduler not in WITHOUT_WARMUP and schedule.lr_warmup_steps
    warmup = f" after {schedule.lr_warmup_steps} steps of warm-up" if has_warmup else ""
    epochs = float(total_steps * batches.size / batches.samples_per_epoch)
    facts = {
        "model": model,
        "adaptation": f"{adaptation}, {sum(trained.values()):,} parameters train: {parts}",
        "noise": noise,
        "precision": f"{accelerator.mixed_precision} on {accelerator.num_processes} x {accelerator.device.type}",
        "data": images.describe() + ("" if held_out is None else f"; {len(held_out.records):,} held out"),
        "resolution": ", ".join(f"{width}x{height}" for width, height in images.plan.sizes),
        "global batch": f"{batches.size} = {sizes} x {accelerator.num_processes} processes",
        "length": f"{total_steps:,} optimizer steps = {epochs:.2f} epochs",
        "optimizer": f"{rates.name}, {schedule.lr_scheduler} at {rates.learning_rate:g}{warmup}",
    }
    return "\n".join(f"  {name:<14} {one_line(fact)}" for name, fact in facts.items())


def open_records(options: Any, accelerator: "Accelerator", folder: OutputFolder, tracking: TrackingOptions) -> None:
    """Writes what the run was made with, and opens the trackers.

    Args:
        options: all of a script's, by group.
    """
    record = as_record(options)
    if accelerator.is_main_process:
        folder.record(record, versions(), without_secrets(sys.argv))
    start_trackers(accelerator, tracking, record)


def card_settings(options: Any, total_steps: int, global_batch: int, resolution: int) -> list[tuple[str, object]]:
    """The settings that a model card names.

    Args:
        options: all of a script's, by group.
    """
    return [
        ("optimizer steps", total_steps),
        ("global batch", global_batch),
        ("learning rate", options.optimizer.learning_rate),
        ("resolution", resolution),
        ("mixed precision", options.runtime.mixed_precision or "as launched"),
        ("seed", options.runtime.seed),
    ]


def data_name(options: Any) -> str:
    """What a model card calls the data.

    Args:
        options: all of a script's, by group.
    """
    source = options.source
    return source.dataset_name or Path(source.train_data_dir or options.data.dataset_file).name
