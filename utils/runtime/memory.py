"""Memory: recognizes out-of-memory errors, keeps freed memory for reuse, and aligns weights."""

import ctypes

import psutil
import torch
from torch import nn

OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
    *("CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
PERHAPS_OUT_OF_MEMORY = ("unable to find an engine to execute this computation",)  # cuDNN, also without a workspace
LITTLE = 0.05  # fraction of a device's memory: with less free, it counts as out of memory

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
NEVER, LARGEST, LARGEST_ONCE = -1, 2**30, 2**25  # bytes; glibc before about 2.35 accepts no more than the last
ALIGNMENT = 64  # bytes: size of AVX-512 registers and cache lines


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, in any of the libraries' wordings."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    if any(words in said for words in PERHAPS_OUT_OF_MEMORY):
        return _is_nearly_full()
    return any(words in said for words in OUT_OF_MEMORY)


def _is_nearly_full() -> bool:
    """Whether the current GPU has almost no free memory."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < LITTLE * total


def used_memory(device: torch.device) -> dict[str, float]:
    """Returns the memory that this process uses now, in GB (1e9 bytes); reading it takes well under a millisecond.

    host_memory_gb is the resident set, without that of loader workers. On a GPU: device_memory_gb is the peak of what
    tensors took so far, device_allocated_gb what they take now, device_reserved_gb what the allocator holds.
    """
    found = {"host_memory_gb": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        found |= {
            "device_memory_gb": torch.cuda.max_memory_allocated(device),
            "device_allocated_gb": torch.cuda.memory_allocated(device),
            "device_reserved_gb": torch.cuda.memory_reserved(device),
        }
    return {name: round(count / 1e9, 3) for name, count in found.items()}


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory, including large blocks, for later allocations.

    By default glibc returns the end of its heap to the kernel. If a step's activations lie there, each step has to
    get them back one page fault at a time.

    Returns:
        Whether it worked: only glibc has this setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    is_mapped_no_more = mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_THRESHOLD, LARGEST_ONCE)
    return bool(is_mapped_no_more and mallopt(TRIM_THRESHOLD, NEVER))


def align(module: nn.Module) -> None:
    """Moves CPU weights that are unaligned in a memory-mapped file to addresses aligned to cache lines."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
