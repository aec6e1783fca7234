"""Options from a file: YAML or JSON with the names of flags, or the run.json of an earlier run."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.options import UserError, parse_truth
from utils.config.terminal import one_line
from utils.config.user_files import FileError, parse_json, read_json, read_text
from utils.config.yaml_files import YAML_LIMIT, parse_yaml

RUN_RECORD = frozenset({"options", "versions"})
"""Keys by which the record of a run is recognized; its options are under the first."""


def recorded_options(folder: Path) -> dict[str, object]:
    """Returns the options in the record of a run, by the folder that it is in; empty if there is none to be read."""
    try:
        found = read_json(folder / "run.json")["options"]
    except (OSError, FileError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


class Actions:
    """The flags that a config file may set, by each of their spellings without dashes."""

    def __init__(self, actions: Sequence[argparse.Action]):
        self._by_name = {
            flag[2:].replace("-", "_"): action
            for action in actions
            for flag in action.option_strings
            if flag.startswith("--") and action.dest not in ("help", "config")
        }

        self._defaults = {action.dest: action.default for action in actions}  # before any file sets another

    def default(self, action: argparse.Action) -> object:
        """Returns a flag's own default."""
        return self._defaults[action.dest]

    def find(self, name: str) -> argparse.Action | None:
        """Returns the flag of a name written with or without dashes, or None."""
        return self._by_name.get(_plain(name))

    def of_type(self, kind: type) -> list[str]:
        """Returns the spellings of flags whose values are texts (str) or switches (bool)."""
        wanted = {str: (str, None), bool: (parse_truth,)}[kind]
        return [name for name, action in self._by_name.items() if action.type in wanted]


def read_config(path: str, actions: Actions) -> tuple[dict[str, object], list[str]]:
    """Returns the options in a file, by the names of their fields, and the names in it that are no flag.

    Sections, which are mappings of flags, may have any name. null stands for the flag's default.

    Args:
        path: a YAML or JSON file.
        actions: the flags of the script.

    Raises:
        UserError: if it can't be read, sets a flag twice, or has a value that the flag does not take.
    """
    where = f"--config {path}"
    values: dict[str, object] = {}
    unknown = []
    for name, value in _entries(_document(path, where, actions), where):
        action = actions.find(name)
        if action is None and _plain(name) == "config":
            other = one_line(str(value), 100)
            raise UserError(f"{where} names another file; give both on the command line: --config {path} {other}")
        if action is None:
            unknown.append(name)
            continue
        if action.dest in values:
            raise UserError(f"{where}: {_plain(name)} is set twice; keep one of them")
        what = f"{where}: {_plain(name)}"
        values[action.dest] = actions.default(action) if value is None else _converted(what, action, value)
    return values, unknown


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _document(path: str, where: str, actions: Actions) -> Mapping[Any, Any]:
    """Reads the file; of a run's record only its options."""
    try:
        text = read_text(path, YAML_LIMIT).text
        is_json = text.lstrip().startswith("{") and Path(path).suffix.lower() not in (".yaml", ".yml")
        texts, switches = actions.of_type(str), actions.of_type(bool)
        found = parse_json(text, Path(path)) if is_json else parse_yaml(text, Path(path), switches, texts)
    except FileError as error:
        raise UserError(f"{where} {error.reason}") from error
    except OSError as error:
        raise UserError(f"{where} can't be read: {error.strerror or error}") from error
    if isinstance(found, dict) and found.keys() >= RUN_RECORD:
        found = found["options"]
    if not isinstance(found, dict):
        raise UserError(f"{where} must be a mapping of flags to values, such as learning_rate: 1e-4")
    return found


def _entries(found: Mapping[Any, Any], where: str) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            nested = [f"{name}: {key}" for key, inner in value.items() if isinstance(inner, dict)]
            if nested:
                raise UserError(f"{where}: {one_line(nested[0], 100)} is a section in a section; flags are flat")
            entries += [(str(key), inner) for key, inner in value.items()]
        else:
            entries.append((str(name), value))
    return entries


def _converted(what: str, action: argparse.Action, value: object) -> object:
    """Returns a value as the command line would give it.

    Raises:
        UserError: if the flag does not take it.
    """
    is_list = action.nargs == "+"
    each = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not is_list:
        raise UserError(f"{what} takes one value, got a list of {len(value)}")
    if not each:
        raise UserError(f"{what} is an empty list; leave it out or give values")
    converted = [_one(what, action, item) for item in each]
    return converted if is_list else converted[0]


def _one(what: str, action: argparse.Action, value: object) -> object:
    if isinstance(action, argparse._StoreFalseAction):  # --no_flag
        return not _truth(what, value)
    if action.type is parse_truth:
        return _truth(what, value)
    if value is True and action.const is not None:  # a flag that may be given without a value
        return action.const
    if isinstance(value, bool | list | dict) or value is None:
        raise UserError(f"{what} must be {_kind(action)}, got {one_line(str(value), 100)}")
    kind = action.type or str
    try:
        found = _integer(value) if kind is int else kind(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{what} must be {_kind(action)}, got {one_line(str(value), 100)}") from error
    if action.choices is not None and found not in action.choices:
        raise UserError(f"{what} must be one of {', '.join(map(str, action.choices))}, got {one_line(str(found), 100)}")
    return found


def _integer(value: object) -> int:
    """Returns a whole number, also of 1e3, which is a text in YAML.

    Raises:
        ValueError: if it is none.
    """
    try:
        return int(str(value))
    except ValueError:
        number = float(str(value))
        if not number.is_integer():
            raise
        return int(number)


def _truth(what: str, value: object) -> bool:
    try:
        return value if isinstance(value, bool) else parse_truth(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{what} {error}") from error


def _kind(action: argparse.Action) -> str:
    kinds = {int: "an integer", float: "a number"}
    return kinds.get(action.type, "text")
