"""What is checked each night: jobs that take long, or need environments of their own.

python tests/nightly.py [--only NAME ...]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import environments

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """A command that must succeed.

    Attributes:
        command: its words; "python" is the environment's.
        environment: a name that tests/environments.py knows; None for this one.
    """

    name: str
    command: tuple[str, ...]
    environment: str | None = None

    def run(self) -> bool:
        """Whether it succeeds, its environment made first."""
        python = sys.executable
        try:
            if self.environment is not None:
                python = str(environments.make(self.environment, ROOT / f".venv-{self.environment}"))
            words = [python if word == "python" else word for word in self.command]
            return subprocess.run(words, cwd=ROOT, check=False).returncode == 0
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{self.name}: {error}", flush=True)
            return False


JOBS = (
    Job("the lower bounds of requirements.txt train", ("python", "tests/short_runs.py"), "floors"),
    Job("the newest releases train", ("python", "tests/short_runs.py"), "newest"),
    Job(
        "LyCORIS merges what runs export for UIs",
        ("python", "-m", "pytest", "-q", "tests/formats/test_lycoris.py"),
        "lycoris",
    ),
    Job("older libraries open the results", ("make", "test-older")),
    Job("tests of many minutes", ("python", "-m", "pytest", "-q", "-m", "nightly")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the jobs, prints a table of them, and gives 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="jobs whose names hold one of these")
    only = parser.parse_args(argv).only
    rows = []
    for job in (job for job in JOBS if any(part in job.name for part in only)):
        print(f"--- {job.name}", flush=True)
        start = time.monotonic()
        rows.append((job.name, "passed" if job.run() else "FAILED", f"{time.monotonic() - start:.0f} s"))
    print("\n| job | result | time |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 1 if not rows or any(result == "FAILED" for _, result, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
