"""Declares, parses and validates a script's options.

An option group is a frozen dataclass; a script's options are one frozen dataclass whose fields are groups. Modules of
option groups import nothing heavy, so that a script parses its arguments before it loads torch. Flags are flat:
`ImageOptions.resolution` is `--resolution`. The section of a group in `--help` is titled by its field name, or by the
group's `help_title` if it has one.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import logging
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

from utils.config.flag_rules import SECRET_OPTIONS, FlagRules, Partner, Resume
from utils.config.foreign_flags import FOREIGN_FLAGS
from utils.config.idle_flags import idle_flags
from utils.config.standard_streams import flush_streams, hide, lasting_streams
from utils.config.terminal import one_line, print_line

logger = logging.getLogger(__name__)
WRITTEN_PATHS = (
    "output_dir",
    "logging_dir",
    "encoding_cache_dir",
    "cache_dir",
    "save_reference",
    "export_geneval",
    "out",
)
WRITTEN_FILES = ("save_reference", "out")  # those of WRITTEN_PATHS that are files
CONFIG_FLAGS = ("--config", "--config_file")
CLOSE = 0.8  # similarity above which an unknown flag counts as a typo
NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse's own pattern takes -1e-4 for a flag


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
MOST_NAME = 255  # bytes of a file name
RANK_NAMES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
"""Variables in which torchrun, MPI and srun pass the process's rank, readable before torch is loaded."""
MAIN_SECONDS = 30.0  # how much later the main process may hit an error than others: it reads more files
AGREED_SECONDS = 1.0
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process has terminated")


class UserError(Exception):
    """An error the user can fix. Printed as one line, `error: <message>`; the process exits with status 2."""


class ProcessError(UserError):
    """A user error that only this process has hit, and that it prints whatever its rank."""


class Stopped(Exception):  # noqa: N818  not an error, like KeyboardInterrupt
    """The run was asked to end early, by signal `number` or as planned (0). Its state is saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status: 128 + the signal number, or 0 for a planned end."""
        return 128 + self.number if self.number else 0


class Diverged(Exception):  # noqa: N818  neither the user's error nor the program's
    """The run reached its end but its result is useless. It is written anyway; the exit status is 1."""


class WrongExport(Diverged):
    """The run reached its end, but a file that it wrote does not hold its weights; the exit status is 1."""


