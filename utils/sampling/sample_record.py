"""The record of a run's samples, `samples/samples.jsonl`, and the folders that the samples of each step are in."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.user_files import read_json
from utils.runtime.atomic_files import replacing, set_aside
from utils.runtime.step_lines import JsonLines, SampleCount, keep_steps, read_lines
from utils.sampling.samples import LAST

LINES, RECORD = "samples.jsonl", "samples.json"
STEP = re.compile(r"step-[0-9]{1,18}")
BASE = "base"  # folder of the samples of the base, where step 0 is not the base
STRIP = "film_strip.png"


class SampleFacts(NamedTuple):
    """A line of the record, without its step, time and count of samples seen.

    Attributes:
        file: the image, relative to the output folder, with slashes.
        prompt: the prompt, or the name of the class; None if there is neither.
        negative_prompt: None for none.
        width, height: size in pixels.
        seed: the seed of its noise.
        steps: denoising steps.
        guidance_scale: None if the pipeline takes none.
        lora_scale: factor on what the trained adapter adds to the weights; None without an adapter.
    """

    file: str
    prompt: str | None
    negative_prompt: str | None
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float | None
    lora_scale: float | None = None


class SampleRecord:
    """Appends a line for each sample to `samples.jsonl`, on the main process."""

    def __init__(self, folder: Path, seen: SampleCount):
        """Args:
        folder: the folder of the samples of a run, `output_dir/samples`.
        seen: counts the training samples seen after a step.
        """
        self._folder, self._seen, self._last = folder, seen, -1

    def begin(self, first_step: int) -> None:
        """Drops lines, and renames samples, of steps after the one from which the run resumes, or of a run before."""
        keep_until(self._folder, first_step)
        keep_steps(self._folder / LINES, first_step)
        _move_last(self._folder / LINES, self._folder.name)
        self._last = first_step

    def add(self, step: int, samples: Sequence[SampleFacts]) -> None:
        """Adds the samples of a step; they replace those that were drawn at this step before."""
        if not samples:
            return
        if step <= self._last:
            keep_steps(self._folder / LINES, step - 1)
        self._last = step
        stamp = self._seen.stamp(step)
        lines = JsonLines(self._folder / LINES)
        for each in samples:
            lines.write({"step": step} | each._asdict() | stamp)
        lines.close()


def keep_until(folder: Path, step: int) -> None:
    """Renames samples of steps after `step`, which the run draws again. Samples of an earlier end keep their step.

    Args:
        step: optimizer steps done; 0 for a new run, which takes none for its own.
    """
    if not folder.is_dir():
        return
    # The run now continues past its earlier end.
    last, drawn_at = folder / LAST, _drawn_at(folder)
    if drawn_at is not None and last.is_dir():
        shutil.rmtree(folder / f"step-{drawn_at}", ignore_errors=True)  # of the same weights
        os.replace(last, folder / f"step-{drawn_at}")
    # Samples of weights that are not this run's.
    kept = -1 if step == 0 else step
    later = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name) and _step_of(path) > kept]
    of_others = [last, folder / BASE] if step == 0 else [last]
    for path in [*later, *(each for each in of_others if each.is_dir())]:
        set_aside(path)
    if step == 0:
        (folder / LINES).unlink(missing_ok=True)
    (folder / STRIP).unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _drawn_at(folder: Path) -> int | None:
    """The step at which the last samples of an earlier run were drawn; None if no record says."""
    steps = [line["step"] for line in read_lines(folder / LINES) if _is_last(line, folder.name)]
    if steps:
        return int(steps[-1])
    try:
        found = read_json(folder / LAST / RECORD)
    except (OSError, ValueError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int and step >= 0 else None


def _is_last(line: dict[str, Any], folder: str) -> bool:
    return str(line.get("file", "")).startswith(f"{folder}/{LAST}/")


def _move_last(file: Path, folder: str) -> None:
    """Renames the files of an earlier end to those of their step, to which `keep_until` has moved them."""
    lines = list(read_lines(file))
    if not any(_is_last(line, folder) for line in lines):
        return
    with replacing(file) as aside:
        aside.unlink(missing_ok=True)
        renamed = JsonLines(aside)
        for line in lines:
            if _is_last(line, folder):
                line["file"] = line["file"].replace(f"/{LAST}/", f"/step-{line['step']}/", 1)
            renamed.write(line)
        renamed.close()
