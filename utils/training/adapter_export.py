"""Exports an adapter in the form that UIs read, beside that of diffusers, and checks both."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.config.file_names import ENDING, LORA_FILE
from utils.exports.adapter_check import check_adapter_files
from utils.exports.diffusers_reading import misread_layers
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
        return folder / UI_FOLDER / f"{self.name}{ENDING}"


@dataclass
class WrittenAdapter:
    """An adapter that is written to a folder.

    Attributes:
        layers: the run's layers.
        pipeline: the run's pipeline, with the adapter in it.
        ui: the file for UIs.
        folder: the folder that it is written to.
        is_sharded: whether the pipeline's weights are spread over processes, which leaves its updates uncompared.
        has_ui_file: whether the file for UIs is written.
    """

    layers: Sequence[AdapterLayer]
    pipeline: "DiffusionPipeline"
    ui: UiExport
    folder: Path
    is_sharded: bool = False
    has_ui_file: bool = False

    def write_for_uis(self, components: Sequence[Component]) -> None:
        """Writes the file for UIs, or warns if they have no names for its layers.

        Raises:
            OSError: if the disk fails.
        """
        file = self.ui.file(self.folder)
        try:
            write_kohya(self.layers, components, file, self.ui.dtype, self.ui.metadata(self.layers))
        except ValueError as error:
            logger.warning("no file for UIs is written: %s", error)
            return
        self.has_ui_file = True
        if any("magnitude" in layer.tensors for layer in self.layers):
            said = "%s has LyCORIS' form of DoRA: %s; the weights that --export_fused merges are right in all of them"
            logger.warning(said, file.name, DORA_NOTE)

    def misread(self, has_own: bool) -> list[str]:
        """Returns the layers of the file for UIs that diffusers reads in another way than UIs; warns if there are any.

        Args:
            has_own: whether diffusers' form is written too.
        """
        is_dora = any("magnitude" in layer.tensors for layer in self.layers)
        if not self.has_ui_file or is_dora or self.layers[0].kind != "lora":
            return []
        file = self.ui.file(self.folder)
        found = misread_layers(file, self.layers, self.pipeline)
        if found:
            cure = (
                f"load {LORA_FILE} in diffusers, which holds them all"
                if has_own
                else "for diffusers give --lora_format both, or --export_fused"
            )
            logger.warning(
                "%s is right by the rules of UIs, but diffusers reads %d of its %d layers without their own scale or "
                "not at all, such as %s; %s",
                *(file.name, len(found), len(self.layers), found[0], cure),
            )
        return found

    def check(self, has_own: bool) -> list[str]:
        """Returns what is wrong with the files; see `check_adapter_files`.

        Args:
            has_own: whether diffusers' or PEFT's form is written too.
        """
        own = {self.folder: torch.float32} if has_own else {}
        for_uis = {self.ui.file(self.folder): self.ui.dtype} if self.has_ui_file else {}
        return check_adapter_files(self.layers, self.pipeline, own, for_uis, self.is_sharded)

    def describe(self) -> str:
        """Returns what is compared, in words."""
        count = sum(len(layer.tensors) for layer in self.layers)
        return f"{count} tensors of {len(self.layers)} layers" + (
            f" in {self.ui.name}.safetensors too" * self.has_ui_file
        )
