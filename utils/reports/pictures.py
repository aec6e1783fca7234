"""The pictures of a report as data URIs, within a budget of bytes: film strips, before and after, the contact sheet."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.images import decode, open_image
from utils.reports.records import RunRecord, Samples

FRAMES, ROWS, PAIRS = 12, 24, 12
FRAME_EDGES, PAIR_EDGES, SHEET_EDGE = (192, 128, 80), (448, 320), 1200  # pixels
STRIP_BYTES, PAIR_BYTES, SHEET_BYTES = 3_500_000, 2_500_000, 600_000  # of data URIs; a page has at most 10 MB
QUALITY = 80
PROMPT_KEYS = ("prompt", "parameters")  # texts of a PNG that say what it shows
LONGEST_CAPTION = 300


@dataclass
class Budget:
    """Bytes that are left for pictures of a kind.

    Attributes:
        left: bytes.
        is_over: whether a picture did not fit.
    """

    left: int
    is_over: bool = False

    def take(self, uri: str) -> bool:
        """Whether the picture still fits; then its bytes are taken."""
        self.is_over |= len(uri) > self.left
        if not self.is_over:
            self.left -= len(uri)
        return not self.is_over


def data_uri(image: Image.Image, edge: int) -> str:
    """Returns an image, at most `edge` pixels wide and high, as a JPEG in a data URI; tiny ones are enlarged."""
    if image.mode != "RGB":
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    longest = max(image.size)
    scale = max(1, min(edge, 256) // longest) if longest < edge else edge / longest
    size = tuple(max(1, round(each * scale)) for each in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Pictures:
    """Reads pictures, each once, and makes them small."""

    def __init__(self, edge: int):
        """Args:
        edge: the largest edge in pixels that is asked for.
        """
        self._edge = edge
        self._kept: dict[Path, Image.Image | None] = {}

    def uri(self, file: Path | None, edge: int, budget: Budget) -> str:
        """Returns a file as a data URI; empty if there is none, it can't be read or does not fit the budget."""
        if file is None:
            return ""
        if file not in self._kept:
            self._kept[file] = self._read(file)
        image = self._kept[file]
        uri = "" if image is None else data_uri(image, edge)
        return uri if uri and budget.take(uri) else ""

    def _read(self, file: Path) -> Image.Image | None:
        try:
            image = decode(str(file))
        except (OSError, ValueError):
            return None
        if max(image.size) > self._edge:
            image.thumbnail((self._edge, self._edge), Image.Resampling.LANCZOS)
        return image


def caption_of(record: RunRecord, name: str) -> str:
    """Returns what a sample shows: its prompt or class, from records or the texts of the PNG; else its file's name."""
    if name in record.captions:
        return record.captions[name][:LONGEST_CAPTION]
    file = next((each.files[name] for each in reversed(record.samples) if name in each.files), None)
    if file is None:
        return name
    try:
        with open_image(str(file)) as image:
            texts = [image.info.get(key) for key in PROMPT_KEYS]
    except (OSError, ValueError):
        return name
    found = next((text for text in texts if isinstance(text, str) and text.strip()), "")
    if found.startswith(("Steps:", "Negative prompt:")):  # a line of settings without a prompt
        found = ""
    return (found.partition("\nNegative prompt:")[0] or name)[:LONGEST_CAPTION]


def evenly(items: Sequence[Samples], most: int) -> list[Samples]:
    """Returns at most `most` items: the first, the last, and others evenly spaced between them."""
    places = np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))
    return [items[place] for place in places]


def names_of(record: RunRecord, most: int) -> list[str]:
    """Returns names of samples, those of the last step first in their order, at most `most`."""
    every = dict.fromkeys(name for each in reversed(record.samples) for name in each.files)
    return list(every)[:most]


def num_samples(record: RunRecord) -> int:
    """Returns how many different samples a run drew."""
    return len(names_of(record, 10 * ROWS))


def film_strips(record: RunRecord) -> list[dict]:
    """Returns a row for each sample: what it shows, and its frames over the steps, the first and the last included.

    Pictures are smaller if they would not fit the budget; rows that still do not fit are left out.
    """
    frames, pictures = evenly(record.samples, FRAMES) if record.samples else [], Pictures(FRAME_EDGES[0])

    def row(name: str, edge: int, budget: Budget) -> dict | None:
        shown = [{"label": each.label, "uri": pictures.uri(each.files.get(name), edge, budget)} for each in frames]
        return {"text": caption_of(record, name), "frames": shown} if any(each["uri"] for each in shown) else None

    return fitting(names_of(record, ROWS), row, FRAME_EDGES, STRIP_BYTES)


def before_and_after(record: RunRecord) -> list[dict]:
    """Returns for each sample its first and its last picture; empty if samples were drawn only once."""
    if len(record.samples) < 2:
        return []
    first, last, pictures = record.samples[0], record.samples[-1], Pictures(PAIR_EDGES[0])

    def row(name: str, edge: int, budget: Budget) -> dict | None:
        if name not in first.files or name not in last.files:
            return None
        uris = [pictures.uri(each.files[name], edge, budget) for each in (first, last)]
        return (
            {"text": caption_of(record, name), "uris": uris, "labels": [first.label, last.label]} if all(uris) else None
        )

    return fitting(names_of(record, PAIRS), row, PAIR_EDGES, PAIR_BYTES)


def fitting(
    names: Sequence[str], row: Callable[[str, int, Budget], dict | None], edges: Sequence[int], num_bytes: int
) -> list[dict]:
    """Returns rows of pictures of the largest size with which all fit the budget, or those that fit at the smallest.

    Args:
        row: makes the row of a name, with pictures of an edge; None if it has no picture.
        edges: from large to small, in pixels.
    """
    rows: list[dict] = []
    for edge in edges:
        budget, rows = Budget(num_bytes), []
        for name in names:
            found = row(name, edge, budget)
            if budget.is_over:
                break
            rows += [found] if found is not None else []
        if not budget.is_over:
            break
    return rows


def contact_sheet(record: RunRecord) -> str:
    """Returns the contact sheet of the training images; empty if there is none."""
    pictures = Pictures(SHEET_EDGE)
    for edge in (SHEET_EDGE, SHEET_EDGE // 2):
        if uri := pictures.uri(record.sheet(), edge, Budget(SHEET_BYTES)):
            return uri
    return ""


def last_samples(records: Sequence[RunRecord]) -> list[dict]:
    """Returns a row for each sample: what it shows, and its last picture in each of several runs."""
    names = dict.fromkeys(name for record in records for name in names_of(record, ROWS))
    files = {record.name: record.samples[-1].files if record.samples else {} for record in records}
    pictures = Pictures(FRAME_EDGES[0])

    def row(name: str, edge: int, budget: Budget) -> dict | None:
        shown = [{"label": run, "uri": pictures.uri(last.get(name), edge, budget)} for run, last in files.items()]
        texts = dict.fromkeys(caption_of(record, name) for record in records if record.samples)
        return {"text": next(iter(texts), name), "frames": shown} if any(each["uri"] for each in shown) else None

    return fitting(list(names)[:ROWS], row, FRAME_EDGES, STRIP_BYTES + PAIR_BYTES)
