"""The training state: everything that an optimizer step changes, saved and restored together."""

import gc
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
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
from utils.training.adaptation import Adaptation, AdapterTuning
from utils.training.adapter_facts import ui_export
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
from utils.training.exporting import Exporter
from utils.training.learning_rates import LearningRates
from utils.training.log import Skips
from utils.training.optimizer_options import OptimizerOptions
from utils.training.optimizers import NamedParameter, build_optimizer, set_learning_rate, unwrapped
from utils.training.options import TrainingOptions
from utils.training.outdated import remove_outdated
from utils.training.per_parameter import PerParameter
from utils.training.posthoc_ema import AverageLengths
from utils.training.session import Session
from utils.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.training.verdict import RunVerdict

logger = logging.getLogger(__name__)
OWN_PARAMETERS = "loss_module.safetensors"
RESULT_ASIDE = ".tmp-result"
NORM_EPSILON = 1e-6  # as added by torch's clip_grad_norm_


@dataclass
class Ahead:
    """An optimizer step already taken together with its gradients, by a CUDA graph of the whole step.

    Attributes:
        norm: [] norm of its gradients until the step is counted; None otherwise.
    """

    norm: Tensor | None = None


@dataclass
class TrainingState:
    """Everything an optimizer step changes: weights, their averages, the optimizer, the fp16 scaler, the step number.

    Attributes:
        engine: how the processes share the work.
        adaptation: which weights train and how they are saved.
        averages: moving averages of the weights: none, or the one of --use_ema.
        lengths: the averages of --ema_lengths, or None.
        optimizer: the optimizer, as the engine wraps it.
        parameters: the trained parameters of the pipeline.
        own_parameters: the trained parameters of loss terms.
        terms: the loss terms.
        facts: the settings that a resumed run is compared with.
        model: maps an encoded batch to losses, as the engine wraps it.
        rates: the learning rate of each step.
        batches: which images are in the batch of each step.
        optimizer_bytes: bytes of the optimizer's complete state.
        skips: counts of skipped steps, as far as the log has read.
        attention: the kernel that computes attention.
        ahead: the step that a CUDA graph has already taken, if any.
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run; early stopping lowers it.
        learning_rate: learning rate of the current step, before factors for layers and text encoders.
        verdict: why the run has diverged, once the result is exported; empty if it has not.
        judge_of_run: measures and judges the run; None before it has begun.
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
    judge_of_run: "RunVerdict | None" = None

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
        """Creates the state of a run at its first step, or loads it from the checkpoint to resume from."""
        adaptation, own, engine, ema = task.adaptation, task.own_parameters, session.engine, options.ema
        # Optimizer and model, wrapped by the engine.
        named = adaptation.named_parameters(rates.optimizer)
        optimizer = make_optimizer(named + own, rates.optimizer, options.adaptation.pure_bf16, session.seed)
        model, optimizer = engine.prepare(task.objective, optimizer, rates.optimizer.clip_norm)
        # an engine that shards weights has replaced the parameters
        named = adaptation.named_parameters(rates.optimizer)
        # The form of the result.
        clip_skip = adaptation.family.clip_skip
        adaptation.exporter = Exporter.of(options, session.folder.path, data.resolution, clip_skip)
        # Moving averages.
        if ema.use_ema:
            limit = f"be at most the run's {facts.total_steps} optimizer steps"
            require(ema.ema_every <= facts.total_steps, "ema_every", ema.ema_every, limit)
        averages = [MovingAverage([each.parameter for each in named], ema)] if ema.use_ema else []
        lengths = AverageLengths(named, ema, session.folder.path) if ema.ema_lengths else None
        # The state, restored from the checkpoint if there is one.
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
        if isinstance(adaptation, AdapterTuning):
            adaptation.ui = ui_export(options, data, task, state)
        return state

    def progress(self) -> Progress:
        """Returns how far the run has come, in steps and epochs."""
        before = self.batches.epochs_before(self.step - 1) if self.step else 0
        return Progress(self.step, self.total_steps, before, self.batches.epochs_before(self.step))

    def set_learning_rate(self, step: int, reductions: int = 0) -> None:
        """Sets the learning rates of an optimizer step.

        Args:
            step: the optimizer step, from 0.
            reductions: number of reductions by reduce_on_plateau so far.
        """
        factor = self.rates.factor(step, reductions)
        set_learning_rate(self.optimizer, factor)
        self.learning_rate = self.rates.optimizer.learning_rate * factor

    def clip(self, max_norm: float) -> Tensor:
        """Clips the gradients to a norm, and returns their norm before clipping, a scalar on the device.

        A fused optimizer clips in its own step, with torch's coefficient, which saves a pass over all gradients. The
        gradients of loss terms are clipped separately, so that they do not affect the pipeline's; if they are not
        finite, neither is the returned norm. For gradients already applied (in the backward pass, or by a CUDA
        graph), only the norm is returned.
        """
        if self.ahead.norm is not None:
            return self.ahead.norm
        if self._steps_in_backward:
            return self._inner.grad_norm().to(self.accelerator.device)
        if self.decides_on_device and not self.own_parameters:
            gradients = [named.parameter.grad for named in self.parameters if named.parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._inner.grad_scale = ((norm + NORM_EPSILON) / max_norm).clamp(min=1)  # the kernel divides by it
            return norm
        norm = self.engine.clip([named.parameter for named in self.parameters], max_norm)
        if not self.own_parameters:
            return norm
        own_norm = nn.utils.clip_grad_norm_([named.parameter for named in self.own_parameters], max_norm)
        return torch.where(torch.isfinite(own_norm), norm, own_norm)

    @property
    def decides_on_device(self) -> bool:
        """Whether the optimizer's kernel clips gradients and skips non-finite steps itself."""
        on_device = self.engine.decides_on_device and self.accelerator.scaler is None
        return on_device and getattr(self._inner, "_step_supports_amp_scaling", False)

    @property
    def accelerator(self) -> "Accelerator":
        """The Accelerator that the processes share."""
        return self.engine.accelerator

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return unwrapped(self.optimizer)

    @property
    def _learning_terms(self) -> list[LossTerm]:
        """The loss terms with trained parameters; their buffers and frozen weights are saved with these."""
        return [term for term in self.terms if any(each.requires_grad for each in term.parameters())]

    @property
    def _steps_in_backward(self) -> bool:
        return isinstance(self._inner, PerParameter) and self._inner.in_backward

    def update(self, grad_norm: Tensor) -> None:
        """Takes an optimizer step and updates the averages; counts but skips it if the gradients are not finite.

        Gradients were summed over the processes, so all of them decide the same. A fused optimizer decides on the
        device, and so does the fp16 scaler; otherwise the norm is read here. After a step that a CUDA graph has already
        taken, only the averages are updated.

        Args:
            grad_norm: [] norm of the gradients before clipping.
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
                is_taken = torch.isfinite(grad_norm)  # the scaler decides by the same test
            elif not torch.isfinite(grad_norm):
                self.optimizer.zero_grad()
                return
            self.engine.step(self.optimizer)
            self.optimizer.zero_grad()
        for average in (*self.averages, *filter(None, [self.lengths])):
            average.update(is_taken)

    def step_on_device(self, grad_norm: Tensor, is_held: Tensor | None = None) -> None:
        """Takes a step of a fused optimizer, which the device skips if the gradients are not finite.

        Args:
            grad_norm: [] norm of the gradients before clipping, on the device.
            is_held: [] float32 on the device: if 1, the step is skipped too.
        """
        inner = self._inner
        not_finite = (~torch.isfinite(grad_norm)).float()
        inner.found_inf = not_finite if is_held is None else torch.maximum(not_finite, is_held)
        self.engine.step(self.optimizer)
        inner.grad_scale = inner.found_inf = None

    @contextmanager
    def holding_optimizer_state(self) -> Iterator[None]:
        """Context manager: allocates as much device memory as the optimizer's state takes from the first step on.

        A fused AdamW allocates its state now, in a step that is skipped. For others, a placeholder of the state's size
        is allocated and freed again.
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
        """Returns functions that write the state into a folder, for one process to run in order.

        If anything is sharded over the processes, all of them must call this.

        Args:
            step: optimizer steps done.
            samples_at_once: samples per process that fitted into memory, if it was short.
            buffers: host memory for the copies.
            is_copied: whether the weights are copied too, so that the functions may run later.
        """
        # Numbers and optimizer state.
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
        # Weights and their averages, then loss terms.
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
        """Returns a function that exports the current weights; all processes call this, one runs the function."""
        return self.adaptation.exporting(HostBuffers(self.accelerator.is_main_process, are_kept=False))

    def export(self, folder: Path) -> None:
        """Exports the result; all processes must call it."""
        adaptation = self.adaptation

        def tidy(written: Collection[str]) -> None:
            components, sources = adaptation.family.trainable_names(), adaptation.exporter.sources
            remove_outdated(folder, written, components, sources)

        on_main_process(self.accelerator, partial(_write_result, self.exporting(), folder, tidy))

    def release(self) -> None:
        """Frees the memory of training, once nothing is trained, exported or drawn with its weights any more."""
        self._inner.state.clear()
        for average in self.averages:
            average.averages.clear()
        parts = [each for each in self.adaptation.family.pipeline.components.values() if isinstance(each, nn.Module)]
        for tensor in (each for part in parts for each in (*part.parameters(), *part.buffers())):
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def evaluating(self) -> AbstractContextManager[None]:
        """Context manager: trained modules in evaluation mode, with the averaged weights if there are any."""
        return evaluating(self.adaptation, self.averages, self.optimizer)

    def holds_finite_weights(self) -> bool:
        """Whether all current trained weights are finite; all processes must call it."""
        parts = [own_part(named.parameter.detach()) for named in self.parameters]
        num_bad = torch.stack([(~torch.isfinite(part)).sum() for part in parts]).sum().float()
        return not self.accelerator.reduce(num_bad.to(self.accelerator.device)).item()

    def judge(self) -> None:
        """Sets `verdict` if the current weights are those of a diverged run; all processes must call it."""
        are_finite = self.holds_finite_weights()
        self.verdict = self.skips.verdict(self.total_steps) or ("" if are_finite else "its weights are not all finite")

    def tensors(self) -> list[Tensor]:
        """Returns the tensors that a checkpoint copies, except those of --ema_lengths."""
        trained = [named.parameter.detach() for named in self.parameters + self.own_parameters]
        averages = [each for average in self.averages for each in average.averages]
        state = [each for values in self.optimizer.state.values() for each in values.values()]
        return [*trained, *averages, *(each for each in state if isinstance(each, Tensor))]

    def copies_fit_twice(self) -> bool:
        """Whether host memory holds the pinned copies of a checkpoint twice, so that training need not wait."""
        own = [each.parameter for each in self.parameters + self.own_parameters]
        averages = [each for average in self.averages for each in average.averages]
        # pinned memory is rounded up to a power of two
        copies = sum(map(taken_bytes, [*own, *averages])) + 2 * self.optimizer_bytes
        return 2 * copies < available_memory()

    def load(self, folder: Path) -> int:
        """Restores the optimizer, averages, loss terms and scaler; the adaptation has loaded the pipeline's weights.

        Returns:
            The optimizer steps done.
        """
        saved = read_state(folder)
        for term in self._learning_terms:
            try:
                term.load_state_dict(read_safetensors(folder / OWN_PARAMETERS))
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"--loss_module differs from the one {folder} was made with: {first_line(error)}"
                ) from error
        load_optimizer(folder, self.engine, self.optimizer, self.parameters + self.own_parameters)
        if self.lengths is not None and not self.lengths.load(folder):
            logger.warning("%s has no averages for --ema_lengths; they start from its weights", folder)
        for average in self.averages:
            if saved.ema_updates is None:
                logger.warning("%s has no moving average; it starts from the weights", folder)
            else:
                self.adaptation.load_average(folder, average, saved.ema_updates)
        if self.accelerator.scaler is not None and saved.scaler:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        gc.collect()  # releases the checkpoint's mapped files, so that Windows can remove them
        self.skips.total, self.skips.in_a_row = saved.skipped_steps, saved.skipped_in_a_row
        self.attention.raced = saved.attention
        return saved.step


