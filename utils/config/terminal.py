"""Terminal output: visible text, log lines above progress bars, and progress bars that also work in a log file.

File names, captions, prompts and titles are untrusted. Printed as they are, they could move the cursor, hide text
or forge log lines. All printing, logging and progress bars of the toolkit go through this module.
"""

import contextlib
import copy
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

# control codes, line separators, bidirectional and zero-width characters, lone surrogates, tags;
# U+200C and U+200D are kept: Persian, Indic scripts and emoji need them
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
MARKUP = re.compile(r"[\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is not markup
BEGINNING = re.compile(r"(?=[#+=-])|\d+(?=[.)])")  # text before a mark that would start a heading or a list
LONGEST = 2000  # characters of one value in a message
GONE = (OSError, ValueError)  # raised when writing to a stream that is closed or has lost its reader
BAR_SECONDS = 0.5, 30.0  # seconds between updates of a progress bar: on a terminal, in a file


class Lines(str):
    """Multi-line text composed by the toolkit itself: a log message keeps its line breaks."""

    __slots__ = ()


def visible(text: str) -> str:
    """Returns the text with control and invisible characters escaped; line breaks and tabs are kept."""
    return HIDDEN.sub(_escape, text)


def json_text(value: object, indent: int | None = None, other: Callable[[Any], Any] | None = None) -> str:
    """Returns JSON that keeps readable characters; control and invisible characters are escaped.

    Args:
        other: converts values that JSON does not support.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=other)
    return HIDDEN.sub(lambda found: json.dumps(found.group())[1:-1], text)


def one_line(value: object, longest: int = LONGEST) -> str:
    """Returns an untrusted name or text for a message: one line, control codes escaped, shortened in the middle."""
    text = str(value)
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}... ({len(text):,} characters) ...{text[-half:]}"
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(found: re.Match) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def markdown_cell(text: object) -> str:
    """Returns untrusted text for a Markdown table cell, shown literally: no markup, HTML or line breaks."""
    return MARKUP.sub(r"\\\g<0>", one_line(" ".join(str(text).split())))


def markdown(text: object) -> str:
    """Same as `markdown_cell`, for text that may start a line and must not become a heading or a list."""
    shown = markdown_cell(text)
    found = BEGINNING.match(shown)
    return shown if found is None else f"{found.group()}\\{shown[found.end() :]}"


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Prints text on stdout or the given stream; does nothing if the stream has lost its reader.

    Characters that the stream's encoding cannot represent are escaped.
    """
    stream = stream or sys.stdout
    if stream is None:  # a process without standard streams
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    known = visible(text).encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(*GONE):
        stream.write(known + "\n")
        stream.flush()


class LogFormatter(logging.Formatter):
    """Formats each record's arguments on one line; only `Lines` may span several."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record's text, without control codes."""
        shown = copy.copy(record)
        if not record.name.startswith("utils"):  # another library: keep one line of bounded length
            shown.msg, shown.args = one_line(record.getMessage()), ()
        elif isinstance(shown.args, tuple):
            shown.args = tuple(map(_shown_argument, shown.args))
        elif isinstance(shown.args, dict):
            shown.args = {name: _shown_argument(value) for name, value in shown.args.items()}
        return visible(super().format(shown))


def _shown_argument(value: object) -> object:
    is_foreign = isinstance(value, str | os.PathLike | BaseException) and not isinstance(value, Lines)
    return one_line(value) if is_foreign else value


class LogHandler(logging.Handler):
    """Writes log lines to stderr, above any open progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        text = self.format(record)
        with _bars_cleared():
            print_line(text, sys.stderr)


def set_up_logging() -> None:
    """Sends log messages to stderr. Processes other than the main one report errors only."""
    is_main = os.environ.get("RANK", "0") == "0"
    if not any(isinstance(each, LogHandler) for each in logging.getLogger().handlers):
        handler = LogHandler()
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("utils").setLevel(logging.INFO if is_main else logging.ERROR)


@contextlib.contextmanager
def _bars_cleared() -> Iterator[None]:
    """Context manager: clears open progress bars from the terminal's last line, and redraws them afterwards."""
    module = sys.modules.get("tqdm")
    if module is None or not on_terminal():
        yield
        return
    bars = [bar for bar in getattr(module.tqdm, "_instances", ()) if isinstance(getattr(bar, "fp", None), _BarStream)]
    for bar in bars:
        bar.clear(nolock=True)
    yield
    for bar in bars:
        bar.refresh(nolock=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal, where lines can be redrawn."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, and not one that it launched."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") and "RANK" not in os.environ


class _BarStream:
    """stderr for a progress bar: updates in place on a terminal, one line per update in a file or pipe.

    If writing fails (reader gone, disk full), the bar is dropped and the work continues.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        self._is_terminal = on_terminal()
        self._is_gone = False

    def write(self, text: str) -> int:
        """Writes one update."""
        shown = text if self._is_terminal else text.strip("\r\n ")
        if shown and not self._is_gone:
            try:
                sys.stderr.write(shown if self._is_terminal else shown + "\n")
            except GONE:
                self._is_gone = True
        return len(text)

    def flush(self) -> None:
        """Flushes stderr."""
        if not self._is_gone:
            try:
                sys.stderr.flush()
            except GONE:
                self._is_gone = True

    def isatty(self) -> bool:
        """Whether updates are drawn in place."""
        return self._is_terminal

    def fileno(self) -> int:
        """The file descriptor, used to find the terminal's width."""
        return sys.stderr.fileno()


def progress_bar(iterable: Iterable | None = None, *, disable: bool = False, **more: Any) -> "tqdm":
    """Returns a tqdm bar on stderr that does not mix with log lines and stays readable in a log file.

    Args:
        disable: whether to hide the bar, such as on processes other than the main one.
        more: arguments of tqdm.
    """
    if "desc" in more:
        more["desc"] = one_line(more["desc"])
    if in_notebook():
        from tqdm.auto import tqdm as notebook_bar  # a widget where ipywidgets is installed, else text

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing ipywidgets
            return notebook_bar(iterable, disable=disable, **{"mininterval": BAR_SECONDS[0], **more})
    from tqdm import tqdm

    stream = _BarStream()
    defaults = {"mininterval": BAR_SECONDS[0] if stream.isatty() else BAR_SECONDS[1], "dynamic_ncols": stream.isatty()}
    if not stream.isatty():
        defaults |= {"ascii": True, "ncols": 100}
        if not more.get("leave", True):  # without an end, a line of a short bar's begin would say nothing
            defaults["delay"] = BAR_SECONDS[1]
    return tqdm(iterable, file=stream, disable=disable, **defaults | more)
