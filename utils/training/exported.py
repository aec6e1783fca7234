"""What the current run has exported into its folder, beside the result in diffusers' layout."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from utils.config.file_names import FUSED, LORA_FILE, file_name_of
from utils.formats.adapter_files import UI_FOLDER
from utils.runtime.processes import is_of_run
from utils.sampling.infotext import single_file_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedFiles:
    """The exports of a run; None for each that it did not write, even if an earlier run left one in the folder.

    Attributes:
        single: the pipeline as one file.
        fused: the folder of the base pipeline with the adapter merged in.
        fused_single: the same as one file.
        ui: the adapter in the names that UIs read.
        lora: the LoRA in the names that diffusers reads.
        best: the folder of the result with the lowest validation loss.
    """

    single: Path | None = None
    fused: Path | None = None
    fused_single: Path | None = None
    ui: Path | None = None
    lora: Path | None = None
    best: Path | None = None

    @classmethod
    def of_run(cls, folder: Path) -> Self:
        """Returns what the run that holds an output folder has written into it; warns of what earlier runs left."""
        fused, ui = folder / FUSED, folder / UI_FOLDER / file_name_of(folder)
        lora = folder / LORA_FILE
        is_fused = _is_new(fused / "model_index.json", folder)
        singles = [each for each in sorted(fused.glob("*.safetensors")) if is_fused and _is_new(each, folder)]
        single = single_file_of(folder)
        best = folder / "best"
        return cls(
            single=single if single is not None and _is_new(single, folder) else None,
            fused=fused if is_fused else None,
            fused_single=singles[0] if singles else None,
            ui=ui if _is_new(ui, folder) else None,
            lora=lora if _is_new(lora, folder) else None,
            best=best if best.is_dir() else None,
        )


def _is_new(file: Path, folder: Path) -> bool:
    """Whether a file was written since the current run began; warns of an older one."""
    if not file.is_file():
        return False
    is_new = is_of_run(file, folder)
    if not is_new:
        logger.warning("%s is of an earlier run: the model card does not name it, and it is not uploaded", file)
    return is_new
