"""Distributed engines: all weights on each process (DistributedDataParallel), sharded weights (FSDP2), or a sharded
optimizer state (DeepSpeed ZeRO-2). `accelerate launch` selects the engine and the number of processes.

The engine wraps the model, clips gradients, steps the optimizer, and gathers the optimizer state. Everything else in
the training is the same under each engine, including checkpoints and results.
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
# modules that FSDP2 gathers as one unit, with all submodules that are not units themselves
SHARDED_CLASSES = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")


class Engine:
    """Engine for one process, or for several that each hold all weights and share gradients (DDP).

    Attributes:
        name: name used in messages.
        optimizers: names of the supported optimizers; None if all are.
        spreads: whether no single process holds everything that a checkpoint contains.
        decides_on_device: whether the optimizer can be told on the device that gradients are not finite.
        can_begin_again: whether a step that ran out of memory can be restarted.
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
        self.checkpoints_activations = False  # requested through the engine rather than --gradient_checkpointing

    def check_options(self, options: object, optimizer: str) -> None:
        """Refuses flags declared as unsupported by this engine, and optimizers that it can't step.

        Args:
            options: a script's options, by group.
            optimizer: name of the optimizer.
        """
        for field, value in flags_of(options):
            cure = rules_of(field).engines.get(self.name)
            if cure is not None and value not in (None, False):
                raise UserError(f"--{field.name} does not work with {self.name}: {cure}")
        if self.optimizers is not None and optimizer not in self.optimizers:
            raise UserError(f"--optimizer must be {' or '.join(self.optimizers)} with {self.name}, got {optimizer}")

    def check_batch(self, global_batch: int) -> None:
        """Refuses a global batch that can't be split evenly, if all processes must run each forward pass together."""
        count = self.accelerator.num_processes
        if not self.can_begin_again and global_batch % count:
            raise UserError(f"--global_batch_size must be divisible by {count} processes with {self.name}")

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the wrapped model to call and the optimizer to step.

        The parameters may be replaced. `max_norm` is the gradient norm that `clip` will be called with.
        """
        return self.accelerator.prepare(objective, optimizer)

    def backward(self, loss: Tensor) -> None:
        """Accumulates a loss's gradients; shares them between processes if `accelerator.sync_gradients` is set."""
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scales gradients down to a norm; returns the norm before scaling, a scalar on the device."""
        norm = whole(self.accelerator.clip_grad_norm_(parameters, max_norm))
        return norm.to(self.accelerator.device)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps the optimizer, whatever the gradients are."""
        optimizer.step()

    def optimizer_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """Returns the optimizer's state of one parameter, by the optimizer's own keys; every process must call it."""
        return optimizer.state.get(parameter, {})

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict[str, Any]], groups: list[dict]
    ) -> None:
        """Restores the optimizer's state of each parameter, and the numbers kept per parameter group."""
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
    """FSDP2: each process holds a shard of every weight, gradient and average, and gathers layers as they run."""

    name = "FSDP2"
    optimizers = ("adamw",)
    spreads = True
    decides_on_device = False
    can_begin_again = False

    def __init__(self, accelerator: "Accelerator"):
        super().__init__(accelerator)
        plugin = accelerator.state.fsdp_plugin
        self.checkpoints_activations = plugin.activation_checkpointing
        plugin.activation_checkpointing = False  # the models do it themselves, where it pays

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Shards the weights; each block, and the rest of each trained module, is gathered as one unit."""
        from torch.distributed.fsdp import MixedPrecisionPolicy
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        # Units of sharding: the trained modules, and their blocks.
        plugin, precision = self.accelerator.state.fsdp_plugin, self.accelerator.mixed_precision
        own = {type(module).__name__ for module in objective.trained.values()}
        there = {type(module).__name__ for module in objective.modules()}
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(own | there.intersection(SHARDED_CLASSES))

        # Precision. The batch stays float32: in bfloat16 noise levels, targets and SDXL's sizes would be rounded.
        plugin.cpu_ram_efficient_loading = False  # every process has loaded the weights, maybe from a checkpoint
        compute = None if precision == "no" else DTYPES[precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

        # Wrapping. Without _lazy_init the first module that is called, perhaps for a sample, would become the root.
        _cast_within(objective, self.accelerator.device.type, precision)
        model, optimizer = super().prepare(objective, optimizer, max_norm)
        root, *_ = sharded_parts([model])
        root._get_fsdp_state()._lazy_init()
        return model, optimizer


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO-2: whole float32 weights on each process; gradients and optimizer state are sharded.

    DeepSpeed is told that everything is float32; autocast sets the precision, as under the other engines.
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

        # Config: DeepSpeed's own precision settings are removed while it starts.
        config = plugin.deepspeed_config
        precision = self.accelerator.mixed_precision
        asked = {name: config.pop(name) for name in ("fp16", "bf16", "amp", "torch_autocast") if name in config}
        config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps
        config["train_micro_batch_size_per_gpu"] = 1  # only used in its arithmetic; batches are never cut to it
        config["gradient_clipping"] = max_norm if math.isfinite(max_norm) else 0.0
        config.pop("train_batch_size", None)
        _cast_within(objective, self.accelerator.device.type, precision)
        model, optimizer = super().prepare(objective, optimizer, max_norm)
        config |= asked  # accelerate looks up the precision here
        self._engine = model
        self._begin_states()
        return model, optimizer

    def _begin_states(self) -> None:
        """Creates the optimizer's state: DeepSpeed would link it to the parameters before all of it exists."""
        inner = self._engine.optimizer.optimizer
        for group in inner.param_groups:
            for part in group["params"]:
                steps: Tensor | int = torch.zeros((), device=part.device if group.get("fused") else "cpu")
                if not isinstance(inner, torch.optim.AdamW):  # DeepSpeed's own CPU optimizer counts in Python
                    steps = 0
                inner.state[part] = {"step": steps} | {name: torch.zeros_like(part.data) for name in self.STATE}
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients; DeepSpeed shares them in every backward pass."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._engine.backward(loss)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Clips and steps, which DeepSpeed does in one call, and skips if the norm is not finite; returns the norm."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Does nothing: `clip` has already stepped."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """Returns the parameter's state, gathered from all processes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps, *_ = (state["step"] for state in self._engine.optimizer.optimizer.state.values())
        return {"step": torch.tensor(float(steps))} | {
            name: safe_get_full_optimizer_state(parameter, name) for name in self.STATE
        }

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict[str, Any]], groups: list[dict]
    ) -> None:
        """Gives each process its shard of every parameter's state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for state in self._engine.optimizer.optimizer.state.values():
            steps = max(float(saved["step"]) for saved in states.values())
            state["step"] = int(steps) if isinstance(state["step"], int) else state["step"].fill_(steps)
        for parameter, state in states.items():
            for name in self.STATE:
                safe_set_full_optimizer_state(parameter, state[name].to(parameter.device), name)


def _cast_within(objective: nn.Module, device: str, precision: str) -> None:
    """Runs the objective's forward pass under autocast, which accelerate does itself only under DDP."""
    if precision != "no":
        objective.forward = torch.autocast(device, DTYPES[precision])(objective.forward)


