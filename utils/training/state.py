"""All that an optimizer step changes, saved and restored as one."""

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from utils.config.options import UserError, first_line, require
from utils.config.progress import Progress
from utils.config.tensor_files import read_safetensors
from utils.data.order import GlobalBatches
from utils.data.stream import StreamedBatches
from utils.models.attention import Attention
from utils.models.loss_terms import LossTerm
from utils.runtime.atomic_files import usual_modes, write_tensors
from utils.runtime.background_writer import HostBuffers, available_memory, taken_bytes
from utils.runtime.engines import Engine
from utils.runtime.processes import on_main_process
from utils.runtime.sharding import own_part
from utils.training.adaptation import Adaptation
from utils.training.checkpoint import (
    RunFacts,
    SavedState,
    load_optimizer,
    optimizer_content,
    read_state,
    write_state,
)
from utils.training.data import TrainingData
from utils.training.ema import MovingAverage
from utils.training.learning_rates import LearningRates
from utils.training.log import Skips
from utils.training.optimizer_options import OptimizerOptions
from utils.training.optimizers import NamedParameter, build_optimizer, set_learning_rate, unwrapped
from utils.training.options import TrainingOptions
from utils.training.per_parameter import PerParameter
from utils.training.posthoc_ema import AverageLengths
from utils.training.session import Session
from utils.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
OWN_PARAMETERS = "loss_module.safetensors"
RESULT_ASIDE = ".tmp-result"
NORM_EPSILON = 1e-6  # that torch's clip_grad_norm_ adds


@dataclass
class Ahead:
    """A step that was taken with its gradients: by a graph of all of it.

    Attributes:
        norm: [] of its gradients, until the step is counted.
    """

    norm: Tensor | None = None


