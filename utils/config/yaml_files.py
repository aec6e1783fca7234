"""Reads untrusted YAML: bounded in size, and refused where YAML 1.1 would silently change a value."""

import logging
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from utils.config.options import first_line
from utils.config.user_files import HALF_CHARACTER, MAX_DEPTH, MAX_DIGITS, FileError, read_text, short

logger = logging.getLogger(__name__)
YAML_LIMIT = 1 << 20
MAX_YAML_NODES = 100_000  # after expanding aliases
MAX_YAML_SCALAR = 4096  # characters
A_DATE = "a date"
NOTHING = ("", "~", "null")  # YAML's spellings of null, accepted where text is expected
NO_SPACE = re.compile(r"[ \t]+(#(?:\S.*|$))")  # a comment without a space after #, perhaps meant as text
AS_WRITTEN = {  # plain values that every YAML version reads the same way, by the last part of their tags
    "bool": re.compile(r"true|false", re.IGNORECASE),
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE),
    "timestamp": re.compile(r"(?!)"),
}


def parse_yaml(text: str, where: object, booleans: Collection[str] = (), texts: Collection[str] = ()) -> Any:
    """Parses YAML into plain Python types; unquoted keys are kept as text.

    Args:
        booleans: keys whose values are true or false, which may also be written yes, no, on and off.
        texts: keys whose unquoted values are kept as text, or are None if empty, null or ~.

    Raises:
        FileError: naming `where` and the line, if the text is not YAML, its aliases expand too far or refer to
            themselves, it is nested too deeply, repeats a key, or has a value that YAML 1.1 reads differently from
            how it is written, such as 010 for 8.
    """
    try:
        _check_yaml(text)
        return _load(text, where, booleans, texts)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f": line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise FileError(where, f"can't be read as YAML: {problem:.200}{place}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, AttributeError, KeyError) as error:
        # the library also raises these, such as for an impossible date or an invalid `!!int`
        raise FileError(where, f"can't be read as YAML: {first_line(error):.200}") from error


def read_yaml(path: str | os.PathLike, limit: int = YAML_LIMIT, encoding: str | None = None) -> Any:
    """Reads a YAML file.

    Raises:
        FileError: as `read_text` and `parse_yaml`.
        OSError: as `open`.
    """
    return parse_yaml(read_text(path, limit, encoding).text, Path(path))


def _load(text: str, where: object, booleans: Collection[str], texts: Collection[str]) -> Any:
    loader = _Loader(text, where, booleans, texts)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _check_yaml(text: str) -> None:
    """Refuses YAML that is small as text but huge or endless once expanded, judging by its events."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.ScalarEvent):
            _check_scalar(event, line)
        # Count of values so far, with aliases expanded.
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_nodes}:
                raise ValueError(f"*{event.anchor} at {line} refers to a value that contains it")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
        if total > MAX_YAML_NODES:
            raise ValueError(f"more than {MAX_YAML_NODES} values at {line}, counting expanded aliases (*name)")
        # Nesting depth, and the sizes of anchored values.
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total - 1))
            if len(open_nodes) > MAX_DEPTH:
                raise ValueError(f"is nested more than {MAX_DEPTH} deep at {line}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before


def _check_scalar(event: yaml.ScalarEvent, line: str) -> None:
    if len(event.value) > MAX_YAML_SCALAR:
        raise ValueError(f"a value of {len(event.value)} characters at {line}; at most {MAX_YAML_SCALAR} are read")
    if HALF_CHARACTER.search(event.value):
        raise ValueError(f"half of a surrogate pair at {line}; write the character itself")


def _in_quotes(text: str) -> str:
    """Quotes a text so that YAML reads it unchanged."""
    return "'" + text.replace("'", "''") + "'" if '"' in text or "\\" in text else f'"{text}"'


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys, overlong integers, and plain values that YAML reads differently from how they look."""

    def __init__(self, text: str, where: object, booleans: Collection[str], texts: Collection[str]):
        super().__init__(text)
        self._source, self._where, self._booleans, self._texts = text, where, booleans, texts
        self._keys: dict[yaml.Node, set[str]] = {}  # keys of each value (aliases can add more); "" for a key itself

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Converts a node; refuses a plain value that would change its meaning."""
        if isinstance(node, yaml.ScalarNode) and node.style is None and self._is_implied(node):
            keys = self._keys.get(node, set())
            if keys == {""}:
                return node.value
            if keys and keys.issubset(self._texts):
                return self._text(node)
            self._refuse_surprise(node)
        return super().construct_object(node, deep)

    def _is_implied(self, node: yaml.ScalarNode) -> bool:
        return self.resolve(type(node), node.value, (True, False)) == node.tag

    def _text(self, node: yaml.ScalarNode) -> str | None:
        """Returns a plain value as text, where text is expected."""
        keys = self._named(node)
        comment = NO_SPACE.match(self._source[node.end_mark.index :].partition("\n")[0])
        if comment is not None and not node.value:
            cure = f"quote it ({_in_quotes(comment[1].rstrip())}), or leave the key out"
            problem = f"{keys}{short(comment[1].rstrip())} is a comment in YAML; {cure}"
            raise yaml.MarkedYAMLError(None, None, problem, node.end_mark)
        if comment is not None:
            whole = _in_quotes(f"{node.value}{comment[0].rstrip()}")
            told = "%s: %s%s is followed by a comment, %s; if that is part of the text, quote it: %s"
            logger.warning(told, self._where, keys, short(node.value), short(comment[1].rstrip()), whole)
        if node.tag.endswith(":null"):
            if node.value in NOTHING:
                return None
            self._refuse(node, "nothing", "null")
        return node.value

    def _refuse_surprise(self, node: yaml.ScalarNode) -> None:
        """Refuses a plain value that YAML reads differently from how it is written."""
        surprise = self._surprise(node)
        if surprise:
            self._refuse(node, surprise, "" if surprise == A_DATE else surprise)

    def _refuse(self, node: yaml.ScalarNode, surprise: str, plainly: str) -> None:
        cure = f"if it is meant as text, quote it ({_in_quotes(node.value)})"
        cure += f"; else write {plainly}" if plainly else ""
        problem = f"{self._named(node)}YAML reads {short(node.value)} as {surprise}; {cure}"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)

    def _named(self, node: yaml.ScalarNode) -> str:
        keys = " and ".join(short(key) for key in sorted(self._keys.get(node, ())) if key)
        return f"{keys}: " if keys else ""

    def _surprise(self, node: yaml.ScalarNode) -> str:
        """Returns what YAML 1.1 makes of a plain value that is written as something else, or ""."""
        kind = node.tag.rpartition(":")[2]
        pattern = AS_WRITTEN.get(kind)
        if pattern is None or pattern.fullmatch(node.value):
            return ""
        if kind == "bool":
            keys = self._keys.get(node, set())
            is_meant = bool(keys) and keys.issubset(self._booleans)
            return "" if is_meant else str(self.construct_yaml_bool(node)).lower()
        if kind == "timestamp":
            return A_DATE
        value = self.construct_yaml_int(node) if kind == "int" else self.construct_yaml_float(node)
        return f"the number {short(value)}"

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Converts a mapping; refuses repeated keys."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, count in counts.items() if count > 1 and key != "<<"), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(None, None, f"{short(twice)} appears twice in a mapping", node.start_mark)
        for key, value in node.value:
            self._keys.setdefault(key, set()).add("")
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self._keys.setdefault(each, set()).update([key.value] if isinstance(key, yaml.ScalarNode) else [])
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Converts an integer of bounded length."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(None, None, f"a number of {len(node.value)} digits", node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
