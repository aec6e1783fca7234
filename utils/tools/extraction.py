"""Finds what differs between two pipelines, and approximates it by a LoRA, one layer at a time."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.config.options import UserError
from utils.config.terminal import progress_bar
from utils.formats.adapter_files import AdapterLayer
from utils.formats.adapter_names import Component
from utils.models.loading import names_of
from utils.models.streamed_components import prediction_of
from utils.models.streamed_pipeline import StreamedPipeline
from utils.tools.extract_options import ExtractionOptions
from utils.tools.low_rank import energy_of, factorize
from utils.tools.merging import lora_layer, say_losses

logger = logging.getLogger(__name__)
AT_ONCE = 2**22  # values whose rounding is compared at a time
KEPT = ("license", "resolution", "trigger_phrase", "prediction_type", "usage_hint", "tags")  # fields of ModelSpec


@dataclass
class Left:
    """Differences that a LoRA can't hold.

    Attributes:
        names: the tensors that differ.
        energy: the sum of squares of their differences.
    """

    names: list[str] = field(default_factory=list)
    energy: float = 0.0


def check_alike(base: StreamedPipeline, tuned: StreamedPipeline) -> None:
    """Refuses pipelines of two models, and warns of two prediction types.

    Raises:
        UserError: saying how they differ.
    """
    if base.family is not tuned.family:
        raise UserError(
            f"{tuned.what} is a {tuned.family.pipeline_class_name}, and {base.what} is a "
            f"{base.family.pipeline_class_name}; give two pipelines of one model"
        )
    if prediction_of(base) != prediction_of(tuned):
        logger.warning(
            "%s predicts %s, and %s %s: the LoRA draws right only where that is chosen by hand for the base",
            *(tuned.what, prediction_of(tuned), base.what, prediction_of(base)),
        )
    for part in base.adapted_names:
        mine, theirs = base.shapes(part), tuned.shapes(part)
        odd = sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])
        odd += sorted(name for name in mine.keys() ^ theirs.keys() if part == base.family.denoiser_name)
        if odd:
            raise UserError(
                f"{tuned.what} and {base.what} are of two models: {len(odd)} tensors of the {part} have other shapes "
                f"or are missing in one: {names_of(odd)}"
            )


def extract_layers(
    base: StreamedPipeline, tuned: StreamedPipeline, components: Sequence[Component], asked: ExtractionOptions
) -> list[AdapterLayer]:
    """Returns a LoRA of the differences, and logs what of them it holds.

    Raises:
        UserError: if there is no difference that a LoRA can hold, or values are not finite.
    """
    # Each layer's difference, at the rank that is asked for.
    wanted = [each for each in components if asked.text_encoder or each.name == base.family.denoiser_name]
    left, layers, losses = Left(), [], []
    total = sum(len(base.parts[component.name]) for component in wanted)
    with progress_bar(total=total, desc="extracting", unit="tensor", leave=False) as bar:
        for component in wanted:
            for name, difference in _differences(base, tuned, component.name):
                bar.update()
                layer = name.removesuffix(".weight")
                if difference is None:
                    continue
                if layer == name or layer not in component.shapes:
                    left.names.append(f"{component.name}.{name}")
                    left.energy += energy_of(difference)
                    continue
                factors = factorize(difference, asked.rank, asked.energy)
                layers.append(lora_layer(component.name, layer, factors, component.shapes[layer]))
                losses.append((factors.kept, factors.total))

    # What was found.
    skipped = [each.name for each in components if each not in wanted]
    _say_left(base, tuned, left, sum(whole for _, whole in losses), skipped)
    if not layers:
        raise UserError(f"{tuned.what} has no layer that differs from {base.what}; there is nothing to extract")
    logger.info("%d layers differ; ranks %d to %d", len(layers), *_ends([layer.rank for layer in layers]))
    say_losses(losses, [layer.name for layer in layers])
    return layers


def _ends(ranks: Sequence[int]) -> tuple[int, int]:
    return min(ranks), max(ranks)


def _differences(base: StreamedPipeline, tuned: StreamedPipeline, part: str) -> Iterator[tuple[str, Tensor | None]]:
    """Yields each tensor's name, and its difference in float32; None if there is none but that of dtypes."""
    rounded: dict[str, int] = {}
    for name in base.parts[part]:
        if name not in tuned.parts[part]:
            continue
        one, other = base.parts[part][name].read(), tuned.parts[part][name].read()
        if not one.is_floating_point():
            continue
        if one.dtype == other.dtype and torch.equal(one, other):
            yield name, None
            continue
        difference = other.to(torch.float32, copy=one.dtype != other.dtype).sub_(one)
        if one.dtype != other.dtype and _is_rounding(one, other, difference):
            if bool(difference.any()):
                dtypes = f"{one.dtype} and {other.dtype}".replace("torch.", "")
                rounded[dtypes] = rounded.get(dtypes, 0) + 1
            yield name, None
            continue
        del one, other
        if not math.isfinite(energy_of(difference)):
            raise UserError(f"{tuned.what}: {part}.{name} or that of the base has NaN or infinite values; give others")
        yield name, difference
    for dtypes, count in rounded.items():
        logger.info(
            "%d tensors of the %s differ by no more than the rounding to %s, which counts as none", count, part, dtypes
        )


def _is_rounding(one: Tensor, other: Tensor, difference: Tensor) -> bool:
    """Whether all of a difference can come from the rounding of equal values to two dtypes."""
    flat = (each.flatten().split(AT_ONCE) for each in (one, other, difference))
    return all(bool((lost.abs() <= _rounding(a) + _rounding(b)).all()) for a, b, lost in zip(*flat, strict=True))


def _rounding(tensor: Tensor) -> Tensor:
    """Returns the largest error of rounding to each value of a tensor: half the distance to the next, in float32."""
    facts = torch.finfo(tensor.dtype)
    mantissas, exponents = torch.frexp(tensor.float())
    binades = torch.ldexp(mantissas.fill_(0.5), exponents).clamp_min_(facts.smallest_normal)
    return binades * (facts.eps / 2)


def _say_left(base: StreamedPipeline, tuned: StreamedPipeline, left: Left, held: float, skipped: Sequence[str]) -> None:
    """Logs differences that are not in the LoRA: of norms, biases and embeddings, of the VAE, and what was left out."""
    if left.names:
        logger.warning(
            "a LoRA can't hold the differences of %d tensors, with %.2f %% of all their energy: %s",
            *(len(left.names), 100 * left.energy / (left.energy + held), names_of(left.names)),
        )
    for part in base.parts.keys() & tuned.parts.keys() - set(base.adapted_names) | set(skipped):
        odd = [name for name, difference in _differences(base, tuned, part) if difference is not None]
        if odd:
            logger.warning("the %s differs in %d tensors, which are not in the LoRA: %s", part, len(odd), names_of(odd))


def kept_metadata(tuned: StreamedPipeline) -> dict[str, str]:
    """Returns what a single file says about itself that holds for its LoRA too."""
    said = {} if tuned.file is None else tuned.file.metadata
    return {key: value for key, value in said.items() if key.removeprefix("modelspec.") in KEPT}