@dataclass
class TrainingState:
    """Everything an optimizer step changes: weights, their averages, the optimizer, fp16's scaler, the step itself.

    Attributes:
        model: maps an encoded batch to losses, under the engine.
        rates: the learning rate of each step.
        batches: which images stand in each step.
        step: optimizer steps done.
        total_steps: after which the run ends; early stopping lowers it.
        learning_rate: of the current step, that which layers and text encoders don't change.
        verdict: why the result is that of a diverged run, once it is exported; empty if it is none.
        averages: of the weights: none, or that of --use_ema.
        lengths: the averages among which a length is chosen at the end, if it is.
        parameters: the trained ones of the pipeline.
        own_parameters: those of loss terms.
        terms: the loss terms.
        facts: what a resumed run is compared with.
        optimizer_bytes: of the optimizer's state, once all of it is there.
        skips: the steps that were not taken, as far as the log has read.
        attention: what computes attention.
        ahead: the step that was taken already, if any.
    """

    engine: Engine
    adaptation: Adaptation
    averages: Sequence[MovingAverage]
    lengths: AverageLengths | None
    optimizer: torch.optim.Optimizer
    parameters: list[NamedParameter]
    own_parameters: list[NamedParameter]
    terms: list[LossTerm]
    facts: RunFacts
    model: nn.Module
    rates: LearningRates
    batches: GlobalBatches | StreamedBatches
    optimizer_bytes: int = 0
    skips: Skips = field(default_factory=Skips)
    attention: Attention = field(default_factory=partial(Attention, None))
    ahead: Ahead = field(default_factory=Ahead)
    step: int = 0
    total_steps: int = 0
    learning_rate: float = 0.0
    verdict: str = ""

    @classmethod
    def create(
        cls,
        options: TrainingOptions,
        session: Session,
        data: TrainingData,
        task: Task,
        rates: LearningRates,
        facts: RunFacts,
    ) -> Self:
        """The state of a run at its first step: that of the checkpoint, if it resumes from one."""
        adaptation, own, engine, ema = task.adaptation, task.own_parameters, session.engine, options.ema
        # Optimizer, and what the engine makes of it and of the weights.
        named = adaptation.named_parameters(rates.optimizer)
        optimizer = make_optimizer(named + own, rates.optimizer, options.adaptation.pure_bf16, session.seed)
        model, optimizer = engine.prepare(task.objective, optimizer, rates.optimizer.clip_norm)
        named = adaptation.named_parameters(
            rates.optimizer
        )  # an engine that spreads weights puts others in their place
        # Moving averages.
        if ema.use_ema:
            limit = f"be at most the run's {facts.total_steps} optimizer steps"
            require(ema.ema_every <= facts.total_steps, "ema_every", ema.ema_every, limit)
        averages = [MovingAverage([each.parameter for each in named], ema)] if ema.use_ema else []
        lengths = AverageLengths(named, ema, session.folder.path) if ema.ema_lengths else None
        state = cls(
            engine=engine,
            adaptation=adaptation,
            averages=averages,
            lengths=lengths,
            optimizer=optimizer,
            parameters=named,
            own_parameters=own,
            terms=task.terms,
            facts=session.resumption.with_structure(facts, task.structure),
            model=model,
            rates=rates,
            batches=data.batches,
            optimizer_bytes=rates.optimizer.spec.state_bytes * sum(each.parameter.numel() for each in named + own),
            attention=session.attention,
            total_steps=rates.total_steps,
        )
        if session.checkpoint is not None:
            state.step = state.load(session.checkpoint)
        return state

    def progress(self) -> Progress:
        """How far the run is."""
        before = self.batches.epochs_before(self.step - 1) if self.step else 0
        return Progress(self.step, self.total_steps, before, self.batches.epochs_before(self.step))

    def set_learning_rate(self, step: int, reductions: int = 0) -> None:
        """Sets the rates of optimizer step `step`, from 0.

        Args:
            reductions: how often reduce_on_plateau has lowered the rates.
        """
        factor = self.rates.factor(step, reductions)
        set_learning_rate(self.optimizer, factor)
        self.learning_rate = self.rates.optimizer.learning_rate * factor

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradients down to a norm; gives the norm they had, also of those that are used up already.

        A fused optimizer does it in its own step, by torch's coefficient, and spares a pass over all gradients.
        The gradients of loss terms are scaled apart: however large, they leave the pipeline's as they are. Where they
        are not finite, the norm is not.
        """
        if self.ahead.norm is not None:
            return self.ahead.norm
        if self._steps_in_backward:
            return self._inner.grad_norm().to(self.accelerator.device)
        if self.decides_on_device and not self.own_parameters:
            gradients = [named.parameter.grad for named in self.parameters if named.parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._inner.grad_scale = ((norm + NORM_EPSILON) / max_norm).clamp(min=1)  # what the kernel divides them by
            return norm
        norm = self.engine.clip([named.parameter for named in self.parameters], max_norm)
        if not self.own_parameters:
            return norm
        own_norm = nn.utils.clip_grad_norm_([named.parameter for named in self.own_parameters], max_norm)
        return torch.where(torch.isfinite(own_norm), norm, own_norm)

    @property
    def decides_on_device(self) -> bool:
        """Whether the optimizer's kernel scales gradients itself, and leaves out a step that is not finite."""
        on_device = self.engine.decides_on_device and self.accelerator.scaler is None
        return on_device and getattr(self._inner, "_step_supports_amp_scaling", False)

    @property
    def accelerator(self) -> "Accelerator":
        """The processes."""
        return self.engine.accelerator

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return unwrapped(self.optimizer)

    @property
    def _learning_terms(self) -> list[LossTerm]:
        """The user's own term, if it learns: its buffers and frozen weights are kept with what it has learnt."""
        return [term for term in self.terms if any(each.requires_grad for each in term.parameters())]

    @property
    def _steps_in_backward(self) -> bool:
        return isinstance(self._inner, PerParameter) and self._inner.in_backward

    def update(self, grad_norm: Tensor) -> None:
        """An optimizer step, and the averages after it, unless the gradients are not finite; it counts all the same.

        Gradients were summed over the processes, so all decide alike. A fused optimizer decides on the device, and
        fp16's scaler for itself; else the norm is read here. A step that a graph has taken already needs the average.

        Args:
            grad_norm: norm of the gradients before clipping, a scalar.
        """
        self.step += 1
        is_taken = None
        if self.ahead.norm is not None:
            self.ahead.norm = None
        elif self.decides_on_device:
            self.step_on_device(grad_norm)
            self.optimizer.zero_grad()
        else:
            if self.accelerator.scaler is not None:
                is_taken = torch.isfinite(grad_norm)  # by which the scaler decides too
            elif not torch.isfinite(grad_norm):
                self.optimizer.zero_grad()
                return
            self.engine.step(self.optimizer)
            self.optimizer.zero_grad()
        for average in (*self.averages, *filter(None, [self.lengths])):
            average.update(is_taken)

    def step_on_device(self, grad_norm: Tensor, is_held: Tensor | None = None) -> None:
        """A fused optimizer's step, which the device leaves out where the gradients are not finite.

        Args:
            is_held: [] float32 on the device: where it is 1, the step is left out too.
        """
        inner = self._inner
        not_finite = (~torch.isfinite(grad_norm)).float()
        inner.found_inf = not_finite if is_held is None else torch.maximum(not_finite, is_held)
        self.engine.step(self.optimizer)
        inner.grad_scale = inner.found_inf = None

    @contextmanager
    def holding_optimizer_state(self) -> Iterator[None]:
        """Context manager: as much of the device's memory is taken as after the first step, which makes the state.

        A fused AdamW makes its state now, by a step that it is told to leave out. Others have a placeholder of the
        state's size.
        """
        inner, held = self._inner, None
        if not inner.state and not self.engine.spreads:
            if self.decides_on_device:
                self._make_state(inner)
            elif self.accelerator.device.type != "cpu" and not getattr(inner, "is_paged", False):
                held = torch.empty(self.optimizer_bytes, dtype=torch.uint8, device=self.accelerator.device)
        yield
        del held

    @torch.no_grad()
    def _make_state(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.found_inf = torch.ones((), device=self.accelerator.device)
        optimizer.step()
        optimizer.found_inf = None
        for parameter in parameters:
            parameter.grad = None

    def saving(
        self, step: int, samples_at_once: int | None, buffers: HostBuffers, is_copied: bool
    ) -> list[Callable[[Path], None]]:
        """What writes all of it as it is after `step` optimizer steps into a folder, for one process to run in order.

        Where something is spread over the processes, all must call this.

        Args:
            samples_at_once: how many memory allowed, where it was short.
            is_copied: whether the weights are copied too, so that it can be called later.
        """
        scaler = self.accelerator.scaler
        state = SavedState(
            step=step,
            facts=self.facts,
            ema_updates=next((average.num_updates for average in self.averages), None),
            scaler=None if scaler is None else scaler.state_dict(),
            samples_at_once=samples_at_once,
            skipped_steps=self.skips.total,
            skipped_in_a_row=self.skips.in_a_row,
            attention=self.attention.raced,
        )
        content = optimizer_content(self.engine, self.optimizer, self.parameters + self.own_parameters, buffers)
        jobs = [partial(write_state, state=state, optimizer=content)]
        if is_copied:
            jobs += self.adaptation.saving(self.averages, buffers)
        else:
            jobs.append(partial(self.adaptation.save, averages=self.averages))
        if self.lengths is not None:
            jobs.append(self.lengths.saving(buffers))
        for term in self._learning_terms:
            own = {name: buffers.copy(f"loss_module {name}", each) for name, each in term.state_dict().items()}
            jobs.append(partial(_write_own, own))
        return jobs

    def exporting(self) -> Callable[[Path], None]:
        """What writes the result of the weights as they are, for one process to run; all must call this."""
        return self.adaptation.exporting(HostBuffers(self.accelerator.is_main_process, are_kept=False))

    def export(self, folder: Path) -> None:
        """Writes the result; for all to call."""
        on_main_process(self.accelerator, partial(_write_result, self.exporting(), folder))

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it the trained modules are in evaluation mode and hold the average, if there is one."""
        return evaluating(self.adaptation, self.averages, self.optimizer)

    def holds_finite_weights(self) -> bool:
        """Whether all trained weights are finite as they are now; for all to call."""
        parts = [own_part(named.parameter.detach()) for named in self.parameters]
        num_bad = torch.stack([(~torch.isfinite(part)).sum() for part in parts]).sum().float()
        return not self.accelerator.reduce(num_bad.to(self.accelerator.device)).item()

    def judge(self) -> None:
        """Finds whether the weights that the modules hold now are those of a diverged run; for all to call."""
        are_finite = self.holds_finite_weights()
        self.verdict = self.skips.verdict(self.total_steps) or ("" if are_finite else "its weights are not all finite")

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint holds copies of, about."""
        trained = [named.parameter.detach() for named in self.parameters + self.own_parameters]
        averages = [each for average in self.averages for each in average.averages]
        state = [each for values in self.optimizer.state.values() for each in values.values()]
        return [*trained, *averages, *(each for each in state if isinstance(each, Tensor))]

    def copies_fit_twice(self) -> bool:
        """Whether host memory holds the pinned copies of a checkpoint twice, so that saving can go without waiting."""
        own = [each.parameter for each in self.parameters + self.own_parameters]
        averages = [each for average in self.averages for each in average.averages]
        copies = sum(map(taken_bytes, [*own, *averages])) + 2 * self.optimizer_bytes  # pinned, up to a power of two
        return 2 * copies < available_memory()

    def load(self, folder: Path) -> int:
        """Restores the optimizer, the average, loss terms and the scaler; the adaptation loaded the pipeline's weights.

        Returns:
            The optimizer steps done.
        """
        saved = read_state(folder)
        for term in self._learning_terms:
            try:
                term.load_state_dict(read_safetensors(folder / OWN_PARAMETERS))
            except (OSError, RuntimeError) as error:
                raise UserError(f"--loss_module is another than that of {folder}: {first_line(error)}") from error
        load_optimizer(folder, self.engine, self.optimizer, self.parameters + self.own_parameters)
        if self.lengths is not None and not self.lengths.load(folder):
            logger.warning("%s has no averages to choose a length of; they start from its weights", folder)
        for average in self.averages:
            if saved.ema_updates is None:
                logger.warning("%s has no moving average; it starts from the weights", folder)
            else:
                self.adaptation.load_average(folder, average, saved.ema_updates)
        if self.accelerator.scaler is not None and saved.scaler:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        gc.collect()  # lets go of the checkpoint's files, which were mapped, so that Windows can prune them
        self.skips.total, self.skips.in_a_row = saved.skipped_steps, saved.skipped_in_a_row
        self.attention.raced = saved.attention
        return saved.step


def _write_result(write: Callable[[Path], None], folder: Path) -> None:
    aside = folder / RESULT_ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write(aside)
        usual_modes(aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.is_file()):  # model_index.json after its parts
            _move(path, folder / path.name)
        aside.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"the result can't be written to {folder}: {first_line(error)}; checkpoints are as they were; resume with "
            "--resume_from_checkpoint latest"
        ) from error


