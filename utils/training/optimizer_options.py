"""Options of the optimizer and of its learning-rate schedule."""

import math
import re
from dataclasses import dataclass, replace

from utils.config.flag_rules import IsNot, Resume
from utils.config.options import (
    UserError,
    as_number,
    option,
    require,
    require_not_negative,
    require_positive,
)
from utils.training.optimizer_table import OPTIMIZERS, OptimizerSpec, without

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
    "cosine_warm_restarts",
    "step",
    "one_cycle",
    "reduce_on_plateau",
)
WITHOUT_WARMUP = ("constant", "piecewise_constant", "one_cycle")
LONGEST_WARMUP = 500  # optimizer steps of the default warm-up, at most
# schedules that depend on the run's length
LENGTH_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle")


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(1e-4, "peak learning rate")
    text_encoder_lr: float | None = option(
        None, "peak learning rate of the (first) text encoder; default: --learning_rate"
    )
    text_encoder_2_lr: float | None = option(
        None, "peak learning rate of the second text encoder; default: the first's"
    )
    layer_rates: list[str] | None = option(
        None,
        "multiply the learning rate of weights whose names match a regular expression, such as mid_block=2 attn2=0.5",
        is_text=True,
    )
    scale_lr: bool = option(False, "multiply the learning rates by batch size, accumulation steps and processes")
    optimizer: str | None = option(
        None,
        "adamw (default; fused where the device supports it), adafactor, muon (for matrices; AdamW for the rest), "
        "schedule_free_adamw, prodigy (finds its learning rate itself); adamw8bit, paged_adamw8bit and lion need "
        "bitsandbytes",
        resume=Resume.STRUCTURE,
    )
    use_8bit_adam: bool = option(False, "same as --optimizer adamw8bit")
    adam_beta1: float = option(
        0.9,
        "decay of the running mean of gradients (Adam's beta1)",
        acts_with=(IsNot("optimizer", without("adam_beta1")),),
    )
    adam_beta2: float | None = option(
        None,
        "decay of the running mean of squared gradients (Adam's beta2); default: 0.999, for lion 0.99",
        acts_with=(IsNot("optimizer", without("adam_beta1")),),
    )
    muon_momentum: float = option(0.95, "momentum of muon", acts_with=("optimizer=muon",))
    adam_weight_decay: float = option(1e-2, "decoupled weight decay of all weights but biases and norms")
    adam_epsilon: float = option(
        1e-8, "epsilon added to AdamW's denominator", acts_with=(IsNot("optimizer", without("adam_epsilon")),)
    )
    max_grad_norm: float | None = option(None, "clip gradients to this norm; default: 1; 0 turns clipping off")
    fused_adamw: bool | None = option(
        None,
        "run AdamW, clipping and the check for non-finite gradients as one kernel; default: on where supported",
        resume=Resume.COST,
        acts_with=(IsNot("optimizer", without("fused_adamw")),),
    )
    optimizer_in_backward: bool = option(
        False,
        "update each weight in the backward pass as soon as its gradient is computed, then free the gradient: less "
        "memory, no clipping",
        engines={"DeepSpeed": "it shards gradients already", "FSDP2": "it shards gradients already"},
    )

    def __post_init__(self) -> None:
        # Names and ranges.
        if self.optimizer is not None:
            require(
                self.optimizer in OPTIMIZERS,
                "optimizer",
                self.optimizer,
                f"be one of {', '.join(OPTIMIZERS)}",
            )
        require_positive(self, "learning_rate", "text_encoder_lr", "text_encoder_2_lr", "adam_epsilon")
        require_not_negative(self, "adam_weight_decay", "max_grad_norm")
        # Rules of --layer_rates.
        for rule in self.layer_rates or ():
            pattern, separator, factor = rule.rpartition("=")
            must = "be REGULAR-EXPRESSION=FACTOR, such as mid_block=2"
            is_number = isinstance(as_number(factor), float) and 0 <= as_number(factor) < math.inf
            require(bool(separator and pattern) and is_number, "layer_rates", rule, must)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"--layer_rates {pattern} is not a regular expression: {error}") from error
        # Options that exclude each other.
        if self.layer_rates and self.spec.has_one_rate:
            raise UserError(f"--optimizer {self.name} uses one learning rate for all weights; leave out --layer_rates")
        if self.optimizer_in_backward and self.max_grad_norm:
            raise UserError(
                "--optimizer_in_backward never holds all gradients at once, which --max_grad_norm needs; leave one out"
            )
        if self.optimizer_in_backward and self.spec.has_one_rate:
            raise UserError(f"--optimizer {self.name} needs all gradients at once; leave out --optimizer_in_backward")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "be in [0, 1)")
        if self.use_8bit_adam and self.optimizer not in (None, "adamw8bit"):
            raise UserError(f"--use_8bit_adam means --optimizer adamw8bit, got --optimizer {self.optimizer}; give one")
        text_rates = {self.rate_of(name) for name in ("text_encoder", "text_encoder_2")}
        if self.spec.has_one_rate and text_rates != {self.learning_rate}:
            raise UserError(
                f"--optimizer {self.name} uses one learning rate for all weights; leave out --text_encoder_lr"
            )

    @property
    def name(self) -> str:
        """The name of the optimizer in `OPTIMIZERS`."""
        return self.optimizer or ("adamw8bit" if self.use_8bit_adam else "adamw")

    @property
    def spec(self) -> OptimizerSpec:
        """The table row of the optimizer."""
        return OPTIMIZERS[self.name]

    @property
    def clip_norm(self) -> float:
        """The norm to clip gradients to; infinite without clipping."""
        if self.max_grad_norm is None:
            return math.inf if self.optimizer_in_backward else 1.0
        return self.max_grad_norm or math.inf

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of the running means of gradients and of squared gradients."""
        return self.adam_beta1, self.spec.beta2 if self.adam_beta2 is None else self.adam_beta2

    def factor_of(self, name: str) -> float:
        """Returns the factor on the learning rate of a weight: that of the first rule its name matches, else 1."""
        for rule in self.layer_rates or ():
            pattern, _, factor = rule.rpartition("=")
            if re.search(pattern, name):
                return float(factor)
        return 1.0

    def scaled(self, factor: int) -> "OptimizerOptions":
        """Returns the options, with all learning rates multiplied by the factor if `--scale_lr` is given."""
        if not self.scale_lr:
            return self
        names = ("learning_rate", "text_encoder_lr", "text_encoder_2_lr")
        return replace(
            self, **{name: getattr(self, name) * factor for name in names if getattr(self, name) is not None}
        )

    def rate_of(self, module: str) -> float:
        """Returns the peak learning rate of a trained module by its name, before `--scale_lr`."""
        text_encoder = self.text_encoder_lr or self.learning_rate
        rates = {"text_encoder": text_encoder, "text_encoder_2": self.text_encoder_2_lr or text_encoder}
        return rates.get(module, self.learning_rate)


@dataclass(frozen=True)
class ScheduleOptions:
    lr_scheduler: str = option("constant", "learning-rate schedule", choices=SCHEDULES)
    lr_warmup_steps: int | None = option(500, "optimizer steps of linear warm-up from 0; ignored by constant")
    lr_num_cycles: int = option(
        1, "number of cycles of cosine_with_restarts", acts_with=("lr_scheduler=cosine_with_restarts",)
    )
    lr_power: float = option(1.0, "power of polynomial", acts_with=("lr_scheduler=polynomial",))
    lr_t_0: int | None = option(None, "optimizer steps in the first cycle of cosine_warm_restarts")
    lr_t_mult: int = option(
        1,
        "length of each cycle of cosine_warm_restarts relative to the one before",
        acts_with=("lr_scheduler=cosine_warm_restarts",),
    )
    lr_step_size: int | None = option(
        None, "schedule step multiplies the learning rate by --lr_gamma every N optimizer steps"
    )
    lr_gamma: float = option(
        0.1,
        "factor on the learning rate in step and reduce_on_plateau",
        acts_with=("lr_scheduler=step", "lr_scheduler=reduce_on_plateau"),
    )
    lr_patience: int = option(
        5,
        "reduce_on_plateau multiplies the learning rate by --lr_gamma after more than this many measurements without a "
        "lower validation loss",
        acts_with=("lr_scheduler=reduce_on_plateau",),
    )
    lr_pct_start: float = option(
        0.3, "fraction of the run in which one_cycle increases the learning rate", acts_with=("lr_scheduler=one_cycle",)
    )
    lr_step_rules: str | None = option(
        None,
        "rules of piecewise_constant; 1:10,0.1:20,0.01 means factor 1 to step 10, 0.1 to step 20, then 0.01",
        is_text=True,
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "lr_warmup_steps", "lr_patience")
        require_positive(self, "lr_num_cycles", "lr_power", "lr_t_0", "lr_t_mult", "lr_step_size", "lr_gamma")
        require(0 < self.lr_pct_start < 1, "lr_pct_start", self.lr_pct_start, "be between 0 and 1")
        for schedule, name in (("cosine_warm_restarts", "lr_t_0"), ("step", "lr_step_size")):
            if (self.lr_scheduler == schedule) != (getattr(self, name) is not None):
                raise UserError(f"--lr_scheduler {schedule} and --{name} go together; give both or neither")
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise UserError("--lr_scheduler piecewise_constant and --lr_step_rules go together; give both or neither")

    def fitted(self, total_steps: int, recorded: int | None) -> "ScheduleOptions":
        """Returns the options with a warm-up: the given one, else the checkpoint's, else one that fits the run.

        Args:
            total_steps: optimizer steps of the whole run.
            recorded: warm-up steps in the checkpoint that the run resumes from, if any.
        """
        if self.lr_warmup_steps is not None:
            return self
        fitting = min(LONGEST_WARMUP, total_steps // 10)
        return replace(self, lr_warmup_steps=fitting if recorded is None else recorded)

    def warning(self, total_steps: int) -> str:
        """Returns a warning, with its cure, if the warm-up takes more than half of the run; else an empty string."""
        warmup = self.lr_warmup_steps
        if self.lr_scheduler in WITHOUT_WARMUP or 2 * warmup <= total_steps:
            return ""
        does = f"the learning rate reaches --learning_rate only at step {warmup + 1} of {total_steps}"
        if warmup >= total_steps:
            share = 100 * (total_steps - 1) / warmup
            does = f"in {total_steps} steps the learning rate only increases, to {share:.0f} % of --learning_rate"
        return f"--lr_warmup_steps {warmup}: {does}; try --lr_warmup_steps {total_steps // 10}"
