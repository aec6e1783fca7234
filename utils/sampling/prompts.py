"""Reads the prompts and plans the images to draw: how many of each prompt or class, and from which initial image."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.delimited import is_missing, read_rows
from utils.config.options import UserError, first_line, flags_as, nearest, require
from utils.config.user_files import (
    FileError,
    TextReader,
    lines_of,
    parse_json,
    parse_json_lines,
    plain_spelling,
    read_bytes,
    short,
)
from utils.data.captions import MAX_CAPTION, CaptionOptions
from utils.data.folders import list_images
from utils.data.metadata import NAME_COLUMN, NAME_COLUMNS
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import is_saved_dataset, read_records
from utils.sampling.options import MOST_IMAGES, PROMPT_FILES, PromptOptions, refuse_files

logger = logging.getLogger(__name__)
PROMPT_COLUMNS = ("prompt", "text", "caption")
SETTINGS = frozenset(
    name.replace("_", "")
    for names in (
        ("negative_prompt", "negative", "neg_prompt", "prompt_2", "negative_prompt_2", "clip_skip", "lora", "loras"),
        ("seed", "seeds", "width", "height", "size", "resolution", "aspect_ratio", "lora_scale", "init_image"),
        ("guidance_scale", "guidance", "cfg", "cfg_scale", "scale", "guidance_rescale", "strength", "init_images"),
        ("num_inference_steps", "steps", "num_steps", "scheduler", "sampler", "sampler_name", "eta"),
        ("num_images", "num_images_per_prompt", "images_per_prompt", "denoising_strength"),
    )
    for name in names
)
"""Columns that set how to draw single prompts in other programs; they are not read here."""
SIZES = frozenset(("width", "height", "size", "resolution", "aspectratio"))
IMAGE_COLUMNS = frozenset(
    (
        *NAME_COLUMNS,
        plain_spelling(NAME_COLUMN),
        "images",
        "img",
        "picture",
        "photo",
        "url",
        "imageurl",
        "jpg",
        "png",
        "webp",
    )
)
FLAG_IN_PROMPT = re.compile(r"(?:^|\s)(--[a-z][a-z_]{0,30})(?=\s|=|$)", re.IGNORECASE)  # "a dog --n ugly --w 512"
SETTING_IN_PROMPT = re.compile(  # as A1111 writes them below a prompt
    r"(?:^|[\s,.])(Negative prompt: ?\S+|(?:Steps|CFG scale|Seed): ?\d+|Size: ?\d+x\d+|(?:Sampler|Model hash): ?\w+)"
)
DEFAULT_EACH, DEFAULT_UNCONDITIONAL = 4, 64
MOST_PROMPT_BYTES, MOST_IMAGE_BYTES = 256 << 20, 4 << 30
CAPTION_FLAGS = {  # flags of the training scripts that read captions, and their names in evaluate_pipeline.py
    "train_data_dir": "captions_dir",
    "dataset_name": "captions_dir",
    "caption_column": "prompts_column",
    "dataset_split": "prompts_split",
}
STATE_KEY = "state"  # PNG text with the result of `state_of`


@dataclass(frozen=True)
class Prompt:
    """A prompt or class to draw images for.

    Attributes:
        text: the prompt, or the name of the class; None if there is neither.
        label: the class number; None for a text prompt.
        init_image: the initial image; None to start from noise.
        facts: the row of the prompt file.
    """

    text: str | None
    label: int | None = None
    init_image: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)


class Task(NamedTuple):
    """An image to draw: sample number `sample` of prompt number `number`."""

    number: int
    sample: int
    prompt: Prompt

    @property
    def name(self) -> str:
        """The stem of its file: `{prompt}_{sample}`, both as numbers."""
        return f"{self.number:05d}_{self.sample:05d}"


def read_prompts(options: PromptOptions) -> list[Prompt]:
    """Returns the prompts that the options give, with their initial images; an empty list if they give none.

    Raises:
        UserError: if a file or dataset can't be read, or has no prompts.
    """
    prompts = [Prompt(text, facts=facts) for text, facts in _texts(options)]
    if options.init_images is not None:
        prompts = _with_init_images(prompts, _init_images(Path(options.init_images)))
    return prompts[: options.max_prompts]


def _texts(options: PromptOptions) -> list[tuple[str, dict[str, Any]]]:
    """(text, row) of each prompt, from the one source that the options give."""
    if options.prompts is not None:
        refuse_files("--prompts", options.prompts, "give --prompts_file")
        warn_of_written_settings("--prompts", options.prompts)
        return [(text, {"prompt": text}) for text in options.prompts]

    # A file, a dataset, or the captions of a folder.
    if options.prompts_file is not None:
        found = _file_prompts(Path(options.prompts_file), options.prompts_column, options.text_encoding)
    elif options.prompts_dataset is not None:
        found = _dataset_prompts(options)
    elif options.captions_dir is not None:
        source = SourceOptions(
            train_data_dir=options.captions_dir,
            caption_column=options.prompts_column or "text",
            text_encoding=options.text_encoding,
        )
        with flags_as(CAPTION_FLAGS):
            records = read_records(DataOptions(), source, CaptionOptions(), 0)
        captions = [records.captions(index)[0] for index in range(len(records))]
        found = [(text, {"prompt": text}) for text in captions if text]
        if not found:
            raise UserError(f"--captions_dir {options.captions_dir} has images, but no captions; add captions to it")
    else:
        return []
    if not found:
        flag = "prompts_file" if options.prompts_file else "prompts_dataset"
        raise UserError(f"--{flag} {getattr(options, flag)} contains no prompts; add at least one")
    return found


def _file_prompts(file: Path, column: str | None, encoding: str | None) -> list[tuple[str, dict[str, Any]]]:
    """(text, row) of each prompt in a file."""
    # Read the text.
    flag, suffix = f"--prompts_file {file}", file.suffix.lower()
    if suffix not in ("", *PROMPT_FILES):
        raise UserError(f"{flag} must end with one of {', '.join(PROMPT_FILES)}, got {file.suffix}")
    reader = TextReader(encoding)
    try:
        text = reader.read(file, MOST_PROMPT_BYTES)
    except OSError as error:
        raise UserError(f"{flag} can't be read: {first_line(error)}") from error
    except FileError as error:
        raise UserError(f"{flag} {error.reason}") from error
    for finding in reader.findings():
        logger.warning("%s: %s", flag, finding)

    # Parse its rows.
    found = []
    for place, row in _prompt_rows(text, flag, suffix, column):
        prompt = _text_of(row, column, f"{flag}, {place}")
        found.append((prompt, row if isinstance(row, dict) else {"prompt": prompt}))
    _warn_of_rows(flag, [facts for _, facts in found], [text for text, _ in found])
    return found


def _warn_of_rows(flag: str, rows: Sequence[Mapping[str, object]], texts: Sequence[str]) -> None:
    """Warns of settings of single prompts in the rows of a file, and of flags in prompts: both are ignored."""
    columns = dict.fromkeys(name for row in rows for name in row if isinstance(name, str))
    unread = [name for name in _settings(columns) if any(_is_set(row.get(name)) for row in rows)]
    _warn_of_settings(flag, unread, sum(any(_is_set(row.get(name)) for name in unread) for row in rows))
    warn_of_written_settings(flag, texts)


def _is_set(value: object) -> bool:
    """Whether a cell or field has a value: 0 is one (a seed), an empty text or list is not."""
    return not is_missing(value) if isinstance(value, str) else value is not None and value not in ([], {})


def prompt_column(columns: Iterable[str]) -> str | None:
    """Returns the first of `PROMPT_COLUMNS` among the columns, in any spelling (`Prompt`, `TEXT`); None if absent."""
    names = [name for name in columns if isinstance(name, str)]
    plain = {plain_spelling(name): name for name in reversed(names)}
    exact = next((name for name in PROMPT_COLUMNS if name in names), None)
    return exact or next((plain[name] for name in PROMPT_COLUMNS if name in plain), None)


def _settings(columns: Iterable[str]) -> list[str]:
    """The columns that set how to draw a prompt. Sizes beside an image column describe that image and do not count."""
    plain = {name: plain_spelling(name) for name in columns}
    sizes = frozenset() if IMAGE_COLUMNS.isdisjoint(plain.values()) else SIZES
    return [name for name, word in plain.items() if word in SETTINGS - sizes]


def _warn_of_settings(flag: str, unread: Sequence[str], num_rows: int) -> None:
    if unread:
        said = "%s: ignored %s in %d rows; set them by flags, for all prompts at once"
        logger.warning(said, flag, ", ".join(map(short, unread[:6])), num_rows)


def warn_of_written_settings(flag: str, texts: Sequence[str]) -> None:
    """Warns of prompts with flags (kohya) or settings (A1111): other programs parse them, here they are plain text."""
    flags = [match[1] for text in texts if (match := FLAG_IN_PROMPT.search(text))]
    if flags:
        said = "%s: %d prompts contain what look like flags, such as %s; they are used as plain text"
        logger.warning(said, flag, len(flags), flags[0])
    settings = [match[1] for text in texts if (match := SETTING_IN_PROMPT.search(text))]
    if settings:
        said = "%s: %d prompts contain settings of other programs, such as %s; they are used as plain text"
        logger.warning(said, flag, len(settings), settings[0])


def _prompt_rows(text: str, flag: str, suffix: str, column: str | None) -> Iterator[tuple[str, object]]:
    """Yields (place, row) of each prompt in a file with this suffix.

    Raises:
        UserError: naming the place of a row that can't be parsed.
    """
    if suffix in (".csv", ".tsv"):
        empty: list[int] = []
        for line, values, reason in read_rows(text, flag, (column,) if column else PROMPT_COLUMNS):
            if reason:
                raise UserError(f"{flag}, line {line}: {reason}")
            name = column or prompt_column(values) or ""
            if name in values and is_missing(values[name].strip()):
                empty.append(line)
                continue
            yield f"line {line}", values
        if empty:
            said = "%s: skipped %d rows without a prompt, the first in line %d; cells such as NULL count as empty"
            logger.warning(said, flag, len(empty), empty[0])
    elif suffix == ".json":
        rows = parse_json(text, flag)
        if not isinstance(rows, list):
            raise UserError(f"{flag} must contain a list of prompts, got a {type(rows).__name__}")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    elif suffix == ".jsonl":
        for number, row, reason in parse_json_lines(text):
            if reason:
                raise UserError(f"{flag}, line {number}: {reason}")
            yield f"line {number}", row
    else:
        lines = enumerate(map(str.strip, lines_of(text)), start=1)
        yield from ((f"line {number}", line) for number, line in lines if line)


def _text_of(row: object, column: str | None, where: str) -> str:
    """The prompt in a row, which is a text or has a column of prompts."""
    if isinstance(row, str):
        return _prompt(row, where)
    columns = list(row) if isinstance(row, dict) else []
    name = column or prompt_column(columns)
    if name not in columns:
        hint = nearest(column, columns) if column else ""
        asked = f"no column {column}" if column else f"none of the columns {', '.join(PROMPT_COLUMNS)}"
        cure = f"did you mean --prompts_column {hint}?" if hint else "name one with --prompts_column"
        raise UserError(f"{where} has {asked}; {cure}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name:.40} must be a text, got {short(value)}")
    return _prompt(value, where)


def _prompt(text: str, where: str) -> str:
    """Returns the prompt; refuses one so long that a tokenizer would need minutes."""
    if len(text) > MAX_CAPTION:
        raise UserError(f"{where} has a prompt of {len(text):,} characters; shorten it to {MAX_CAPTION:,} at most")
    return text


def _dataset_prompts(options: PromptOptions) -> list[tuple[str, dict[str, Any]]]:
    """(text, row) of each prompt in a dataset."""
    from datasets import Dataset, load_dataset, load_from_disk

    # Load the dataset.
    name, flag = options.prompts_dataset, f"--prompts_dataset {options.prompts_dataset}"
    try:
        if is_saved_dataset(Path(name)):
            found = load_from_disk(name)
            found = found if isinstance(found, Dataset) else found[options.prompts_split]
        else:
            found = load_dataset(name, split=options.prompts_split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{flag} can't be loaded: {first_line(error)}") from error

    # Find the column of prompts.
    names = found.column_names
    _warn_of_settings(flag, _settings(names) if len(found) else [], len(found))
    column = options.prompts_column or prompt_column(names)
    if column not in names:
        hint = nearest(column or "", names)
        cure = f"did you mean --prompts_column {hint}?" if hint else f"give --prompts_column, one of {', '.join(names)}"
        raise UserError(f"{flag} has no column {column or ' or '.join(PROMPT_COLUMNS)}; {cure}")

    # Read the texts; a row may have a list of captions, whose first is the prompt.
    rows = found.select_columns([column])[: options.max_prompts][column]
    texts = [row[0] if isinstance(row, list) and row else row for row in rows]
    num_empty = sum(text is None for text in texts)
    if num_empty:
        logger.warning("%s: skipped %d rows without %s", flag, num_empty, short(column))
    wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise UserError(f"{flag}: row {wrong} of {column} must be a text, got {short(texts[wrong])}")
    texts = [text for text in texts if text is not None]
    warn_of_written_settings(flag, texts)
    return [(_prompt(text, flag), {"prompt": text}) for text in texts]


def _init_images(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [path / name for name in list_images(path, "init_images")]
    if not found:
        raise UserError(f"--init_images {path} contains no images; give an image or a folder with images")
    return found


def _with_init_images(prompts: Sequence[Prompt], images: Sequence[Path]) -> list[Prompt]:
    """The prompts with their initial images: a single prompt or image goes with all of the other, else in pairs."""
    if not prompts:
        prompts = [Prompt("")]
    if len(prompts) == 1:
        return [Prompt(prompts[0].text, init_image=image, facts=prompts[0].facts) for image in images]
    if len(images) == 1:
        return [Prompt(prompt.text, init_image=images[0], facts=prompt.facts) for prompt in prompts]
    if len(prompts) != len(images):
        raise UserError(
            f"--init_images has {len(images)} images for {len(prompts)} prompts; give one of either, or equal numbers"
        )
    return [
        Prompt(prompt.text, init_image=image, facts=prompt.facts) for prompt, image in zip(prompts, images, strict=True)
    ]


def plan_tasks(prompts: Sequence[Prompt], options: PromptOptions) -> list[Task]:
    """Returns the images to draw, prompt by prompt.

    `--num_images` is divided evenly over the prompts; the first ones get one more if there is a remainder. Without
    prompts and classes, `prompts` has one entry whose text is None.

    Raises:
        UserError: if there are more than MOST_IMAGES.
    """
    count = len(prompts)
    default = DEFAULT_UNCONDITIONAL if count == 1 and prompts[0].text is None and prompts[0].label is None else None
    total = options.num_images
    if total is not None:
        each = [total // count + (number < total % count) for number in range(count)]
    else:
        each = [options.images_per_prompt or default or DEFAULT_EACH] * count
        most = f"give at most {MOST_IMAGES} images in total for {count} prompts"
        require(sum(each) <= MOST_IMAGES, "images_per_prompt", each[0], most)
    return [Task(number, sample, prompt) for number, prompt in enumerate(prompts) for sample in range(each[number])]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Returns the SHA-256 of the prompts, classes and bytes of the initial images."""
    digest = hashlib.sha256()
    for prompt in prompts:
        start = prompt.init_image
        content = None if start is None else hashlib.sha256(read_bytes(start, MOST_IMAGE_BYTES)).hexdigest()
        digest.update(json.dumps([prompt.text, prompt.label, content]).encode())
    return digest.hexdigest()


def drawn_texts(info: Mapping[object, object]) -> dict[str, str]:
    """Returns the PNG texts of an image drawn by this package; none for others, whose texts may mean something else.

    Images of evaluate_pipeline.py have a seed and a state, and a prompt or class if there is one; samples of a training
    run have a seed and a number of steps.
    """
    texts = {name: value for name, value in info.items() if isinstance(name, str) and isinstance(value, str)}
    has_state = texts.get(STATE_KEY) in ("ok", "nan", "black", "constant")
    is_sample = texts.get("num_inference_steps", "").isdecimal()
    return texts if texts.get("seed", "").isdecimal() and (has_state or is_sample) else {}
