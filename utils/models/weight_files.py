"""Checks of weight files: values are used as stored, so weights that need scales or unpacking are refused.

All weights are checked here: folders, shards, single files, LoRA files, VAEs and text encoders.
"""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.config.options import UserError
from utils.config.tensor_files import open_safetensors, read_pickle, refuse_other_content
from utils.config.terminal import one_line
from utils.config.user_files import FileError, read_json

logger = logging.getLogger(__name__)
FULL_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
"""Dtypes whose values are the weights themselves, as named by safetensors and by torch."""
EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "float8_e4m3fn", "float8_e5m2")
EIGHT_BIT_FLOATS += ("float8_e4m3fnuz", "float8_e5m2fnuz")
COMPLEX = ("C64", "C128", "complex32", "complex64", "complex128")
TRUTH_VALUES = ("BOOL", "bool")
COUNTED = ("position_ids", "relative_position_index", "num_batches_tracked", "num_updates")
"""Last parts of the names of tensors that are integers by nature."""
OF_A_LAYER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of a layer's own tensors; others may hold scales."""
SCALES = re.compile(
    r"scale_(weight|input)|(\w+_)?(weight|input|output)_scale\w*|scaled_fp8|\w*absmax|quant_\w+|comfy_quant|SCB|qweight"
    r"|q?zeros|[qw]?scales|weight_(packed|format|zero_point|shape)|\w*zero_point|smooth_factor\w*",
    re.IGNORECASE,
)
"""Last parts of the names of tensors that common tools store beside quantized weights."""
STEMS = "diffusion_pytorch_model|pytorch_model|model"
CURE = "give the weights in fp32, fp16 or bf16"
LONGEST_NAME = 120


