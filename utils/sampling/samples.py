"""Samples that a run draws of itself: what the samplers share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControls

if TYPE_CHECKING:
    from accelerate import Accelerator

LAST = "final"  # folder of the samples of the result
Item = TypeVar("Item")


class Sample(NamedTuple):
    """A drawn image and its caption."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Surroundings:
    """Where and by whom a run's samples are drawn.

    Attributes:
        accelerator: the processes, each of which draws its share.
        folder: the output folder.
        seed: the run's.
        requests: which may break off drawing.
        controls: bounds on what is drawn.
    """

    accelerator: "Accelerator"
    folder: Path
    seed: int
    requests: StopRequests
    controls: SamplingControls = field(default_factory=SamplingControls)

    def seeds(self, count: int) -> list[int]:
        """The seed of each of `count` samples, the same at every time."""
        return [(self.seed + number) % 2**63 for number in range(count)]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this process draws."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def gather(self, drawn: Sequence[tuple[int, Image.Image]]) -> list[tuple[int, Image.Image]]:
        """(number, image) of all processes, in the order of their numbers; for all to call."""
        from accelerate.utils import gather_object

        pixels = [(number, np.asarray(image)) for number, image in drawn]
        return [
            (number, Image.fromarray(each)) for number, each in sorted(gather_object(pixels), key=lambda pair: pair[0])
        ]