class _AddUp(argparse.Action):
    """Collects the values of a flag that is given several times; they replace those of a config file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: typing.Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(namespace).setdefault(f"given {self.dest}", [])
        given += values
        setattr(namespace, self.dest, given)


def option(  # noqa: PLR0913 - the parts of a flag's declaration
    default: typing.Any,
    help: str,
    *,
    place: str = "",
    aliases: Sequence[str] = (),
    choices: Iterable | None = None,
    const: typing.Any = None,
    is_text: bool = False,
    is_repeatable: bool = False,
    resume: Resume = Resume.FIXED,
    engines: Mapping[str, str] = types.MappingProxyType({}),
    acts_with: Sequence[str | Partner] = (),
) -> typing.Any:
    """Declares a dataclass field that is also a command-line flag.

    Args:
        place: what `--help` calls an argument that is given by its place, without a flag, such as IN.
        aliases: additional spellings, including dashes.
        const: the value if the flag is given without one; None if it needs a value.
        is_text: whether the value is text and never a path, so that a leading `~` is kept.
        is_repeatable: whether a list's flag may be given several times: the values add up; by default the last counts.
        resume: whether a resumed run may change it, and why.
        engines: for engines that do not support it, by engine name: why, or what to do instead.
        acts_with: other flags, or conditions on them, of which one must hold for it to have an effect.
    """
    rules = FlagRules.of(resume, engines, acts_with)
    metadata: dict[str, typing.Any] = {"help": help.replace("%", "%%"), "is_text": is_text, "rules": rules}
    if place:
        metadata["place"] = place
    if aliases:
        metadata["aliases"] = list(aliases)
    if choices is not None:
        metadata["choices"] = list(choices)
    if const is not None:
        metadata |= {"const": const, "nargs": "?"}
    if is_repeatable:
        metadata["action"] = _AddUp
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, flag: str, value: typing.Any, must: str, cure: str = "") -> None:
    """Raises `UserError("--flag must ..., got value; cure")` unless the condition holds."""
    if not condition:
        raise UserError(f"--{flag} must {must}, got {value}" + (f"; {cure}" if cure else ""))


def require_positive(group: typing.Any, *names: str) -> None:
    """Refuses options of a group that are given but not finite and above 0."""
    for name in names:
        value = getattr(group, name)
        require(value is None or 0 < value < math.inf, name, value, "be a number above 0")


def require_not_negative(group: typing.Any, *names: str) -> None:
    """Refuses options of a group that are given but not finite and at least 0."""
    for name in names:
        value = getattr(group, name)
        require(value is None or 0 <= value < math.inf, name, value, "be 0 or more")


def require_fraction(group: typing.Any, *names: str) -> None:
    """Refuses options of a group outside [0, 1]."""
    for name in names:
        value = getattr(group, name)
        require(0 <= value <= 1, name, value, "be between 0 and 1")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def flags_as(names: Mapping[str, str]) -> Iterator[None]:
    """Context manager: renames flags in user errors and log lines to those that the user typed.

    Args:
        names: the user's name for each internal name; flags that start with an internal name are renamed too. A name in
            capitals is an argument's place, without dashes. If contexts are nested, the inner names are replaced first.
    """

    def renamed(text: str) -> str:
        for theirs, ours in names.items():
            text = text.replace(f"--{theirs}", ours if ours.isupper() else f"--{ours}")
        return text

    make_record = logging.getLogRecordFactory() if not _RENAMERS else _RENAMERS[0][0]
    _RENAMERS.append((make_record, renamed))
    logging.setLogRecordFactory(_renamed_record)
    try:
        yield
    except UserError as error:
        kind = ProcessError if isinstance(error, ProcessError) else UserError
        raise kind(renamed(str(error))) from error
    finally:
        _RENAMERS.pop()
        if not _RENAMERS:
            logging.setLogRecordFactory(make_record)


_RENAMERS: list[tuple[Callable[..., logging.LogRecord], Callable[[str], str]]] = []


def _renamed_record(*args: typing.Any, **kwargs: typing.Any) -> logging.LogRecord:
    make_record, _ = _RENAMERS[0]
    record = make_record(*args, **kwargs)
    if not record.name.startswith("utils."):
        return record

    def shown(value: object) -> object:
        if not isinstance(value, str | UserError):
            return value
        text = str(value)
        for _, renamed in reversed(_RENAMERS):
            text = renamed(text)
        return text if type(value) is str or isinstance(value, UserError) else type(value)(text)

    record.msg = shown(record.msg)  # arguments stay separate: the formatter puts each on one line
    if isinstance(record.args, tuple):
        record.args = tuple(map(shown, record.args))
    return record


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Returns the known word most similar to `word`, or an empty string if none reaches the similarity `cutoff`."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), "")


class _Parser(argparse.ArgumentParser):
    """An argument parser that refuses abbreviated flags and raises `UserError` instead of printing usage and exiting.

    It accepts what transformers' HfArgumentParser accepts (`--train_data_dir` and `--train-data-dir`, `--flag` and
    `--flag false`, `--no_flag`), but importing that would take half as long as importing torch.
    """

    def __init__(self, groups: Mapping[str, type], description: str):
        places = [
            place for group in groups.values() for field in dataclasses.fields(group) if (place := _place_of(field))
        ]
        usage = " ".join(["%(prog)s", *places, "--flag value ..."])
        super().__init__(usage=usage, description=description, allow_abbrev=False)
        self._negative_number_matcher = NEGATIVE_NUMBER
        self.add_argument(
            *CONFIG_FLAGS,
            nargs="+",
            metavar="FILE",
            help="YAML or JSON files with values of flags, or the run.json of an earlier run; later files override "
            "earlier ones, and flags of the command line override all files",
        )
        for name, group in groups.items():
            title = getattr(group, "help_title", name.replace("_", " "))
            section, hints = self.add_argument_group(title), typing.get_type_hints(group)
            for field in dataclasses.fields(group):
                _add_flag(section, field, hints[field.name])

    def error(self, message: str) -> NoReturn:
        flag, separator, reason = message.removeprefix("argument ").partition(": ")
        if separator and flag.startswith("-"):
            names = flag.split("/")
            given = re.search(r"^invalid \w+ value: '([^']*)'", reason)
            if given and "," in given[1] and self._option_string_actions[names[0]].nargs == "+":
                reason += "; separate values by spaces: " + " ".join(re.split(r"[,\s]+", given[1]))
            raise UserError(f"{next((name for name in names if '-' not in name[2:]), names[0])}: {reason}")
        raise UserError(message)


def _place_of(field: dataclasses.Field) -> str:
    """Returns what an option that is given by its place is called; empty for one with a flag."""
    return field.metadata.get("place", "")


def _add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field, hint: typing.Any) -> None:
    """Adds an option's flag; for a switch that is on by default, also the flag that turns it off."""
    if place := _place_of(field):
        many = {"nargs": "+"} if list in map(typing.get_origin, (hint, *typing.get_args(hint))) else {}
        section.add_argument(field.name, metavar=place, help=field.metadata["help"], **many)
        return
    known = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind = known[0] if isinstance(hint, types.UnionType) else hint
    given = {name: value for name, value in field.metadata.items() if name not in ("aliases", "is_text", "rules")}
    given["default"] = field.default
    if field.default not in (None, "") and field.default is not False:
        given["help"] += " (default: %(default)s)"
    if kind is bool:
        given |= {"type": parse_truth, "nargs": "?", "const": True, "metavar": "true|false"}
    elif typing.get_origin(kind) is list:
        given |= {"type": typing.get_args(kind)[0], "nargs": "+", "metavar": "VALUE"}
    else:
        given |= {"type": kind} | ({} if "choices" in given else {"metavar": kind.__name__.upper()})
    section.add_argument(f"--{field.name}", *field.metadata.get("aliases", ()), **given)
    if kind is bool and field.default is True:
        section.add_argument(
            f"--no_{field.name}", action="store_false", dest=field.name, help=f"turn off --{field.name}"
        )


