"""What the sections of benchmarks/gpu.py share: the remaining time, and short runs of the scripts in this process."""

import io
import json
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import tiny

HOLDS, FAILED, SKIPPED = "holds", "failed", "skipped"


class Finding(NamedTuple):
    """The result of a section.

    Attributes:
        verdict: HOLDS, FAILED or SKIPPED.
        says: the main figures in one line, or the reason.
        facts: all other results, for its JSON.
    """

    verdict: str
    says: str
    facts: Mapping[str, Any] = MappingProxyType({})


class Run(NamedTuple):
    """A run of a script: its exit status, output folder, and log."""

    status: int
    folder: Path
    said: str

    @property
    def losses(self) -> list[float]:
        """Returns the loss of each step."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["train_loss"] for line in lines]

    @property
    def error(self) -> str:
        """Returns the line with the reason why the run failed."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return lines[-1] if lines else f"exit status {self.status}"


@dataclass
class Bench:
    """The input of a section.

    Attributes:
        folder: folder for temporary files.
        out: folder for results.
        is_tiny: whether models are tiny everywhere.
        ends_at: deadline by time.monotonic().
        peer: folder with diffusers' example scripts; None if not given.
        product_tflops: measured TFLOP/s of a matrix product; None before it is measured.
    """

    folder: Path
    out: Path
    device: torch.device
    is_tiny: bool
    ends_at: float
    peer: Path | None = None
    product_tflops: float | None = None
    last_said: str = ""
    _pipelines: dict[str, Path] = field(default_factory=dict)

    def left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.ends_at - time.monotonic()

    def note(self, text: str) -> None:
        """Prints an intermediate finding, in case the section is stopped later."""
        self.last_said = text
        print(f"  {text}", flush=True)

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def pipeline(self, name: str) -> Path:
        """Returns the folder of a tiny pipeline or VAE, created at its first use."""
        makers = {"sd": tiny.make_sd, "sdxl": tiny.make_sdxl, "vae": tiny.make_vae, "deep": self._make_deep}
        if name not in self._pipelines:
            self._pipelines[name] = makers[name](self.folder / "pipelines" / name)
        return self._pipelines[name]

    @cached_property
    def images(self) -> Path:
        """Returns the folder of six tiny images with captions."""
        return tiny.make_images(self.folder / "images")

    @cached_property
    def classes(self) -> Path:
        """Returns a folder of the same images in two class folders."""
        return tiny.make_classes(self.images, self.folder / "classes")

    def _make_deep(self, folder: Path) -> Path:
        """Writes a Stable Diffusion pipeline with 11 transformer blocks, above torch.compile's default graph limit."""
        from diffusers import UNet2DConditionModel

        tiny.make_sd(folder)
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=2,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=32,
        ).save_pretrained(folder / "unet")
        return folder

    def train(
        self, pipeline: str, flags: Sequence[object], out: str, shape: Sequence[object] = (), data: Path | None = None
    ) -> Run:
        """Runs a script in this process, and writes its log to run.log.

        Args:
            pipeline: sd, sdxl or deep, or a name of `tiny.UNCONDITIONAL`.
            out: the name of its output folder.
            shape: flags for the shape of a new denoiser, instead of those of `tiny.UNCONDITIONAL`.
        """
        folder = self.folder / "runs" / out
        if pipeline in tiny.UNCONDITIONAL:
            from train_unconditional import main

            own = tuple(shape) or tiny.UNCONDITIONAL[pipeline]
            given = data or (self.classes if "--class_conditional" in own else self.images)
            words = ["--train_data_dir", given, *(self.pipeline("vae") if word == "vae" else word for word in own)]
        else:
            from train_text_to_image import main

            words = ["--pretrained_model", self.pipeline(pipeline), "--train_data_dir", data or self.images]
        words += ["--resolution", tiny.RESOLUTION, "--output_dir", folder, "--lr_warmup_steps", 0]
        words += ["--train_batch_size", 4, "--report_to", "none", "--dataloader_num_workers", 0]
        words += ["--no_report", "--no_verdict", "--no_export_check"]  # each takes a second, and changes no bit
        words += ["--encoding_cache_dir", self.folder / "cache", *flags]
        said = io.StringIO()
        with process_of_its_own(), hearing(said), redirect_stderr(said), redirect_stdout(said):
            try:
                status = main([str(word) for word in words])
            except Exception as error:  # noqa: BLE001 - not a user's error, but a bug in the script
                status = 1
                said.write(f"{traceback.format_exc()}\nerror: {type(error).__name__}: {error}\n")
        with (self.out / "run.log").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {out}: {' '.join(map(str, words))}\n{said.getvalue()}exit status {status}\n")
        return Run(status, folder, said.getvalue())


@contextmanager
def hearing(said: io.StringIO) -> Iterator[None]:
    """Context manager: records the log of the scripts."""
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("utils")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def process_of_its_own() -> Iterator[None]:
    """Context manager: resets accelerate and the compiler as in a fresh process, and restores a run's settings."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    with settings_kept():
        yield


@contextmanager
def settings_kept() -> Iterator[None]:
    """Context manager: restores process-wide settings of a run: TF32, deterministic kernels, compiled functions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(False)
        torch.compiler.reset()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of the files in a folder, by file and name."""
    from safetensors.torch import load_file

    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def relative_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the norm of the difference of two sets of tensors, relative to the second; 1 if their names differ."""
    if one.keys() != other.keys():
        return 1.0
    squares = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return (squares / max(1e-30, sum(float(each.double().square().sum()) for each in other.values()))) ** 0.5
