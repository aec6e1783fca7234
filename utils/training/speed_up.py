"""Preparations before the first step: tries the largest batch, and applies the speed options."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

import torch

from utils.config.options import UserError
from utils.models.attention import Recorder, race
from utils.models.fused_lora import num_shortened
from utils.runtime.memory import keep_freed_memory
from utils.runtime.processes import is_tf32_allowed, on_main_process
from utils.training.backward import Gradients, setting
from utils.training.data import Feed, TrainingData
from utils.training.fast import Part, circumstances, hastened, offer, paying_parts
from utils.training.optimizers import unwrapped
from utils.training.options import SpeedOptions, TrainingOptions
from utils.training.session import Session
from utils.training.speed import Compilation, Passes, as_before, compile_checked, compile_denoiser, compiled_part
from utils.training.state import TrainingState
from utils.training.step_graph import CudaRecorder, StepGraph, obstacle
from utils.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
RACED_ON = ("cuda",)  # devices with several competitive attention kernels
AnyOptions = TypeVar("AnyOptions", bound=TrainingOptions)


def with_fast(options: AnyOptions, session: Session, data: TrainingData) -> tuple[AnyOptions, list[Part]]:
    """Returns the options with the parts that `--fast` turns on, and these parts (without `--fast`: would turn on)."""
    steps_in_backward = options.optimizer.optimizer_in_backward
    here = circumstances(session.engine, options.adaptation.trains_base, data.sizes_vary, steps_in_backward)
    parts = paying_parts(options.speed, here)
    return replace(options, speed=hastened(options.speed, parts)), parts


def prepare_steps(
    options: TrainingOptions,
    task: Task,
    state: TrainingState,
    gradients: Gradients,
    feed: Feed,
    fast_parts: Sequence[Part],
) -> None:
    """Runs the largest batch once, so that running out of memory shows before the first step; applies speed options.

    Args:
        fast_parts: parts that `--fast` has turned on, or would turn on.

    Raises:
        UserError: if memory does not suffice for one sample, or the denoiser can't be compiled.
    """
    task.adaptation.train_mode()
    largest = feed.largest(options.perceptual.perceptual_min_timestep)
    logger.info("running the largest batch once to check that it fits into memory")
    gradients.rehearse(largest, state.holding_optimizer_state)
    speed_up(options, task, state, gradients, feed, fast_parts)
    if options.loader.find_batch_size:
        uses_buckets = options.buckets.use_aspect_ratio_buckets
        groups = f" --bucket_group_size {feed.group_size}" if uses_buckets else ""
        logger.info("--find_batch_size: keep %s%s", setting(gradients.size, gradients.num_samples), groups)


def speed_up(
    options: TrainingOptions,
    task: Task,
    state: TrainingState,
    gradients: Gradients,
    feed: Feed,
    fast_parts: Sequence[Part],
) -> None:
    """Applies the speed options that need a batch, such as compiling, and logs all active ones.

    A compiled denoiser is compared with the uncompiled one on a batch of the largest size.
    """
    speed, accelerator, denoiser = options.speed, gradients.accelerator, task.family.denoiser
    sizes_vary = len(feed.dataset.sizes) > 1
    has_tf32 = accelerator.device.type == "cuda" and is_tf32_allowed()
    largest = partial(feed.largest, options.perceptual.perceptual_min_timestep)
    draw_once = cache(lambda: feed.dataset.with_draws(largest()))
    # The fastest attention kernel.
    if speed.fast:
        _choose_attention(speed, state, lambda: gradients.of(draw_once()), sizes_vary)
    # The fastest convolutions, if there is only one image size.
    compiled = compiled_part(speed.compiled, denoiser, accelerator.num_processes)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    times_convolutions = speed.cudnn_benchmark and not sizes_vary and not is_deterministic
    if speed.cudnn_benchmark and not times_convolutions:
        why = "images of several sizes" if sizes_vary else "--deterministic"
        logger.warning("--cudnn_benchmark has no effect with %s", why)
    torch.backends.cudnn.benchmark = times_convolutions
    # CUDA graphs of whole steps, and the compiled denoiser.
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
    # Log what is active.
    inner, num_fused = unwrapped(state.optimizer), num_shortened(gradients.model)
    active = {
        "--cache_latents": options.cache.cache_latents,
        "--cache_text_embeddings": options.cache.cache_text_embeddings,
        f"--dataloader_num_workers {feed.num_workers}": feed.num_workers > 0,
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


def _step_graph(gradients: Gradients, state: TrainingState, max_norm: float) -> StepGraph | None:
    """Returns the CUDA graphs of whole steps; None, with a warning, if steps can't be recorded."""
    why = obstacle(gradients, state)
    if why:
        logger.warning("--cuda_graphs: whole steps can't be recorded: %s", why)
        return None
    return StepGraph(CudaRecorder(), gradients, state, max_norm)


def _choose_attention(speed: SpeedOptions, state: TrainingState, passes: Passes, sizes_vary: bool) -> None:
    """Sets the fastest attention kernel for this run's shapes on a GPU; a resumed run keeps its first choice.

    Args:
        passes: runs a batch forward and backward.
    """
    accelerator, attention = state.accelerator, state.attention
    is_asked = speed.attention_backend is not None or torch.are_deterministic_algorithms_enabled()
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
        logger.info("--fast chooses the attention kernel %s, the fastest at these sizes", winner)
    attention.take(winner)


def _compiles(
    accelerator: "Accelerator",
    denoiser: torch.nn.Module,
    how: Compilation,
    passes: Passes,
    is_exact: bool,
    is_optional: bool,
) -> bool:
    """Compiles a denoiser in all processes; returns whether it did.

    Args:
        is_optional: whether to leave it out if it fails, with a warning.

    Raises:
        UserError: as `compile_checked`, unless it is optional.
    """
    try:
        on_main_process(accelerator, partial(compile_checked, denoiser, how, passes, is_exact))
    except UserError as error:
        if not is_optional:
            raise
        logger.warning("--fast leaves out --compile %s: %s", how.what, str(error).removeprefix("--compile: "))
        as_before(denoiser)
        return False
    if not accelerator.is_main_process:  # no second check: gradients are the same, and processes share host memory
        compile_denoiser(denoiser, how)
        with passes():
            pass
    return True


def _keeps_memory(asked: bool | None, device: str) -> bool:
    """Keeps freed host memory if requested, or by default on a CPU; returns whether it does."""
    if asked is False or (asked is None and device != "cpu"):
        return False
    is_kept = keep_freed_memory()
    if asked and not is_kept:
        logger.warning("--keep_freed_memory has no effect here: it needs glibc")
    return is_kept
