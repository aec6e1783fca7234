"""Options of the result: its files, their dtype, and whether they are checked."""

import re
from dataclasses import dataclass
from typing import ClassVar

from utils.config.flag_rules import Resume
from utils.config.options import UserError, option, require_positive

EXPORT_DTYPES = ("fp32", "fp16", "bf16")
SIZE = re.compile(r"[1-9]\d*(\.\d+)?(KB|MB|GB|KIB|MIB|GIB)?", re.IGNORECASE)
VARIANT = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class ExportOptions:
    help_title: ClassVar[str] = "export"

    export_single_file: bool = option(
        False,
        "also write each exported pipeline as one file for ComfyUI, A1111 and others: <name of output_dir>.safetensors "
        "inside its folder",
        resume=Resume.SAVING,
    )
    export_dtype: str = option(
        "fp32",
        "dtype of the exported pipeline's weights, in its folder and its single file",
        choices=EXPORT_DTYPES,
        resume=Resume.SAVING,
    )
    export_variant: str | None = option(
        None,
        "name the weight files of the exported folder as this variant, such as fp16, which from_pretrained(..., "
        "variant=...) then needs; --variant names the files to load",
        is_text=True,
        resume=Resume.SAVING,
    )
    max_shard_size: str | None = option(
        None,
        "split weights of the exported folder into files of at most this size, such as 5GB; default: 10GB for the "
        "denoiser and VAE, 50GB for text encoders",
        is_text=True,
        resume=Resume.SAVING,
    )
    export_steps: int | None = option(
        None, "also export every N optimizer steps, to output_dir/export-<step>", resume=Resume.SAVING
    )
    export_check: bool = option(
        True,
        "read exported files back and compare them with the trained weights, and draw a small image from them",
        resume=Resume.SAVING,
    )

    def __post_init__(self) -> None:
        require_positive(self, "export_steps")
        if self.export_variant is not None and not VARIANT.fullmatch(self.export_variant):
            raise UserError(
                f"--export_variant {self.export_variant} may only have letters, digits and _; give one such as fp16"
            )
        if self.max_shard_size is not None and not SIZE.fullmatch(self.max_shard_size):
            raise UserError(f"--max_shard_size {self.max_shard_size} is not a size; give one such as 5GB or 500MB")
