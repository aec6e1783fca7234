"""Keeps the report of a run current while it trains, and completes it at its end."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from utils.config.options import Diverged, Stopped, first_line
from utils.config.user_files import read_json
from utils.reports.page import FILE, write_page
from utils.reports.plots import FOLDER as PLOTS
from utils.reports.plots import SCHEDULE, TRAINING, write_plots
from utils.reports.records import MODEL_SUMMARY, SHEET, read_run
from utils.runtime.processes import OutputFolder

logger = logging.getLogger(__name__)
LEAST_PAUSE = 30.0  # seconds between two reports of a running run
SHARE = 50  # a report is written again after at least as many times the seconds that the last one took
LONGEST_REFRESH = 600.0  # seconds
CODE = Path(__file__).resolve().parents[2]


class RunReport:
    """Writes `report.html` of a run on the main process, and its state in `run.json`.

    While the run trains, another process with the lowest priority writes the report from the records in the folder, so
    that no step waits for it. A report that can't be written costs one warning.
    """

    def __init__(self, folder: OutputFolder, is_on: bool, is_main_process: bool):
        """Args:
        is_on: whether to write the report; the state is always written.
        """
        self._folder, self._is_on, self._is_main = folder, is_on, is_main_process
        self._has_begun = self._has_failed = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen | None = None

    def begin(self, write_files: Callable[[Path], None]) -> None:
        """Starts to keep the report current, once the run's records are those of this run.

        Args:
            write_files: writes to the folder what is known before the first step.
        """
        self._has_begun = True
        if not self._is_main:
            return
        if not self._is_on:
            self._attempt(self._remove_outdated)
            return
        self._attempt(partial(write_files, self._folder.path))
        self._thread = threading.Thread(target=self._keep_current, name="report", daemon=True)
        self._thread.start()

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """Context manager around a run: at its end, however it ends, writes its state and the whole report."""
        try:
            yield
        except BaseException as error:
            self._finish(_state_of(error), _reason_of(error))
            raise
        self._finish("finished", None)

    def _keep_current(self) -> None:
        """Writes the report again and again until the run ends."""
        pause = LEAST_PAUSE
        while not self._ended.wait(pause):
            began = time.perf_counter()
            self._attempt(self._refresh)
            pause = max(LEAST_PAUSE, SHARE * (time.perf_counter() - began))

    def _refresh(self) -> None:
        """Writes the report in another process, and waits for it.

        Raises:
            OSError: if it fails.
        """
        command = [sys.executable or "python", "-m", "utils.reports.refresh", str(self._folder.path.resolve())]
        paths = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as self._child:
            try:
                _, said = self._child.communicate(timeout=LONGEST_REFRESH)
            except subprocess.TimeoutExpired as error:
                self._child.kill()
                raise OSError(f"it took over {LONGEST_REFRESH:g} seconds") from error
        if self._child.returncode and not self._ended.is_set():
            raise OSError((said.decode("utf-8", "replace").strip().splitlines() or ["it failed"])[-1])

    def _finish(self, state: str, why: str | None) -> None:
        """Writes the state, the whole report and the plots."""
        self._ended.set()
        if not (self._has_begun and self._is_main):
            return
        child = self._child
        if child is not None and child.poll() is None:
            child.terminate()
        if self._thread is not None:
            self._thread.join(timeout=10)
        if self._has_diverged():  # --max_skipped_steps ends a run with an error
            state = "diverged"
        self._folder.add_to_record(state=state, ended=round(time.time(), 3), ended_because=why)
        if self._is_on:
            self._attempt(self._write_all)

    def _has_diverged(self) -> bool:
        """Whether the outcome in `run.json` says that the run has diverged."""
        try:
            run = read_json(self._folder.path / "run.json")
        except (OSError, ValueError):
            return False
        outcome = run.get("outcome") if isinstance(run, dict) else None
        return isinstance(outcome, dict) and bool(outcome.get("diverged"))

    def _write_all(self) -> None:
        record = read_run(self._folder.path)
        write_page([record], self._folder.path / FILE)
        write_plots(record)
        logger.info("the report of the run is %s", self._folder.path / FILE)

    def _remove_outdated(self) -> None:
        """Removes the report of an earlier run in the folder: it would not be that of this one."""
        for name in (FILE, SHEET, MODEL_SUMMARY, *(f"{PLOTS}/{name}" for name in (TRAINING, SCHEDULE))):
            (self._folder.path / name).unlink(missing_ok=True)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Runs a part of the report; an error of any kind costs a warning, as the training does not depend on it."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever the records of a run make it fail with
            if not self._has_failed:
                logger.warning(
                    "%s can't be written: %s; the run continues", self._folder.path / FILE, first_line(error)
                )
            self._has_failed = True


def _state_of(error: BaseException) -> str:
    """The state of a run that an exception ended."""
    if isinstance(error, Stopped | KeyboardInterrupt):
        return "stopped"
    return "diverged" if type(error) is Diverged else "failed"


def _reason_of(error: BaseException) -> str:
    """The line of an exception that the report shows."""
    return first_line(error)[:1000]