def _move(path: Path, target: Path) -> None:
    """Moves a file or folder to its place, from which an earlier one is removed."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif path.is_dir():
        target.unlink(missing_ok=True)
    os.replace(path, target)


def make_optimizer(
    named: list[NamedParameter], options: OptimizerOptions, pure_bf16: bool, seed: int
) -> torch.optim.Optimizer:
    """The optimizer, which steps parameter by parameter where that was asked for."""
    if pure_bf16 or options.optimizer_in_backward:
        return PerParameter(named, options, options.optimizer_in_backward, seed)
    return build_optimizer(named, options)


def _write_own(tensors: dict[str, Tensor], folder: Path) -> None:
    write_tensors(tensors, folder / OWN_PARAMETERS)


@contextmanager
def evaluating(
    adaptation: Adaptation, averages: Sequence[MovingAverage], optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Within it the trained modules are in evaluation mode and hold the averages, where there are any.

    Without a moving average, the weights of an optimizer that averages its steps itself are that average.
    """
    adaptation.evaluation_mode()
    try:
        with averages[0].in_place() if averages else averaged_by(optimizer):
            yield
    finally:
        adaptation.train_mode()


@contextmanager
def averaged_by(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the weights are those that a schedule-free optimizer is evaluated at; of others they stay.

    They are put back bit for bit, which the optimizer's own way back would not do.
    """
    inner = unwrapped(optimizer)
    if not callable(getattr(inner, "eval", None)):
        yield
        return
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    weights = [parameter.detach().clone() for parameter in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight)
