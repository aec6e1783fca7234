"""Checkpoints: written atomically, found, verified, and pruned."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from utils.config.options import UserError, first_line
from utils.config.tensor_files import open_safetensors, read_safetensors
from utils.config.user_files import FileError, open_regular, read_json, short
from utils.models.options import ATTENTION
from utils.runtime.atomic_files import set_aside, sync_file, sync_folder, usual_modes, write_tensors
from utils.runtime.background_writer import HostBuffers
from utils.runtime.engines import Engine
from utils.runtime.processes import write_json
from utils.training.optimizers import NamedParameter

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
HASHED_AT_ONCE = 2  # files
STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
READ_SUFFIXES = (".safetensors", ".json")  # suffixes of the files that a resumed run reads
OWN_GROUP_OPTIONS = ("lr", "peak_lr", "weight_decay", "eps")  # taken from the run's options, not from the checkpoint


@dataclass(frozen=True)
class RunFacts:
    """The settings of a run that a resumed run is compared with.

    Attributes:
        structure: settings that must be equal, by flag.
        training: other settings that affect training, by flag, and the data; `--allow_changed_options` allows changes.
        total_steps: optimizer steps of the whole run, on which some learning-rate schedules depend.
    """

    structure: dict[str, object]
    training: dict[str, object]
    total_steps: int


@dataclass(frozen=True)
class SavedState:
    """The training state beside weights and optimizer. The data position and learning rates follow from the step.

    Attributes:
        step: optimizer steps done.
        facts: the settings of the run.
        ema_updates: updates of the moving average; None without one.
        scaler: state of the fp16 gradient scaler, or None.
        samples_at_once: samples per process that fitted into memory, if the run was out of memory; else None.
        skipped_steps: steps without a finite loss and gradient.
        skipped_in_a_row: consecutive skipped steps up to this one.
        attention: the chosen attention kernel, as `Attention.raced`.
    """

    step: int
    facts: RunFacts
    ema_updates: int | None
    scaler: dict[str, float | int] | None
    samples_at_once: int | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    attention: str | None = None


class Checkpoints:
    """The `checkpoint-{step}` folders of an output folder."""

    def __init__(self, folder: Path, limit: int | None):
        self.folder = folder
        self.limit = limit
        self._kept: set[Path] = set()  # paths that could not be removed; each is warned of once

    def listed(self) -> list[Path]:
        """Returns the folders named like checkpoints, oldest first; `checkpoint-007` is not one."""
        steps = {step_of(path): path for path in self.folder.glob("checkpoint-*") if os.path.isdir(path)}
        return [steps[step] for step in sorted(step for step in steps if step is not None)]

    def found(self) -> list[Path]:
        """Returns the checkpoints whose files all exist with the right sizes, oldest first."""
        return [path for path in self.listed() if not damage(path, by_content=False)]

    def resolve(self, asked: str | None) -> Path | None:
        """Returns the checkpoint that `--resume_from_checkpoint` names, fully verified; None to start anew.

        Raises:
            UserError: if a named checkpoint is missing or damaged, or `latest` finds only another program's.
        """
        if asked is None:
            return None
        if asked == "latest":
            return self._latest()
        inside = self.folder / asked
        path = inside if os.path.isdir(inside) else Path(asked)
        if not os.path.isdir(path):
            there = ", ".join(found.name for found in self.found()) or "none"
            raise UserError(
                f"--resume_from_checkpoint {asked} is not a folder, in {self.folder} or elsewhere; checkpoints: {there}"
            )
        if foreign := foreign_kind(path):
            raise UserError(f"--resume_from_checkpoint {asked} {foreign}")
        if wrong := damage(path):
            raise UserError(f"--resume_from_checkpoint {asked} is damaged: {wrong}")
        return path

    def _latest(self) -> Path | None:
        foreign = ""
        for path in reversed(self.listed()):
            wrong = foreign_kind(path)
            foreign = foreign or (f"{path} {wrong}" if wrong else "")
            wrong = wrong or damage(path)
            if not wrong:
                return path
            logger.warning("--resume_from_checkpoint latest skips %s: %s", path.name, wrong)
        if foreign:
            raise UserError(f"--resume_from_checkpoint latest: {foreign}, in another --output_dir")
        logger.warning("--resume_from_checkpoint latest: no checkpoint in %s, starting anew", self.folder)
        return None

    def save(self, step: int, jobs: Sequence[Callable[[Path], None]], is_alone: bool = False) -> Path:
        """Writes a checkpoint to a temporary folder, renames it to `checkpoint-{step}`, and prunes the oldest.

        The files of one job are hashed while the next job writes.

        Args:
            step: optimizer steps done.
            jobs: functions that write files into the folder they are given.
            is_alone: whether other processes may be writing the same checkpoint; their files are left alone.

        Raises:
            UserError: if it can't be written.
        """
        # Write and hash the files in a temporary folder.
        target = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".tmp-checkpoint-{step}-{os.getpid()}"
        if not is_alone:
            self.clean()
        try:
            with _Hashes(aside) as hashes:
                for job in jobs:
                    job(aside)
                    hashes.begin()
                usual_modes(aside)
                _sync(aside)
                write_json(aside / MANIFEST, {"files": hashes.facts()})
            sync_file(aside / MANIFEST)
            sync_folder(aside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"checkpoint-{step} can't be written to {self.folder}: {error}") from error
        # Rename it into place.
        try:
            replaced = self._move_aside(target)
            os.replace(aside, target)
            sync_folder(self.folder)
        except OSError as error:
            raise UserError(f"checkpoint-{step} can't be written to {self.folder}: {error}") from error
        if replaced is not None:
            self._remove(replaced)
        self._prune()
        return target

    def _move_aside(self, target: Path) -> Path | None:
        """Renames an existing path of a checkpoint's name, and returns it if it is to be removed.

        That is an incomplete checkpoint, or one of a run that went further before it was resumed from an earlier step.
        What is not a checkpoint of this program is kept under another name.
        """
        if not os.path.lexists(target):
            return None
        is_own = (target / MANIFEST).exists() or (target.is_dir() and not any(target.iterdir()))
        if is_own:
            replaced = self.folder / f".tmp-{target.name}-replaced-{os.getpid()}"
            os.replace(target, replaced)
            return replaced
        kept = set_aside(target)
        logger.warning("%s is not a checkpoint of this run; renamed it to %s", target.name, kept.name)
        return None

    def clean(self) -> None:
        """Removes incomplete checkpoints left by a killed run."""
        for path in self.folder.glob(".tmp-checkpoint-*"):
            self._remove(path)

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps than the one a run resumes from.

        Otherwise they would be taken for this run's, be resumed from, and cause its own to be pruned.
        """
        for path in self.found():
            if step_of(path) > step:
                try:
                    aside = set_aside(path)
                except OSError as error:
                    raise UserError(f"{path}, of a later step, can't be renamed: {error}") from error
                logger.warning(
                    "%s is of a run that this one does not resume from; renamed it to %s", path.name, aside.name
                )

    def _prune(self) -> None:
        if self.limit is None:
            return
        for path in self.found()[: -self.limit]:
            if path.is_symlink():
                self._warn_not_removed(path, f"it is a link to {os.path.realpath(path)}")
                continue
            doomed = self.folder / f".tmp-{path.name}-pruned-{os.getpid()}"
            try:
                os.replace(path, doomed)  # so that no half-removed folder has a checkpoint's name
            except OSError as error:
                self._warn_not_removed(path, str(error))
                continue
            self._remove(doomed)

    def _remove(self, path: Path) -> None:
        """Removes a folder, a file or a link; warns once if it can't."""
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except (OSError, RecursionError) as error:  # shutil can't remove folders nested a thousand deep
            self._warn_not_removed(path, str(error))

    def _warn_not_removed(self, path: Path, reason: str) -> None:
        if path not in self._kept:
            logger.warning("%s is no longer needed but can't be removed: %s", path, reason)
        self._kept.add(path)


