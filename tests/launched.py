"""A training script in processes of their own, as tests want it; the environment says how.

torchrun --nproc_per_node 2 tests/launched.py train_text_to_image <its flags>

TEST_ENGINE=fsdp runs it under FSDP2 on CPUs, to which accelerate offers no way: a stand-in for GPUs. TEST_OPTIMIZER=sgd
has adamw stand for plain SGD, whose steps show gradients as they are: Adam's are the same at any scale of theirs.
TEST_FAILS=1:3 has the process of rank 1 raise in its third backward pass, TEST_MEMORY=1:3 run out of memory there, and
TEST_FORWARD_MEMORY=1:3 in its third forward pass.
"""

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import utils.runtime.engines
import utils.runtime.processes
from utils.config.options import leave
from utils.training.optimizer_table import OPTIMIZERS


def shard() -> None:
    """Has every accelerator say that it was launched with FSDP2."""
    created = accelerate.Accelerator.__init__

    def create(self, *arguments, **named) -> None:
        created(self, *arguments, **named)
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)

    accelerate.Accelerator.__init__ = create
    utils.runtime.processes.check_engine = lambda on_cpu, precision: None


def fail(where: str, error: Exception) -> None:
    """Has one rank raise in one of its backward passes."""
    rank, call = (int(part) for part in where.split(":"))
    backward, calls = utils.runtime.engines.Engine.backward, []

    def raising(self, loss) -> None:
        calls.append(None)
        if self.accelerator.process_index == rank and len(calls) == call:
            raise error
        backward(self, loss)

    utils.runtime.engines.Engine.backward = raising


def fail_forward(where: str) -> None:
    """Has one rank run out of memory in one of its forward passes, once."""
    from utils.training.objective import Objective

    rank, call = (int(part) for part in where.split(":"))
    forward, calls = Objective.forward, []

    def raising(self, encoded):
        calls.append(None)
        if int(os.environ["RANK"]) == rank and len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, encoded)

    Objective.forward = raising


if __name__ == "__main__":
    if os.environ.get("TEST_ENGINE") == "fsdp":
        shard()
    if os.environ.get("TEST_OPTIMIZER") == "sgd":
        OPTIMIZERS["adamw"] = replace(OPTIMIZERS["adamw"], make=lambda groups, options: torch.optim.SGD(groups))
    if "TEST_FAILS" in os.environ:
        fail(os.environ["TEST_FAILS"], RuntimeError("this rank fails"))
    if "TEST_MEMORY" in os.environ:
        fail(os.environ["TEST_MEMORY"], torch.OutOfMemoryError("CUDA out of memory"))
    if "TEST_FORWARD_MEMORY" in os.environ:
        fail_forward(os.environ["TEST_FORWARD_MEMORY"])
    script = importlib.import_module(sys.argv.pop(1))
    leave(script.main())
