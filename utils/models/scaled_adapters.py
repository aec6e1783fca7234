"""Adapters with scales, as a command line names them: `--lora A=0.8 B=0.5`."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.config.file_names import LORA_FILE
from utils.config.options import UserError, first_line
from utils.config.terminal import one_line
from utils.runtime.hub_files import hub_file

NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|infinity|nan)", re.IGNORECASE | re.ASCII)
COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)


class ScaledAdapter(NamedTuple):
    """An adapter (a folder, a file or a Hub name) and the factor by which its change of the weights is multiplied."""

    source: str
    scale: float = 1.0

    @property
    def name(self) -> str:
        """A short name: that of its folder, of its file without the ending, or the whole Hub name."""
        path = Path(self.source)
        if not path.exists():
            return self.source
        return path.resolve().name if path.is_dir() else path.stem

    @property
    def label(self) -> str:
        """Its short name and its scale, as a command line would name them."""
        return f"{self.name}={number_text(self.scale)}"

    @property
    def place(self) -> str:
        """The file that it is read from, as far as that is known without the network: equal for the same adapter."""
        file = os.path.join(self.source, LORA_FILE)
        return os.path.realpath(file if os.path.isfile(file) else self.source)


def number_text(value: float) -> str:
    """Returns the shortest text of a number that is read as the same number: 1 and not 1.0, 0 and not -0."""
    text = repr(value + 0.0)
    return text.removesuffix(".0")


def parse_adapter(flag: str, word: str) -> ScaledAdapter:
    """Reads `SOURCE` or `SOURCE=SCALE`.

    What follows the last `=` is a scale only if it is a number: /x/a=b is a path. So is a word that exists as it
    stands, unless the part before its last `=` exists as well.

    Args:
        flag: the flag without dashes, for messages.
        word: its value.

    Raises:
        UserError: if the scale is not finite, or there is no source.
    """
    source, assigned, number = word.rpartition("=")
    if not assigned or not NUMBER.fullmatch(number):
        is_meant = not number or COMMA.fullmatch(number) or os.path.exists(source)
        if assigned and source and not os.path.lexists(word) and is_meant:
            meant = number.replace(",", ".").strip()
            cure = f"{source}={meant}" if NUMBER.fullmatch(meant) else f"{source}=0.8, or {source} alone"
            raise UserError(f"--{flag} {one_line(word)}: what follows = is not a number; write {one_line(cure)}")
        return ScaledAdapter(word)
    if os.path.exists(word) and not os.path.exists(source):
        return ScaledAdapter(word)
    if not source:
        raise UserError(f"--{flag} {one_line(word)} names no LoRA; write --{flag} NAME{one_line(word)}")
    scale = float(number)
    if not math.isfinite(scale):
        raise UserError(f"--{flag} {one_line(word)}: the scale must be a finite number, such as 0.8")
    return ScaledAdapter(source, scale)


def parse_adapters(flag: str, words: Sequence[str] | None) -> tuple[ScaledAdapter, ...]:
    """Reads the values of a flag that takes several adapters with scales; empty for None.

    Raises:
        UserError: as `parse_adapter`, or if an adapter is given twice.
    """
    found = tuple(parse_adapter(flag, word) for word in words or ())
    known: dict[str, ScaledAdapter] = {}
    for each in found:
        other = known.setdefault(each.place, each)
        if other is not each:
            both = f"{one_line(other.source)}={number_text(other.scale + each.scale)}"
            raise UserError(
                f"--{flag} names {one_line(each.source)} twice; give it once, such as {both} for the sum of both scales"
            )
    return found


def local_source(source: str, what: str) -> str:
    """Returns the file or folder of an adapter; that of a Hub name is downloaded, if it is not in the cache.

    Args:
        source: a file, a folder or a Hub name.
        what: the flag and its value, for messages.

    Raises:
        UserError: if it is not available, or the repository has several files and none of the usual name.
    """
    if os.path.exists(source):
        return source
    from huggingface_hub import list_repo_files
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HTTPError

    failure = f"{what} is not a local file or folder, and was not found on the Hub"
    try:
        names = [LORA_FILE] if HF_HUB_OFFLINE else list_repo_files(source)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"{failure}: {first_line(error)}") from error
    files = [name for name in names if name.endswith(".safetensors")]
    if LORA_FILE not in files and len(files) != 1:
        held = f"{len(files)} weight files, such as {one_line(files[0])}" if files else "no .safetensors file"
        raise UserError(f"{what}: this Hub repository has {held}; download the one to use, and give its path")
    return str(hub_file(source, LORA_FILE if LORA_FILE in files else files[0], None, failure))
