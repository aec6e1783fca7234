"""Checkpoints: written whole or not at all, found again, and pruned."""

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.background import HostBuffers
from utils.disk import sync_file, sync_folder
from utils.engines import Engine
from utils.optim import NamedParameter
from utils.options import UserError, first_line, option, require_positive
from utils.runtime import write_json

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
OWN_GROUP_OPTIONS = ("lr", "peak_lr", "weight_decay", "eps")  # a resumed run's own, not its checkpoint's


@dataclass(frozen=True)
class CheckpointOptions:
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, "newest checkpoints to keep; by default all")
    final_checkpoint: bool = option(True, "also write a checkpoint after the last step, for a longer run to go on from")
    resume_from_checkpoint: str | None = option(
        None,
        "go on from latest, from checkpoint-N in output_dir, or from a path; latest without a checkpoint starts anew",
    )
    async_checkpointing: bool = option(False, "write checkpoints from copies in host memory while the training goes on")
    allow_changed_options: bool = option(
        False, "go on although options that change the training, or the data, are others than the checkpoint's"
    )

    def __post_init__(self) -> None:
        require_positive(self, "checkpointing_steps", "checkpoints_total_limit")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether a checkpoint is written after optimizer step number `step`, from 1."""
        return step % self.checkpointing_steps == 0 or (self.final_checkpoint and step == total_steps)


@dataclass(frozen=True)
class RunFacts:
    """What a run that goes on is compared with.

    Attributes:
        structure: the options that it must share.
        training: what else changes the training, which it may change if asked: options by flag, and the data.
        total_steps: optimizer steps of the whole run, on which some learning rates depend.
    """

    structure: dict[str, object]
    training: dict[str, object]
    total_steps: int


@dataclass(frozen=True)
class TrainingState:
    """What a run goes on from, beside weights and optimizer. The data's position and the rates follow from the step.

    Attributes:
        step: optimizer steps done.
        ema_updates: updates of the moving average, or None without one.
        scaler: state of fp16's gradient scaler, or None.
        samples_at_once: what memory allowed, where it was short; else None.
        skipped_steps: of these, steps that had no finite loss and gradient.
        skipped_in_a_row: the last of them, without one between.
    """

    step: int
    facts: RunFacts
    ema_updates: int | None
    scaler: dict[str, float | int] | None
    samples_at_once: int | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class Checkpoints:
    """The folders `checkpoint-{step}` of a run's output folder."""

    def __init__(self, folder: Path, limit: int | None):
        self.folder = folder
        self.limit = limit

    def listed(self) -> list[Path]:
        """The checkpoints by their names, oldest first."""
        steps = {
            int(match[1]): path
            for path in self.folder.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
        }
        return [steps[step] for step in sorted(steps)]

    def found(self) -> list[Path]:
        """Those whose files are all there, in their sizes, oldest first."""
        return [path for path in self.listed() if not damage(path, by_content=False)]

    def resolve(self, asked: str | None) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` names, or None to start anew; it is read and checked whole.

        Raises:
            UserError: if a named checkpoint is not there or damaged.
        """
        if asked is None:
            return None
        if asked == "latest":
            for path in reversed(self.listed()):
                wrong = damage(path)
                if not wrong:
                    return path
                logger.warning("--resume_from_checkpoint latest passes over %s: %s", path.name, wrong)
            logger.warning("--resume_from_checkpoint latest: no checkpoint in %s, starting anew", self.folder)
            return None
        inside, outside = self.folder / asked, Path(asked)
        path = inside if inside.is_dir() else outside
        if not path.is_dir():
            there = ", ".join(found.name for found in self.found()) or "none"
            raise UserError(
                f"--resume_from_checkpoint {asked} is no folder in {self.folder}, nor elsewhere; there are: {there}"
            )
        if wrong := damage(path):
            raise UserError(f"--resume_from_checkpoint {asked} is damaged: {wrong}")
        return path

    def save(self, step: int, write: Callable[[Path], None], is_alone: bool = False) -> Path:
        """Has `write` fill a folder aside, makes it `checkpoint-{step}`, and then prunes the oldest.

        Where `is_alone`, another process may be writing one too, whose files are left.
        """
        target = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".tmp-checkpoint-{step}-{os.getpid()}"
        if not is_alone:
            self.clean()
        try:
            write(aside)
            files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
            facts = {
                str(path.relative_to(aside)): {"size": path.stat().st_size, "sha256": _hash(path)} for path in files
            }
            write_json(aside / MANIFEST, {"files": facts})
            _sync(aside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"checkpoint-{step} can't be written to {self.folder}: {error}") from error
        replaced = self.folder / f".tmp-checkpoint-{step}-replaced-{os.getpid()}"
        if target.exists():  # not whole, or of a run that went further before it was resumed from an earlier step
            os.replace(target, replaced)
        os.replace(aside, target)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()
        return target

    def clean(self) -> None:
        """Removes what a killed run left half written."""
        for path in self.folder.glob(".tmp-checkpoint-*"):
            shutil.rmtree(path)

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps, which a run that goes on from `step` has left behind.

        Else they would pass for its own, be resumed from, and keep its own from being kept.
        """
        for path in self.found():
            if int(path.name.partition("-")[2]) > step:
                names = (f"abandoned-{path.name}" + (f"-{number}" if number else "") for number in itertools.count())
                aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
                path.rename(aside)
                logger.warning("%s is of a run that this one does not go on from; it is %s now", path.name, aside.name)

    def _prune(self) -> None:
        if self.limit is not None:
            for path in self.found()[: -self.limit]:
                shutil.rmtree(path)


def damage(path: Path, by_content: bool = True) -> str:
    """What of a checkpoint is not as it was written, or ""; by the files' sizes, and by their content if asked."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["size"]:
                return f"{name} has {file.stat().st_size} bytes, {facts['size']} were written"
            if by_content and _hash(file) != facts["sha256"]:
                return f"{name} is not what was written (its sha256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read: {first_line(error)}"
    return ""


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class OptimizerContent(NamedTuple):
    """An optimizer's state by the names of the parameters: tensors on the CPU, numbers, and those of its groups."""

    tensors: dict[str, Tensor]
    numbers: dict[str, dict[str, Any]]
    groups: list[dict[str, float | int | bool]]


def optimizer_content(
    engine: Engine, optimizer: torch.optim.Optimizer, parameters: list[NamedParameter], buffers: HostBuffers
) -> OptimizerContent:
    """The optimizer's state as it is now, copied; for all to call where it is spread over the processes."""
    content = OptimizerContent({}, {}, _group_numbers(optimizer))
    for name, parameter, _ in parameters:
        for key, value in engine.optimizer_state(optimizer, parameter).items():
            if isinstance(value, Tensor):
                content.tensors[f"{name}/{key}"] = buffers.copy(f"optimizer {name}/{key}", value)
            else:
                content.numbers.setdefault(name, {})[key] = value
    return content


def write_state(folder: Path, state: TrainingState, optimizer: OptimizerContent) -> None:
    """Writes the training state as JSON and the optimizer's tensors as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(optimizer.tensors, folder / OPTIMIZER)
    numbers = {"optimizer": optimizer.numbers, "optimizer_groups": optimizer.groups}
    write_json(folder / STATE, asdict(state) | numbers)


def _group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float | int | bool]]:
    """What some optimizers keep by group, such as the rate that Prodigy has found; as JSON keeps floats exactly."""
    return [
        {name: value for name, value in group.items() if isinstance(value, bool | int | float) and math.isfinite(value)}
        for group in optimizer.param_groups
    ]


def read_state(folder: Path) -> TrainingState:
    """The training state of a checkpoint."""
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    del values["optimizer"], values["optimizer_groups"]
    return TrainingState(**values | {"facts": RunFacts(**values["facts"])})


def check_structure(folder: Path, structure: dict[str, object]) -> None:
    """Refuses a checkpoint that was made with other options than `structure`, each of which is named."""
    if changes := _changes(structure, read_state(folder).facts.structure):
        raise UserError(f"{folder} can't be gone on from with {changes}; give the options it was made with")


def check_training(folder: Path, training: dict[str, object], may_change: bool) -> None:
    """Refuses, or where it may change names, what else changes the training and is not as the checkpoint has it."""
    changes = _changes(training, read_state(folder).facts.training)
    if changes and not may_change:
        cure = "give the options it was made with, or --allow_changed_options"
        raise UserError(f"{folder} was made otherwise than with {changes}; {cure}")
    if changes:
        logger.warning("going on from %s with %s", folder, changes)


def _changes(now: dict[str, object], then: dict[str, object]) -> str:
    """The options that differ, each with its value now and then."""
    now = json.loads(json.dumps(now))
    return ", ".join(f"--{name} {now[name]} (it was {then.get(name)})" for name in now if then.get(name) != now[name])


def load_optimizer(
    folder: Path, engine: Engine, optimizer: torch.optim.Optimizer, parameters: list[NamedParameter]
) -> None:
    """Restores the optimizer's state from a checkpoint.

    Raises:
        UserError: if the checkpoint's parameters are others than these.
    """
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    saved: dict[str, dict[str, Any]] = values["optimizer"]
    on_cpu = {name for name, parameter, _ in parameters if parameter.device.type == "cpu"}
    for name, tensor in load_file(folder / OPTIMIZER).items():
        parameter_name, _, key = name.rpartition("/")
        # a tensor that stays where it is would keep the file mapped, which Windows then does not let be pruned
        saved.setdefault(parameter_name, {})[key] = tensor.clone() if parameter_name in on_cpu else tensor
    unknown = set(saved) - {name for name, _, _ in parameters}
    if unknown:
        raise UserError(f"{folder} trains {min(unknown)}, which this run does not; give the options it was made with")
    groups = [
        {name: value for name, value in numbers.items() if name not in OWN_GROUP_OPTIONS}
        for numbers in values.get("optimizer_groups", ())
    ]
    states = {parameter: saved[name] for name, parameter, _ in parameters if name in saved}
    engine.load_optimizer_state(optimizer, states, groups)


def _sync(folder: Path) -> None:
    """Has the disk hold every file below the folder before it gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
