"""Creates the Hub repository of a run before it starts, and uploads the result at its end."""

import glob
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from utils.config.options import UserError, first_line
from utils.config.terminal import Lines, one_line
from utils.config.user_files import FileError, read_json
from utils.training.card_files import CARD, OTHER_CARD, is_own_card
from utils.training.exported import ExportedFiles
from utils.training.options import HubOptions

logger = logging.getLogger(__name__)
GRID, GALLERY = "val_imgs_grid.png", "gallery"  # samples as one image, and a folder of them
LONGEST_COMMAND = 10_000  # characters


def create_repository(folder: Path, options: HubOptions) -> str | None:
    """Creates the Hub repository for the result, unless it exists, before training starts.

    Returns:
        Its full name; None without --push_to_hub.

    Raises:
        UserError: without a login, or if the Hub can't be reached or denies creating or writing the repository.
    """
    if not options.push_to_hub:
        return None
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    wanted = options.hub_model_id or folder.resolve().name
    if options.hub_token is None and get_token() is None:
        also = f"; also unset {offline}" if (offline := _offline_variable()) else ""
        raise UserError(f"--push_to_hub: not logged in; run `hf auth login`, or set HF_TOKEN{also}")
    api = HfApi(token=options.hub_token)
    try:
        repository = api.create_repo(wanted, private=options.hub_private_repo or None, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # create_repo succeeds for an existing repository without write access
    except OfflineModeIsEnabled as error:
        offline = _offline_variable()
        reason = f"{offline} is set; unset it" if offline else "the Hub can't be reached; check the network"
        raise UserError(f"--push_to_hub: {wanted} can't be written to: {reason}, or leave out --push_to_hub") from error
    except (HTTPError, OSError, ValueError) as error:
        cure = "give --hub_model_id, run `hf auth login` with a token that may write there, or leave out --push_to_hub"
        raise UserError(
            f"--push_to_hub: {wanted} can't be written to: {_without_token(error, options)}; {cure}"
        ) from error
    return repository


def result_files(folder: Path, exported: ExportedFiles) -> list[str]:
    """Returns glob patterns of what is uploaded, of what is there: the result in all its forms, and its card.

    Checkpoints, logs and records of the run are not uploaded.
    """
    # The pipeline or adapter in diffusers' and peft's layouts; peft's folders hold a config without a pipeline's index.
    try:
        index = read_json(folder / "model_index.json")
    except (OSError, FileError):
        index = {}
    parts = [name for name in index if not name.startswith("_") and (folder / name).is_dir()]
    adapters = [path.parent.name for path in folder.glob("*/adapter_config.json")]
    parts += [name for name in adapters if not name.endswith("_ema")]
    files = ["model_index.json", "pipeline.py"]

    # The same for other tools, fused, and with the lowest validation loss; the card with its samples.
    others = filter(None, (exported.lora, exported.single, exported.ui))
    files += [each.relative_to(folder).as_posix() for each in others]
    parts += [each.name for each in (exported.fused, exported.best) if each is not None]
    files += [CARD, GRID] if is_own_card(folder / CARD) else [CARD, OTHER_CARD, GRID]
    found = [glob.escape(name) for name in files if (folder / name).is_file()]
    found += [f"{glob.escape(name)}/**" for name in dict.fromkeys(parts) if (folder / name).is_dir()]
    return [*found, *([f"{GALLERY}/*.png"] if (folder / GALLERY).is_dir() else [])]


def upload(folder: Path, repository: str, options: HubOptions, files: Sequence[str]) -> None:
    """Uploads only the result and its card; a failed upload is a warning, as the result is still in the folder.

    `upload_folder` commits in parts, and continues where an earlier call for the same files was interrupted: files that
    are already there are skipped, and their parts that were already sent are not sent again. So does `hf upload`. Both
    leave nothing in the folder, unlike `upload_large_folder`, which huggingface_hub 2 no longer has.

    Args:
        files: glob patterns, as `result_files` returns them.
    """
    from huggingface_hub import upload_folder
    from huggingface_hub.errors import HTTPError

    if CARD in files and is_own_card(folder / CARD) and _has_other_card(repository, options):
        files = [each for each in files if each != CARD]
        told = "%s has a README.md that no run wrote, or that was edited since: it is kept, and the new one is in %s"
        logger.warning(told, repository, folder / CARD)
    logger.info("uploading to %s: %s", repository, ", ".join(files))
    try:
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=options.hub_token,
            commit_message="End of training",
            allow_patterns=files,
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        reason = _without_token(error, options)
        logger.warning(
            "upload to %s failed: %s; the result is in %s; this command continues the upload where it ended:\n%s",
            *(repository, reason, folder, upload_command(folder, repository, files)),
        )
        return
    logger.info("the result is on the Hub: %s", repository)


def upload_command(folder: Path, repository: str, files: Sequence[str]) -> Lines:
    """Returns the command that uploads these files, or continues to, for a shell."""
    words = ["hf", "upload", repository, str(folder.absolute()), "."]
    for each in files:
        words += ["--include", each]
    return Lines(one_line(shlex.join(words), LONGEST_COMMAND))


def _has_other_card(repository: str, options: HubOptions) -> bool:
    """Whether a repository has a card that no run wrote."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return not is_own_card(Path(hf_hub_download(repository, CARD, token=options.hub_token)))
    except (HTTPError, OSError, ValueError):  # there is none, or the upload fails too
        return False


def _offline_variable() -> str | None:
    """Returns the environment variable that keeps huggingface_hub offline; None if there is none."""
    on = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in on), None)


def _without_token(error: BaseException, options: HubOptions) -> str:
    """Returns an error in one line, with the tokens that were used masked."""
    from huggingface_hub import get_token

    reason = first_line(error)
    for token in filter(None, (options.hub_token, get_token())):
        reason = reason.replace(token, "***")
    return reason
