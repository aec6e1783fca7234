"""Restores what a run sets in its process: a notebook may run several, and then do other work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # set by --deterministic


@contextmanager
def settings_restored() -> Iterator[None]:
    """Context manager: restores torch's settings, and forgets accelerate's state if there was none before.

    Accelerate keeps one state in a process, with the precision of its first use. Where several processes train, each
    ends with its run, and its state stays: what still waits for the others needs it.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    had_state = bool(PartialState._shared_state)
    is_deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills, benchmarks = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    workspace = os.environ.get(CUBLAS)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = benchmarks
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        if not had_state and PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
