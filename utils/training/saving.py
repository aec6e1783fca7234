"""Saving between steps: when checkpoints are due or requested, and writing them while training continues."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from utils.config.options import UserError, first_line
from utils.config.progress import Progress
from utils.runtime.background_writer import BackgroundWriter, HostBuffers
from utils.runtime.processes import on_main_process
from utils.runtime.stop_requests import Wish, stopped
from utils.training.backward import Gradients
from utils.training.checkpoint import Checkpoints
from utils.training.options import TrainingOptions
from utils.training.session import Session
from utils.training.state import TrainingState

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes what is due between steps: checkpoints, `--ema_lengths` snapshots, and exported pipelines.

    Attributes:
        saver: writes a checkpoint.
    """

    def __init__(
        self,
        options: TrainingOptions,
        session: Session,
        state: TrainingState,
        gradients: Gradients,
        at_once: int,
        exports: Callable[[Progress], bool] = lambda progress: False,
    ):
        """Args:
        at_once: samples that a process computes at once if memory allows.
        exports: whether to export the result after a step; by default only at the end.
        """
        asked = options.checkpoint
        folders = Checkpoints(session.folder.path, asked.checkpoints_total_limit)
        self.saver = CheckpointSaver(folders, state, BackgroundWriter(saves_behind(asked.async_checkpointing, state)))
        self._options, self._ema, self._session = asked, options.ema, session
        self._export_steps = options.export.export_steps
        self._state, self._gradients, self._at_once = state, gradients, at_once
        self._exports = exports
        gradients.rescue = self._rescue

    def __enter__(self) -> Self:
        self.saver.writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for the last checkpoint, and raises its error on all processes."""
        try:
            if kind is None:
                self.saver.join()
        finally:
            self.saver.writer.__exit__(kind, error, traceback)

    def is_due(self, progress: Progress, wish: Wish) -> bool:
        """Whether something is to be written after a step, as scheduled or as requested."""
        planned = (self._options.is_due, self._is_snapshot_due, self._is_export_due, self._is_kept_export_due)
        return wish.saves or any(is_due(progress) for is_due in planned)

    def save(self, progress: Progress, wish: Wish) -> None:
        """Writes what is due; all processes must call it."""
        accelerator, lengths = self._session.accelerator, self._state.lengths
        if self._is_snapshot_due(progress):
            on_main_process(accelerator, partial(lengths.snapshot, progress.step))
        if wish.saves:
            on_main_process(accelerator, self._session.requests.remove_heard)
        if wish.saves or self._options.is_due(progress):
            self.saver.save(progress.step, self._gradients.shortened(self._at_once))
            self._session.requests.timers.checkpoints.restart()
        if self._is_export_due(progress) and not wish.ends:
            with self._state.evaluating():
                self._state.export(self._session.folder.path)
        if self._is_kept_export_due(progress) and not wish.ends:
            with self._state.evaluating():
                write = self._state.exporting()
                name = f"export-{progress.step}"
                on_main_process(accelerator, lambda: self._session.folder.replace(name, write))

    def stop_if_wished(self, progress: Progress, wish: Wish) -> None:
        """Ends a run that was requested to stop, once its checkpoint is written.

        Raises:
            Stopped: if a stop was requested.
        """
        if wish.number or (wish.ends and not progress.is_last):
            self.saver.join()
            raise stopped(wish, progress.step, self._session.folder.path)

    def _is_snapshot_due(self, progress: Progress) -> bool:
        interval = self._ema.ema_snapshot_steps or self._options.snapshot_interval
        return self._state.lengths is not None and (progress.is_multiple_of(interval) or progress.is_last)

    def _is_export_due(self, progress: Progress) -> bool:
        return self._exports(progress) and not progress.is_last

    def _is_kept_export_due(self, progress: Progress) -> bool:
        steps = self._export_steps
        return steps is not None and progress.is_multiple_of(steps) and not progress.is_last

    def _rescue(self, step: int, size: int) -> None:
        self.saver.rescue(step, size if size < self._at_once else None)


def saves_behind(asked: bool | None, state: TrainingState) -> bool:
    """Whether to write checkpoints while training continues; default: on a GPU if host memory allows."""
    if asked is None:
        accelerator = state.accelerator
        return accelerator.device.type == "cuda" and on_main_process(accelerator, state.copies_fit_twice)
    return asked


class CheckpointSaver:
    """Saves the training state as checkpoints, immediately or in the background."""

    def __init__(self, checkpoints: Checkpoints, state: TrainingState, writer: BackgroundWriter):
        self.writer = writer
        self._checkpoints = checkpoints
        self._state = state
        self._buffers = HostBuffers(keeps=state.accelerator.is_main_process)

    def save(self, step: int, samples_at_once: int | None) -> None:
        """Starts saving, after waiting for the previous checkpoint and raising its error; all processes must call it.

        If host memory is too small for copies, it saves immediately.
        """
        accelerator, engine = self._state.accelerator, self._state.engine
        is_copied = on_main_process(accelerator, self._can_copy)
        jobs: list[Callable[[Path], None]] = []
        if engine.spreads or accelerator.is_main_process:
            buffers = self._buffers if is_copied else HostBuffers(accelerator.is_main_process, are_kept=False)
            jobs = self._state.saving(step, samples_at_once, buffers, is_copied or engine.spreads)
        on_main_process(accelerator, lambda: self._write(step, jobs, waits=not is_copied))

    def rescue(self, step: int, samples_at_once: int | None) -> None:
        """Saves from a process that can't continue, without the other processes; each process has the whole state.

        An existing checkpoint of that step is kept.
        """
        self.writer.join()
        if self._is_saved(step):
            return
        jobs = self._state.saving(step, samples_at_once, HostBuffers(are_kept=False), is_copied=False)
        try:
            self._checkpoints.save(step, jobs, is_alone=True)
        except OSError as error:  # another process may have saved the same step at the same moment
            if not self._is_saved(step):
                raise UserError(f"checkpoint-{step} can't be written: {first_line(error)}") from error

    def _is_saved(self, step: int) -> bool:
        return any(path.name == f"checkpoint-{step}" for path in self._checkpoints.found())

    def join(self) -> None:
        """Waits until the last checkpoint is written, and raises its error; all processes must call it."""
        on_main_process(self._state.accelerator, self.writer.join)

    def _can_copy(self) -> bool:
        self.writer.join()
        can = self.writer.is_on and self._buffers.have_room_for(self._state.tensors())
        if self.writer.is_on and not can:
            logger.warning(
                "--async_checkpointing: host memory is too small for copies, so training waits for the write"
            )
        return can

    def _write(self, step: int, jobs: Sequence[Callable[[Path], None]], waits: bool) -> None:
        self.writer.run(partial(self._checkpoints.save, step, jobs))
        if waits:
            self.writer.join()
