"""Reads and checks config files in local folders and Hub repositories."""

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config import user_files
from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.library_errors import short
from utils.config.options import UserError, first_line

INDEX = "model_index.json"
MOST_LAYERS = 1000
MOST_TIMESTEPS = 100_000
LARGEST_SIZE = 10**7  # of a layer or a vocabulary


class Wanted(NamedTuple):
    """The requirement on a config value: a test, and the same as text."""

    fits: Callable[[Any], bool]
    words: str


def _is_whole(value: Any, most: int = LARGEST_SIZE) -> bool:
    return type(value) is int and 0 < value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(each) for each in value)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 1000 and all(_is_whole(each) for each in value)


def _is_few_layers(value: Any) -> bool:
    """Whether a value is a number of layers, or one per block, or one per layer of each block, none of them missing."""
    if isinstance(value, list):
        return len(value) <= MOST_LAYERS and all(_is_few_layers(each) for each in value)
    return value is None or _is_whole(value, MOST_LAYERS)


def _or_none(wanted: Wanted) -> Wanted:
    return Wanted(lambda value: value is None or wanted.fits(value), f"{wanted.words}, or null")


def _is_class(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
    return isinstance(value, str) or is_pair


WHOLE = Wanted(_is_whole, "a whole number above 0")
LAYERS = Wanted(lambda value: _is_whole(value, MOST_LAYERS), f"a whole number from 1 to {MOST_LAYERS:,}")
LAYERS_OF_BLOCKS = Wanted(
    _is_few_layers,
    f"a whole number from 1 to {MOST_LAYERS:,} or a list of them",
)
WHOLE_NUMBERS = Wanted(_are_whole, "a list of whole numbers above 0")
EITHER = _or_none(
    Wanted(lambda value: _is_whole(value) or _are_whole(value), "a whole number above 0 or a list of them")
)
NUMBERS = _or_none(Wanted(_are_numbers, "a list of numbers"))
SHARE = Wanted(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
POSITIVE = Wanted(lambda value: _is_number(value) and value > 0, "a number above 0")
FLAG = _or_none(Wanted(lambda value: isinstance(value, bool), "true or false"))
TEXT = Wanted(lambda value: isinstance(value, str), "a string")

TIMESTEPS = Wanted(lambda value: _is_whole(value, MOST_TIMESTEPS), f"a whole number from 1 to {MOST_TIMESTEPS:,}")

VALUES: dict[str, Wanted] = {
    "_class_name": Wanted(_is_class, "the name of a class"),
    "num_train_timesteps": _or_none(TIMESTEPS),
    "beta_start": SHARE,
    "beta_end": SHARE,
    "beta_schedule": TEXT,
    "trained_betas": NUMBERS,
    "prediction_type": TEXT,
    "timestep_spacing": TEXT,
    "rescale_betas_zero_snr": FLAG,
    "clip_sample": FLAG,
    "scaling_factor": _or_none(POSITIVE),
    "shift_factor": _or_none(Wanted(_is_number, "a number")),
    "latents_mean": NUMBERS,
    "latents_std": NUMBERS,
    "force_upcast": FLAG,
    "in_channels": WHOLE,
    "latent_channels": WHOLE,
    "out_channels": _or_none(WHOLE),
    "block_out_channels": WHOLE_NUMBERS,
    "layers_per_block": LAYERS_OF_BLOCKS,
    "transformer_layers_per_block": LAYERS_OF_BLOCKS,
    "reverse_transformer_layers_per_block": LAYERS_OF_BLOCKS,
    "num_layers": _or_none(LAYERS),
    "cross_attention_dim": EITHER,
    "attention_head_dim": EITHER,
    "num_attention_heads": EITHER,
    "sample_size": EITHER,
    "norm_num_groups": _or_none(WHOLE),
    "num_class_embeds": _or_none(WHOLE),
    "hidden_size": WHOLE,
    "intermediate_size": WHOLE,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": WHOLE,
    "vocab_size": WHOLE,
    "projection_dim": _or_none(WHOLE),
}
"""Requirements on the config values that this toolkit reads, by key."""
SCHEDULER_VALUES = {"num_train_timesteps": TIMESTEPS}
"""Stricter requirements for a scheduler's config, which must set these."""


def is_path(name: str) -> bool:
    """Whether a name that could be a path or a Hub repository can only be a path."""
    return Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1


FILE_KINDS = {
    ".gguf": "a GGUF file, whose quantized weights can't be read here",
    ".onnx": "an ONNX file, which can't be read here",
    **dict.fromkeys((".zip", ".tar", ".gz", ".7z"), "an archive; unpack it"),
}


def require_model(flag: str, name: str | None, cure: str, endings: Sequence[str] = ()) -> None:
    """Refuses a path that exists but is no model, or that can only be a path and does not exist.

    Args:
        flag: the flag that names the model.
        name: its value; None if it is not given.
        cure: what to give instead.
        endings: extensions of single files that are supported.

    Raises:
        UserError: saying what the path is. Names that could be Hub repositories pass.
    """
    if name is None:
        return
    path = Path(name)
    try:
        kind = user_files.kind_of(path.stat().st_mode)
    except (OSError, ValueError):
        is_file_name = path.suffix in (*endings, *FILE_KINDS, ".ckpt", ".safetensors")
        if path.is_symlink() or is_path(name) or is_file_name:
            what = "is a broken link" if path.is_symlink() else "does not exist"
            raise UserError(f"--{flag} {name} {what}; {cure}") from None
        return
    if kind == "folder" or (kind == "file" and path.suffix in endings):
        return
    what = FILE_KINDS.get(path.suffix.lower(), f"a {path.suffix} file" if path.suffix else "a file")
    raise UserError(f"--{flag} {name} is {what if kind == 'file' else f'a {kind}'}; {cure}")


def hub_file(repository: str, file: str, revision: str | None, failure: str) -> Path:
    """Returns the cached path of a small file of a Hub repository, downloading it if needed.

    Raises:
        UserError: `failure` and the reason, if the file is not available.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"{failure}: {first_line(error)}") from error


def config_file(name: str, file: str, revision: str | None, flag: str) -> Path:
    """Returns the path of a file in a local folder, whether it exists or not, or of one on the Hub.

    Raises:
        UserError: naming `flag`, if the folder does not exist and the Hub does not have the file.
    """
    if Path(name).is_dir():
        return Path(name, file)
    return hub_file(name, file, revision, f"{flag} {name} is not a local folder, and was not found on the Hub")


def index_file(name: str, revision: str | None, flag: str) -> Path:
    """Returns the path of a pipeline's `model_index.json`.

    Raises:
        UserError: naming `flag`, if the folder has none.
    """
    if Path(name).is_dir() and not Path(name, INDEX).is_file():
        raise UserError(f"{flag} {name} is not a pipeline folder: it has no {INDEX}")
    return config_file(name, INDEX, revision, flag)


def read_json(file: Path, where: str) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: starting with `where`, if it can't be read.
    """
    try:
        content = user_files.read_bytes(file, user_files.CONFIG_LIMIT)
        if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            reason = "starts with a byte order mark, which the libraries can't read; save it as UTF-8 without one"
            raise user_files.FileError(file, reason)
        try:
            text = user_files.decode(content, "utf-8").text
        except ValueError as error:
            raise user_files.FileError(file, first_line(error)) from error
        return user_files.parse_json(text, where)
    except OSError as error:
        raise UserError(f"{where} can't be read: {first_line(error)}") from error
    except user_files.FileError as error:
        raise UserError(f"{where} {error.reason}") from error


def read_config(file: Path, flag: str) -> dict[str, Any]:
    """Reads a config: a JSON object whose values are valid for their keys.

    Raises:
        UserError: naming `flag`, if it is invalid.
    """
    config = read_json(file, f"{flag}: {file}")
    if not isinstance(config, dict):
        raise UserError(f"{flag}: {file} is not a config, which would be a JSON object")
    values = VALUES | SCHEDULER_VALUES if file.name == SCHEDULER_CONFIG else VALUES
    for key, wanted in values.items():
        if key in config and not wanted.fits(config[key]):
            raise UserError(f"{flag}: {file}: {key} must be {wanted.words}, got {short(config[key])}")
    return config


def class_name_of(index: Mapping[str, Any]) -> str | None:
    """Returns the class of a pipeline by its index, whose entry may be [file of code, class]; None if it names none."""
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) else None


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Refuses to train a component whose config says that its weights are quantized.

    Raises:
        UserError: starting with `where`.
    """
    found = config.get("quantization_config")
    if found is not None:
        kind = found.get("quant_method") if isinstance(found, dict) else found
        raise UserError(
            f"{where} has quantization_config ({kind!s:.40}): quantized weights can't be trained; give the "
            "unquantized model, with --quantize_base to train a LoRA on a base that is quantized on loading"
        )


def read_config_file(name: str, file: str, revision: str | None, flag: str) -> dict[str, Any]:
    """Reads a config from a local folder or a Hub repository.

    Raises:
        UserError: naming `flag`, if it is missing or invalid.
    """
    return read_config(config_file(name, file, revision, flag), flag)
