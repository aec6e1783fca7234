"""The settings of a drawn image as PNG text in the format of AUTOMATIC1111's web UI, which other tools read too.

The key is `parameters`. The format and the names of samplers are those of `create_infotext` in its
`modules/processing.py` and of `modules/sd_samplers_*.py` (version 1.10).
"""

import hashlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

from utils.config.file_names import file_name_of, result_name
from utils.config.terminal import json_text
from utils.config.user_files import FileError, open_regular
from utils.models.base_card import shown_name
from utils.runtime.processes import is_of_run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

PARAMETERS = "parameters"
HASH_DIGITS = 10  # of a SHA-256, as the web UI shows them
NEGATIVE = re.compile(r"^(\s*)N(?=egative prompt:)", re.MULTILINE)  # what begins the negative prompt, for a parser
QUOTED = re.compile(r"[,:\n]")  # values with these characters are written as JSON strings
SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "LMSDiscreteScheduler": "LMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "UniPCMultistepScheduler": "UniPC",
    "LCMScheduler": "LCM",
}
"""The web UI's names of samplers, by diffusers' class; `sampler_name` adds those of DPMSolverMultistepScheduler."""
MULTISTEP = {
    ("dpmsolver++", "midpoint", 2): "DPM++ 2M",
    ("sde-dpmsolver++", "midpoint", 2): "DPM++ 2M SDE",
    ("sde-dpmsolver++", "heun", 2): "DPM++ 2M SDE Heun",
    ("sde-dpmsolver++", "midpoint", 3): "DPM++ 3M SDE",
}
"""The web UI's names by DPMSolverMultistepScheduler's (algorithm_type, solver_type, solver_order)."""
WITHOUT_SCHEDULE = ("DDIM", "PLMS", "UniPC", "LCM")
"""Samplers of the web UI that take no schedule type; for others, none would mean the sampler's favourite."""
SCHEDULE_TYPES = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}


@dataclass(frozen=True)
class DrawnModel:
    """The model that an image is drawn with.

    Attributes:
        name: name of the pipeline or checkpoint, without its folder.
        file: the single file with its weights; None if there is none.
        adapters: names of the adapters that were added to it.
    """

    name: str
    file: Path | None = None
    adapters: Sequence[str] = ()

    @classmethod
    def of_training(cls, folder: Path, base: str | None = None) -> "DrawnModel":
        """Returns the model that a run trains into a folder.

        Args:
            base: folder, Hub name or file of the base model of an adapter; None if all weights are exported.
        """
        name = result_name(folder)
        return cls(name) if base is None else cls.at(base, adapters=[str(folder)])

    def exported(self, folder: Path) -> "DrawnModel":
        """Returns the same model with the single file that the current run has exported into its folder, if it did."""
        file = single_file_of(folder)
        is_new = file is not None and is_of_run(file, folder)
        return replace(self, file=file) if is_new and not self.adapters else self

    @property
    def digest(self) -> str:
        """The first digits of the SHA-256 of its single file; "" if there is none."""
        return short_hash(self.file)

    @classmethod
    def at(cls, path: str, parts: Path | None = None, adapters: Sequence[str] = ()) -> "DrawnModel":
        """Returns the model at a path: a folder, a Hub name, or a single file.

        Args:
            parts: a checkpoint whose weights replace the model's, which no single file has then.
            adapters: paths or Hub names of adapters.
        """
        place = Path(path)
        names = tuple(Path(each).resolve().stem if Path(each).is_file() else base_name(each) for each in adapters)
        name = place.stem if place.is_file() else base_name(path)
        if parts is not None:
            return cls(f"{name} {parts.name}", adapters=names)
        if place.is_file():
            return cls(name, place, names)
        file, index = single_file_of(place), place / "model_index.json"
        is_same = file is not None and index.is_file() and file.stat().st_mtime_ns >= index.stat().st_mtime_ns
        return cls(name, file if is_same else None, names)


@dataclass(frozen=True)
class Drawing:
    """The settings of one drawn image; None for what does not apply.

    Attributes:
        sampler: (name of the sampler, schedule type or ""), as `sampler_name` returns them.
        size: width and height in pixels.
        more: other (name, value) pairs, such as ("Clip skip", 2).
    """

    seed: int
    size: tuple[int, int]
    sampler: tuple[str, str]
    steps: int | None = None
    guidance: float | None = None
    prompt: str = ""
    negative_prompt: str = ""
    model: DrawnModel | None = None
    more: Sequence[tuple[str, object]] = ()


