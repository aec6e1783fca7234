"""The options of the optimizer and of its learning rate."""

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
LONGEST_WARMUP = 500  # optimizer steps, of a warm-up that is not asked for
LENGTH_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle")  # reach to the run's end


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(1e-4, "peak learning rate of the UNet")
    text_encoder_lr: float | None = option(
        None, "peak learning rate of the (first) text encoder; by default the UNet's"
    )
    text_encoder_2_lr: float | None = option(None, "peak learning rate of the second; by default the first's")
    layer_rates: list[str] | None = option(
        None,
        "factors on the rate of the weights whose names hold a regular expression, such as mid_block=2 attn2=0.5",
        is_text=True,
    )
    scale_lr: bool = option(False, "multiply the learning rates by batch size, accumulation and processes")
    optimizer: str | None = option(
        None,
        "adamw by default, fused where the device has it; adamw8bit, paged_adamw8bit and lion are bitsandbytes', "
        "adafactor and muon (for the matrices; AdamW for the rest) torch's, prodigy finds its rate itself",
        resume=Resume.STRUCTURE,
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer adamw8bit")
    adam_beta1: float = option(
        0.9, "decay of the mean gradient", acts_with=(IsNot("optimizer", without("adam_beta1")),)
    )
    adam_beta2: float | None = option(
        None,
        "decay of the mean squared gradient; by default 0.999, of lion 0.99",
        acts_with=(IsNot("optimizer", without("adam_beta1")),),
    )
    muon_momentum: float = option(0.95, "decay of muon's mean gradient", acts_with=("optimizer=muon",))
    adam_weight_decay: float = option(1e-2, "decoupled weight decay, of all but biases and norms")
    adam_epsilon: float = option(
        1e-8, "term in AdamW's denominator", acts_with=(IsNot("optimizer", without("adam_epsilon")),)
    )
    max_grad_norm: float | None = option(
        None, "gradients are scaled down to this norm, by default 1; 0 leaves them as they are"
    )
    fused_adamw: bool | None = option(
        None,
        "AdamW's step, with clipping and the guard against what is not finite, as one kernel; by default on",
        resume=Resume.COST,
        acts_with=(IsNot("optimizer", without("fused_adamw")),),
    )
    optimizer_in_backward: bool = option(
        False,
        "step each weight as soon as its gradient is there, and free that: less memory, no clipping",
        engines={"DeepSpeed": "gradients are spread already", "FSDP2": "gradients are spread already"},
    )

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            require(
                self.optimizer in OPTIMIZERS,
                "optimizer",
                self.optimizer,
                f"be one of {', '.join(OPTIMIZERS)}",
            )
        require_positive(self, "learning_rate", "text_encoder_lr", "text_encoder_2_lr", "adam_epsilon")
        require_not_negative(self, "adam_weight_decay", "max_grad_norm")
        for rule in self.layer_rates or ():
            pattern, separator, factor = rule.rpartition("=")
            must = "be REGULAR-EXPRESSION=FACTOR, such as mid_block=2"
            is_number = isinstance(as_number(factor), float) and 0 <= as_number(factor) < math.inf
            require(bool(separator and pattern) and is_number, "layer_rates", rule, must)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"--layer_rates {pattern} is no regular expression: {error}") from error
        if self.layer_rates and self.spec.has_one_rate:
            raise UserError(f"--optimizer {self.name} has one rate for all it trains; leave out --layer_rates")
        if self.optimizer_in_backward and self.max_grad_norm:
            raise UserError(
                "--optimizer_in_backward never has all gradients at once, for --max_grad_norm; leave one out"
            )
        if self.optimizer_in_backward and self.spec.has_one_rate:
            raise UserError(
                f"--optimizer {self.name} finds one rate from all gradients; leave out --optimizer_in_backward"
            )
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "be in [0, 1)")
        if self.use_8bit_adam and self.optimizer not in (None, "adamw8bit"):
            raise UserError(f"--use_8bit_adam is --optimizer adamw8bit, got --optimizer {self.optimizer}; give one")
        text_rates = {self.rate_of(name) for name in ("text_encoder", "text_encoder_2")}
        if self.spec.has_one_rate and text_rates != {self.learning_rate}:
            raise UserError(f"--optimizer {self.name} has one rate for all it trains; leave out --text_encoder_lr")

    @property
    def name(self) -> str:
        """The name of the optimizer in `OPTIMIZERS`."""
        return self.optimizer or ("adamw8bit" if self.use_8bit_adam else "adamw")

    @property
    def spec(self) -> OptimizerSpec:
        """What is known of the optimizer."""
        return OPTIMIZERS[self.name]

    @property
    def clip_norm(self) -> float:
        """The norm that gradients are scaled down to; infinite to leave them as they are."""
        if self.max_grad_norm is None:
            return math.inf if self.optimizer_in_backward else 1.0
        return self.max_grad_norm or math.inf

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of the mean gradient and of the mean squared gradient."""
        return self.adam_beta1, self.spec.beta2 if self.adam_beta2 is None else self.adam_beta2

    def factor_of(self, name: str) -> float:
        """The factor on the rate of a weight by its name: that of the first of the rules that it holds."""
        for rule in self.layer_rates or ():
            pattern, _, factor = rule.rpartition("=")
            if re.search(pattern, name):
                return float(factor)
        return 1.0

    def scaled(self, factor: int) -> "OptimizerOptions":
        """The options with all learning rates times the factor where `--scale_lr` asks for it."""
        if not self.scale_lr:
            return self
        names = ("learning_rate", "text_encoder_lr", "text_encoder_2_lr")
        return replace(
            self, **{name: getattr(self, name) * factor for name in names if getattr(self, name) is not None}
        )

    def rate_of(self, module: str) -> float:
        """The peak learning rate of a trained module by its name, before scaling."""
        text_encoder = self.text_encoder_lr or self.learning_rate
        rates = {"text_encoder": text_encoder, "text_encoder_2": self.text_encoder_2_lr or text_encoder}
        return rates.get(module, self.learning_rate)


@dataclass(frozen=True)
class ScheduleOptions:
    lr_scheduler: str = option("constant", "course of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int | None = option(500, "optimizer steps over which the rate rises from 0; ignored by constant")
    lr_num_cycles: int = option(
        1, "hard restarts of cosine_with_restarts", acts_with=("lr_scheduler=cosine_with_restarts",)
    )
    lr_power: float = option(1.0, "power of the polynomial schedule", acts_with=("lr_scheduler=polynomial",))
    lr_t_0: int | None = option(None, "optimizer steps of the first cycle of cosine_warm_restarts")
    lr_t_mult: int = option(
        1,
        "how many times as long each next cycle of cosine_warm_restarts is",
        acts_with=("lr_scheduler=cosine_warm_restarts",),
    )
    lr_step_size: int | None = option(None, "optimizer steps after which step multiplies the rate by --lr_gamma")
    lr_gamma: float = option(
        0.1, "factor of step and reduce_on_plateau", acts_with=("lr_scheduler=step", "lr_scheduler=reduce_on_plateau")
    )
    lr_patience: int = option(
        5,
        "measurements without a lower validation loss after which reduce_on_plateau multiplies the rate by --lr_gamma",
        acts_with=("lr_scheduler=reduce_on_plateau",),
    )
    lr_pct_start: float = option(
        0.3, "portion of the run in which one_cycle rises", acts_with=("lr_scheduler=one_cycle",)
    )
    lr_step_rules: str | None = option(
        None, "rules of piecewise_constant: 1:10,0.1:20,0.01 is 1 to step 10, 0.1 to 20", is_text=True
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
        """The options with a warm-up: the one that is asked for, else a resumed run's own, else one that fits the run.

        Args:
            recorded: the warm-up of the checkpoint that the run resumes from.
        """
        if self.lr_warmup_steps is not None:
            return self
        fitting = min(LONGEST_WARMUP, total_steps // 10)
        return replace(self, lr_warmup_steps=fitting if recorded is None else recorded)

    def warning(self, total_steps: int) -> str:
        """What a warm-up of more than half of the run does, and the cure; empty if it is shorter."""
        warmup = self.lr_warmup_steps
        if self.lr_scheduler in WITHOUT_WARMUP or 2 * warmup <= total_steps:
            return ""
        does = f"the learning rate reaches --learning_rate only at step {warmup + 1} of {total_steps}"
        if warmup >= total_steps:
            share = 100 * (total_steps - 1) / warmup
            does = f"in {total_steps} steps the learning rate only rises, to {share:.0f} % of --learning_rate"
        return f"--lr_warmup_steps {warmup}: {does}; try --lr_warmup_steps {total_steps // 10}"
