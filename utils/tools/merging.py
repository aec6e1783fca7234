"""Merges adapters: into a base's weights, read tensor by tensor, or into one LoRA."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from utils.config.options import UserError
from utils.config.terminal import progress_bar
from utils.formats.adapter_files import KINDS, AdapterLayer, updated
from utils.formats.streaming import StreamedTensor
from utils.models.streamed_pipeline import StreamedPipeline, Weights
from utils.tools.low_rank import Factors, factorize, relative_error, shortened

logger = logging.getLogger(__name__)
Key = tuple[str, str]
"""A layer: (component, name)."""


@dataclass(frozen=True)
class Update:
    """An adapter's update of a layer, and the strength that it is merged with."""

    layer: AdapterLayer
    strength: float

    @property
    def is_plain(self) -> bool:
        """Whether it is a LoRA without a magnitude, whose factors can be concatenated."""
        return self.layer.kind == "lora" and "magnitude" not in self.layer.tensors


def updates_of(adapters: Sequence[tuple[Sequence[AdapterLayer], float]]) -> dict[Key, list[Update]]:
    """Returns the updates of each layer, given the layers and the strength of each adapter."""
    found: dict[Key, list[Update]] = {}
    for layers, strength in adapters:
        for layer in layers:
            found.setdefault((layer.component, layer.name), []).append(Update(layer, strength))
    return found


def merged_pipeline(
    pipeline: StreamedPipeline, updates: dict[Key, list[Update]], dtype: torch.dtype | None = None
) -> StreamedPipeline:
    """Returns the pipeline with the sum of all updates in its weights, each computed when it is read.

    Args:
        pipeline: the base.
        updates: the updates of each layer.
        dtype: dtype of the sums, which are rounded once; None for that of the base.
    """
    parts: dict[str, Weights] = {}
    for (component, name), own in updates.items():
        weights = parts.setdefault(component, dict(pipeline.parts[component]))
        base = weights[f"{name}.weight"]
        target = dtype or (base.dtype if base.dtype.itemsize > 1 else torch.float32)
        read = partial(_read_merged, base, own, target, f"{component}.{name}.weight")
        weights[f"{name}.weight"] = replace(base, dtype=target, read=read)
    return pipeline.with_parts(parts)


def _read_merged(base: StreamedTensor, updates: Sequence[Update], dtype: torch.dtype, name: str) -> Tensor:
    """Returns a weight with all updates in a dtype, rounded once.

    Raises:
        UserError: if values are not finite that were in the base.
    """
    weight = base.read()
    merged = updated(weight, [(each.layer, each.strength) for each in updates]).to(dtype)
    require_finite(merged, name, weight)
    return merged


def require_finite(values: Tensor, name: str, before: Tensor | None = None) -> None:
    """Refuses sums that are not finite; those of values that were not before are left to others.

    Raises:
        UserError: naming the tensor.
    """
    if bool(values.isfinite().all()):
        return
    bad = ~values.isfinite() if before is None else ~values.isfinite() & before.isfinite()
    if count := int(bad.sum()):
        largest = (
            f"beyond {torch.finfo(values.dtype).max:.5g}, the largest of {str(values.dtype).removeprefix('torch.')}"
        )
        cure = "give smaller scales" + (", or --dtype bf16 or fp32" if values.dtype == torch.float16 else "")
        raise UserError(f"--lora: merging makes {count:,} values of {name} {largest}, or NaN; {cure}")


def merged_lora(pipeline: StreamedPipeline, updates: dict[Key, list[Update]], rank: int | None) -> list[AdapterLayer]:
    """Returns one LoRA with the sum of all updates.

    Args:
        pipeline: the base.
        updates: the updates of each layer.
        rank: largest rank of a layer, for the best approximation; None to concatenate all ranks, which is exact.

    Raises:
        UserError: if updates are not LoRA, and there is no rank.
    """
    others = sorted({_kind(each) for own in updates.values() for each in own if not each.is_plain})
    if others and rank is None:
        raise UserError(
            f"--to lora: {' and '.join(others)} can't be concatenated to a LoRA; give --rank, to approximate the "
            "sum, or leave --to out, to merge it into the pipeline"
        )
    found: list[AdapterLayer] = []
    losses: list[tuple[float, float]] = []
    names: list[str] = []
    for (component, name), own in progress_bar(updates.items(), desc="merging", unit="layer", leave=False):
        shape = own[0].layer.shape
        factors = _concatenated(own) if all(each.is_plain for each in own) else None
        if rank is not None and (factors is None or factors.rank > rank):
            base = pipeline.parts[component][f"{name}.weight"]
            factors = shortened(factors.up, factors.down, rank) if factors else factorize(_sum(base, own), rank)
            losses.append((factors.kept, factors.total))
            names.append(name)
        found.append(lora_layer(component, name, factors, shape))
    if rank is not None and not losses:
        logger.info("--rank %d is no less than the sum of ranks of any layer: the result is exact", rank)
    elif losses:
        say_losses(losses, names)
        logger.info("%d of %d layers are approximated; the others are exact", len(losses), len(found))
    return found


def _kind(update: Update) -> str:
    """Returns what users call an update that is no plain LoRA."""
    return "DoRA" if update.layer.kind == "lora" else KINDS[update.layer.kind]


def _sum(base: StreamedTensor, updates: Sequence[Update]) -> Tensor:
    weight = base.read() if any("magnitude" in each.layer.tensors for each in updates) else None
    found = sum((each.strength * each.layer.change(weight) for each in updates), start=torch.zeros(base.shape))
    require_finite(found, _name_of(updates))
    return found


def _name_of(updates: Sequence[Update]) -> str:
    return f"{updates[0].layer.component}.{updates[0].layer.name}"


def _concatenated(updates: Sequence[Update]) -> Factors:
    """Returns the factors of all updates side by side; strength and scale are multiplied into the up matrices."""
    ups = [each.layer.tensors["up"].float() * (each.layer.scale * each.strength) for each in updates]
    downs = [each.layer.tensors["down"].float() for each in updates]
    up = torch.cat(ups, dim=1)
    require_finite(up, _name_of(updates))
    return Factors(up, torch.cat(downs), 1.0, 1.0)


def lora_layer(component: str, name: str, factors: Factors, shape: tuple[int, ...]) -> AdapterLayer:
    """Returns a LoRA layer of factors, with its rank as alpha."""
    tensors = {"down": factors.down, "up": factors.up}
    return AdapterLayer(component, name, "lora", tensors, factors.rank, float(factors.rank), shape)


def say_losses(losses: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Logs what an approximation loses, relative to the whole, overall and in the worst layer.

    Args:
        losses: pairs (kept, total) of sums of squares, by layer.
    """
    total = sum(whole for _, whole in losses)
    kept = sum(min(each, whole) for each, whole in losses)
    worst, name = max(zip((relative_error(*each) for each in losses), names, strict=True), default=(0.0, ""))
    logger.info(
        "the rank holds %.2f %% of the energy of the updates; relative error %.4f overall, and at most %.4f, in %s",
        *(100 * (kept / total if total else 1.0), relative_error(kept, total), worst, name),
    )
