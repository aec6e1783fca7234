"""The floors of the house hold, and every room is on the plan."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import utils

ROOT = Path(__file__).parent.parent


def test_the_floors_hold():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    )  # in here it would silence all loggers


def test_the_declared_modules_are_those_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    declared = {name.strip() for floor in floors for name in floor.split("|")}
    found = {module.name for module in pkgutil.walk_packages(utils.__path__, "utils.") if not module.ispkg}
    assert declared == found


def test_every_init_is_empty():
    assert not [path for path in (ROOT / "utils").rglob("__init__.py") if path.read_text().strip()]


def test_families_stay_in_their_place():
    words = ("time_ids", "text_encoder_2", "pooled", "0.18215", "0.13025", "is_sdxl")
    allowed = {"options.py", "optim.py"}  # optim has the flag --text_encoder_2_lr
    offences = [
        (path.name, word)
        for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]
        if "families" not in path.parts and path.name not in allowed
        for word in words
        if word in path.read_text().replace("text_encoder_2_lr", "")
    ]
    assert not offences
