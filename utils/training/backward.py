"""Accumulates a step's gradients over micro-batches that are as large as the device's memory allows."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.config.batch import Batch
from utils.config.options import ProcessError, UserError
from utils.config.seeding import model_seed
from utils.data.workers import LoadingError
from utils.runtime.engines import Engine
from utils.runtime.memory import is_out_of_memory
from utils.runtime.processes import without_tf32
from utils.runtime.stop_requests import resume_command
from utils.training.bf16_weights import HalfCopy
from utils.training.data import Feed
from utils.training.encoding import EncodedBatch, Encoder
from utils.training.options import RECOMPUTING, TrainingOptions
from utils.training.session import Session
from utils.training.state import TrainingState
from utils.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class StepSums(NamedTuple):
    """The results of a step's micro-batches.

    Attributes:
        loss: [] sum of the samples' losses, on the device.
        batches: the batches as loaded, on the CPU.
        losses: the losses of the samples, [B] for each part of a batch.
    """

    loss: Tensor
    batches: list[Batch]
    losses: list[Tensor]

    @property
    def keys(self) -> list[str]:
        """The names of the images."""
        return [key for batch in self.batches for key in batch.keys]

    @property
    def loss_by_key(self) -> list[tuple[str, Tensor]]:
        """(name, loss) of each image."""
        return list(zip(self.keys, torch.cat(self.losses), strict=True))

    @property
    def unreadable(self) -> dict[str, str]:
        """Reason by name of images that could not be read."""
        return {key: why for batch in self.batches for key, why in batch.unreadable}


@dataclass
class Gradients:
    """Runs forward and backward passes.

    Attributes:
        engine: how the processes share the work.
        model: maps an encoded batch to losses, as the engine wraps it.
        encoder: adds encodings to batches.
        seed: seed of the run.
        num_batches: micro-batches per step, as loaded.
        num_samples: samples per step of this process.
        loss_scale: factor on the sum of losses, so that a step's gradients are those of the mean loss.
        size: largest number of samples at once; halved when out of memory.
        can_retry: whether a step can be restarted: not if weights are updated inside the backward pass, or if the
            engine can't.
        cures: memory-saving flags that are not given, in the order to try them.
        half_copy: bfloat16 copy of the denoiser's weights to compute with, if any.
        rescue: writes a checkpoint from this process alone, given the steps done and the samples to take at once.
        owns_memory: whether gradients are accumulated in separate memory, as CUDA graphs overwrite their outputs.
        has_static_graph: whether DDP shares gradients in a fixed order.
        gate_scale: factor on the loss of `of`; its gradients are divided by it.
        whole_step: takes an optimizer step on a batch and returns its losses, or None if it can't.
    """

    engine: Engine
    model: nn.Module
    encoder: Encoder
    seed: int
    num_batches: int
    num_samples: int
    loss_scale: float
    size: int
    can_retry: bool
    cures: Sequence[str]
    half_copy: HalfCopy | None = None
    rescue: Callable[[int, int], None] | None = None
    owns_memory: bool = False
    has_static_graph: bool = False
    gate_scale: float = 1.0
    whole_step: Callable[[EncodedBatch], Tensor | None] | None = None
    _trained: Sequence[nn.Parameter] = ()  # parameters that have gradients
    _memory: Sequence[Tensor] = ()  # memory of their gradients, with owns_memory
    _is_shared: bool = False  # whether the processes are sharing gradients now

    @classmethod
    def of_run(cls, options: TrainingOptions, session: Session, task: Task, state: TrainingState, feed: Feed) -> Self:
        """Creates it for a run; a resumed run takes no more samples at once than fitted into memory before."""
        loader, engine, accelerator = options.loader, session.engine, session.accelerator
        allowed = None if loader.find_batch_size else session.resumption.samples_at_once
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / state.batches.size
        return cls(
            engine,
            state.model,
            Encoder(task.family, task.trains_text_encoders),
            session.seed,
            num_batches=len(feed.pieces.slots),
            num_samples=sum(len(slots) for slots in feed.pieces.slots),
            loss_scale=scale,
            size=min(feed.at_once, allowed or feed.at_once),
            can_retry=engine.can_begin_again and not options.optimizer.optimizer_in_backward,
            cures=[flag for flag, is_given in options.memory_savers.items() if not is_given],
            half_copy=_half_copy(options, task, state),
        )

    @property
    def accelerator(self) -> "Accelerator":
        """The Accelerator that the processes share."""
        return self.engine.accelerator

    def add_up(self, step: int, batches: Iterable[Batch]) -> StepSums:
        """Computes a step's gradients into the parameters; when out of memory, restarts the step with smaller parts.

        Args:
            step: optimizer steps done before.
            batches: the micro-batches of the step.

        Raises:
            UserError: if one sample at a time does not fit into memory.
            ProcessError: if memory runs out where the step can't be restarted.
            LoadingError: if a batch can't be loaded; the steps before are saved.
        """
        held: list[Batch] = []
        source = iter(batches)
        while True:
            try:
                return self._accumulate(step, _replayed(held, source))
            except LoadingError as error:
                raise self._loading_failed(step, error, has_begun=bool(held)) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._is_shared or not self.can_retry:
                    raise self._out_of_memory(step) from error
            self._halve(f"step {step + 1}")

    @contextmanager
    def of(self, batch: Batch, in_float32: bool = False, at_once: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Context manager: computes the gradients of samples of a batch, and yields them by parameter name.

        They are not shared between processes, and the fp16 scaler is not used.

        Args:
            in_float32: compute everything in float32, including weights frozen in half precision, sample by sample.
            at_once: number of samples; default: as many as are taken at once.
        """
        part = batch.part(0, self.size if at_once is None else at_once)
        pieces = [part.part(number, number + 1) for number in range(len(part))] if in_float32 else [part]
        try:
            with self._in_float32() if in_float32 else nullcontext():
                for piece in pieces:
                    self._backward_alone(piece, in_float32)
            trained = {name: each for name, each in self.model.named_parameters() if each.grad is not None}
            self._trained = list(trained.values())
            scale = self.gate_scale
            yield {name: each.grad if scale == 1 else each.grad / scale for name, each in trained.items()}
        finally:
            self.drop()

    def settle_gate_scale(self, batch: Batch) -> None:
        """Finds, for fp16, a factor on the loss of `of` with which gradients neither overflow nor vanish."""
        if self.accelerator.mixed_precision != "fp16":
            return
        for exponent in range(14, -15, -4):
            self.gate_scale = 2.0**exponent
            with self.of(batch) as found:
                if all(bool(torch.isfinite(each).all()) for each in found.values()):
                    return

    def _backward_alone(self, part: Batch, in_float32: bool) -> None:
        accelerator = self.accelerator
        torch.manual_seed(model_seed(self.seed, 0, part.slots[0]))
        encoded = self.encoder.encode(part.to(accelerator.device))
        half = nullcontext() if in_float32 or self.half_copy is None else self.half_copy.in_place()
        with accelerator.no_sync(self.model), half:
            losses = self.model(encoded.in_float32() if in_float32 else encoded)
            (losses.sum() * self.loss_scale * self.gate_scale).backward()

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Context manager: the model computes in float32, without autocast or TF32."""
        module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        plain = getattr(module, "_original_forward", None)
        cast = None if plain is None else module.forward
        halves = [(each, each.data) for each in module.parameters() if each.dtype in (torch.float16, torch.bfloat16)]
        try:
            if plain is not None:  # accelerate has wrapped it in autocast
                module.forward = plain
            for parameter, weights in halves:
                parameter.data = weights.float()
            with without_tf32():
                yield
        finally:
            if cast is not None:
                module.forward = cast
            for parameter, weights in halves:
                parameter.data = weights

    def _out_of_memory(self, step: int) -> ProcessError:
        """Returns the error for running out of memory in a step that can't be restarted: other processes wait for it.

        Each process has all weights, so this one first saves the steps before.
        """
        self.drop()
        where = f"out of memory in step {step + 1}, which can't be restarted at this point"
        half = -(-self.size // 2)
        ways = [self.cures[0]] if self.cures[:1] == [RECOMPUTING] else []
        if self.can_retry and self.size > 1 and self.rescue is not None:
            self.rescue(step, half)
            ways.insert(0, f"--resume_from_checkpoint latest, which takes {half} samples at once")
            return ProcessError(f"{where}; the {step} steps before are saved; continue with {' or '.join(ways)}")
        ways += [] if self.engine.can_begin_again and not self.can_retry else [setting(half, self.num_samples)]
        return ProcessError(f"{where}; resume from the last checkpoint with {' or '.join(ways) or 'more memory'}")

    def _loading_failed(self, step: int, error: LoadingError, has_begun: bool) -> LoadingError:
        """Returns the error when a step's data can't be loaded; saves the steps before if possible.

        Args:
            step: optimizer steps done before.
            error: why the data can't be loaded.
            has_begun: whether part of the step is done, which may have updated weights inside the backward pass.
        """
        self.drop()
        if self.rescue is None or self.engine.spreads or (has_begun and not self.can_retry):
            return LoadingError(f"{error}; resume from the last checkpoint with: {resume_command(sys.argv)}")
        if step == 0:
            return LoadingError(f"{error}; no step was done yet")
        try:
            self.rescue(step, self.size)
        except UserError as other:
            return LoadingError(f"{error}; {other}")
        return LoadingError(f"{error}; saved checkpoint-{step}; resume with: {resume_command(sys.argv)}")

    def rehearse(self, largest: Batch, holding_state: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Runs forward and backward of the largest batch before the first step, and drops the gradients.

        All processes halve their part together until it fits. Then gradients are shared in further backward passes:
        DistributedDataParallel reorders its sums after the first ones, so without them a resumed run would sum in
        another order. Skipped in a single process on a CPU, and if weights are updated inside the backward pass.

        Args:
            largest: the largest batch of the run.
            holding_state: context manager in which the optimizer's state has its memory, as from the second step on.

        Raises:
            UserError: if one sample does not fit into memory.
        """
        is_alone = self.accelerator.num_processes == 1
        if (self.accelerator.device.type == "cpu" and is_alone) or not self.engine.rehearses:
            return
        if not self.engine.can_begin_again:
            self._try_together(largest)
            return
        if not self.can_retry:
            return
        # Halve until it fits in every process.
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        while True:
            failed = False
            try:
                with holding_state():
                    self._backward(0, largest.part(0, self.size), shares=False)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            together = torch.tensor(float(failed), device=self.accelerator.device)
            if not self.accelerator.reduce(together).item():
                break
            self._halve("the rehearsal of the largest batch")
        self.drop()
        # Fix the order in which DDP sums gradients.
        if self.accelerator.num_processes > 1:
            if isinstance(self.model, DistributedDataParallel):
                self.model._set_static_graph()  # the constructor's option would require the first pass to be shared
                self.has_static_graph = True
            # the first pass of a static graph does not record an order
            for _ in range(2 if self.has_static_graph else 1):
                self._backward(0, largest.part(0, 1), shares=True)
                self.drop()
        # Restore the buffers.
        for buffer, value in buffers:
            buffer.copy_(value)

    def _try_together(self, largest: Batch) -> None:
        try:
            self._backward(0, largest.part(0, self.size), shares=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ProcessError(
                f"out of memory in the rehearsal of the largest batch; try {self._advice()} or "
                f"{setting(max(1, self.size // 2), self.num_samples)}"
            ) from error
        self.drop()

    def shortened(self, at_once: int) -> int | None:
        """Returns the number of samples that fits into memory in every process, if less than `at_once`; else None."""
        size = int(self.accelerator.gather(torch.tensor([self.size], device=self.accelerator.device)).min())
        return size if size < at_once else None

    def _accumulate(self, step: int, batches: Iterator[Batch]) -> StepSums:
        sums = StepSums(torch.zeros((), device=self.accelerator.device), [], [])
        if self.owns_memory:
            self._begin_gradients()
        for number, batch in enumerate(batches, start=1):
            parts = [batch.part(begin, begin + self.size) for begin in range(0, len(batch), self.size)]
            for place, part in enumerate(parts, start=1):
                is_last = number == self.num_batches and place == len(parts)
                losses = self._backward(step, part, is_last, is_whole=is_last and number == place == 1)
                sums.loss.add_(losses.sum())
                sums.losses.append(losses)
            sums.batches.append(batch)
        return sums

    @torch.no_grad()
    def _begin_gradients(self) -> None:
        """Sets the gradient of each trained parameter to zeros, in the same memory each step, in one call for all."""
        if len(self._memory) == len(self._trained):
            torch._foreach_zero_(self._memory)
        else:
            self._memory = [torch.zeros_like(parameter) for parameter in self._trained]
        for parameter, gradient in zip(self._trained, self._memory, strict=True):
            parameter.grad = gradient

    def _backward(self, step: int, part: Batch, shares: bool, is_whole: bool = False) -> Tensor:
        """Returns the losses of a part, [B], and adds its gradients to the existing ones.

        Args:
            step: optimizer steps done before.
            part: the samples.
            shares: whether to sum the gradients over the processes, at the last part of a step.
            is_whole: whether the part is the whole step, which a CUDA graph may then take.
        """
        torch.manual_seed(model_seed(self.seed, step, part.slots[0]))  # dropout, where the model has any
        encoded = self.encoder.encode(part.to(self.accelerator.device))
        if is_whole and self.whole_step is not None:
            losses = self.whole_step(encoded)
            if losses is not None:
                return losses
        return self.passes(encoded, shares)

    def passes(self, encoded: EncodedBatch, shares: bool = True) -> Tensor:
        """Returns the losses of encoded samples, [B], and adds their gradients to the existing ones."""
        accelerator = self.accelerator
        accelerator.sync_gradients = shares
        with (
            nullcontext() if shares else accelerator.no_sync(self.model),
            nullcontext() if self.half_copy is None else self.half_copy.in_place(),
        ):
            losses = self.model(encoded)
            self._is_shared = shares and accelerator.num_processes > 1
            self.engine.backward(losses.sum() * self.loss_scale)
        self._is_shared = False
        return losses.detach()

    def drop(self) -> None:
        """Drops all gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def _halve(self, where: str) -> None:
        self.drop()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.size == 1:
            raise UserError(f"out of memory in {where} with one sample at a time; try {self._advice()}")
        self.size = -(-self.size // 2)
        message = "out of memory in %s: continuing with %s, which trains the same; %s would avoid it"
        logger.warning(message, where, setting(self.size, self.num_samples), self._advice())

    def _advice(self) -> str:
        return ", ".join(self.cures) or "a smaller --resolution or another GPU"


def _half_copy(options: TrainingOptions, task: Task, state: TrainingState) -> HalfCopy | None:
    """Returns the bfloat16 copy of the denoiser's weights if --bf16_weights is given and has an effect."""
    if not options.speed.bf16_weights:
        return None
    if task.adaptation.trains_base:
        return HalfCopy(task.family.denoiser, state.optimizer)
    logger.info("--bf16_weights has no effect: adapters have few weights, and the frozen weights are bfloat16 already")
    return None


def _replayed(held: list[Batch], source: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the batches held from before, then the remaining ones, which it adds to `held`."""
    yield from list(held)
    for batch in source:
        held.append(batch)
        yield batch


def setting(size: int, samples: int) -> str:
    """Returns the flags with which a process takes its `samples` per step, at most `size` at once."""
    size = max(count for count in range(1, size + 1) if samples % count == 0)
    return f"--train_batch_size {size} --gradient_accumulation_steps {samples // size}"
