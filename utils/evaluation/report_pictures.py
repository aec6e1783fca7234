"""The pictures of a report, as data URIs: images side by side, the rows of a sweep, and curves."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from utils.evaluation.findings import ARROWS, Entry, computed_names
from utils.evaluation.metrics.features import Picture

THUMBNAIL = 256
IMAGES_OF_A_PROMPT = 4


def data_uri(image: Image.Image, edge: int = THUMBNAIL) -> str:
    """Returns an image as a data URI, at most `edge` pixels wide and high; small images as PNG, which is lossless."""
    if max(image.size) > edge:
        image = image.copy()
        image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    is_small = max(image.size) <= 96
    image.save(buffer, "PNG" if is_small else "JPEG", **({} if is_small else {"quality": 88}))
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(picture: Picture) -> str | None:
    """A picture as a data URI; None if it can't be read."""
    try:
        return data_uri(picture.read())
    except (OSError, ValueError):
        return None


def prompt_sections(entries: Sequence[Entry], num_prompts: int) -> list[dict]:
    """Prompts with their images: entries side by side if they have the same prompts, else one entry after another."""
    if all(entry.subject.images.is_like(entries[-1].subject.images) for entry in entries):
        return _sections_of(entries, num_prompts)
    return [section for entry in entries for section in _sections_of([entry], num_prompts)]


def _sections_of(entries: Sequence[Entry], num_prompts: int) -> list[dict]:
    """Prompts with the images of each entry, for at most `num_prompts` prompts."""
    images = entries[-1].subject.images
    sections = []
    if images.prompts is None and len(set(images.clusters.tolist())) == len(images):  # unconditional: one grid of all
        clusters = [None]
    else:
        clusters = _evenly(list(dict.fromkeys(images.clusters.tolist())), num_prompts)
    for cluster in clusters:
        chosen = np.arange(len(images)) if cluster is None else (images.clusters == cluster).nonzero()[0]
        first = int(chosen[0])
        text = f"class or prompt {cluster}" if images.prompts is None else images.prompts[first]
        limit = 16 if cluster is None else IMAGES_OF_A_PROMPT
        sides = []
        for entry in entries:
            read = [thumbnail(entry.subject.images.pictures[index]) for index in chosen[:limit].tolist()]
            sides.append({"entry": entry.name, "pictures": [each for each in read if each is not None]})
        sections.append({"text": "" if cluster is None else text, "sides": sides})
    return sections


def _evenly(items: list, count: int) -> list:
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def sweep_columns(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the entries of a sweep that have the same prompts and samples: the baseline may lack them."""
    return [entry for entry in entries if entry.subject.images.is_like(entries[-1].subject.images)]


def sweep_sections(entries: Sequence[Entry], num_prompts: int) -> list[dict]:
    """Returns the rows of pictures of a sweep, for at most `num_prompts` prompts.

    Each row has one prompt and seed, and a cell for each entry: its label, and a picture or None if it can't be read.
    """
    images, columns, sections = entries[-1].subject.images, sweep_columns(entries), []
    for cluster in _evenly(list(dict.fromkeys(images.clusters.tolist())), num_prompts):
        chosen = (images.clusters == cluster).nonzero()[0][:IMAGES_OF_A_PROMPT].tolist()
        rows = [
            [{"label": entry.label, "picture": thumbnail(entry.subject.images.pictures[index])} for entry in columns]
            for index in chosen
        ]
        text = f"class or prompt {cluster}" if images.prompts is None else images.prompts[chosen[0]]
        sections.append({"text": text, "rows": rows})
    return sections


def sweep_record(entries: Sequence[Entry]) -> dict[str, object]:
    """Returns a sweep as JSON: its scales, and for each prompt and sample the row of image files, by entry."""
    images, columns = entries[-1].subject.images, sweep_columns(entries)
    rows = [
        {
            "prompt": None if images.prompts is None else images.prompts[index],
            "prompt_number": int(images.clusters[index]),
            "sample": int(images.samples[index]),
            "images": {
                entry.name: "/".join(filter(None, (entry.folder, entry.subject.images.pictures[index].name)))
                for entry in columns
            },
        }
        for index in range(len(images))
    ]
    return {"scales": {entry.name: entry.scale for entry in entries if entry.scale is not None}, "rows": rows}


def curves(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Returns a plot of each score over the checkpoints or scales, as data URIs; none for fewer than two of them."""
    for axis, title in (("step", "optimizer steps"), ("scale", "scale")):
        points = [(getattr(entry, axis), entry) for entry in entries if getattr(entry, axis) is not None]
        if len(points) > 1:
            points.sort(key=lambda point: point[0])
            return [_curve(points, name, title) for name in computed_names([entry for _, entry in points])]
    return []


def _curve(points: Sequence[tuple[float, Entry]], name: str, axis_title: str) -> dict[str, str]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    scores = [(place, entry.score(name)) for place, entry in points]
    known = [(place, score) for place, score in scores if score is not None and score.value is not None]
    places = [place for place, _ in known]
    figure = Figure(figsize=(3.6, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(places, [score.value for _, score in known], marker="o", markersize=3.5, linewidth=1.4)
    bounds = [score.interval for _, score in known]
    if None not in bounds:
        axes.fill_between(places, [each.low for each in bounds], [each.high for each in bounds], alpha=0.18)
    axes.set_title(f"{name}{ARROWS[known[0][1].better]}", fontsize=10)
    axes.set_xlabel(axis_title, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return {"name": name, "picture": f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
