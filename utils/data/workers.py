"""Processes that load data beside the training."""

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
CHILD_ENDED = getattr(signal, "SIGCHLD", None)  # Windows has none; there the death of a worker is noticed within 5 s
CURE = "lower --dataloader_num_workers"
KILLED = f"a data-loader worker was killed (out of memory? see dmesg; or /dev/shm is full); {CURE}"
DYING_SECONDS = 2.0  # a process that is being killed closes its sockets before it counts as dead


class LoadingError(ProcessError):
    """No further batch can be loaded. It is raised where a batch is asked for, and nowhere else."""


def make_loader(dataset: Dataset, num_workers: int, **more: Any) -> DataLoader:
    """A loader of batches that its dataset puts together, whose processes end when this one does, and not before.

    Signals that are sent to the whole group are for the run alone, which saves what there is. The iterators of the
    loader raise `LoadingError` where a worker was killed, hangs, or is short of memory.

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
        before, handler = set(multiprocessing.active_children()), _handler_now()
        try:
            batches = super().__iter__()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise LoadingError(f"data-loader workers can't be started: {first_line(error)}; {CURE}") from error
        finally:
            _take_handler(handler)
        workers = set(multiprocessing.active_children()) - before
        _WORKERS.update(workers)
        return _Batches(batches, list(workers))


class _Batches(Iterator):
    """The batches of a loader; whatever becomes of its workers is raised as `LoadingError` by `next`.

    torch raises the death of a worker from a signal handler: in the middle of an optimizer step, of a checkpoint, of a
    log line. Here that handler is set only while a batch is waited for.
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
        except UserError as error:  # of a worker with the traceback there in front, which ends in its message
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from error
        except (RuntimeError, MemoryError, OSError, EOFError) as error:
            explained = self._explained(error)
            if explained is None:
                raise
            raise explained from error

    def _explained(self, error: Exception) -> LoadingError | None:
        """What an error means for the run; None of one that no worker's end and no lack of memory explains."""
        if isinstance(error, RuntimeError) and "timed out after" in str(error):
            return LoadingError(
                f"no batch was loaded within --dataloader_timeout: {first_line(error)}; is a disk hanging?"
            )
        if not str(error).startswith("Caught "):  # which is what a worker that lives reports
            until = time.monotonic() + DYING_SECONDS
            for worker in self._workers:
                worker.join(max(0.0, until - time.monotonic()))
            if not all(worker.is_alive() for worker in self._workers):
                return LoadingError(KILLED)
        if is_out_of_memory(error):
            cure = CURE if self._workers else "free some memory"
            return LoadingError(f"out of memory while a batch was loaded: {first_line(error)}; {cure}")
        return None


def _handler_now() -> Any:
    return None if CHILD_ENDED is None else signal.getsignal(CHILD_ENDED)


def _take_handler(handler: Any) -> None:
    """Puts a handler back in the place of torch's, which is kept for `_hearing_of_workers`."""
    now = _handler_now()
    if now is handler or threading.current_thread() is not threading.main_thread():
        return
    _TORCHS_HANDLER[:] = [now]  # torch sets it once in a process
    signal.signal(CHILD_ENDED, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _hearing_of_workers() -> Iterator[None]:
    """Context manager: torch's handler raises a `RuntimeError` where a worker dies."""
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
    """Ends what is left of the loaders' processes: at exit Python would send them a SIGTERM, and wait for good."""
    for process in [process for process in _WORKERS if process.is_alive()]:
        process.kill()
