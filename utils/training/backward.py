"""A step's gradients, added up over micro-batches that are as large as the device's memory allows."""

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
    """What the micro-batches of a step came to.

    Attributes:
        loss: sum of the samples' losses, on the device.
        batches: on the CPU, as the loader gave them.
        losses: [B] each, those of the samples by batch and part.
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
        """Each image's name with its loss."""
        return list(zip(self.keys, torch.cat(self.losses), strict=True))

    @property
    def unreadable(self) -> dict[str, str]:
        """Why images could not be read, by their names."""
        return {key: why for batch in self.batches for key, why in batch.unreadable}


@dataclass
class Gradients:
    """Runs forward and backward passes.

    Attributes:
        num_batches: micro-batches that the loader gives for a step.
        num_samples: in them.
        loss_scale: what the sum of losses is multiplied by, so that a step's gradients are of their mean.
        size: samples at once, at most; halved where memory is short.
        can_retry: whether a step can be begun again: not where weights step inside the backward pass, or where the
            engine can't.
        cures: flags that save memory and are not given, in the order to try them.
        half_copy: what the denoiser computes with in the place of its own weights, if anything.
        rescue: writes a checkpoint of the steps done, from this process alone, with how many samples to take at once.
        owns_memory: whether gradients are added to memory of their own: what a CUDA graph gives, it overwrites.
        has_static_graph: whether the processes share gradients in an order that is laid down.
        gate_scale: what the loss of `of` is multiplied by, and its gradients divided by.
        whole_step: takes an optimizer step on a batch and gives its losses, or None if it can't.
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
    _trained: Sequence[nn.Parameter] = ()  # those that have gradients
    _memory: Sequence[Tensor] = ()  # their gradients', where that is kept
    _is_shared: bool = False  # whether the processes are sharing gradients now

    @classmethod
    def of_run(cls, options: TrainingOptions, session: Session, task: Task, state: TrainingState, feed: Feed) -> Self:
        """Those of a run; a resumed one takes no more samples at once than memory allowed before."""
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
        """The processes."""
        return self.engine.accelerator

    def add_up(self, step: int, batches: Iterable[Batch]) -> StepSums:
        """The gradients of a step, in the parameters; where memory is short it is begun again with smaller pieces.

        Raises:
            UserError: if one sample at a time is too much, or the processes were sharing gradients already.
            LoadingError: if a batch can't be loaded; the steps before are saved.
        """
        held: list[Batch] = []
        source = iter(batches)
        while True:
            try:
                return self._over(step, _again(held, source))
            except LoadingError as error:
                raise self._end_without_data(step, error, has_begun=bool(held)) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._is_shared or not self.can_retry:
                    raise self._end(step) from error
            self._halve(f"step {step + 1}")

    @contextmanager
    def of(self, batch: Batch, in_float32: bool = False, at_once: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Context manager: the gradients of samples of a batch, by the parameters' names, which hold them meanwhile.

        The processes share none, and fp16's scaler has no part in it.

        Args:
            in_float32: all in float32 arithmetic, weights that are frozen in half precision too, sample after sample.
            at_once: of so many samples; by default of as many as are taken at once.
        """
        part = batch.part(0, self.size if at_once is None else at_once)
        pieces = [part.part(number, number + 1) for number in range(len(part))] if in_float32 else [part]
        try:
            with self._exactly() if in_float32 else nullcontext():
                for piece in pieces:
                    self._backward_alone(piece, in_float32)
            trained = {name: each for name, each in self.model.named_parameters() if each.grad is not None}
            self._trained = list(trained.values())
            scale = self.gate_scale
            yield {name: each.grad if scale == 1 else each.grad / scale for name, each in trained.items()}
        finally:
            self.drop()

    def settle_gate_scale(self, batch: Batch) -> None:
        """Finds, for fp16, what the loss of `of` is multiplied by, lest gradients overflow or vanish."""
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
    def _exactly(self) -> Iterator[None]:
        """Context manager: the model computes in float32, without autocast or TF32."""
        module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        plain = getattr(module, "_original_forward", None)
        cast = None if plain is None else module.forward
        halves = [(each, each.data) for each in module.parameters() if each.dtype in (torch.float16, torch.bfloat16)]
        try:
            if plain is not None:  # what accelerate has put autocast around
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

    def _end(self, step: int) -> ProcessError:
        """What ends the run where a step can't be begun again: the others wait for this process's gradients.

        Each of them has all weights, so this one can save what the steps before have come to.
        """
        self.drop()
        where = f"out of memory in step {step + 1}, where it can't be begun again"
        half = -(-self.size // 2)
        ways = [self.cures[0]] if self.cures[:1] == [RECOMPUTING] else []
        if self.can_retry and self.size > 1 and self.rescue is not None:
            self.rescue(step, half)
            ways.insert(0, f"--resume_from_checkpoint latest, which takes {half} samples at once")
            return ProcessError(f"{where}; the {step} steps before are saved, continue with {' or '.join(ways)}")
        ways += [] if self.engine.can_begin_again and not self.can_retry else [setting(half, self.num_samples)]
        return ProcessError(f"{where}; resume from the last checkpoint with {' or '.join(ways) or 'more memory'}")

    def _end_without_data(self, step: int, error: LoadingError, has_begun: bool) -> LoadingError:
        """What ends the run where a step's data can't be loaded; the steps before are saved where that is possible.

        Args:
            has_begun: whether a part of the step is done, which may have changed weights that step inside the backward
                pass.
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
        """Forward and backward of the largest batch there will be, before the first step, all gradients dropped.

        On a CPU, where a process alone gains nothing by it, there is none, nor where weights step in the backward pass.
        All processes halve together until it fits. Then backward passes share gradients: DistributedDataParallel
        orders its sums anew after them, so that without them a resumed run would add up in another order.

        Args:
            holding_state: a context in which the optimizer's state takes its memory, as from the second step on.

        Raises:
            UserError: if one sample is too much.
        """
        is_alone = self.accelerator.num_processes == 1
        if (self.accelerator.device.type == "cpu" and is_alone) or not self.engine.rehearses:
            return
        if not self.engine.can_begin_again:
            self._try_together(largest)
            return
        if not self.can_retry:
            return
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
        if self.accelerator.num_processes > 1:
            if isinstance(self.model, DistributedDataParallel):
                self.model._set_static_graph()  # its constructor's option asks that the very first pass be shared
                self.has_static_graph = True
            for _ in range(2 if self.has_static_graph else 1):  # a static graph's first pass takes no note of an order
                self._backward(0, largest.part(0, 1), shares=True)
                self.drop()
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
        """How many samples memory allows in every process, if not so many."""
        size = int(self.accelerator.gather(torch.tensor([self.size], device=self.accelerator.device)).min())
        return size if size < at_once else None

    def _over(self, step: int, batches: Iterator[Batch]) -> StepSums:
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
        """Gives each trained parameter a gradient of zeros, in the same memory each step, by one call for all."""
        if len(self._memory) == len(self._trained):
            torch._foreach_zero_(self._memory)
        else:
            self._memory = [torch.zeros_like(parameter) for parameter in self._trained]
        for parameter, gradient in zip(self._trained, self._memory, strict=True):
            parameter.grad = gradient

    def _backward(self, step: int, part: Batch, shares: bool, is_whole: bool = False) -> Tensor:
        """[B] the losses of a part; its gradients are added to those that are there, at the last part of all ranks.

        Args:
            is_whole: whether the part is all of a step, which a recorded one may take then.
        """
        torch.manual_seed(model_seed(self.seed, step, part.slots[0]))  # dropout, where the model has any
        encoded = self.encoder.encode(part.to(self.accelerator.device))
        if is_whole and self.whole_step is not None:
            losses = self.whole_step(encoded)
            if losses is not None:
                return losses
        return self.passes(encoded, shares)

    def passes(self, encoded: EncodedBatch, shares: bool = True) -> Tensor:
        """[B] the losses of encoded samples; their gradients are added to those that are there."""
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
        message = "out of memory in %s: continuing as with %s, which trains the same; %s would avoid it"
        logger.warning(message, where, setting(self.size, self.num_samples), self._advice())

    def _advice(self) -> str:
        return ", ".join(self.cures) or "a smaller --resolution or another GPU"


def _half_copy(options: TrainingOptions, task: Task, state: TrainingState) -> HalfCopy | None:
    """What the denoiser computes with in the place of its float32 weights, if that was asked for."""
    if not options.speed.bf16_weights:
        return None
    if task.adaptation.trains_base:
        return HalfCopy(task.family.denoiser, state.optimizer)
    logger.info("--bf16_weights is left off: an adapter's weights are few, and the others are bfloat16 already")
    return None


def _again(held: list[Batch], source: Iterator[Batch]) -> Iterator[Batch]:
    """The batches that were taken before, and those still to come, which are held."""
    yield from list(held)
    for batch in source:
        held.append(batch)
        yield batch


def setting(size: int, samples: int) -> str:
    """The flags by which a process takes its samples of a step, at most so many at once."""
    size = max(count for count in range(1, size + 1) if samples % count == 0)
    return f"--train_batch_size {size} --gradient_accumulation_steps {samples // size}"
