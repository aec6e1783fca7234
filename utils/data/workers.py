"""Data-loader worker processes, and clear errors when one fails."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset

from utils.config.options import ProcessError, UserError, first_line
from utils.runtime.memory import is_out_of_memory
from utils.runtime.stop_requests import SIGNALS

_WORKERS: WeakSet = WeakSet()
_TORCHS_HANDLER: list[Any] = []
CHILD_ENDED = getattr(signal, "SIGCHLD", None)  # None on Windows, where torch notices a dead worker within 5 s
CURE = "lower --dataloader_num_workers"
KILLED = f"a data-loader worker was killed (out of memory? see dmesg; or /dev/shm is full); {CURE}"
DYING_SECONDS = 2.0  # a killed process closes its sockets before it counts as dead


class LoadingError(ProcessError):
    """No further batch can be loaded; only raised where the next batch is requested."""


def make_loader(dataset: Dataset, num_workers: int, **more: Any) -> DataLoader:
    """Returns a DataLoader for a dataset of whole batches; its workers live exactly as long as this process.

    Workers ignore signals sent to the process group, so that the run can save a checkpoint first. The loader's
    iterators raise `LoadingError` if a worker is killed, hangs, or runs out of memory.

    Args:
        dataset: returns whole batches.
        num_workers: number of worker processes; 0 loads in this process.
        more: further arguments of torch's DataLoader.
    """
    if num_workers > 0:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn if used before a fork
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    return _Loader(dataset, batch_size=None, num_workers=num_workers, worker_init_fn=_ignore_signals, **more)


class _Loader(DataLoader):
    """A DataLoader that keeps track of its worker processes."""

    def __iter__(self) -> Iterator:
        before, handler = set(multiprocessing.active_children()), _handler_now()
        try:
            batches = super().__iter__()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise LoadingError(f"cannot start data-loader workers: {first_line(error)}; {CURE}") from error
        finally:
            _take_handler(handler)
        workers = set(multiprocessing.active_children()) - before
        _WORKERS.update(workers)
        return _Batches(batches, list(workers))


class _Batches(Iterator):
    """The batches of a loader; `next` raises a `LoadingError` for any failure of a worker.

    torch raises the death of a worker from a signal handler, which could interrupt an optimizer step or a checkpoint.
    Here that handler is only installed while waiting for a batch.
    """

    def __init__(self, batches: Iterator, workers: list[BaseProcess]):
        self._batches = batches
        self._workers = workers

    def __next__(self) -> Any:
        try:
            with _hearing_of_workers():
                if any(worker.exitcode for worker in self._workers):
                    raise LoadingError(KILLED)
                return next(self._batches)
        except UserError as error:  # from a worker its message follows the worker's traceback
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from error
        except (RuntimeError, MemoryError, OSError, EOFError) as error:
            explained = self._explained(error)
            if explained is None:
                raise
            raise explained from error

    def _explained(self, error: Exception) -> LoadingError | None:
        """Returns the `LoadingError` for an error; None if it is not due to a dead or hanging worker or to memory."""
        # a worker that hangs
        if isinstance(error, RuntimeError) and "timed out after" in str(error):
            return LoadingError(
                f"no batch was loaded within --dataloader_timeout: {first_line(error)}; is a disk hanging?"
            )

        # a worker that was killed; living workers report errors as "Caught ..."
        if not str(error).startswith("Caught "):
            until = time.monotonic() + DYING_SECONDS
            for worker in self._workers:
                worker.join(max(0.0, until - time.monotonic()))
            if not all(worker.is_alive() for worker in self._workers):
                return LoadingError(KILLED)

        # out of memory
        if is_out_of_memory(error):
            cure = CURE if self._workers else "free some memory"
            return LoadingError(f"out of memory while a batch was loaded: {first_line(error)}; {cure}")
        return None


def _handler_now() -> Any:
    return None if CHILD_ENDED is None else signal.getsignal(CHILD_ENDED)


def _take_handler(handler: Any) -> None:
    """Restores a handler that torch replaced, and keeps torch's handler for `_hearing_of_workers`."""
    now = _handler_now()
    if now is handler or threading.current_thread() is not threading.main_thread():
        return
    _TORCHS_HANDLER[:] = [now]  # torch sets it once in a process
    signal.signal(CHILD_ENDED, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _hearing_of_workers() -> Iterator[None]:
    """Context manager: torch's handler is installed, which raises a `RuntimeError` when a worker dies."""
    if not _TORCHS_HANDLER or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(CHILD_ENDED, _TORCHS_HANDLER[0])
    try:
        yield
    finally:
        signal.signal(CHILD_ENDED, signal.SIG_DFL if before is None else before)


def _ignore_signals(_: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kills the remaining workers; they ignore the SIGTERM that Python sends at exit before it waits for them."""
    for process in [process for process in _WORKERS if process.is_alive()]:
        process.kill()
