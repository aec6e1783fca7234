"""How the processes of a run share its work: each with all weights (DistributedDataParallel), the weights spread over
them (FSDP2), or the optimizer's state spread (DeepSpeed's ZeRO-2). `accelerate launch` says which, and how many.

The weights that train, their gradients' norm, an optimizer step and its state are asked of the engine; all else of the
training is the same under each, its checkpoints and its results too.
"""

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.config.options import UserError, flags_of, rules_of
from utils.runtime.options import PRECISIONS
from utils.runtime.sharding import sharded_parts, spread_like, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {name: getattr(torch, dtype) for name, dtype in PRECISIONS.items()}
# what is gathered together under FSDP2: with it go its parts that are not gathered by themselves
SHARDED_CLASSES = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")


class Engine:
    """One process, or several that each hold all weights and share gradients.

    Attributes:
        name: in messages.
        optimizers: those that it can step, or None for all.
        spreads: whether no process has all of what a checkpoint holds.
        decides_on_device: whether an optimizer may be told on the device that gradients are not finite.
        can_begin_again: whether a step that ran out of memory can be begun again.
        rehearses: whether the largest batch is tried before the first step.
    """

    name = "DDP"
    optimizers: Sequence[str] | None = None
    spreads = False
    decides_on_device = True
    can_begin_again = True
    rehearses = True

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator = accelerator
        self.checkpoints_activations = False  # asked of the engine, beside --gradient_checkpointing

    def check_options(self, options: object, optimizer: str) -> None:
        """Refuses flags that are declared not to go with the engine, and an optimizer that it can't step.

        Args:
            options: all of a script's, by group.
        """
        for field, value in flags_of(options):
            cure = rules_of(field).engines.get(self.name)
            if cure is not None and value not in (None, False):
                raise UserError(f"--{field.name} does not go with {self.name}: {cure}")
        if self.optimizers is not None and optimizer not in self.optimizers:
            raise UserError(f"--optimizer must be {' or '.join(self.optimizers)} with {self.name}, got {optimizer}")

    def check_batch(self, global_batch: int) -> None:
        """Refuses a global batch that processes that run each forward pass together can't share evenly."""
        count = self.accelerator.num_processes
        if not self.can_begin_again and global_batch % count:
            raise UserError(f"--global_batch_size must be divisible by {count} processes with {self.name}")

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model to call and the optimizer to step.

        The parameters may be others afterwards. `max_norm` is what gradients will be scaled down to.
        """
        return self.accelerator.prepare(objective, optimizer)

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients up; they are shared if `accelerator.sync_gradients` says so."""
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scales gradients down to a norm; gives the norm they had, a scalar on the device."""
        norm = whole(self.accelerator.clip_grad_norm_(parameters, max_norm))
        return norm.to(self.accelerator.device)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps, whatever the gradients are."""
        optimizer.step()

    def optimizer_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps of a parameter, by its own names; every process must call it."""
        return optimizer.state.get(parameter, {})

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict[str, Any]], groups: list[dict]
    ) -> None:
        """Restores it, and the numbers that are kept by group."""
        current = optimizer.state_dict()
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        current["state"] = {
            index: {name: spread_like(value, parameter) for name, value in states[parameter].items()}
            for index, parameter in enumerate(order)
            if parameter in states
        }
        for group, numbers in zip(current["param_groups"], groups, strict=False):
            group |= {name: value for name, value in numbers.items() if name in group}
        optimizer.load_state_dict(current)


class ShardedEngine(Engine):
    """FSDP2: each process keeps a part of every weight, gradient and average, and gathers layers as they run."""

    name = "FSDP2"
    optimizers = ("adamw",)
    spreads = True
    decides_on_device = False
    can_begin_again = False

    def __init__(self, accelerator: "Accelerator"):
        super().__init__(accelerator)
        plugin = accelerator.state.fsdp_plugin
        self.checkpoints_activations = plugin.activation_checkpointing
        plugin.activation_checkpointing = False  # done by the models themselves, which know where it pays

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Spreads the weights; those of a block, and of the rest of a trained module, are gathered together."""
        from torch.distributed.fsdp import MixedPrecisionPolicy
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin, precision = self.accelerator.state.fsdp_plugin, self.accelerator.mixed_precision
        own = {type(module).__name__ for module in objective.trained.values()}
        there = {type(module).__name__ for module in objective.modules()}
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(own | there.intersection(SHARDED_CLASSES))
        plugin.cpu_ram_efficient_loading = False  # every process has loaded the weights, of a checkpoint perhaps
        compute = None if precision == "no" else DTYPES[precision]
        # the batch stays float32: rounded to bfloat16, noise levels, targets and SDXL's sizes would be others
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        _cast_within(objective, self.accelerator.device.type, precision)
        model, optimizer = super().prepare(objective, optimizer, max_norm)
        root, *_ = sharded_parts([model])
        root._get_fsdp_state()._lazy_init()  # else the first module that is called, be it for a sample, becomes root
        return model, optimizer


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO-2: weights whole in float32, gradients and the optimizer's state spread over the processes.

    DeepSpeed is told that all is float32, and the arithmetic is chosen by autocast as under the other engines.
    """

    name = "DeepSpeed"
    optimizers = ("adamw",)
    spreads = True
    decides_on_device = False
    can_begin_again = False
    rehearses = False
    STATE = ("exp_avg", "exp_avg_sq")

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Hands the model and the optimizer to DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        precision = self.accelerator.mixed_precision
        asked = {name: config.pop(name) for name in ("fp16", "bf16", "amp", "torch_autocast") if name in config}
        config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps
        config["train_micro_batch_size_per_gpu"] = 1  # it is counted with, never cut to
        config["gradient_clipping"] = max_norm if math.isfinite(max_norm) else 0.0
        config.pop("train_batch_size", None)
        _cast_within(objective, self.accelerator.device.type, precision)
        model, optimizer = super().prepare(objective, optimizer, max_norm)
        config |= asked  # where accelerate looks the precision up
        self._engine = model
        self._begin_states()
        return model, optimizer

    def _begin_states(self) -> None:
        """Makes the optimizer's state, which DeepSpeed else links to the parameters before all of it is there."""
        inner = self._engine.optimizer.optimizer
        for group in inner.param_groups:
            for part in group["params"]:
                steps: Tensor | int = torch.zeros((), device=part.device if group.get("fused") else "cpu")
                if not isinstance(inner, torch.optim.AdamW):  # DeepSpeed's own, on the host, counts in Python
                    steps = 0
                inner.state[part] = {"step": steps} | {name: torch.zeros_like(part.data) for name in self.STATE}
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor) -> None:
        """Adds gradients up; DeepSpeed shares them in every backward pass."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._engine.backward(loss)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Clips and steps, which DeepSpeed does in one, but where the norm is not finite; gives the norm."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """It has stepped."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """The parameter's part of the state, gathered from the processes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps, *_ = (state["step"] for state in self._engine.optimizer.optimizer.state.values())
        return {"step": torch.tensor(float(steps))} | {
            name: safe_get_full_optimizer_state(parameter, name) for name in self.STATE
        }

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict[str, Any]], groups: list[dict]
    ) -> None:
        """Gives each process its part of every parameter's state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for state in self._engine.optimizer.optimizer.state.values():
            steps = max(float(saved["step"]) for saved in states.values())
            state["step"] = int(steps) if isinstance(state["step"], int) else state["step"].fill_(steps)
        for parameter, state in states.items():
            for name in self.STATE:
                safe_set_full_optimizer_state(parameter, state[name].to(parameter.device), name)


def _cast_within(objective: nn.Module, device: str, precision: str) -> None:
    """Runs the objective's forward pass under autocast, as accelerate does under DDP and not under these engines."""
    if precision != "no":
        objective.forward = torch.autocast(device, DTYPES[precision])(objective.forward)