class Stored(NamedTuple):
    """A tensor in a file: its dtype, by safetensors' or torch's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def stored_in(path: Path) -> dict[str, Stored]:
    """Returns dtype and shape of each tensor in a file, by name; reads only the header of a safetensors file.

    Raises:
        FileError, OSError, SafetensorError: if it can't be read; for a pickle as `read_pickle`.
    """
    if path.suffix != ".safetensors":
        return stored_tensors(weights_by_name(read_pickle(path, mmap=True), path))
    refuse_other_content(path)
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Stored(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


def weights_by_name(held: object, path: Path) -> Mapping[str, object]:
    """Returns the content of a pickle of weights, if it is tensors by name.

    Raises:
        FileError: saying what it contains instead.
    """
    cure = "give a file saved from a state_dict()"
    if not isinstance(held, Mapping):
        raise FileError(path, f"contains a {type(held).__name__}, not weights by name; {cure}")
    odd = [type(name).__name__ for name in held if not isinstance(name, str)]
    if odd:
        raise FileError(path, f"has {len(odd)} weights named by {odd[0]}, not by text; {cure}")
    if not any(isinstance(each, Tensor) for each in held.values()):
        inner = next((name for name, each in held.items() if isinstance(each, Mapping)), None)
        if inner is None:
            raise FileError(path, f"contains no weights; {cure}")
        raise FileError(
            path, f"contains its weights inside {one_line(inner, LONGEST_NAME)}; save those as a separate file"
        )
    return held


def stored_tensors(held: object) -> dict[str, Stored]:
    """Returns dtype and shape of tensors by name; empty for anything else."""
    items = held.items() if isinstance(held, Mapping) else ()
    return {
        str(name): Stored(str(each.dtype).removeprefix("torch."), tuple(each.shape))
        for name, each in items
        if isinstance(each, Tensor)
    }


def check_stored(what: str, stored: Mapping[str, Stored]) -> None:
    """Refuses weights that are not used as stored (scaled, quantized, complex), and warns about 8-bit floats.

    Args:
        what: the flag, its value and the part or file, for messages.
        stored: dtype and shape of each tensor, by name.

    Raises:
        UserError: naming the first such tensor.
    """
    # Scales, which this toolkit does not apply.
    scale = next((name for name in stored if _is_scale(name, stored)), None)
    if scale is not None:
        is_known = SCALES.fullmatch(scale.rpartition(".")[2])
        cure = CURE if is_known else f"{CURE}, or --allow_missing_weights {scale} if it can be left out"
        raise UserError(
            f"{what} contains {one_line(scale, LONGEST_NAME)}, so its weights are scaled or quantized: without that "
            f"tensor, which is not read here, they would be wrong; {cure}"
        )

    # Dtypes that are not weights.
    complex_one = next((name for name, each in stored.items() if each.dtype in COMPLEX), None)
    if complex_one is not None:
        raise UserError(
            f"{what} contains {one_line(complex_one, LONGEST_NAME)} as {stored[complex_one].dtype}; weights must be "
            f"real numbers; {CURE}"
        )
    packed = next((name for name, each in stored.items() if _is_packed(name, each)), None)
    if packed is not None:
        raise UserError(
            f"{what} contains {one_line(packed, LONGEST_NAME)} as {stored[packed].dtype}: it is quantized, and its "
            f"values are not the weights; {CURE}"
        )

    # 8-bit floats are used, but coarse.
    coarse = [name for name, each in stored.items() if each.dtype in EIGHT_BIT_FLOATS]
    if coarse:
        logger.warning(
            "%s: %d of its %d tensors are 8-bit floats (%s), which are used as they are; a file in fp16 or fp32 is "
            "more accurate",
            *(what, len(coarse), len(stored), stored[coarse[0]].dtype),
        )


def _is_scale(name: str, stored: Mapping[str, Stored]) -> bool:
    """Whether a tensor scales or unpacks another: by its name, or because it accompanies one of low precision.

    Tensors that accompany full-precision weights are accepted: older releases of diffusers saved a `W` there.
    """
    layer, _, last = name.rpartition(".")
    if SCALES.fullmatch(last):
        return True
    words = layer.split(".")
    owners = [".".join(words[:count]) for count in range(1, len(words) + 1)]
    owners += [f"{layer}.weight"] if last not in OF_A_LAYER else []
    return any(stored[owner].dtype not in FULL_FLOATS for owner in owners if owner in stored)


def _is_packed(name: str, each: Stored) -> bool:
    """Whether a tensor holds integers where floats are expected; booleans may be a mask."""
    last = name.rpartition(".")[2]
    if each.dtype in (*FULL_FLOATS, *EIGHT_BIT_FLOATS) or last in COUNTED or math.prod(each.shape) <= 1:
        return False
    return each.dtype not in TRUTH_VALUES or last in OF_A_LAYER


def weight_files(folder: Path, variant: str | None, with_pickles: bool) -> list[Path]:
    """Returns the weight files in a model's folder that diffusers or transformers would read, sorted.

    Args:
        folder: folder of the model.
        variant: variant of the files, such as fp16; None for the default.
        with_pickles: whether to fall back to .bin files.

    Raises:
        FileError: if an index names a file that is missing, and no whole file is there to read instead.
    """
    infix = "" if variant is None else rf"\.{re.escape(variant)}"
    for suffix in ("safetensors", "bin") if with_pickles else ("safetensors",):
        single = re.compile(rf"({STEMS})({infix}(-\d+-of-\d+)?|-\d+-of-\d+{infix})\.{suffix}")
        index = re.compile(rf"({STEMS})\.{suffix}\.index{infix}\.json")
        found = {path for path in folder.glob(f"*.{suffix}") if single.fullmatch(path.name)}
        for path in folder.glob("*.json"):
            if match := index.fullmatch(path.name):
                shards = {folder / name for name in _shards(path)}
                whole = folder / f"{match[1]}{'' if variant is None else f'.{variant}'}.{suffix}"
                _require_all(path, shards, whole)
                found |= {shard for shard in shards if shard.is_file()}
        if found := {path for path in found if path.is_file()}:
            return sorted(found)
    return []


def loaded_files(folder: Path | None, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    """Returns the safetensors files that a model was loaded from, if any: of the variant if it has that.

    Args:
        folder: folder of the model; None if it has none.
        variant: variant that was asked for.
        use_safetensors: False if pickles were asked for.
    """
    if folder is None or use_safetensors is False:
        return []
    return weight_files(folder, variant, with_pickles=False) or weight_files(folder, None, with_pickles=False)


def _require_all(index: Path, shards: Collection[Path], whole: Path) -> None:
    missing = sorted(shard.name for shard in shards if not shard.is_file())
    if missing and not whole.is_file():
        raise FileError(
            index,
            f"names {len(shards)} files of weights, of which {len(missing)} are missing, such as "
            f"{one_line(missing[0], LONGEST_NAME)}; copy or download the folder again",
        )


def _shards(index: Path) -> set[str]:
    """Returns the file names in a shard index; none if it can't be read, which the library reports itself."""
    try:
        names = read_json(index)["weight_map"].values()
    except (OSError, FileError, TypeError, KeyError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str, is_refused: bool = True) -> None:
    """Refuses weights with NaN or infinite values, from which training can't recover.

    Args:
        tensors: pairs of name and tensor.
        what: the flag, its value and the part, for messages.
        is_refused: whether to raise an error; otherwise a warning is logged.

    Raises:
        UserError: naming the first such tensor.
    """
    bad = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)]
    if not bad:
        return
    name, tensor = bad[0]
    count = int((~tensor.float().isfinite()).sum())
    others = f", as do {len(bad) - 1} other tensors" if len(bad) > 1 else ""
    said = f"{what}: {one_line(name, LONGEST_NAME)} has {count:,} NaN or infinite values of {tensor.numel():,}{others}"
    if is_refused:
        cure = "the file is damaged or from a run that diverged: give another"
        if tensor.dtype == torch.float16 and not bool(tensor.isnan().any()):
            cure = "they are too large for fp16: use --mixed_precision bf16, or give another file"
        raise UserError(f"{said}; {cure}")
    logger.warning("%s: samples will be NaN", said)


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One pass: their sum is finite too, unless it overflows, which is then checked."""
    if tensor.is_meta or math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return True
    return bool(tensor.isfinite().all())
