"""A run's processes, its output folder, what asks it to stop, and the checkpoint it resumes from."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch

from utils.config.options import as_record, without_secrets
from utils.config.terminal import Lines
from utils.models.attention import Attention
from utils.models.loading import allowing_missing
from utils.runtime.engines import Engine, engine_of
from utils.runtime.processes import OutputFolder, ending, on_main_process, start_processes, versions
from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControls
from utils.sampling.samples import Surroundings
from utils.training.compatibility import check_output_folder, check_speed, check_stepping
from utils.training.log import start_trackers
from utils.training.model_card import create_repository
from utils.training.options import TrainingOptions
from utils.training.resume import Resumption, find_resumption

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Recorded(Protocol):
    """What keeps records of its own in the output folder."""

    def begin(self, first_step: int) -> None:
        """Drops what was recorded after the step from which the run resumes; for all processes to call."""


@dataclass(frozen=True)
class Session:
    """What a run has before it knows its data and its model.

    Attributes:
        engine: how the processes share the work.
        folder: the output folder, locked while the session lives.
        requests: signals, files and time limits that ask the run to save or to stop.
        attention: the kernel that computes attention.
        resumption: the checkpoint to resume from, if any, and what the run is compared with.
        repository: the Hub repository that the result is uploaded to; None without --push_to_hub.
        surroundings: where and by whom samples are drawn.
        seed: from which everything random follows.
    """

    engine: Engine
    folder: OutputFolder
    requests: StopRequests
    attention: Attention
    resumption: Resumption
    repository: str | None
    surroundings: Surroundings
    seed: int

    @classmethod
    @contextmanager
    def start(cls, options: TrainingOptions, output_dir: str, pipeline_class: str) -> Iterator[Self]:
        """Joins the processes, takes the output folder and finds the checkpoint; all are let go at the end.

        Args:
            pipeline_class: the name of the class that is trained, which a checkpoint must share.

        Raises:
            UserError: if an option does not go with the processes, or the folder or the checkpoint is not this run's.
        """
        folder = OutputFolder(output_dir)
        engine = start_engine(options, folder)
        accelerator = engine.accelerator
        requests = StopRequests(folder.path, options.length.seconds)
        attention, allowed = Attention(options.speed.attention_backend), allowing_missing(options.loading)
        with ending(accelerator, folder, options.runtime.peer_timeout), requests.listening(), attention, allowed:
            resumption = find_resumption(options, engine, folder, requests, pipeline_class)
            repository = None
            if not (options.runtime.dry_run or options.cache.ends_when_filled):
                repository = on_main_process(accelerator, partial(create_repository, folder.path, options.hub))
            seed, controls = options.runtime.seed, SamplingControls(options.controls)
            surroundings = Surroundings(accelerator, folder.path, seed, requests, controls)
            yield cls(engine, folder, requests, attention, resumption, repository, surroundings, seed)

    @property
    def accelerator(self) -> "Accelerator":
        """The processes."""
        return self.engine.accelerator

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None for a run that begins."""
        return self.resumption.checkpoint

    def begin(self, options: TrainingOptions, plan: str, recorded: Sequence[Recorded]) -> None:
        """Tidies what earlier runs left in the output folder, writes `run.json`, opens the trackers, says the plan.

        It is called once nothing can refuse this run any more.

        Args:
            recorded: what keeps records of its own in the output folder.
        """
        self.resumption.take_over()
        for each in recorded:
            each.begin(self.resumption.first_step)
        record = as_record(options)
        if self.accelerator.is_main_process:
            self.folder.record(record, versions(), without_secrets(sys.argv))
        start_trackers(self.accelerator, options.tracking, record)
        logger.info("training\n%s", Lines(plan))


def start_engine(options: TrainingOptions, folder: OutputFolder) -> Engine:
    """Joins the processes of the run, and takes the engine it was launched with.

    Raises:
        UserError: if an option does not go with the engine, the processes or the precision.
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
