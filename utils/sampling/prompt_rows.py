"""Reads prompts with settings of their own: lines with kohya's flags, or rows of JSON, YAML or a table."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.config.delimited import is_missing, read_rows
from utils.config.options import UserError, first_line, nearest
from utils.config.user_files import FileError, TextReader, lines_of, parse_json, parse_json_lines, plain_spelling, short

logger = logging.getLogger(__name__)
ROW_FILES = (".txt", ".jsonl", ".json", ".yaml", ".yml", ".csv", ".tsv")
MOST_BYTES = 16 << 20
MOST_ROWS = 10_000
LONGEST_PROMPT = 1 << 16  # characters
LARGEST_EDGE = 16_384  # pixels
EDGE_STEP = 8  # diffusers refuses images whose edges it does not divide
MOST_STEPS = 100_000
KOHYA = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance_scale",
    "am": "lora_scale",
}
"""The flags of prompts in kohya's sd-scripts (`line_to_prompt_dict` in its training, `--am` in its gen_img.py)."""
OTHER_FLAGS = {
    "g": "give --l, which sets the guidance scale of these models",
    "ss": "samples are drawn with the scheduler of the pipeline",
}
"""Flags of kohya's prompts that mean nothing here, and what to do instead."""
FLAG = re.compile(r"(?:^|\s)--(?P<name>[A-Za-z][A-Za-z_]{0,31})(?=[\s=]|$)=?")
OTHER_NAMES = {
    **dict.fromkeys(("text", "caption"), "prompt"),
    **dict.fromkeys(("negative", "negativetext", "negprompt"), "negative_prompt"),
    **dict.fromkeys(("numinferencesteps", "samplesteps", "numsteps"), "steps"),
    **dict.fromkeys(("scale", "cfg", "cfgscale", "guidance"), "guidance_scale"),
    **dict.fromkeys(("loraweight", "networkmul", "multiplier"), "lora_scale"),
}
"""Names of the same settings in other programs, in plain spelling."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file; None for what it does not set.

    Attributes:
        place: where it stands, such as "line 3".
        prompt: the text.
        negative_prompt: what the image should not show.
        width, height: size in pixels.
        seed: the seed of the first image.
        steps: denoising steps.
        guidance_scale: classifier-free guidance scale.
        lora_scale: factor on what the trained adapter adds to the weights.
    """

    place: str
    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    lora_scale: float | None = None


SETTINGS = tuple(name for name in PromptRow.__dataclass_fields__ if name != "place")
WHOLE = {  # least and largest value
    "width": (EDGE_STEP, LARGEST_EDGE),
    "height": (EDGE_STEP, LARGEST_EDGE),
    "seed": (0, 2**63 - 1),
    "steps": (1, MOST_STEPS),
}


def read_rows_of(flag: str, name: str) -> list[PromptRow]:
    """Returns the prompts of a file with their settings.

    Args:
        flag: the flag that names the file, with dashes.
        name: its path.

    Raises:
        UserError: naming the file and the place, if it can't be read, has no prompts, or has a setting that does not
            exist or does not fit.
    """
    file, what = Path(name), f"{flag} {name}"
    suffix = file.suffix.lower()
    if suffix not in ("", *ROW_FILES):
        raise UserError(f"{what} must end with one of {', '.join(ROW_FILES)}, got {file.suffix}")
    reader = TextReader()
    try:
        text = reader.read(file, MOST_BYTES)
        rows = [_row(found, place, what) for place, found in _rows(text, suffix, what)]
    except OSError as error:
        raise UserError(f"{what} can't be read: {first_line(error)}") from error
    except FileError as error:
        raise UserError(f"{what} {error.reason}") from error
    for finding in reader.findings():
        logger.warning("%s: %s", what, finding)
    if not rows:
        raise UserError(f"{what} contains no prompts; add at least one")
    if len(rows) > MOST_ROWS:
        raise UserError(f"{what} contains {len(rows):,} prompts; keep at most {MOST_ROWS:,}")
    return rows


