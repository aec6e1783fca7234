"""The metrics of a run for Prometheus: names in its conventions, and the server that it reads them from.

https://prometheus.io/docs/practices/naming
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from utils.config.user_files import FileError, read_json
from utils.runtime.processes import is_of_run
from utils.runtime.prometheus_options import PrometheusOptions, not_served

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

logger = logging.getLogger(__name__)
STEP_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
PER_STEP = {
    "train_loss": ("finetune_loss", "Training loss of the last step"),
    "learning_rate": ("finetune_learning_rate", "Learning rate of the denoiser"),
    "grad_norm": ("finetune_gradient_norm", "Norm of the gradients before clipping"),
    "images_per_second": ("finetune_images_per_second", "Training speed in images per second"),
    "epoch": ("finetune_epoch", "Passes over the data so far"),
    "data_wait": ("finetune_data_wait_ratio", "Fraction of a step spent waiting for data"),
}
"""By name in the log: the gauge of a number of each step, and its help."""
BETWEEN_STEPS = {
    "validation_loss": ("finetune_validation_loss", "Loss on held-out images"),
    "validation_loss_ema": ("finetune_validation_loss_ema", "Loss of the averaged weights on held-out images"),
    "validation_loss_relative": (
        "finetune_validation_loss_relative",
        "Mean over timesteps of log(held-out loss / held-out loss of the base model)",
    ),
}
LABELLED = {
    "eval/": ("finetune_score", "Score of the evaluation", "name"),
    "validation_loss_at/": (
        "finetune_validation_loss_at",
        "Loss on held-out images by place in the timesteps",
        "place",
    ),
}
"""By beginning of the name in the log: the gauge, its help, and the label that holds the rest of the name."""
LEFT_OUT = ("grad_norm/", "loss_for_", "verdict/")
"""Beginnings of names that would be a series for each layer or image, and of the verdict, which is a state set."""
DURATIONS = ("validation", "evaluation", "samples", "verdict")
SECONDS = "_seconds"


class StepNumbers:
    """The gauges, counters and durations of the run, which the log sets."""

    def __init__(self, registry: "CollectorRegistry", images_per_step: int):
        """Args:
        images_per_step: the global batch.
        """
        from prometheus_client import Counter, Gauge, Histogram, Summary

        self._images_per_step = images_per_step
        self._gauges = {
            name: Gauge(gauge, text, registry=registry) for name, (gauge, text) in (PER_STEP | BETWEEN_STEPS).items()
        }
        self._labelled = {
            start: Gauge(gauge, text, [label], registry=registry) for start, (gauge, text, label) in LABELLED.items()
        }
        self._others = Gauge("finetune_measurement", "Other numbers of the log", ["name"], registry=registry)
        self._step = Gauge("finetune_step", "Optimizer steps done, with those before a resumption", registry=registry)
        self._last = Gauge("finetune_last_step_timestamp_seconds", "Time of the last step's numbers", registry=registry)
        self._images = Counter("finetune_images", "Images that this process's run has trained on", registry=registry)
        self._seconds = Histogram(
            "finetune_step_duration_seconds", "Time per optimizer step", buckets=STEP_SECONDS, registry=registry
        )
        self._evaluations = Summary(
            "finetune_evaluation_duration_seconds", "Time of measurements and samples", ["kind"], registry=registry
        )
        self._checkpoints = Summary("finetune_checkpoint_duration_seconds", "Time of a checkpoint", registry=registry)
        for name in DURATIONS:
            self._evaluations.labels(name)

    def step(self, values: Mapping[str, float | None], step: int) -> None:
        """Sets the numbers of a step."""
        for name in values.keys() & PER_STEP.keys():
            self._gauges[name].set(_number(values[name]))
        self._step.set(step)
        self._last.set_to_current_time()
        self._images.inc(self._images_per_step)
        speed = values.get("images_per_second")
        if speed:
            self._seconds.observe(self._images_per_step / speed)

    def values(self, values: Mapping[str, float | None]) -> None:
        """Sets numbers that were measured between steps."""
        for name, value in values.items():
            start = next((start for start in LABELLED if name.startswith(start)), None)
            kind = name.removesuffix(SECONDS)
            if name == f"checkpoint{SECONDS}":
                self._checkpoints.observe(_number(value))
            elif name.endswith(SECONDS) and kind in DURATIONS:
                self._evaluations.labels(kind).observe(_number(value))
            elif name in self._gauges:
                self._gauges[name].set(_number(value))
            elif start is not None:
                self._labelled[start].labels(name.removeprefix(start)).set(_number(value))
            elif not name.startswith(LEFT_OUT):
                self._others.labels(name).set(_number(value))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class RunCounts:
    """Counts and the verdict, read at each scrape from where the run keeps them."""

    def __init__(
        self,
        total_steps: int,
        skipped: Callable[[], int],
        unreadable: Callable[[], int],
        verdict: Path,
        words: Sequence[str],
    ):
        """Args:
        total_steps: optimizer steps of the whole run.
        skipped: returns how many steps were skipped.
        unreadable: returns how many images could not be read.
        verdict: the file `verdict.json`, which need not exist.
        words: all verdicts that there are.
        """
        self._total_steps, self._skipped, self._unreadable = total_steps, skipped, unreadable
        self._verdict, self._words = verdict, words

    def describe(self) -> Iterable["Metric"]:
        """Returns nothing: registering must not read anything."""
        return []

    def collect(self) -> Iterable["Metric"]:
        """Returns the metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, StateSetMetricFamily

        yield GaugeMetricFamily("finetune_steps_planned", "Optimizer steps of the whole run", self._total_steps)
        yield CounterMetricFamily(
            "finetune_skipped_steps", "Steps skipped without a finite loss and gradient", self._skipped()
        )
        yield CounterMetricFamily("finetune_unreadable_images", "Images that could not be read", self._unreadable())
        found = self._word_in_file()
        states = {word: word == found for word in self._words}
        yield StateSetMetricFamily("finetune_verdict", "Whether the training works: 1 for the verdict", states)

    def _word_in_file(self) -> str:
        try:
            if not is_of_run(self._verdict, self._verdict.parent):  # that of an earlier run
                return ""
            found = read_json(self._verdict)
        except (OSError, FileError):
            return ""
        word = found.get("verdict") if isinstance(found, dict) else None
        return word if isinstance(word, str) else ""