def step_of(path: Path) -> int | None:
    """Returns the step in a checkpoint's name; None if it is not named like a checkpoint."""
    match = NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def foreign_kind(path: Path) -> str:
    """Returns what another program's checkpoint is, with the cure; "" for this program's and for other folders."""
    if (path / MANIFEST).exists() or not any((path / name).is_file() for name in ("optimizer.bin", "scheduler.bin")):
        return ""
    lora = next((path / name for name in LORA_FILES if (path / name).is_file()), None)
    weights = ""
    if (path / "unet").is_dir():
        weights = f" from its weights: replace unet/ in a copy of the pipeline by {path / 'unet'}, and give that copy"
    elif lora is not None:
        weights = f" from its weights: --adaptation lora --lora_weights {lora}"
    programs = "another program's, such as diffusers' scripts, kohya's or SimpleTuner's"
    return f"is a checkpoint of {programs}: its optimizer can't be resumed here; start anew{weights}"


LORA_FILES = ("pytorch_lora_weights.safetensors", "model.safetensors")


def damage(path: Path, by_content: bool = True) -> str:
    """Returns how a checkpoint differs from what was written, or "": by file sizes, and by content if asked."""
    try:
        return _wrong_files(path, by_content) or (_wrong_state(path) if by_content else "")
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except UserError as error:
        return str(error)
    except OSError as error:
        return first_line(error)