def _underscored(word: str, known_flags: Sequence[str]) -> str:
    """Returns `--train_data_dir` for `--train-data-dir`; other words unchanged."""
    flag, assigned, value = word.partition("=")
    name = "--" + flag[2:].replace("-", "_")
    return name + assigned + value if flag.startswith("--") and name in known_flags else word


def _flag_of(word: str) -> str:
    """Returns the flag in a command-line word as argparse would read it, or an empty string."""
    is_flag = len(word) > 1 and word[0] == "-" and word != "--" and not NEGATIVE_NUMBER.match(word)
    name = word.partition("=")[0]
    return name if is_flag and " " not in name else ""


def _refuse_unknown(unknown: Sequence[str], known_flags: Sequence[str], where: str = "") -> None:
    """Raises one `UserError` for all unknown arguments, each with the flag that was probably meant."""
    if not unknown:
        return
    shown = [
        f"{one_line(word, 100)} ({hint})" if (hint := _hint(word, known_flags)) else one_line(word, 100)
        for word in dict.fromkeys(unknown)
    ]
    noun = "argument" if len(shown) == 1 else "arguments"
    raise UserError(f"unknown {noun}{where} {', '.join(shown)}; --help lists the flags")


def _hint(flag: str, known_flags: Sequence[str]) -> str:
    """Suggests what an unknown flag probably means; an empty string if nothing is close."""
    if not flag.startswith("-"):
        return "a value without a flag; quote values that contain spaces"
    found = FOREIGN_FLAGS.get(flag.lstrip("-").replace("-", "_").lower(), ())
    for advice in (found,) if isinstance(found, str) else found:
        target = advice.split(" ")[0].rstrip(",:") if advice.startswith("--") else ""
        if not target or target in known_flags:
            return f"use {advice}" if target else advice
    similar = nearest(flag, known_flags, CLOSE)
    return f"did you mean {similar}?" if similar else ""