class Memory:
    """Memory of this process's device and machine, read at each scrape."""

    def __init__(self, device: torch.device):
        self._device = device

    def describe(self) -> Iterable["Metric"]:
        """Returns nothing: registering must not read anything."""
        return []

    def collect(self) -> Iterable["Metric"]:
        """Returns the metrics as they are now."""
        from prometheus_client.core import GaugeMetricFamily

        for name, text, value in (*self._of_device(), *self._of_host()):
            yield GaugeMetricFamily(name, text, value)

    def _of_device(self) -> list[tuple[str, str, float]]:
        """The allocator's numbers, which cause no wait for the device; none on a CPU."""
        module = getattr(torch, self._device.type, None)
        if self._device.type == "cpu" or not hasattr(module, "memory_allocated"):
            return []
        total = module.get_device_properties(self._device).total_memory
        return [
            (
                "finetune_device_memory_allocated_bytes",
                "Device memory of tensors",
                module.memory_allocated(self._device),
            ),
            (
                "finetune_device_memory_reserved_bytes",
                "Device memory that torch holds",
                module.memory_reserved(self._device),
            ),
            (
                "finetune_device_memory_peak_bytes",
                "Most device memory of tensors so far",
                module.max_memory_allocated(self._device),
            ),
            ("finetune_device_memory_total_bytes", "Memory of the device", total),
        ]

    def _of_host(self) -> list[tuple[str, str, float]]:
        memory, process = psutil.virtual_memory(), psutil.Process()
        workers = 0
        for child in process.children(recursive=True):
            try:
                workers += child.memory_info().rss
            except psutil.Error:  # it has ended
                continue
        return [
            ("finetune_host_memory_resident_bytes", "Host memory of this process", process.memory_info().rss),
            ("finetune_host_memory_workers_bytes", "Host memory of its data workers and other children", workers),
            ("finetune_host_memory_available_bytes", "Host memory that is free or can be freed", memory.available),
            ("finetune_host_memory_total_bytes", "Host memory of the machine", memory.total),
        ]


def process_registry(device: torch.device, rank: int) -> "CollectorRegistry":
    """Returns the metrics that each process serves: its memory, its CPU time, and which process it is."""
    from prometheus_client import CollectorRegistry, Info, ProcessCollector

    registry = CollectorRegistry()
    registry.register(Memory(device))
    ProcessCollector(registry=registry)
    Info("finetune_process", "This process", registry=registry).info({"rank": str(rank), "device": str(device)})
    return registry


class MetricsServer:
    """Serves a registry over HTTP until it is closed; errors of its clients never reach the run."""

    def __init__(self, options: PrometheusOptions, registry: "CollectorRegistry"):
        """Starts serving.

        Raises:
            UserError: if the port can't be opened.
        """
        from prometheus_client import start_http_server

        try:
            self._server, self._thread = start_http_server(options.port, options.prometheus_address, registry)
        except OSError as error:
            raise not_served(options, error) from error
        address = options.prometheus_address
        place = f"[{address}]" if ":" in address else address
        logger.info("metrics for Prometheus: http://%s:%d/metrics", place, options.port)

    def close(self) -> None:
        """Ends the server, and frees its port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