def _wrong_files(path: Path, by_content: bool) -> str:
    try:
        content = read_json(path / MANIFEST)
    except FileError as error:
        return f"{MANIFEST} can't be read: {error.reason}"
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return f"{MANIFEST} lists no files"
    for name, facts in files.items():
        if not _is_inside(name):
            return f"{MANIFEST} lists {short(name)}, which is not inside the checkpoint"
        if not (isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)):
            return f"{MANIFEST} lacks the size or sha256 of {name}"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["size"]:
            return f"{name} has {file.stat().st_size} bytes, but {facts['size']} were written"
        if by_content and _hash(file) != facts["sha256"]:
            return f"{name} has changed since it was written (its sha256 differs)"
    there = [file.relative_to(path).as_posix() for file in _read_files(path) if file.suffix in READ_SUFFIXES]
    for name in (STATE, OPTIMIZER, *there):
        if name not in files and name != MANIFEST:
            return f"{MANIFEST} does not list {name}"
    return ""


def _read_files(path: Path) -> list[Path]:
    """Returns the files of a checkpoint that a run may read: in the folder and one level below."""
    return [file for pattern in ("*", "*/*") for file in sorted(path.glob(pattern)) if file.is_file()]


def _is_inside(name: str) -> bool:
    """Whether a relative file name stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "\0" not in name and "\\" not in name and not {"..", "/"} & set(parts) and ":" not in name


def _wrong_state(path: Path) -> str:
    """Returns why a run could not resume although all files are as listed in the manifest, or ""."""
    state = read_state(path)
    if step_of(path) not in (None, state.step):
        return f"its state is from step {state.step}"
    for file in _read_files(path):
        if file.suffix != ".safetensors":
            continue
        try:
            with open_safetensors(file):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.relative_to(path)} can't be read: {first_line(error)}"
    return ""


class _Hashes:
    """SHA-256 digests of a folder's files, computed on threads while further files are written."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(HASHED_AT_ONCE)
        self._found: dict[tuple[Path, int, int], Future[str]] = {}

    def __enter__(self) -> "_Hashes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self) -> list[tuple[Path, int, int]]:
        """Starts hashing new and changed files; returns (path, size, modification time in ns) of all files."""
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        versions = [(path, (facts := path.stat()).st_size, facts.st_mtime_ns) for path in files]
        for version in versions:
            if version not in self._found:
                self._found[version] = self._pool.submit(_hash, version[0])
        return versions

    def facts(self) -> dict[str, dict[str, int | str]]:
        """Returns the manifest entry (size, sha256) of each file as it is now."""
        return {
            str(version[0].relative_to(self._folder)): {"size": version[1], "sha256": self._found[version].result()}
            for version in self.begin()
        }


def _hash(file: Path) -> str:
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class OptimizerContent(NamedTuple):
    """An optimizer's state by parameter name: tensors on the CPU, other numbers, and the numbers of its groups."""

    tensors: dict[str, Tensor]
    numbers: dict[str, dict[str, Any]]
    groups: list[dict[str, float | int | bool]]


def optimizer_content(
    engine: Engine, optimizer: torch.optim.Optimizer, parameters: list[NamedParameter], buffers: HostBuffers
) -> OptimizerContent:
    """Returns a copy of the optimizer's state; all processes must call it if the state is sharded."""
    content = OptimizerContent({}, {}, _group_numbers(optimizer))
    for name, parameter, _ in parameters:
        for key, value in engine.optimizer_state(optimizer, parameter).items():
            if isinstance(value, Tensor):
                content.tensors[f"{name}/{key}"] = buffers.copy(f"optimizer {name}/{key}", value)
            else:
                content.numbers.setdefault(name, {})[key] = value
    return content


def write_state(folder: Path, state: SavedState, optimizer: OptimizerContent) -> None:
    """Writes the training state as JSON and the optimizer's tensors as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(optimizer.tensors, folder / OPTIMIZER)
    numbers = {"optimizer": optimizer.numbers, "optimizer_groups": optimizer.groups}
    write_json(folder / STATE, asdict(state) | numbers)


def _group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float | int | bool]]:
    """Returns the numbers that an optimizer keeps per group, such as Prodigy's learning rate; JSON is exact."""
    return [
        {name: value for name, value in group.items() if isinstance(value, bool | int | float) and math.isfinite(value)}
        for group in optimizer.param_groups
    ]


class _Saved(NamedTuple):
    """The content of a checkpoint's state file."""

    state: SavedState
    numbers: dict[str, dict[str, Any]]
    groups: list[dict[str, float | int | bool]]


