"""The summary of a model: its parts, its layers with their shapes, the FLOPs of a step, and the memory at rest."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from utils.config.batch import Conditioning, Crop
from utils.config.options import first_line
from utils.config.user_files import size_text
from utils.models.base import Family
from utils.reports.records import MODEL_SUMMARY
from utils.runtime.processes import write_json
from utils.training.optimizer_table import OPTIMIZERS
from utils.training.options import TrainingOptions
from utils.training.task import Task

logger = logging.getLogger(__name__)
FLOAT32 = 4
TRAINED_PASSES, FROZEN_PASSES = 3, 2


@dataclass(frozen=True)
class Part:
    """A component of the pipeline.

    Attributes:
        name: the pipeline's name for it.
        kind: its class.
        parameters, trained: number of its weights, and of those that train.
        num_bytes: memory of its weights and buffers.
    """

    name: str
    kind: str
    parameters: int
    trained: int
    num_bytes: int


@dataclass(frozen=True)
class ModelSummary:
    """What a model consists of, and what a training step costs.

    Attributes:
        parts: the components with weights.
        layers: (name, class, shape of its weights, number of parameters) of each module that has weights of its own.
        size: (width, height) of the images that the FLOPs are of.
        flops: FLOPs of the forward pass of one sample, by part; a multiplication and an addition are two.
        step_flops: FLOPs of an optimizer step; None if they can't be counted.
        assumption: how `step_flops` follows from `flops`, or why they can't be counted.
        memory: bytes at rest, by what takes them.
    """

    parts: list[Part]
    layers: list[tuple[str, str, str, int]]
    size: tuple[int, int]
    flops: Mapping[str, int] = field(default_factory=dict)
    step_flops: int | None = None
    assumption: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, str]:
        """Returns the totals in words, by name."""
        parts = ", ".join(f"{each.name} {each.parameters:,}" for each in self.parts)
        width, height = self.size
        counted = ", ".join(f"{name} {flops_text(count)}" for name, count in self.flops.items())
        step = "unknown" if self.step_flops is None else flops_text(self.step_flops)
        sizes = ", ".join(f"{name} {size_text(count)}" for name, count in self.memory.items() if count)
        return {
            "parts": f"{sum(each.parameters for each in self.parts):,} parameters: {parts}",
            "forward pass": f"of one image of {width}x{height}: {counted}" if counted else "not counted",
            "step": f"{step}: {self.assumption}",
            "memory at rest": f"{size_text(sum(self.memory.values()))} without activations: {sizes}",
        }

    def record(self) -> dict[str, Any]:
        """Returns the contents of `model_summary.json`."""
        return {
            "parts": [
                {
                    "name": each.name,
                    "class": each.kind,
                    "parameters": each.parameters,
                    "trained": each.trained,
                    "bytes": each.num_bytes,
                    "parameters_text": f"{each.parameters:,}",
                    "trained_text": f"{each.trained:,}",
                    "memory_text": size_text(each.num_bytes),
                }
                for each in self.parts
            ],
            "totals": self.facts(),
            "forward_flops": dict(self.flops),
            "step_flops": self.step_flops,
            "memory_bytes": dict(self.memory),
            "layers": [
                {"name": name, "class": kind, "shape": shape, "parameters": count}
                for name, kind, shape, count in self.layers
            ],
        }

    def write(self, folder: Path) -> Path:
        """Writes `model_summary.json` into a folder, and returns its path."""
        write_json(folder / MODEL_SUMMARY, self.record())
        return folder / MODEL_SUMMARY


def summarize(options: TrainingOptions, task: Task, sizes: list[tuple[int, int]], global_batch: int) -> ModelSummary:
    """Summarizes the model of a task; it computes nothing with the weights, and draws no random numbers.

    Args:
        sizes: (width, height) of the images; the FLOPs are those of the largest.
        global_batch: samples of an optimizer step.
    """
    pipeline = task.family.pipeline
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts = [_part(name, module) for name, module in modules.items()]
    layers = [layer for name, module in modules.items() for layer in _layers(name, module)]
    size = max(sizes, key=lambda each: each[0] * each[1])
    memory = _memory(options, task, parts)
    try:
        flops = _forward_flops(task.family, size)
    except Exception as error:  # a kernel or model that fake tensors do not support: the count is a fact less
        logger.debug("FLOPs can't be counted", exc_info=True)
        return ModelSummary(
            parts, layers, size, assumption=f"FLOPs can't be counted: {first_line(error)}", memory=memory
        )
    total, words = _step_flops(options, task, flops)
    return ModelSummary(parts, layers, size, flops, total * global_batch, f"{global_batch} images x ({words})", memory)


def flops_text(count: float) -> str:
    """Returns a number of FLOPs with its unit."""
    for unit in ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} PFLOPs"


def _part(name: str, module: nn.Module) -> Part:
    tensors = [*module.parameters(), *module.buffers()]
    count = sum(each.numel() for each in module.parameters())
    trained = sum(each.numel() for each in module.parameters() if each.requires_grad)
    return Part(name, type(module).__name__, count, trained, sum(each.nbytes for each in tensors))


def _layers(part: str, module: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if own:
            shape = max((tuple(each.shape) for each in own), key=len)
            whole = f"{part}.{name}" if name else part
            yield whole, type(layer).__name__, " x ".join(map(str, shape)), sum(each.numel() for each in own)


def _memory(options: TrainingOptions, task: Task, parts: list[Part]) -> dict[str, int]:
    """Bytes of the weights, their gradients, the optimizer's state and averages, between two steps."""
    trained = [each for module in task.modules.values() for each in module.parameters() if each.requires_grad]
    count = sum(each.numel() for each in trained)
    averages = int(options.ema.use_ema) + 2 * bool(options.ema.ema_lengths)
    return {
        "weights": sum(each.num_bytes for each in parts),
        "gradients": 0 if options.optimizer.optimizer_in_backward else sum(each.nbytes for each in trained),
        "optimizer": count * OPTIMIZERS[options.optimizer.name].state_bytes,
        "averages": count * FLOAT32 * averages,
    }