def parse_truth(word: str) -> bool:
    """Parses a switch's value: yes, true, t, y or 1, or no, false, f, n or 0."""
    for value, words in ((True, ("yes", "true", "t", "y", "1")), (False, ("no", "false", "f", "n", "0"))):
        if word.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"must be true or false, got {word}")


def parse(options: type, argv: Sequence[str] | None, description: str) -> typing.Any:
    """Parses `argv` (None: the process's arguments) into an instance of `options`, a dataclass of option groups.

    Raises:
        UserError: for an unknown or abbreviated flag, or a value that its group refuses.
    """
    groups = typing.get_type_hints(options)
    parser = _Parser(groups, description)
    known_flags = [flag for action in parser._actions for flag in action.option_strings]

    # Words to values: unknown flags are refused all at once.
    words = [_underscored(word, known_flags) for word in (sys.argv[1:] if argv is None else argv)]
    _refuse_unknown([flag for flag in map(_flag_of, words) if flag and flag not in known_flags], known_flags)
    _take_configs(parser, words, known_flags)
    found, unknown = parser.parse_known_args(words)
    _refuse_unknown(unknown, known_flags)
    refuse_missing_docstrings()

    # Secrets and output paths, before any group sees them.
    for name in SECRET_OPTIONS:
        if secret := getattr(found, name, None):
            hide(secret)
    for name in WRITTEN_PATHS:
        _require_unicode(name, getattr(found, name, None))
        _require_place(name, getattr(found, name, None), getattr(found, "output_dir", None))

    # Groups, which validate their own values.
    values = {
        name: group(**{field.name: expanded(field, getattr(found, field.name)) for field in dataclasses.fields(group)})
        for name, group in groups.items()
    }
    for group in values.values():
        for field in dataclasses.fields(group):
            if getattr(group, field.name) == "" and not field.name.endswith("prompt"):
                raise UserError(f"--{field.name} must not be empty; leave it out or give a value")
    _warn_of_idle(values.values())
    return options(**values)


def _take_configs(parser: _Parser, words: Sequence[str], known_flags: Sequence[str]) -> None:
    """Makes the values in the files of `--config` the parser's defaults."""
    if not any(_flag_of(word) in CONFIG_FLAGS for word in words):
        return
    files, _ = parser.parse_known_args([word for word in words if _flag_of(word) not in ("-h", "--help")])
    if files.config is None:
        return
    from utils.config.config_file import Actions, read_config  # it imports from here

    actions = Actions(parser._actions)
    for file in files.config:
        values, unknown = read_config(file, actions)
        _refuse_unknown([f"--{name.removeprefix('--')}" for name in unknown], known_flags, f" in --config {file}:")
        parser.set_defaults(**values)


def rules_of(field: dataclasses.Field) -> FlagRules:
    """Returns the rules that `option` declared for a flag."""
    return field.metadata["rules"]


def flags_of(options: typing.Any) -> Iterator[tuple[dataclasses.Field, typing.Any]]:
    """Yields each flag of a script's options (a dataclass of option groups) with its value."""
    for each in dataclasses.fields(options):
        group = getattr(options, each.name)
        for field in dataclasses.fields(group):
            yield field, getattr(group, field.name)


def _warn_of_idle(groups: Iterable[typing.Any]) -> None:
    """Logs one warning that lists the flags which have no effect because another flag is missing."""
    fields = [(group, field) for group in groups for field in dataclasses.fields(group)]
    values = {field.name: getattr(group, field.name) for group, field in fields}
    rules, defaults = ({field.name: of(field) for _, field in fields} for of in (rules_of, lambda field: field.default))
    idle = list(idle_flags(rules, values, defaults))
    if idle:
        logger.warning("%s no effect: %s", "this flag has" if len(idle) == 1 else "these flags have", ", ".join(idle))