def engine_of(accelerator: "Accelerator") -> Engine:
    """The engine that the run was launched with."""
    engines = {"FSDP": ShardedEngine, "DEEPSPEED": ZeroEngine}
    return engines.get(accelerator.distributed_type.value, Engine)(accelerator)


def asked_engine() -> str:
    """The engine that `accelerate launch` asks for by the environment: FSDP, DEEPSPEED, MEGATRON_LM, or ""."""
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            return engine
    return ""


def check_engine(on_cpu: bool, precision: str | None) -> None:
    """Refuses an engine that can't be had here, or that accelerate would pass over in silence.

    Args:
        precision: what was asked for, by the script or the launcher.
    """
    engine = asked_engine()
    if engine == "MEGATRON_LM":
        raise UserError("accelerate's MEGATRON_LM has no models for images; use FSDP2 (accelerate_configs/fsdp2.yaml)")
    if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP is used in its second version; set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does"
        )
    if engine == "FSDP" and on_cpu:
        raise UserError("FSDP2 needs GPUs: accelerate passes over it on a CPU; use accelerate_configs/cpu.yaml")
    if engine == "FSDP" and precision == "fp16":
        raise UserError("--mixed_precision must be bf16 or no with FSDP2, got fp16")
    if engine != "DEEPSPEED":
        return
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed; pip install deepspeed, or use accelerate_configs/fsdp2.yaml")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3":
        raise UserError(
            "ZeRO-3 spreads the weights, which FSDP2 does here without DeepSpeed; use accelerate_configs/fsdp2.yaml, "
            "or zero_stage: 2"
        )
    if precision == "fp16":
        raise UserError("--mixed_precision must be bf16 or no with DeepSpeed, got fp16")
    if on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise UserError("DeepSpeed needs GPUs, or DS_ACCELERATOR=cpu in the environment to try it without")
