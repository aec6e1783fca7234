"""The experiment trackers that accelerate knows, and which of them are installed; nothing is imported to find out."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from utils.config.options import UserError, nearest

TABLE = re.compile(r"^LOGGER_TYPE_TO_CLASS\b[^{]*\{(.*?)^\}", re.MULTILINE | re.DOTALL)
OTHER_PACKAGES = {"tensorboard": ("tensorboardX",), "mlflow": ("mlflow-skinny",)}
"""Packages that serve in place of the one of a tracker's name."""
NEWER_REFUSED = {"aim": 4}
"""The first major version of a package that accelerate does not take."""


@cache
def tracker_names() -> tuple[str, ...]:
    """Returns the names of accelerate's trackers, read from its source; empty if accelerate is not installed."""
    found = find_spec("accelerate")
    if found is None or found.origin is None:
        return ()
    source = Path(found.origin).with_name("tracking.py").read_text(encoding="utf-8")
    table = TABLE.search(source)
    return () if table is None else tuple(sorted(re.findall(r'"(\w+)":', table.group(1))))


def find_trackers(asked: str) -> list[str]:
    """Returns the trackers that --report_to asks for; for `all`, those that are installed.

    Args:
        asked: names separated by commas, `all`, or `none`.

    Raises:
        UserError: if a name is unknown, or its package is not installed.
    """
    words = list(dict.fromkeys(word.strip().casefold() for word in asked.split(",") if word.strip()))
    names = tracker_names()
    for word in words:
        if names and word not in (*names, "all", "none"):
            near = nearest(word, names)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"--report_to must be all, none, or of {', '.join(names)}, got {word}{hint}")
    if not words or ("none" in words and len(words) > 1):
        raise UserError(f"--report_to must be names separated by commas, all, or none, got {asked!r}")
    if words == ["none"]:
        return []
    if "all" in words:
        return [name for name in names if not missing_package(name)]
    for word in words:
        if package := missing_package(word):
            raise UserError(f"--report_to {word} needs a package that is not installed; pip install {package}")
    return words


def missing_package(tracker: str) -> str:
    """Returns what `pip install` needs for a tracker; empty if it is installed.

    As accelerate does, it asks for the package's metadata too: a folder of its name, such as `wandb/` in the working
    directory, is no package.
    """
    limit = NEWER_REFUSED.get(tracker)
    for package in (tracker, *OTHER_PACKAGES.get(tracker, ())):
        module = tracker if package.startswith(f"{tracker}-") else package
        try:
            if find_spec(module) is not None and (limit is None or int(version(package).split(".")[0]) < limit):
                return ""
        except (PackageNotFoundError, ValueError):
            continue
    return tracker if limit is None else f"'{tracker}<{limit}'"
