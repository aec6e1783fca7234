"""The files that a model card is written to: one that no run wrote, or that was edited since, is never replaced."""

import hashlib
import logging
import re
from pathlib import Path

from utils.config.terminal import visible
from utils.config.user_files import FileError, read_text
from utils.runtime.atomic_files import write_text

logger = logging.getLogger(__name__)
CARD, OTHER_CARD = "README.md", "MODEL_CARD.md"
CARD_LIMIT = 4 << 20  # bytes
SEAL = "<!-- Written by the diffusion fine-tuning toolkit; a run replaces this file unless it was edited: {digest} -->"
SEALED = re.compile(re.escape(SEAL).replace(r"\{digest\}", "([0-9a-f]{64})") + r"\n?\Z")


def is_own_card(path: Path) -> bool:
    """Whether a file is a model card exactly as a run wrote it."""
    try:
        text = read_text(path, CARD_LIMIT, "utf-8").text.replace("\r\n", "\n")
    except (OSError, FileError):
        return False
    found = SEALED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def write_card_file(folder: Path, text: str) -> Path | None:
    """Writes a model card to README.md, or to MODEL_CARD.md beside a README.md that no run wrote.

    Returns:
        The file; None if neither may be replaced, or the disk is full, which the log says.
    """
    body = visible(text).rstrip("\n") + "\n\n"
    whole = body + SEAL.format(digest=_digest(body)) + "\n"
    for name in (CARD, OTHER_CARD):
        file = folder / name
        if (file.exists() or file.is_symlink()) and not is_own_card(file):
            logger.warning("%s was not written by a run, or was edited since: it is kept", file)
            continue
        try:
            write_text(file, whole)
        except OSError as error:
            logger.warning("the model card %s can't be written: %s", file, error.strerror or error)
            return None
        if name != CARD:
            logger.warning("the model card is in %s", file)
        return file
    logger.warning("no model card is written; move one of these files away and run again")
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