def base_name(path: str) -> str:
    """Returns the last part of a path or Hub name, also of `.`, and of a path that ends in a slash."""
    return shown_name(path).rstrip("/").rpartition("/")[2]


def single_file_of(folder: Path) -> Path | None:
    """Returns the single file that a run exported into its folder, which has the folder's name; None without it."""
    file = folder / file_name_of(folder)
    return file if file.is_file() else None


def short_hash(file: Path | None) -> str:
    """Returns the first digits of a file's SHA-256, which the web UI calls the model hash; "" if it can't be read."""
    if file is None:
        return ""
    try:
        facts = os.stat(file)
        return _sha256(file.resolve(), facts.st_size, facts.st_mtime_ns)[:HASH_DIGITS]
    except (OSError, FileError):
        return ""


@lru_cache(maxsize=16)
def _sha256(file: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file, remembered until its size or its time changes."""
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sampler_name(scheduler: "SchedulerMixin") -> tuple[str, str]:
    """Returns (the web UI's name of a scheduler, its schedule type or ""); diffusers' class name if it has none."""
    kind, config = type(scheduler).__name__.removeprefix("Consistent"), scheduler.config
    name = SAMPLERS.get(kind, kind)
    if kind == "DPMSolverMultistepScheduler":
        settings = (config.get("algorithm_type"), config.get("solver_type"), config.get("solver_order"))
        name = MULTISTEP.get(settings, kind)
    schedule = next((word for flag, word in SCHEDULE_TYPES.items() if config.get(flag)), "")
    is_known = name != kind and name not in WITHOUT_SCHEDULE
    return name, schedule or ("Uniform" if is_known else "")


def call_default(pipeline: "DiffusionPipeline", name: str) -> float | None:
    """Returns the default of a number among the arguments of a pipeline's call; None if it does not take it."""
    argument = inspect.signature(type(pipeline).__call__).parameters.get(name)
    default = None if argument is None else argument.default
    return default if isinstance(default, int | float) and not isinstance(default, bool) else None


def parameters_text(drawing: Drawing) -> str:
    """Returns the settings of an image as the web UI writes them: prompt, negative prompt, then one line of pairs."""
    model = drawing.model or DrawnModel("")
    pairs: list[tuple[str, object]] = [
        ("Steps", drawing.steps),
        ("Sampler", drawing.sampler[0]),
        ("Schedule type", drawing.sampler[1]),
        ("CFG scale", None if drawing.guidance is None else f"{drawing.guidance:g}"),
        ("Seed", drawing.seed),
        ("Size", f"{drawing.size[0]}x{drawing.size[1]}"),
        ("Model hash", model.digest),
        ("Model", model.name),
        ("LoRA", ", ".join(model.adapters)),
        *drawing.more,
        ("RNG", "CPU"),  # each image's noise is drawn by a generator on the CPU
    ]
    prompt, unwanted = _harmless(drawing.prompt), _harmless(drawing.negative_prompt)
    negative = f"\nNegative prompt: {unwanted}" if unwanted else ""
    settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs if value not in (None, ""))
    return f"{prompt}{negative}\n{settings}".strip()


def png_texts(facts: Mapping[str, object], drawing: Drawing) -> PngInfo:
    """Returns the texts of a PNG: our own facts by name, without those that are None, and the web UI's line."""
    texts = PngInfo()
    for name, value in facts.items():
        if value is not None:
            texts.add_itxt(name, _storable(str(value)))
    texts.add_text(PARAMETERS, _storable(parameters_text(drawing)))  # iTXt in UTF-8 if Latin-1 lacks a character
    return texts


def _harmless(prompt: str) -> str:
    """The prompt, with no line that the web UI would take for the negative prompt's beginning.

    Such a line gets a small letter, which is the same to CLIP's tokenizers; the web UI has no escape.
    """
    return NEGATIVE.sub(r"\1n", prompt)


def _quoted(value: object) -> str:
    """A value as the web UI writes it: as a JSON string if it contains what separates values."""
    text = str(value)
    return json_text(text) if QUOTED.search(text) or text.startswith('"') else text


def _storable(text: str) -> str:
    """The text without halves of surrogate pairs, which UTF-8 can't store."""
    return text.encode("utf-8", "replace").decode("utf-8")
