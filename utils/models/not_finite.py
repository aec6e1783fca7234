"""Finds the source of NaN in samples: the first value that is not finite, checked without waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Place(NamedTuple):
    """A checked value: its name, the sampling step, and whether it is finite (a tensor on its device)."""

    name: str
    step: int
    is_finite: Tensor


class Watch:
    """Inputs and outputs of the denoiser in one call of a pipeline, in order."""

    def __init__(self, scheduler_name: str):
        self._scheduler_name = scheduler_name
        self._places: list[Place] = []
        self._step = 0

    def forget(self) -> None:
        """Starts over, for another call of the pipeline."""
        self._places, self._step = [], 0

    def before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the denoiser."""
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        if self._step == 0:
            self._look("text", named.get("encoder_hidden_states"))
        self._look("sample", named.get("sample", named.get("hidden_states")))

    def after(self, _: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the denoiser."""
        self._look("prediction", output[0] if isinstance(output, tuple) else getattr(output, "sample", None))
        self._step += 1

    def _look(self, name: str, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            self._places.append(Place(name, self._step, value.detach().isfinite().all()))

    def blame(self) -> str:
        """Explains where the NaN values in samples come from, and what to do."""
        if not self._places:
            return "the denoiser's samples are NaN or infinite: they are black; its weights have diverged"
        found = next((place for place in self._places if not bool(place.is_finite)), None)
        if found is not None and found.name == "text":
            return (
                "the text embeddings are NaN or infinite: samples are black; use --mixed_precision bf16, or give "
                "other text encoders"
            )
        if found is not None and found.name == "prediction":
            return (
                f"the denoiser's prediction is NaN or infinite from step {found.step + 1} on: samples are black; its "
                "weights have diverged, or overflow in fp16"
            )
        number = self._step if found is None else found.step
        if number == 0:
            return "the initial noise of sampling is NaN or infinite: samples are black; change the scheduler"
        return (
            f"step {number} of the {self._scheduler_name} turns finite predictions into NaN or infinite values: "
            "samples are black; change its config, or give the pipeline another scheduler"
        )


@contextmanager
def watching(pipeline: "DiffusionPipeline") -> Iterator[Watch]:
    """Context manager: checks the values that pass through the pipeline's denoiser."""
    watch = Watch(type(pipeline.scheduler).__name__)
    denoiser = getattr(pipeline, "unet", None)
    denoiser = getattr(pipeline, "transformer", None) if denoiser is None else denoiser
    handles = []
    if isinstance(denoiser, nn.Module):
        handles.append(denoiser.register_forward_pre_hook(watch.before, with_kwargs=True))
        handles.append(denoiser.register_forward_hook(watch.after))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
