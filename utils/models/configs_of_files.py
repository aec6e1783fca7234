"""Finds the configs and tokenizers that a single file lacks."""

from pathlib import Path

from utils.config.options import UserError, first_line
from utils.models.single_file import SingleFile
from utils.runtime.hub_files import INDEX

SMALL_FILES = ("*.json", "*.txt", "*.model")


def configs_folder(file: SingleFile, given: str | None) -> Path:
    """Returns the folder of a pipeline with the configs of a single file; those on the Hub are downloaded.

    Args:
        file: the single file.
        given: value of --pipeline_config, a folder or Hub name; None for the pipeline that the file lies in, or else
            the one that diffusers finds by weights.

    Raises:
        UserError: if it is not available.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    given = given or file.configs_beside
    if given is not None and Path(given).is_dir():
        folder = Path(given)
    else:
        name = given or file.hub_configs
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
        except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise UserError(
                f"{file.what} needs configs and tokenizers, and those of {name} are not available: "
                f"{first_line(error)}; give a pipeline folder with --pipeline_config"
            ) from error
    if not (folder / INDEX).is_file():
        raise UserError(f"--pipeline_config {given or folder} is not a pipeline folder: it has no {INDEX}")
    return folder
