"""Samples drawn during training: what both samplers share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from utils.runtime.step_lines import SampleCount
from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControls

if TYPE_CHECKING:
    from accelerate import Accelerator

LAST = "final"  # folder of the samples of the exported model
Item = TypeVar("Item")


class Sample(NamedTuple):
    """A drawn image.

    Attributes:
        image: the image.
        caption: its prompt or class.
        file: its file relative to the output folder, with slashes.
        negative_prompt: empty for none.
        is_scaled: whether the trained adapter acted at another scale than 1, so that it does not show the result.
    """

    image: Image.Image
    caption: str
    file: str = ""
    negative_prompt: str = ""
    is_scaled: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What drawing during training depends on: processes, folder, seed, stop requests.

    Attributes:
        accelerator: the processes; each draws its share.
        folder: the output folder of the run.
        seed: the seed of the run.
        requests: stop requests, which interrupt drawing.
        controls: sampling controls.
        seen: the training samples seen after each step.
    """

    accelerator: "Accelerator"
    folder: Path
    seed: int
    requests: StopRequests
    controls: SamplingControls = field(default_factory=SamplingControls)
    seen: SampleCount = field(default_factory=SampleCount)

    def seeds(self, count: int) -> list[int]:
        """Returns the seed of each of `count` samples, the same at every step."""
        return [(self.seed + number) % 2**63 for number in range(count)]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Returns the items that this process draws."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def gather(self, drawn: Sequence[tuple[int, Image.Image]]) -> list[tuple[int, Image.Image]]:
        """Returns (number, image) of all processes, sorted by number. All processes must call it."""
        from accelerate.utils import gather_object

        pixels = [(number, np.asarray(image)) for number, image in drawn]
        return [
            (number, Image.fromarray(each)) for number, each in sorted(gather_object(pixels), key=lambda pair: pair[0])
        ]
