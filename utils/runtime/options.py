"""Options of a run's processes and its output folder."""

from dataclasses import dataclass

from utils.config.flag_rules import Resume
from utils.config.options import option, require, require_not_negative

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The mixed precisions, with torch's names of their dtypes."""


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and on what a run computes, and how its random numbers are seeded."""

    output_dir: str | None = option(
        None,
        "folder for the result, checkpoints, samples and logs (default: sd-model-finetuned or sdxl-model-finetuned, "
        "with -lora appended for LoRA; without text ddpm-model-64)",
        resume=Resume.SAVING,
    )
    overwrite_output_dir: bool = option(
        False,
        "allow an output folder that contains another run: its checkpoints are set aside, its result is replaced",
        resume=Resume.SAVING,
    )
    seed: int = option(0, "seed of all random numbers", resume=Resume.COMPARED)
    mixed_precision: str | None = option(
        None,
        "precision of the forward and backward passes (default: as set by `accelerate launch`)",
        choices=tuple(PRECISIONS),
        resume=Resume.COMPARED,
    )
    allow_tf32: bool | None = option(
        None,
        "compute float32 matrix products and convolutions in TF32 on Ampere and later GPUs (default: if a mixed "
        "precision is used)",
        resume=Resume.COST,
    )
    deterministic: bool = option(
        False,
        "use deterministic kernels; on a GPU, a resumed run is bit-exact only with this",
        resume=Resume.COST,
    )
    peer_timeout: float = option(
        45.0,
        "seconds without a heartbeat after which another process is presumed dead and the run ends; 0 to wait forever",
        resume=Resume.COST,
    )
    local_rank: int = option(-1, "ignored: the launcher sets it in the environment", resume=Resume.COST)
    dry_run: bool = option(
        False,
        "check the data, draw what the model would see, print what would be trained for how many steps, and exit",
        resume=Resume.REPORTING,
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "seed", "peer_timeout")
        require(not 0 < self.peer_timeout < 10, "peer_timeout", self.peer_timeout, "be 0 or at least 10 seconds")
        require(self.seed < 2**63, "seed", self.seed, "be below 2**63")
