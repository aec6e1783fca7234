"""File names in the folder of a saved pipeline or adapter."""

import re
from pathlib import Path

SCHEDULER_CONFIG = "scheduler_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
FUSED = "fused"  # folder of the base pipeline with an adapter merged in
ENDING = ".safetensors"
SEPARATORS = re.compile(r"[:<>/\\]")  # A1111 splits <lora:name:weight> at the first three; others end folders
FALLBACK = "model"  # name of a result in the root of a file system


def result_name(folder: Path) -> str:
    """Returns the name of the files that a result is exported to, without their ending: that of its folder.

    UIs name files in prompts: characters that separate names there become `_`. An ending that the folder's name has
    already is dropped.
    """
    name = folder.resolve().name
    while name.lower().endswith(ENDING):
        name = name[: -len(ENDING)]
    return SEPARATORS.sub("_", name) or FALLBACK


def file_name_of(folder: Path) -> str:
    """Returns the name of the single file, and of the file for UIs, of the result in a folder."""
    return f"{result_name(folder)}{ENDING}"