def engine_of(accelerator: "Accelerator") -> Engine:
    """Returns the engine that the run was launched with."""
    engines = {"FSDP": ShardedEngine, "DEEPSPEED": ZeroEngine}
    return engines.get(accelerator.distributed_type.value, Engine)(accelerator)


def asked_engine() -> str:
    """Returns the engine that `accelerate launch` requests in the environment: FSDP, DEEPSPEED, MEGATRON_LM, or ""."""
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            return engine
    return ""


def check_engine(on_cpu: bool, precision: str | None) -> None:
    """Refuses an engine that is not available here, or that accelerate would silently ignore.

    Args:
        on_cpu: whether there is no GPU.
        precision: the mixed precision requested by the script or the launcher.
    """
    engine = asked_engine()
    if engine == "MEGATRON_LM":
        raise UserError("accelerate's MEGATRON_LM supports no image models; use FSDP2 (accelerate_configs/fsdp2.yaml)")
    if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP is supported in version 2 only; set fsdp_version: 2, as in accelerate_configs/fsdp2.yaml")
    if engine == "FSDP" and on_cpu:
        raise UserError("FSDP2 needs GPUs: accelerate ignores it on a CPU; use accelerate_configs/cpu.yaml")
    if engine == "FSDP" and precision == "fp16":
        raise UserError("--mixed_precision must be bf16 or no with FSDP2, got fp16")
    if engine != "DEEPSPEED":
        return
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed; pip install deepspeed, or use accelerate_configs/fsdp2.yaml")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3":
        raise UserError(
            "ZeRO-3 shards the weights, for which FSDP2 is used here; use accelerate_configs/fsdp2.yaml, "
            "or zero_stage: 2"
        )
    if precision == "fp16":
        raise UserError("--mixed_precision must be bf16 or no with DeepSpeed, got fp16")
    if on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise UserError("DeepSpeed needs GPUs; to try it on a CPU, set DS_ACCELERATOR=cpu in the environment")
