"""Exports an adapter in the form that UIs read, beside that of diffusers, and checks both."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.exports.adapter_check import check_adapter_files
from utils.formats.adapter_files import UI_FOLDER, AdapterLayer
from utils.formats.adapter_metadata import DORA_NOTE
from utils.formats.adapter_names import Component
from utils.formats.adapter_writer import write_kohya

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UiExport:
    """The file for UIs of a run.

    Attributes:
        name: its name, without extension.
        dtype: dtype of its tensors.
        metadata: returns what it says about its layers and their training so far.
    """

    name: str
    dtype: torch.dtype
    metadata: Callable[[Sequence[AdapterLayer]], Mapping[str, str]]

    def file(self, folder: Path) -> Path:
        """Returns its path in an output folder."""
        return folder / UI_FOLDER / f"{self.name}.safetensors"


def export_for_uis(layers: Sequence[AdapterLayer], components: Sequence[Component], ui: UiExport, folder: Path) -> bool:
    """Writes the file for UIs; returns whether it could be written, else warns.

    Raises:
        OSError: if the disk fails.
    """
    try:
        write_kohya(layers, components, ui.file(folder), ui.dtype, ui.metadata(layers))
    except ValueError as error:
        logger.warning("no file for UIs is written: %s", error)
        return False
    if any("magnitude" in layer.tensors for layer in layers):
        logger.warning(
            "%s has LyCORIS' form of DoRA: %s; the weights merged by --export_fused are right in all of them",
            *(ui.file(folder).name, DORA_NOTE),
        )
    return True


def check_export(
    layers: Sequence[AdapterLayer],
    pipeline: "DiffusionPipeline",
    ui: UiExport | None,
    lora_format: str,
    folder: Path,
) -> list[str]:
    """Checks the files of an exported adapter; see `check_adapter_files`.

    Args:
        layers: the run's layers.
        pipeline: the run's pipeline, with the adapter in it.
        ui: the file for UIs, if one is written.
        lora_format: the formats that are written.
        folder: the folder that they were written to.
    """
    has_ui = ui is not None and lora_format != "diffusers"
    if lora_format == "kohya" and has_ui:
        return check_adapter_files(layers, pipeline, {}, {ui.file(folder): ui.dtype})
    return check_adapter_files(layers, pipeline, {folder: torch.float32}, {ui.file(folder): ui.dtype} if has_ui else {})
