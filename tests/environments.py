"""Environments with other versions of the libraries, which share the torch of the environment that makes them.

python tests/environments.py older .venv-older
"""

import argparse
import hashlib
import re
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # gigabytes, and the same in all environments
OLDER = (
    "transformers==4.57.6",
    "diffusers==0.35.2",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "peft==0.17.1",
    "accelerate==1.10.1",
)
"""The newest libraries before transformers 5, which many programs that open pipelines still run with."""
LYCORIS = ("lycoris-lora==4.1.3", "pytest", "pytest-timeout")
"""The library whose names files for UIs have, which merges them by itself."""


def requirements() -> dict[str, str]:
    """The lines of requirements.txt by the name of the package."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {re.split(r"[><=;\s]", line, maxsplit=1)[0]: line for line in lines if line}


def tested_torch() -> str:
    """The line of constraints.txt that names torch's version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def packages(name: str) -> list[str]:
    """What pip installs: `older`, `floors` (lower bounds of requirements.txt), `newest` (releases) or `lycoris`."""
    if name == "older":
        return [tested_torch(), *OLDER]
    if name == "lycoris":
        return [tested_torch(), *(line for package, line in requirements().items() if package != "torch"), *LYCORIS]
    others = [line for package, line in requirements().items() if package != "torch"]
    return [tested_torch(), *(line.replace(">=", "==") if name == "floors" else line for line in others)]


def make(name: str, folder: Path) -> Path:
    """Makes an environment, unless it is there with the same packages; `newest` is made again each time.

    Returns:
        Its Python.
    """
    wanted = packages(name)
    mark = folder / f"installed-{hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if mark.exists() and name != "newest":
        return python
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    _link_torch(site)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    subprocess.run([str(word) for word in pip], check=True)
    mark.touch()
    return python


def _link_torch(site: Path) -> None:
    """Links torch, and the libraries that come with it, from this environment into another's site-packages."""
    for distribution in distributions():
        if SHARED.fullmatch(distribution.name):
            for path in _tops(distribution):
                if path.exists() and not (site / path.name).exists():
                    (site / path.name).symlink_to(path)


def _tops(distribution: Distribution) -> Iterator[Path]:
    """The folders and files that a distribution has in its site-packages."""
    names = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    yield from (Path(str(distribution.locate_file(name))) for name in sorted(names))


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the environment that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("older", "floors", "newest", "lycoris"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    print(make(arguments.name, arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
