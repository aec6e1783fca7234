"""Masks that weight the loss within an image: its alpha channel, or a mask file or column (white counts fully)."""

import contextlib
import filecmp
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.config.batch import MaskFile
from utils.config.options import require
from utils.config.user_files import read_bytes
from utils.data.crop_plan import Cut
from utils.data.folders import list_images
from utils.data.images import Refused
from utils.data.tables import ImageTable

MASK_LABEL = "-masklabel"  # suffix that OneTrainer appends to an image's name to name its mask
MASK_ENDING = re.compile(r"([-_. ]|(?<=[0-9]))(masks?|masklabel|matte)$")
MASK_FOLDER = re.compile(r"/(masks?|mattes?)$")
MASK_WORD = re.compile("mask|matte", re.IGNORECASE)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos")
ASPECT_TOLERANCE = 0.02
logger = logging.getLogger(__name__)


class AlphaMasks:
    """Masks from each image's own alpha channel; opaque parts count."""

    name = "alpha"

    def of(self, table: ImageTable, row: int) -> MaskFile:
        """Returns a marker for the image's own alpha channel."""
        return MaskFile(b"", is_alpha=True)


class ColumnMasks:
    """Masks from a column of the table."""

    def __init__(self, column: str):
        self.name = f"column {column}"

    def of(self, table: ImageTable, row: int) -> MaskFile | None:
        """Returns the mask of a row, or None if it has none."""
        mask = table.mask(row)
        return MaskFile(mask, is_alpha=False) if mask else None


class FolderMasks:
    """Masks in a folder, named as their images with any file extension; `a-masklabel.png` is a mask of `a.jpg`.

    If an image has several masks, copies of the image itself are ignored, and the one with the image's own extension
    is used. If there is none, the image counts as unreadable.

    Raises:
        UserError: if the folder holds no masks.
    """

    def __init__(self, folder: Path, data_folder: Path | None = None):
        """`data_folder` holds the images; if it is `folder` too, only files named NAME-masklabel are masks."""
        self.name = f"folder {folder.resolve()}"
        self._folder = folder
        names, wanted = list_images(folder, "mask_dir"), "hold mask images"
        if data_folder is not None and data_folder.resolve() == folder.resolve():
            names = [name for name in names if _is_labelled(name)]
            wanted = f"hold masks called NAME{MASK_LABEL}.png, as it is also the image folder"
        require(bool(names), "mask_dir", folder, wanted)
        self._names = _by_image(names)
        self._chosen: dict[str, MaskFile] = {}  # for images with several masks, so that bytes are compared only once
        several = [found for found in self._names.values() if len(found) > 1]
        if several:
            logger.warning(
                "--mask_dir %s: %d images have several masks, such as %s; copies of the image itself are ignored, and "
                "each image uses the mask with its own file extension, or is skipped if there is none",
                *(folder, len(several), " and ".join(several[0])),
            )

    def of(self, table: ImageTable, row: int) -> MaskFile | None:
        """Returns the mask with the image's name, or None if there is none."""
        return self.named(table.key(row), lambda: table.image(row))

    def named(self, key: str, image: Callable[[], str | bytes]) -> MaskFile | None:
        """Returns the mask of an image, or None if there is none.

        Args:
            key: the image's path within its source.
            image: returns the image's path or bytes; called only if there are several masks to compare it with.
        """
        found = self._names.get(_plain(_stem(key)), [])
        found = [name for name in found if _image_of(name) == _stem(key)] or found
        if len(found) <= 1:
            return self._file(found[0]) if found else None
        if key not in self._chosen:
            self._chosen[key] = self._choose(found, key, image)
        return self._chosen[key]

    def _choose(self, found: Sequence[str], key: str, image: Callable[[], str | bytes]) -> MaskFile:
        """Chooses one of several masks of an image."""
        masks = [name for name in found if not _is_copy(str(self._folder / name), image)]
        if not masks:
            refusal = Refused(f"{' and '.join(found)} are copies of it, not masks; save its mask under its name")
            return MaskFile(refusal, is_alpha=False)
        alike = [name for name in masks if _ending(name) == _ending(key)] if len(masks) > 1 else masks
        if len(alike) == 1:
            return self._file(alike[0])
        return MaskFile(Refused(f"{' and '.join(masks)} are its masks; keep one"), is_alpha=False)

    def _file(self, name: str) -> MaskFile:
        return MaskFile(str(self._folder / name), is_alpha=False)


