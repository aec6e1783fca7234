"""The session of a run: processes, output folder, stop requests, and the checkpoint to resume from."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch

from utils.config.options import as_record, changed_options, without_secrets
from utils.config.terminal import Lines
from utils.models.attention import Attention
from utils.models.loading import allowing_missing
from utils.runtime.engines import Engine, engine_of
from utils.runtime.machine import git_state, hardware
from utils.runtime.process_settings import settings_restored
from utils.runtime.processes import OutputFolder, ending, on_main_process, start_processes, versions
from utils.runtime.step_lines import samples_before
from utils.runtime.stop_requests import StopRequests, repeat_command
from utils.runtime.timers import Timers
from utils.runtime.tracker_folders import kept_within
from utils.runtime.trackers import start_trackers
from utils.sampling.controls import SamplingControls
from utils.sampling.samples import Surroundings
from utils.training.compatibility import check_output_folder, check_speed, check_stepping
from utils.training.hub_upload import create_repository
from utils.training.log import METRICS
from utils.training.options import TrainingOptions
from utils.training.reporting import RunReport
from utils.training.resume import Resumption, find_resumption

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Plan(Protocol):
    """What a run is about to do: a text for the log, a record for run.json, and files for the report."""

    @property
    def text(self) -> str:
        """One fact per line."""

    @property
    def record(self) -> Mapping[str, object]:
        """Values by name, as JSON."""

    @property
    def write_files(self) -> Callable[[Path], None]:
        """Writes to a folder what the report shows and is known before the first step."""


class Recorded(Protocol):
    """An object that keeps its own records in the output folder."""

    def begin(self, first_step: int) -> None:
        """Drops records after the step from which the run resumes; all processes must call it."""


@dataclass(frozen=True)
class Session:
    """The parts of a run that exist before its data and model are known.

    Attributes:
        engine: how the processes share the work (DDP, FSDP2, DeepSpeed).
        folder: the output folder, locked while the session is open.
        requests: signals, files and time limits that request a save or a stop.
        attention: the kernel that computes attention.
        resumption: the checkpoint to resume from, if any, and the settings to compare with it.
        repository: the Hub repository to upload the result to; None without --push_to_hub.
        surroundings: processes, folder and seed for sampling.
        seed: the seed of everything random.
        report: the report of the run.
    """

    engine: Engine
    folder: OutputFolder
    requests: StopRequests
    attention: Attention
    resumption: Resumption
    repository: str | None
    surroundings: Surroundings
    seed: int
    report: RunReport

    @classmethod
    @contextmanager
    def start(cls, options: TrainingOptions, output_dir: str, pipeline_class: str) -> Iterator[Self]:
        """Context manager: starts the processes, claims the output folder and finds the checkpoint.

        Args:
            pipeline_class: name of the pipeline class that is trained, which a checkpoint must share.

        Raises:
            UserError: if an option excludes the launched setup, or the folder or checkpoint belongs to another run.
        """
        with ExitStack() as stack:
            stack.enter_context(settings_restored())
            folder = OutputFolder(output_dir)
            engine = start_engine(options, folder)
            accelerator = engine.accelerator
            timers = Timers(options.checkpoint.checkpointing_minutes, options.samples.minutes)
            requests = StopRequests(folder.path, options.length.seconds, timers)
            attention, allowed = Attention(options.speed.attention_backend), allowing_missing(options.loading)
            for each in (
                kept_within(folder.path, options.tracking.trackers),
                ending(accelerator, folder, options.runtime.peer_timeout),
                requests.listening(),
                attention,
                allowed,
            ):
                stack.enter_context(each)
            resumption = find_resumption(options, engine, folder, requests, pipeline_class)
            repository = None
            if not (options.runtime.dry_run or options.cache.ends_when_filled):
                repository = on_main_process(accelerator, partial(create_repository, folder.path, options.hub))
            seed, controls = options.runtime.seed, SamplingControls(options.controls)
            surroundings = Surroundings(accelerator, folder.path, seed, requests, controls)
            report = RunReport(folder, options.tracking.report, accelerator.is_main_process)
            with report.lasting():
                yield cls(engine, folder, requests, attention, resumption, repository, surroundings, seed, report)

    @property
    def accelerator(self) -> "Accelerator":
        """The Accelerator that the processes share."""
        return self.engine.accelerator

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None for a new run."""
        return self.resumption.checkpoint

    def count_samples(self, global_batch: int) -> None:
        """Starts the count of samples seen, at what the run to resume from had seen."""
        start = self.resumption
        file, then = self.folder.path / METRICS, start.global_batch or global_batch
        self.surroundings.seen.begin(
            global_batch, start.first_step, samples_before(file, start.first_step, then) if start.first_step else 0
        )

    def begin(self, options: TrainingOptions, plan: Plan, recorded: Sequence[Recorded]) -> None:
        """Cleans up what earlier runs left in the output folder, writes `run.json`, opens the trackers, logs the plan.

        Called once nothing can refuse this run any more.

        Args:
            plan: the run as `describe_run` describes it.
            recorded: objects that keep their own records in the output folder.
        """
        self.resumption.take_over()
        for each in recorded:
            each.begin(self.resumption.first_step)
        record = as_record(options)
        if self.accelerator.is_main_process:
            self.folder.record(record, versions(), without_secrets(sys.argv), **self._facts(options), **plan.record)
        start_trackers(self.accelerator, self.folder.path, options.tracking.tracker_project_name, record)
        self.report.begin(plan.write_files)
        logger.info("training\n%s", Lines(plan.text))

    def _facts(self, options: TrainingOptions) -> dict[str, object]:
        """What `run.json` records of the run's surroundings: its start, command, changed options, hardware and git."""
        git = git_state(Path.cwd())
        return {
            "state": "running",
            "started": round(time.time(), 3),
            "repeat": repeat_command(sys.argv),
            "changed_options": changed_options(options),
            "hardware": hardware(self.accelerator),
            **({} if git is None else {"git": git}),
        }


def start_engine(options: TrainingOptions, folder: OutputFolder) -> Engine:
    """Starts the processes of the run with the engine it was launched with.

    Raises:
        UserError: if an option excludes the engine, the number of processes or the precision.
    """
    loader, tracking, pure_bf16 = options.loader, options.tracking, options.adaptation.pure_bf16
    check_output_folder(options, folder.path)
    accelerator = start_processes(
        options.runtime, loader.gradient_accumulation_steps, tracking.trackers, folder.path, tracking.logging_dir
    )
    check_stepping(options.optimizer, tracking, pure_bf16, accelerator)
    check_speed(options.speed, options.model, options.optimizer.optimizer_in_backward, pure_bf16, accelerator)
    engine = engine_of(accelerator)
    engine.check_options(options, options.optimizer.name)
    engine.check_batch(loader.global_batch(accelerator.num_processes))
    return engine