def read_state(folder: Path) -> SavedState:
    """Returns the training state of a checkpoint.

    Raises:
        UserError: if the file can't be read or holds no training state.
    """
    return _read_saved(folder).state


def _read_saved(folder: Path) -> _Saved:
    file = folder / STATE
    try:
        values = read_json(file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no training state")
    # Fields that earlier releases did not write.
    values = {"samples_at_once": None, "skipped_steps": 0, "skipped_in_a_row": 0, "attention": None, **values}
    facts = values.get("facts")
    is_fact = isinstance(facts, dict) and {name: type(each) for name, each in facts.items()} == FACT_TYPES
    if not is_fact:
        raise UserError(f"{file} does not record the options of its run")
    # Each field must be known and valid.
    known = {"facts", "optimizer", "optimizer_groups", *STATE_CHECKS}
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"{file} contains {short(unknown)}, which this version does not know; a later version may have written it"
        )
    for name, is_right in STATE_CHECKS.items():
        if name not in values or not is_right(values[name]):
            raise UserError(f"{file}: {name} has an invalid value: {short(values.get(name))}")
    # The optimizer's numbers.
    numbers, groups = values.get("optimizer"), values.get("optimizer_groups", [])
    is_whole = isinstance(numbers, dict) and all(isinstance(each, dict) for each in numbers.values())
    if not (is_whole and isinstance(groups, list) and all(_are_numbers(group) for group in groups)):
        raise UserError(f"{file} lacks the optimizer's numbers")
    state = SavedState(**{name: values[name] for name in STATE_CHECKS}, facts=RunFacts(**facts))
    return _Saved(state, numbers, groups)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())


FACT_TYPES = {"structure": dict, "training": dict, "total_steps": int}
STATE_CHECKS: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "attention": lambda value: value in (None, "", *ATTENTION),
    "ema_updates": lambda value: value is None or _is_count(value),
    "scaler": lambda value: value is None or _are_numbers(value),
    "samples_at_once": lambda value: value is None or (_is_count(value) and value > 0),
    "skipped_steps": _is_count,
    "skipped_in_a_row": _is_count,
}


def check_structure(folder: Path, structure: dict[str, object]) -> None:
    """Refuses a checkpoint made with a different `structure`; names each option that differs."""
    if changes := _changes(structure, read_state(folder).facts.structure):
        raise UserError(f"can't resume from {folder}: {changes}; give the options it was made with")


def check_training(
    folder: Path, training: dict[str, object], may_change: bool, defaults: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Refuses a checkpoint whose other training options differ; if `may_change`, warns of them instead.

    Args:
        training: this run's options, by flag.
        may_change: whether they may differ.
        defaults: values of options that a checkpoint of an earlier release does not record.
    """
    changes = _changes(training, {**defaults, **read_state(folder).facts.training})
    if changes and not may_change:
        cure = "give the options it was made with, or --allow_changed_options"
        raise UserError(f"can't resume from {folder}: {changes}; {cure}")
    if changes:
        logger.warning("resuming from %s with %s", folder, changes)


def _changes(now: dict[str, object], then: dict[str, object]) -> str:
    """Returns the options that differ, each with its value now and in the checkpoint."""
    now = json.loads(json.dumps(now))
    return ", ".join(
        f"--{name} {now[name]} (the checkpoint used {then.get(name)})" for name in now if then.get(name) != now[name]
    )


def load_optimizer(
    folder: Path, engine: Engine, optimizer: torch.optim.Optimizer, parameters: list[NamedParameter]
) -> None:
    """Restores the optimizer's state from a checkpoint.

    Raises:
        UserError: if the checkpoint has parameters that this run does not train.
    """
    _, saved, own_groups = _read_saved(folder)
    on_cpu = {name for name, parameter, _ in parameters if parameter.device.type == "cpu"}
    for name, tensor in read_safetensors(folder / OPTIMIZER).items():
        parameter_name, _, key = name.rpartition("/")
        # a tensor that is not copied keeps the file mapped, and Windows can't remove mapped files
        saved.setdefault(parameter_name, {})[key] = tensor.clone() if parameter_name in on_cpu else tensor
    unknown = set(saved) - {name for name, _, _ in parameters}
    if unknown:
        raise UserError(f"{folder} trains {min(unknown)}, but this run does not; give the options it was made with")
    groups = [
        {name: value for name, value in numbers.items() if name not in OWN_GROUP_OPTIONS} for numbers in own_groups
    ]
    states = {parameter: saved[name] for name, parameter, _ in parameters if name in saved}
    engine.load_optimizer_state(optimizer, states, groups)


def _sync(folder: Path) -> None:
    """Flushes every file and folder below a folder to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
