"""The form of a pipeline's folder: dtype, variant and shards of its weights."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.runtime.sharding import plain_class

logger = logging.getLogger(__name__)
NAMES_OF_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class FolderForm:
    """How the weights of a pipeline are written.

    Attributes:
        dtype: their dtype.
        variant: the variant that names their files, such as fp16; None for plain names.
        max_shard_size: largest size of a file, such as 5GB; None for the libraries' defaults.
    """

    dtype: torch.dtype = torch.float32
    variant: str | None = None
    max_shard_size: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether files of a float32 base can be copied as they are."""
        return self == FLOAT32

    @property
    def arguments(self) -> dict[str, str]:
        """Arguments for `save_pretrained`."""
        given = {"variant": self.variant, "max_shard_size": self.max_shard_size}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def load_arguments(self) -> str:
        """Arguments with which `from_pretrained` loads the folder as it is, as Python code; empty if it needs none."""
        dtype = [] if self.dtype == torch.float32 else [f"torch_dtype={self.dtype}"]
        return ", ".join([*dtype, *([f'variant="{self.variant}"'] if self.variant else [])])


FLOAT32 = FolderForm()


def in_dtype(module: nn.Module, dtype: torch.dtype, what: str) -> nn.Module:
    """Returns the module, or a copy on the CPU in another dtype if its weights are not in that one.

    Args:
        what: name of the module, for messages.
    """
    state = module.state_dict()
    if {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} <= {dtype}:
        return module
    kind = plain_class(module)
    make = getattr(kind, "from_config", kind)  # diffusers has from_config, transformers does not
    with torch.device("meta"):
        copied = make(module.config)
    tensors = {name: rounded(tensor.detach().cpu(), dtype) for name, tensor in state.items()}
    warn_of_overflow(what, {name: num_overflowed(state[name], each) for name, each in tensors.items()})
    copied.load_state_dict(tensors, assign=True)
    return copied


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns a tensor in a dtype; integers stay, and with None all do."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def num_overflowed(before: Tensor, after: Tensor) -> int:
    """Returns how many values became infinite when a tensor was rounded."""
    if after.dtype != torch.float16 or before.dtype == torch.float16:
        return 0
    is_bad = ~after.isfinite()
    return int((before.detach().cpu().isfinite() & is_bad).sum()) if bool(is_bad.any()) else 0


def warn_of_overflow(what: str, counts: dict[str, int]) -> None:
    """Warns of weights that fp16 can't hold, by the numbers of their values."""
    found = {name: count for name, count in counts.items() if count}
    if found:
        logger.warning("%s: %s", what, overflow_text(found))


def overflow_text(counts: dict[str, int]) -> str:
    """Returns what to say of weights that fp16 can't hold, by the numbers of their values."""
    names = ", ".join(list(counts)[:SHOWN]) + (" and others" if len(counts) > SHOWN else "")
    return (
        f"{sum(counts.values()):,} values of {len(counts)} tensors are beyond 65504, the largest of fp16, and became "
        f"infinite: {names}; give --export_dtype bf16"
    )
