"""The options of the processes of a run and of its output folder."""

from dataclasses import dataclass

from utils.config.flag_rules import Resume
from utils.config.options import option, require, require_not_negative

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The mixed precisions, and torch's name for the dtype of each."""


@dataclass(frozen=True)
class RuntimeOptions:
    output_dir: str | None = option(
        None,
        "folder of the result, its checkpoints, samples and logs; by default sd-model-finetuned or "
        "sdxl-model-finetuned, with -lora behind it for LoRA",
        resume=Resume.SAVING,
    )
    overwrite_output_dir: bool = option(
        False,
        "train into a folder that holds another run; its checkpoints are set aside, its result is replaced",
        resume=Resume.SAVING,
    )
    seed: int = option(0, "everything random follows from it", resume=Resume.COMPARED)
    mixed_precision: str | None = option(
        None,
        "arithmetic of forward and backward; by default what `accelerate launch` says",
        choices=tuple(PRECISIONS),
        resume=Resume.COMPARED,
    )
    allow_tf32: bool | None = option(
        None,
        "compute float32 matrix products and convolutions in TF32 on Ampere and later GPUs; by default with a mixed "
        "precision",
        resume=Resume.COST,
    )
    deterministic: bool = option(
        False,
        "choose kernels that give the same bits each time; on a GPU a resumed run is bit-exact only with it",
        resume=Resume.COST,
    )
    peer_timeout: float = option(
        45.0,
        "seconds without a sign of life after which another process is taken for dead and the run ends; 0 never",
        resume=Resume.COST,
    )
    local_rank: int = option(-1, "ignored: the launcher says it by the environment", resume=Resume.COST)
    dry_run: bool = option(
        False,
        "examine the data, draw what the model will see, print what would be trained for how many steps, and stop",
        resume=Resume.REPORTING,
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "seed", "peer_timeout")
        require(not 0 < self.peer_timeout < 10, "peer_timeout", self.peer_timeout, "be 0 or at least 10 seconds")
        require(self.seed < 2**63, "seed", self.seed, "be below 2**63")
