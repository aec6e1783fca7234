"""Measures how the code is built, as a reader meets it: python tests/house.py [--limits]

It prints the figures that CONTRIBUTING asks to keep low, and with --limits fails where one is over its limit.
"""

import argparse
import ast
import difflib
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_text_to_image.py", "train_unconditional.py")
RUNS = ("train", "run")  # the function of a script that trains, by its names
Function = ast.FunctionDef | ast.AsyncFunctionDef
MOST_ARGUMENTS = 7


class Figure(NamedTuple):
    """A measured number, and the most that it may be; None where it is only shown."""

    name: str
    value: float
    limit: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it is within its limit."""
        return self.limit is None or self.value <= self.limit


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods of a module."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_lines(function: Function) -> int:
    """Lines of a function from its `def` to its last one."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def num_arguments(function: Function) -> int:
    """Arguments beside `self` and `cls`."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def local_names(function: Function) -> set[str]:
    """Names that a function assigns."""
    stores = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return {node.id for node in stores}


def comment_share(source: str) -> float:
    """The share of a file's lines that hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    whole = [each for each in tokens if each.type == tokenize.COMMENT and each.line.strip().startswith("#")]
    return len(whole) / max(1, len(source.splitlines()))


def training_function(tree: ast.Module) -> Function:
    """The function of a script that trains."""
    there = {node.name: node for node in tree.body if isinstance(node, Function)}
    return next(there[name] for name in RUNS if name in there)


def loop_line(function: Function) -> int:
    """The line of a function, from 1, at which its training loop starts."""
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
    return max(loops, key=lambda node: (node.end_lineno or 0) - node.lineno).lineno - function.lineno + 1


def imports(tree: ast.Module) -> tuple[set[str], set[str]]:
    """(the modules of this project that a module imports from at its top, the names that it imports)."""
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils")]
    return {node.module or "" for node in found}, {alias.name for node in found for alias in node.names}


def shared_lines(one: str, other: str) -> int:
    """Lines that two texts have in common, in their order, blank ones left out."""
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in (one, other)]
    return sum(block.size for block in difflib.SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks())


def is_untyped(source: str) -> int:
    """How often options are passed on without a type."""
    return len(re.findall(r"\boptions: Any\b", source))


def measure(root: Path) -> list[Figure]:
    """All figures of a checkout."""
    files = [*sorted((root / "utils").rglob("*.py")), *(root / name for name in (*SCRIPTS, "evaluate_pipeline.py"))]
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    every = [function for tree in trees.values() for function in functions(tree)]
    lengths, arguments = sorted(map(num_lines, every)), [num_arguments(each) for each in every]
    quantiles = statistics.quantiles(lengths, n=100)
    figures = [
        Figure("modules in utils/", sum("utils" in path.parts for path in files)),
        Figure("modules directly in utils/", len([*(root / "utils").glob("[!_]*.py")]), 0),
        Figure("lines of a function, median", quantiles[49], 8),
        Figure("lines of a function, 90th percentile", quantiles[89], 25),
        Figure("arguments of a function, most", max(arguments)),
        Figure(f"functions with over {MOST_ARGUMENTS} arguments", sum(count > MOST_ARGUMENTS for count in arguments)),
        Figure("uses of `options: Any`", sum(map(is_untyped, sources.values())), 0),
        Figure("whole-line comments, % of lines", 100 * comment_share("\n".join(sources.values()))),
    ]
    texts = []
    for name in SCRIPTS:
        run = training_function(trees[root / name])
        texts.append(ast.get_source_segment(sources[root / name], run) or "")
        modules, names = imports(trees[root / name])
        figures += [
            Figure(f"{name}: lines of {run.name}()", num_lines(run), 80),
            Figure(f"{name}: line where its loop starts", loop_line(run), 45),
            Figure(f"{name}: local names", len(local_names(run)), 25),
            Figure(f"{name}: modules imported", len(modules), 25),
            Figure(f"{name}: names imported", len(names), 35),
        ]
    figures.append(Figure("lines that both training functions share", shared_lines(*texts), 50))
    tests = [*(root / "tests").rglob("test_*.py")]
    longest = max(len(path.read_text(encoding="utf-8").splitlines()) for path in tests)
    return [*figures, Figure("lines of the longest module of tests", longest)]


def main() -> int:
    """Prints the figures; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", action="store_true", help="fail where a figure is over its limit")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure")
    given = parser.parse_args()
    figures = measure(given.root)
    for each in figures:
        limit = "" if each.limit is None else f"  (at most {each.limit:g})"
        print(f"{each.value:8.4g}  {each.name}{limit}{'' if each.is_kept else '  OVER'}")
    return int(given.limits and not all(each.is_kept for each in figures))


if __name__ == "__main__":
    sys.exit(main())
