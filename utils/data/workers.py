"""Processes that load data beside the training."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset

from utils.stopping import SIGNALS

_WORKERS: WeakSet = WeakSet()


def make_loader(dataset: Dataset, num_workers: int, **more: Any) -> DataLoader:
    """A loader of batches that its dataset puts together, whose processes end when this one does, and not before.

    Signals that are sent to the whole group are for the run alone, which saves what there is.

    Args:
        more: torch's own arguments.
    """
    if num_workers > 0:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizers' first use
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    return _Loader(dataset, batch_size=None, num_workers=num_workers, worker_init_fn=_ignore_signals, **more)


class _Loader(DataLoader):
    """A loader that remembers its processes."""

    def __iter__(self) -> Iterator:
        before = set(multiprocessing.active_children())
        batches = super().__iter__()
        _WORKERS.update(set(multiprocessing.active_children()) - before)
        return batches


def _ignore_signals(_: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Ends what is left of the loaders' processes: at exit Python would send them a SIGTERM, and wait for good."""
    left = [process for process in _WORKERS if process.is_alive()]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a process for a fault
    for process in left:
        process.kill()
