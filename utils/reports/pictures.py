"""The pictures of a report as data URIs, within a budget of bytes: film strips, before and after, the contact sheet."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.images import decode, open_image
from utils.reports.records import RunRecord, Samples

FRAMES, ROWS, PAIRS = 12, 24, 12
FRAME_EDGES, PAIR_EDGE, SHEET_EDGE = (192, 128, 96), 448, 1200  # pixels; frames are smaller if there are many
MANY_FRAMES = 96
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


def picture(file: Path | None, edge: int, budget: Budget) -> str:
    """Returns a file as a data URI; empty if there is none, it can't be read or does not fit the budget."""
    if file is None:
        return ""
    try:
        uri = data_uri(decode(str(file)), edge)
    except (OSError, ValueError):
        return ""
    return uri if budget.take(uri) else ""


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

    A row whose pictures do not all fit the budget is left out, with those after it.
    """
    frames = evenly(record.samples, FRAMES) if record.samples else []
    names = names_of(record, ROWS)
    count = len(frames) * len(names)
    edge = FRAME_EDGES[min(len(FRAME_EDGES) - 1, max(0, math.ceil(math.log2(max(count, 1) / MANY_FRAMES))))]
    budget, rows = Budget(STRIP_BYTES), []
    for name in names:
        row = [{"label": each.label, "uri": picture(each.files.get(name), edge, budget)} for each in frames]
        if budget.is_over:
            break
        if any(frame["uri"] for frame in row):
            rows.append({"text": caption_of(record, name), "frames": row})
    return rows


def before_and_after(record: RunRecord) -> list[dict]:
    """Returns for each sample its first and its last picture; empty if samples were drawn only once."""
    if len(record.samples) < 2:
        return []
    first, last, budget, pairs = record.samples[0], record.samples[-1], Budget(PAIR_BYTES), []
    for name in names_of(record, PAIRS):
        if name in first.files and name in last.files:
            uris = [picture(each.files[name], PAIR_EDGE, budget) for each in (first, last)]
            if all(uris):
                text = caption_of(record, name)
                pairs.append({"text": text, "uris": uris, "labels": [first.label, last.label]})
    return pairs


def contact_sheet(record: RunRecord) -> str:
    """Returns the contact sheet of the training images; empty if there is none."""
    for edge in (SHEET_EDGE, SHEET_EDGE // 2):
        uri = picture(record.sheet(), edge, Budget(SHEET_BYTES))
        if uri:
            return uri
    return ""


def last_samples(records: Sequence[RunRecord]) -> list[dict]:
    """Returns a row for each sample: what it shows, and its last picture in each of several runs."""
    names = dict.fromkeys(name for record in records for name in names_of(record, ROWS))
    budget, rows = Budget(STRIP_BYTES + PAIR_BYTES), []
    for name in list(names)[:ROWS]:
        frames = [
            {
                "label": record.name,
                "uri": picture(record.samples[-1].files.get(name) if record.samples else None, FRAME_EDGES[0], budget),
            }
            for record in records
        ]
        if any(frame["uri"] for frame in frames):
            texts = dict.fromkeys(caption_of(record, name) for record in records if record.samples)
            rows.append({"text": next(iter(texts), name), "frames": frames})
    return rows
