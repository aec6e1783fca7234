"""The text-to-image script as a process: its command line, a launcher's, and its run."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests import tiny
from tests.repository import ROOT

SCRIPT = str(ROOT / "train_text_to_image.py")


def command(pipelines: dict[str, Path], images: Path, out: Path, *flags: object) -> list[str]:
    words = [
        SCRIPT,
        "--pretrained_model_name_or_path",
        pipelines["sd"],
        "--train_data_dir",
        images,
        "--output_dir",
        out,
    ]
    words += ["--resolution", tiny.RESOLUTION, "--lr_warmup_steps", 0, "--report_to", "none"]
    words += ["--no_export_check", "--no_report", "--no_verdict"]
    return [str(word) for word in (*words, *flags)]


def run(words: list[str], expect: int = 0, **environment: str) -> str:
    """Runs a command elsewhere than in the repository, and gives its stderr."""
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, cwd="/", env=os.environ | environment, check=False
    )
    assert (done.returncode == 0) == (expect == 0), done.stderr[-4000:]
    return done.stderr


def succeed(words: Iterable, cwd: Path = ROOT, seconds: float = 600, **environment: str) -> str:
    """Runs a command that must succeed, and gives its stdout; a failure shows what it printed."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def launcher(module: str) -> list[str]:
    return [sys.executable, "-m", module]