def _rows(text: str, suffix: str, what: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yields (place, settings by the names that the file uses)."""
    if suffix in (".json", ".yaml", ".yml"):
        found = parse_json(text, what) if suffix == ".json" else _yaml(text, what)
        if isinstance(found, dict):  # such as prompts: [...]
            found = next(iter(found.values())) if len(found) == 1 and "prompt" not in found else [found]
        if not isinstance(found, list):
            raise UserError(f"{what} must contain a list of prompts, got {short(found)}")
        yield from ((f"row {number}", _mapping(each, f"{what}, row {number}")) for number, each in enumerate(found, 1))
    elif suffix == ".jsonl":
        for number, each, reason in parse_json_lines(text):
            if reason:
                raise UserError(f"{what}, line {number}: {reason}")
            yield f"line {number}", _mapping(each, f"{what}, line {number}")
    elif suffix in (".csv", ".tsv"):
        for number, cells, reason in read_rows(text, what, SETTINGS):
            if reason:
                raise UserError(f"{what}, line {number}: {reason}")
            yield f"line {number}", {name: cell for name, cell in cells.items() if not is_missing(cell.strip())}
    else:
        for number, line in enumerate(map(str.strip, lines_of(text)), start=1):
            if line and not line.startswith("#"):
                yield f"line {number}", _flags(line, f"{what}, line {number}")


def _yaml(text: str, what: str) -> object:
    from utils.config.yaml_files import parse_yaml

    return parse_yaml(text, what, texts=("prompt", "negative_prompt", "text", "caption"))


def _mapping(found: object, where: str) -> Mapping[str, object]:
    """A row that is a text, or a mapping of settings."""
    if isinstance(found, str):
        return {"prompt": found}
    if not isinstance(found, dict):
        raise UserError(f"{where} must be a text or a mapping with the key prompt, got {short(found)}")
    return {str(name): value for name, value in found.items() if value is not None}


def _flags(line: str, where: str) -> dict[str, object]:
    """The settings of a line such as `a red fox --n blurry --w 512 --h 768 --d 7 --s 20 --l 7.5`."""
    flags = list(FLAG.finditer(line))
    ends = [*(each.start() for each in flags), len(line)][1:]
    found: dict[str, object] = {"prompt": line[: flags[0].start()].strip() if flags else line}
    for flag, end in zip(flags, ends, strict=False):
        name = flag["name"].lower()
        if name in OTHER_FLAGS:
            raise UserError(f"{where}: --{name} is not supported: {OTHER_FLAGS[name]}")
        setting = KOHYA.get(name) or _setting(name, where, dashes="--", known=KOHYA)
        value = line[flag.end() : end].strip()
        if not value and setting != "negative_prompt":
            raise UserError(f"{where}: --{name} has no value; give one, or leave it out")
        if setting in found:
            raise UserError(f"{where} sets {setting} twice; keep one of them")
        found[setting] = value
    return found


def _setting(name: str, where: str, dashes: str = "", known: Iterable[str] = ()) -> str:
    """The setting of a name, in any spelling.

    Raises:
        UserError: if there is none, with the nearest.
    """
    plain = plain_spelling(name)
    names = {plain_spelling(each): each for each in SETTINGS} | OTHER_NAMES
    if plain in names:
        return names[plain]
    close = nearest(plain, names)
    hint = f"did you mean {dashes}{names[close]}?" if close else ""
    listed = ", ".join(dashes + each for each in (*known, *(SETTINGS[1:] if dashes else SETTINGS)))
    raise UserError(f"{where}: unknown setting {dashes}{short(name)}; {hint or f'known are {listed}'}")


def _row(found: Mapping[str, object], place: str, what: str) -> PromptRow:
    where = f"{what}, {place}"
    values: dict[str, object] = {}
    for name, value in found.items():
        setting = _setting(name, where)
        if setting in values:
            raise UserError(f"{where} sets {setting} twice; keep one of them")
        values[setting] = _value(setting, value, f"{where}: {name}")
    if not str(values.get("prompt", "")).strip():
        raise UserError(f"{where} has no prompt; write its text, or leave the {place.partition(' ')[0]} out")
    return PromptRow(place, **values)


def _value(setting: str, value: object, what: str) -> str | int | float:
    """A setting's value as its type, checked."""
    if setting in ("prompt", "negative_prompt"):
        if not isinstance(value, str):
            raise UserError(f"{what} must be a text, got {short(value)}")
        if len(value) > LONGEST_PROMPT:
            raise UserError(f"{what} has {len(value):,} characters; shorten it to {LONGEST_PROMPT:,} at most")
        return value
    number = _number(value)
    if number is None:
        kind = "a whole number" if setting in WHOLE else "a number"
        raise UserError(f"{what} must be {kind}, got {short(value)}")
    if setting not in WHOLE:
        if setting == "guidance_scale" and number < 0:
            raise UserError(f"{what} must be 0 or more, got {number:g}")
        return float(number)
    least, most = WHOLE[setting]
    if number != int(number) or not least <= number <= most:
        raise UserError(f"{what} must be a whole number from {least} to {most}, got {short(value)}")
    if setting in ("width", "height") and number % EDGE_STEP:
        below = int(number) - int(number) % EDGE_STEP
        raise UserError(f"{what} must be divisible by {EDGE_STEP}, got {number:g}; try {below} or {below + EDGE_STEP}")
    return int(number)


def _number(value: object) -> int | float | None:
    """A finite number that a JSON value or a text is; None if it is none."""
    if isinstance(value, str):
        try:
            value = int(value) if re.fullmatch(r"[+-]?\d{1,30}", value.strip()) else float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