def refuse_missing_docstrings() -> None:
    """Raises `UserError` under python -OO, where transformers and diffusers can't be imported."""
    if sys.flags.optimize > 1:
        raise UserError("python -OO drops docstrings, which transformers reads; start with python or python -O")


def expanded(field: dataclasses.Field, value: typing.Any) -> typing.Any:
    """Returns an option's value with a leading `~` or `~user` expanded; texts and other types unchanged.

    Applies to every option not marked as text, so that no path option can miss it. Hub names never start with `~`.
    A folder whose name really is `~` can be written as `./~`.

    Raises:
        UserError: if the user does not exist.
    """
    if field.metadata.get("is_text"):
        return value
    if isinstance(value, list):
        return [expanded(field, each) for each in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    user = value.partition("/")[0]
    cure = f"there is no user {user[1:]}" if user != "~" else "the home folder is unknown"
    require(path != value, field.name, value, "be a path that exists", f"{cure}; write ./{value} for a name with a ~")
    return path


def _require_unicode(name: str, path: str | None) -> None:
    """Refuses an output path that is not UTF-8, which the libraries that write models do not accept."""
    try:
        (path or "").encode()
    except UnicodeEncodeError as error:
        cure = "choose another name, or rename the folder"
        raise UserError(f"--{name} must be UTF-8, got {one_line(path)}; {cure}") from error


def _require_place(name: str, path: str | None, output_dir: str | None) -> None:
    """Refuses an output path that is blank or too long, or that is or lies below something other than a folder."""
    if path is None:
        return
    require(bool(path.strip()), name, repr(path), "be a path", "a shell variable may be unset")
    longest = max(len(os.fsencode(part)) for part in path.split(os.sep))
    require(
        longest <= MOST_NAME, name, one_line(path), f"have names of at most {MOST_NAME} bytes", f"one has {longest}"
    )
    base = output_dir or "" if name == "logging_dir" else ""
    whole = os.path.join(os.path.expanduser(base), os.path.expanduser(path))
    place = os.path.dirname(whole) if name in WRITTEN_FILES else whole
    while place and not os.path.lexists(place):
        place = os.path.dirname(place)
    if place and not os.path.isdir(place):
        kind = "a file" if os.path.isfile(place) else "not a folder"
        where = "it" if place == whole else one_line(place)
        raise UserError(f"--{name} {one_line(path)} can't be written: {where} is {kind}; choose another place")


def as_number(value: object) -> object:
    """Converts a string such as 1e-4, which YAML does not read as a number; returns anything else unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def with_values(group: typing.Any, values: Mapping[str, typing.Any], where: str) -> typing.Any:
    """Returns a copy of a group with values from a mapping, such as a file's; ignores names that are not in the group.

    Raises:
        UserError: naming `where`, for a value of the wrong type or not among the choices.
    """
    hints, changes = typing.get_type_hints(type(group)), {}
    for field in dataclasses.fields(group):
        if field.name not in values:
            continue
        # Type: a whole number may stand for a float.
        value, known = values[field.name], typing.get_args(hints[field.name]) or (hints[field.name],)
        if float in known and type(as_number(value)) in (int, float):
            value = float(as_number(value))
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in known)
        if type(value) not in known:
            is_text = str in known and isinstance(value, int | float)
            cure = f'; put text in quotes: {field.name}: "{value!s:.40}"' if is_text else ""
            raise UserError(f"{where}: {field.name} must be {names}, got {value!r:.100}{cure}")
        # Choices, and ~ in paths.
        choices = field.metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise UserError(f"{where}: {field.name} must be one of {', '.join(choices)}, got {value!s:.100}")
        try:
            changes[field.name] = expanded(field, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        return dataclasses.replace(group, **changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def as_record(options: typing.Any) -> dict[str, typing.Any]:
    """Returns all options of a script as one flat dict for JSON, without secrets, to record the run."""
    record: dict[str, typing.Any] = {}
    for group in dataclasses.fields(options):
        record |= dataclasses.asdict(getattr(options, group.name))
    return {name: value for name, value in record.items() if name not in SECRET_OPTIONS}


def changed_options(options: typing.Any) -> dict[str, dict[str, typing.Any]]:
    """Returns options that differ from their defaults, as {"value": ..., "default": ...} by name, without secrets."""
    return {
        field.name: {"value": value, "default": field.default}
        for field, value in flags_of(options)
        if value != field.default and field.name not in SECRET_OPTIONS
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """Returns a command line without secret flags and their values; *** could be mistaken for a token."""
    shown, hide_next = [], False
    for word in words:
        flag, assigned, _ = word.partition("=")
        is_secret = flag.removeprefix("--").replace("-", "_") in SECRET_OPTIONS
        if not (hide_next or is_secret):
            shown.append(word)
        hide_next = is_secret and not assigned
    return shown


def run_script(
    run: Callable[[Sequence[str] | None], None],
    argv: Sequence[str] | None = None,
    names: Mapping[str, str] = types.MappingProxyType({}),
) -> int:
    """Runs a script's body and returns its exit status; a user error becomes one line on stderr and status 2.

    A stopped run prints one line and returns the status of what stopped it.

    Args:
        names: this script's names for flags that its modules know by other names.
    """
    with lasting_streams():
        return _run(run, argv, names)


def _run(run: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, names: Mapping[str, str]) -> int:
    try:
        with flags_as(names):
            run(argv)
    # Ends that all processes reach together.
    except Stopped as stopped:
        _print_once(str(stopped), is_agreed=True)
        return stopped.status
    except Diverged as diverged:
        _print_once(f"error: {one_line(diverged)}", is_agreed=True)
        return 1
    # Errors, which one process alone may have met.
    except UserError as error:
        line = f"error: {one_line(' '.join(str(error).split()))}"
        if isinstance(error, ProcessError):
            print_line(line, sys.stderr)
        else:
            _print_once(line)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" {error.filename}" if error.filename else ""
        print_line(f"error: disk error{where}: {error.strerror}; earlier checkpoints are unchanged", sys.stderr)
        return 2
    return 0


def _print_once(line: str, is_agreed: bool = False) -> None:
    """Prints a line that every process is about to print, but on the main process only.

    A launcher ends all processes as soon as one exits with an error, so the others wait for the main process. A process
    still alive after `MAIN_SECONDS` is the only one with this error, or has no launcher: it prints the line itself.

    Args:
        is_agreed: whether all processes decided together to end, so that the main process prints this line too.
    """
    rank = next((os.environ[name] for name in RANK_NAMES if os.environ.get(name, "").isdecimal()), "0")
    if rank == "0":
        print_line(line, sys.stderr)
    elif is_agreed:
        time.sleep(AGREED_SECONDS)
    else:
        time.sleep(MAIN_SECONDS)
        print_line(f"process {rank}: {line}", sys.stderr)


def end_at_once_on_errors() -> None:
    """Ends this process at once on an unexpected error, so that the launcher ends the others.

    If the error only says that another process is gone, it points to that process's error instead.
    """
    show = sys.excepthook

    def end(kind: type, error: BaseException, trace: types.TracebackType | None) -> None:
        if any(words in str(error) for words in PEER_IS_GONE):
            print_line("this process ends because another one did; see the error of that process", sys.stderr)
        else:
            show(kind, error, trace)
        leave(1)

    sys.excepthook = end


def leave(status: int) -> NoReturn:
    """Exits the process; under a launcher without Python's own shutdown.

    Python's shutdown would destroy a process group that is still referenced while holding the interpreter's lock, for
    which the group's threads wait: this caused aborts and hangs after all work was done.
    """
    flush_streams()
    if "RANK" in os.environ:
        os._exit(status)
    sys.exit(status)
