"""Where a run takes place: the machine's hardware, and the git state of the user's working folder."""

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

GIT_SECONDS = 2.0  # a repository on a slow network disk must not delay the run any longer
LONGEST_NAME = 200  # characters of a branch's name


def hardware(accelerator: "Accelerator") -> dict[str, object]:
    """Returns the hardware of this process's machine: CPU, host memory and GPUs, memory in bytes."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": each.name, "memory_bytes": each.total_memory} for each in gpus],
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
    }


def git_state(folder: Path) -> dict[str, object] | None:
    """Returns commit, branch (None if detached) and whether files differ from the commit; None outside a repository.

    It never raises, and takes at most GIT_SECONDS; what git did not answer in that time is None.
    """
    try:
        asked = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"],
            capture_output=True,
            timeout=GIT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    if asked.returncode != 0:
        return None
    lines = asked.stdout.decode("utf-8", "backslashreplace").splitlines()
    heads = dict(line[2:].partition(" ")[::2] for line in lines if line.startswith("# "))
    branch = heads.get("branch.head", "(detached)")[:LONGEST_NAME]
    return {
        "commit": heads.get("branch.oid"),
        "branch": None if branch == "(detached)" else branch,
        "dirty": any(not line.startswith("#") for line in lines),
    }
