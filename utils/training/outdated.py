"""Removes what an earlier export left in an output folder, which holds other weights than the new result beside it."""

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError

from utils.config.file_names import FUSED, LORA_FILE, file_name_of
from utils.config.tensor_files import open_safetensors
from utils.formats.adapter_files import METADATA_KEY, PEFT_CONFIG, PEFT_FILE, UI_FOLDER
from utils.runtime.atomic_files import MARKER

logger = logging.getLogger(__name__)
OURS = "modelspec.sai_model_spec"  # in the header of each file for UIs, of pipelines and of adapters


def remove_outdated(
    folder: Path, written: Collection[str], components: Collection[str], sources: Collection[Path]
) -> None:
    """Removes the forms that a result does not have, but that an earlier export wrote to its folder.

    Only files with the names and marks of exports are removed, in a folder that a run wrote.

    Args:
        folder: the output folder.
        written: names of the files and folders that the result consists of.
        components: names of the components that can have an adapter.
        sources: paths that the run reads, which stay.

    Raises:
        OSError: if one can't be removed.
    """
    if not (folder / MARKER).is_file():
        return
    read = [source.absolute() for source in sources]
    removed = []
    for path in _forms(folder, written, components):
        if any(path.absolute() in (source, *source.parents) for source in read):
            logger.warning("%s is of an earlier export, and stays because this run reads it", path)
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        if path.parent != folder and not any(path.parent.iterdir()):
            path.parent.rmdir()
        removed.append(path.relative_to(folder).as_posix())
    if removed:
        said = "removed from %s what holds the weights of an earlier export, and is not of this result: %s"
        logger.warning(said, folder, ", ".join(removed))


def _forms(folder: Path, written: Collection[str], components: Collection[str]) -> list[Path]:
    """Returns files and folders that earlier exports wrote and the last one did not."""
    found, name = [], file_name_of(folder)
    if name not in written and _has_mark(folder / name, OURS):
        found.append(folder / name)
    if LORA_FILE not in written and _has_mark(folder / LORA_FILE, METADATA_KEY):
        found.append(folder / LORA_FILE)
    ui = folder / UI_FOLDER / name
    if UI_FOLDER not in written and _has_mark(ui, OURS):
        found.append(ui)
    for component in sorted(set(components) - set(written)):
        pair = [folder / component / PEFT_FILE, folder / component / PEFT_CONFIG]
        if all(each.is_file() for each in pair):
            found += pair
    fused = folder / FUSED
    if FUSED not in written and (fused / "model_index.json").is_file() and not fused.is_symlink():
        found.append(fused)
    return found


def _has_mark(file: Path, key: str) -> bool:
    """Whether the header of a safetensors file has a key that exports write."""
    if not file.is_file():
        return False
    try:
        with open_safetensors(file) as opened:
            return key in (opened.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False
