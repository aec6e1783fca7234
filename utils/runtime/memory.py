"""Memory: what says that it was short, where weights lie in it, and keeping it for the next step."""

import ctypes

import torch
from torch import nn

OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
    *("CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
PERHAPS_OUT_OF_MEMORY = ("unable to find an engine to execute this computation",)  # cuDNN's, without a workspace too
LITTLE = 0.05  # of a device's memory, with less of which free it was short

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
NEVER, LARGEST, LARGEST_ONCE = -1, 2**30, 2**25  # bytes; before glibc 2.35 or so it takes no more than the last
ALIGNMENT = 64  # bytes: of AVX-512's registers, and of a cache's lines


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, in any of the words that libraries have for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    if any(words in said for words in PERHAPS_OUT_OF_MEMORY):
        return _is_nearly_full()
    return any(words in said for words in OUT_OF_MEMORY)


def _is_nearly_full() -> bool:
    """Whether the current GPU has little memory left that no process holds."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < LITTLE * total


def keep_freed_memory() -> bool:
    """Has the C library keep memory that is freed, also large pieces, for whoever asks next.

    By itself glibc gives the end of its heap back to the kernel, and where a step's activations happen to lie there,
    each step takes them anew, a page and a fault at a time.

    Returns:
        Whether it does: other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl; on Windows the program itself is no library
        return False
    is_mapped_no_more = mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_THRESHOLD, LARGEST_ONCE)
    return bool(is_mapped_no_more and mallopt(TRIM_THRESHOLD, NEVER))


def align(module: nn.Module) -> None:
    """Copies weights that lie anywhere in a mapped file to addresses that a CPU reads in whole cache lines."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
