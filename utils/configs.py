"""Config files, of folders and of repositories on the Hub."""

from pathlib import Path
from typing import Any

from utils import user_files
from utils.options import UserError, first_line

INDEX = "model_index.json"


def is_path(name: str) -> bool:
    """Whether a name that may be a path or a repository's on the Hub can only be a path."""
    return Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1


def hub_file(repository: str, file: str, revision: str | None, failure: str) -> Path:
    """A small file of a Hub repository, by the cache.

    Raises:
        UserError: `failure` and the reason, if it can't be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"{failure}: {first_line(error)}") from error


def config_file(name: str, file: str, revision: str | None, flag: str) -> Path:
    """The path of a file in a folder, whether it is there or not, or of one on the Hub.

    Raises:
        UserError: naming the flag that named the folder, if it is none, and the Hub does not have the file.
    """
    if Path(name).is_dir():
        return Path(name, file)
    return hub_file(name, file, revision, f"{flag} {name} is no folder here, and was not found on the Hub")


def index_file(name: str, revision: str | None, flag: str) -> Path:
    """The path of a pipeline's `model_index.json`.

    Raises:
        UserError: naming the flag that named the pipeline, if it has none.
    """
    if Path(name).is_dir() and not Path(name, INDEX).is_file():
        raise UserError(f"{flag} {name} is no pipeline folder: it has no {INDEX}")
    return config_file(name, INDEX, revision, flag)


def read_json(file: Path, where: str) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: naming `where` it stands, if it can't be read.
    """
    try:
        text = user_files.read_text(file, user_files.CONFIG_LIMIT, "utf-8").text
        return user_files.parse_json(text, where)
    except OSError as error:
        raise UserError(f"{where} can't be read: {first_line(error)}") from error
    except user_files.FileError as error:
        raise UserError(f"{where} {error.reason}") from error


def read_config(file: Path, flag: str) -> dict[str, Any]:
    """A config, which is a JSON object.

    Raises:
        UserError: naming the flag that named the file or its folder, if it is none.
    """
    config = read_json(file, f"{flag}: {file}")
    if not isinstance(config, dict):
        raise UserError(f"{flag}: {file} holds no config, which would be a JSON object")
    return config


def read_config_file(name: str, file: str, revision: str | None, flag: str) -> dict[str, Any]:
    """A config of a folder, or of a repository on the Hub.

    Raises:
        UserError: naming the flag that named the folder, if it is not there or no config.
    """
    return read_config(config_file(name, file, revision, flag), flag)