def _is_copy(file: str, image: Callable[[], str | bytes]) -> bool:
    """Whether a file has the same bytes as an image; False if it can't be read, which is reported elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        return have_same_bytes(file, image())
    return False


def have_same_bytes(mask: str | bytes, image: str | bytes) -> bool:
    """Whether a mask, by its path or bytes, is a copy of an image.

    Raises:
        OSError, ValueError: if a file can't be read.
    """
    if isinstance(mask, str) and isinstance(image, str):
        return filecmp.cmp(mask, image, shallow=False)
    if isinstance(mask, bytes) and isinstance(image, bytes):
        return mask == image
    path, content = (mask, image) if isinstance(mask, str) else (image, mask)
    return os.path.getsize(path) == len(content) and read_bytes(Path(path), len(content)) == content


def _by_image(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the masks of each image by its path without extension; names with -masklabel take precedence."""
    plain, labelled = defaultdict(list), defaultdict(list)
    for name in names:
        (labelled if _is_labelled(name) else plain)[_plain(_image_of(name))].append(name)
    return dict(plain | labelled)


def _image_of(name: str) -> str:
    """Returns the path, without extension, of the image that a mask's name refers to."""
    return _stem(name).removesuffix(MASK_LABEL)


def _plain(name: str) -> str:
    """Normalizes a name to one Unicode form: file systems and archives use several."""
    return unicodedata.normalize("NFC", name)


def called_masks(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (path, image's path) of images named like masks of other images, such as 1_mask.png beside 1.png."""
    keys = list(keys)
    some = [key for key in keys if MASK_WORD.search(key)]
    if not some:
        return []
    images = {_plain(_stem(key)).lower(): key for key in keys}
    found = []
    for key in some:
        stem = _plain(_stem(key)).lower()
        folder, _, name = stem.rpartition("/")
        bare = MASK_ENDING.sub("", name)
        names = ["/".join(filter(None, (folder, bare)))] if bare != name else []
        if MASK_FOLDER.search(f"/{folder}"):
            outer, folders = folder.rpartition("/")[0], ("", *IMAGE_FOLDERS)
            names += ["/".join(filter(None, (outer, beside, each))) for each in (name, bare) for beside in folders]
        image = next((images[each] for each in names if each in images), None)
        if image is not None:
            found.append((key, image))
    return found


Masks = AlphaMasks | ColumnMasks | FolderMasks


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1]


def _is_labelled(name: str) -> bool:
    return _stem(name).endswith(MASK_LABEL)


def without_masks(names: Sequence[str], folder: Path, mask_folder: Path | None) -> list[str]:
    """Returns the names of a folder's files without its masks, which may lie among the images or in a subfolder."""
    if mask_folder is None:
        return list(names)
    inside = Path(os.path.relpath(mask_folder.resolve(), folder.resolve())).as_posix()
    if inside == ".":
        return [name for name in names if not _is_labelled(name)]
    return [name for name in names if not name.startswith(f"{inside}/")]


def check_same_shape(mask_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Raises `ValueError` if a mask does not have its image's aspect ratio.

    Args:
        mask_size, size: width and height of the mask and of the image.
    """
    ratio = mask_size[0] * size[1] / (mask_size[1] * size[0])
    if not 1 - ASPECT_TOLERANCE < ratio < 1 + ASPECT_TOLERANCE:
        raise ValueError("its mask of {}x{} does not have the shape of {}x{}".format(*mask_size, *size))


def cut_mask(mask: Image.Image, cut: Cut, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Cuts a mask as its image is cut, and averages it down to the size of the latents.

    Args:
        size: width and height of the image; the mask may be larger or smaller in the same aspect ratio.
        shape: h and w of the result.

    Returns:
        [h, w] uint8, the mean of the mask over the area of each value.

    Raises:
        ValueError: if the mask does not have the image's aspect ratio.
    """
    check_same_shape(mask.size, size)
    if cut.degrees:
        mask = mask.rotate(cut.degrees, Image.Resampling.BILINEAR)
    scale = mask.width / size[0], mask.height / size[1]
    left, top, right, bottom = cut.box
    box = (left * scale[0], top * scale[1], min(right * scale[0], mask.width), min(bottom * scale[1], mask.height))
    taken = mask.resize(shape[::-1], Image.Resampling.BOX, box=box)
    return np.array(ImageOps.mirror(taken) if cut.mirrored else taken)
