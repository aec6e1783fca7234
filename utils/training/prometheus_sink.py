"""The sink of the log that Prometheus reads: on the main process the run's metrics, on each process its memory."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from utils.config.config_file import recorded_options
from utils.config.options import UserError
from utils.config.terminal import one_line
from utils.evaluation.judging import WORDS
from utils.reports.records import VERDICT
from utils.runtime.processes import on_main_process, versions
from utils.runtime.prometheus import MetricsServer, RunCounts, StepNumbers, process_registry
from utils.runtime.prometheus_options import PrometheusOptions
from utils.training.data import TrainingData
from utils.training.session import Session
from utils.training.sinks import Sink
from utils.training.state import TrainingState

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

logger = logging.getLogger(__name__)
TOLD = ("pretrained_model_name_or_path", "adaptation", "optimizer", "resolution", "seed")
"""Options that the run's info names."""
LONGEST_LABEL = 200  # characters


class PrometheusSink(Sink):
    """Serves what the run logs until the log is closed."""

    def __init__(self, options: PrometheusOptions, registry: "CollectorRegistry", numbers: StepNumbers | None):
        """Args:
        numbers: the numbers that the log sets; None on a process that serves only its memory.
        """
        self._options, self._registry, self._numbers = options, registry, numbers
        self._server: MetricsServer | None = None

    @classmethod
    def start(
        cls, options: PrometheusOptions, session: Session, data: TrainingData, state: TrainingState
    ) -> list[Self]:
        """Starts the servers of --prometheus_port; returns no sink without it. All processes must call it.

        Raises:
            UserError: if the main process can't open its port.
        """
        if options.prometheus_port is None:
            return []
        accelerator = session.accelerator
        registry = process_registry(accelerator.device, accelerator.process_index)
        if not accelerator.is_main_process:
            sink = cls(options, registry, None)
        else:
            sink = cls(options, registry, StepNumbers(registry, data.batches.size))
            sink._add_run(session, data, state)
        on_main_process(accelerator, sink._serve)
        if not accelerator.is_main_process:
            try:
                sink._serve()
            except UserError as error:
                logger.error("%s; its memory is not served, and the training continues", error)
        return [sink]

    def _add_run(self, session: Session, data: TrainingData, state: TrainingState) -> None:
        """Adds what is read at each scrape, and what the run is."""
        from prometheus_client import Info

        folder = session.folder.path
        counts = (lambda: state.skips.total), (lambda: len(data.images.bad))
        self._registry.register(RunCounts(state.total_steps, *counts, folder / VERDICT, WORDS))
        Info("finetune_run", "This run", registry=self._registry).info(_facts(folder))

    def _serve(self) -> None:
        self._server = MetricsServer(self._options, self._registry)

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Sets the numbers of a step."""
        if self._numbers is not None:
            self._numbers.step(values, step)

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Sets numbers measured between steps."""
        if self._numbers is not None:
            self._numbers.values(values)

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.close()
            self._server = None


def _facts(folder: Path) -> dict[str, str]:
    """Returns what a run is, for its info metric."""
    options, packages = recorded_options(folder), versions()
    facts = {name: one_line(options.get(name), LONGEST_LABEL) for name in TOLD if options.get(name) is not None}
    return (
        facts
        | {"output_dir": one_line(folder.absolute(), LONGEST_LABEL)}
        | {name: packages.get(name, "") for name in ("torch", "diffusers")}
    )