def _forward_flops(family: Family, size: tuple[int, int]) -> dict[str, int]:
    """Counts the FLOPs of one sample's forward pass by part, on tensors that have shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    denoiser, width, height = family.denoiser, *size
    dtype = next(each.dtype for each in denoiser.parameters() if each.is_floating_point())
    input_ids, crop = family.tokenizer()([""]), Crop(height, width, 0, 0, height, width).row()
    shape = family.latent_space.shape(size)
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
    }  # torch counts that of GPUs
    found: dict[str, int] = {}

    def counted(name: str, action: Callable[[], Any]) -> Any:
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            result = action()
        if count := counter.get_total_flops():
            found[name] = count
        return result

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        place = next(denoiser.parameters()).device
        dropped = torch.zeros(1, dtype=torch.bool, device=place)
        states = counted("text encoders", lambda: family.encode_text(input_ids.to(place), dropped))
        states = {name: each.to(dtype) if each.is_floating_point() else each for name, each in states.items()}
        noisy = torch.zeros(1, *shape, dtype=dtype, device=place)
        conditioning = Conditioning(states, torch.tensor([crop], device=place))
        timesteps = torch.ones(1, dtype=torch.long, device=place)
        counted("denoiser", lambda: family.predict(denoiser, noisy, timesteps, conditioning))
        if family.coder_names:
            channels = getattr(family.latent_space.vae.config, "in_channels", 3)
            pixels = torch.zeros(1, channels, height, width, dtype=torch.uint8, device=place)
            counted("VAE encoder", lambda: family.latent_space.moments(pixels))
    return found


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of attention, from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


def _step_flops(options: TrainingOptions, task: Task, flops: Mapping[str, int]) -> tuple[int, str]:
    """Returns the FLOPs of one sample in a step, and how they follow from those of its forward passes."""
    passes = TRAINED_PASSES if task.adaptation.trains_base else FROZEN_PASSES
    passes += options.model.gradient_checkpointing
    is_cached = {"text encoders": options.cache.cache_text_embeddings, "VAE encoder": options.cache.cache_latents}
    total, words = 0, []
    for name, count in flops.items():
        times = passes if name == "denoiser" or (name == "text encoders" and task.trains_text_encoders) else 1
        if is_cached.get(name, False):
            continue
        total += times * count
        words.append(f"{times} x {name}")
    why = (
        "a backward pass counts as two forward passes"
        if task.adaptation.trains_base
        else ("a backward pass through frozen weights counts as one forward pass")
    )
    return total, f"{' + '.join(words)}; {why}"