def _write_result(write: Callable[[Path], None], folder: Path, tidy: Callable[[Collection[str]], None]) -> None:
    """Writes a result aside and moves it into place; `tidy` gets the names of what was moved."""
    aside = folder / RESULT_ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write(aside)
        usual_modes(aside)
        written = sorted(aside.iterdir(), key=lambda path: path.is_file())  # model_index.json after the components
        for path in written:
            _move(path, folder / path.name)
        aside.rmdir()
        tidy([path.name for path in written])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"the result can't be written to {folder}: {first_line(error)}; checkpoints are unchanged; resume with "
            "--resume_from_checkpoint latest"
        ) from error


def _move(path: Path, target: Path) -> None:
    """Moves a file or folder to a target, replacing what is there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif path.is_dir():
        target.unlink(missing_ok=True)
    os.replace(path, target)


def make_optimizer(
    named: list[NamedParameter], options: OptimizerOptions, pure_bf16: bool, seed: int
) -> torch.optim.Optimizer:
    """Builds the optimizer; `--pure_bf16` and `--optimizer_in_backward` update each parameter separately."""
    if pure_bf16 or options.optimizer_in_backward:
        return PerParameter(named, options, options.optimizer_in_backward, seed)
    return build_optimizer(named, options)


def _write_own(tensors: dict[str, Tensor], folder: Path) -> None:
    write_tensors(tensors, folder / OWN_PARAMETERS)


@contextmanager
def evaluating(
    adaptation: Adaptation, averages: Sequence[MovingAverage], optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Context manager: trained modules in evaluation mode, with the averaged weights if there are any.

    Without a moving average, a schedule-free optimizer provides its own averaged weights.
    """
    adaptation.evaluation_mode()
    try:
        with averages[0].in_place() if averages else averaged_by(optimizer):
            yield
    finally:
        adaptation.train_mode()


@contextmanager
def averaged_by(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context manager: the weights at which a schedule-free optimizer is evaluated; no effect for other optimizers.

    The weights are restored bit for bit, which the optimizer's own way back does not do.
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
