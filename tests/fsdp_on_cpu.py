"""Runs train_text_to_image.py under FSDP2 on CPUs, which accelerate offers no way to: a stand-in for GPUs in tests.

torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py <the script's flags>
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import utils.runtime
from utils.options import leave

created = accelerate.Accelerator.__init__


def create(self, *arguments, **named) -> None:
    created(self, *arguments, **named)
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)


accelerate.Accelerator.__init__ = create
utils.runtime.check_engine = lambda on_cpu, precision: None

if __name__ == "__main__":
    from train_text_to_image import main

    leave(main())
