"""A drawn image with what it shows."""

from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    pass


class Sample(NamedTuple):
    """A drawn image and its caption."""

    image: Image.Image
    caption: str
