"""Reads untrusted text: bounded in size, nesting and time, in any encoding. Everything else reads text through it.

Only regular files are opened, and read up to a limit. Text that is not UTF-8 is decoded by its byte order mark, or by
a guess that is marked as one. Each error is one line: the file, the position in it, and the reason.
"""

import codecs
import contextlib
import errno
import json
import logging
import os
import re
import reprlib
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from typing import Any, BinaryIO, NamedTuple

from utils.config.options import UserError, first_line, require

logger = logging.getLogger(__name__)
TEXT_LIMIT = 1 << 30  # bytes of a file that lists images or prompts
CONFIG_LIMIT = 16 << 20  # bytes of a config
MAX_DEPTH = 100  # of nested lists and mappings
MAX_DIGITS = 300  # of an integer: longer ones overflow a float
SHOWN_LENGTH = 100

MARKS = (  # UTF-32 first: its little-endian mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
EAST_ASIAN = ("gb18030", "cp932", "big5hkscs", "cp949", "euc_jis_2004")
LATIN = ("cp1252", "cp1250", "cp1254", "cp1257")
OTHER_ALPHABETS = ("cp1251", "cp1253", "cp1255", "cp1256", "cp874", "koi8-r", "cp866")
WESTERN = re.compile(r"[^\W\d_ðþýÐÞÝªº]")  # letters of cp1252 that occur in Western European words
SYMBOL_IN_WORD = re.compile(r"[^\W\d_][\u0080-\u00bf\u00d7\u00f7†‡‰ƒˆ˜™€](?<!·)[^\W\d_]")
SMALL_SETS = (*LATIN, *OTHER_ALPHABETS)
FEW_BYTES = 16  # non-ASCII bytes; a text with no more does not reveal its encoding
SAMPLE_LENGTH = 100_000
CERTAIN_ENOUGH = 0.1  # chardet's confidence above which another Latin encoding is preferred to the Western European
NO_TEXT_CODECS = {"idna", "mbcs", "oem", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7"}
HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x08\x0e-\x19\x1b-\x1f\x7f-\x84\x86-\x9f]")

NOT_SHOWN = re.compile(  # zero-width characters, except the joiners and tags that form other letters and emoji
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufeff\ufff9-\ufffb]"
)


class FileError(UserError, ValueError):
    """A file that can't be read as what it should be. The message is "path: reason"."""

    def __init__(self, path: object, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class Decoded(NamedTuple):
    """Decoded text and its encoding.

    Attributes:
        is_guess: whether the encoding was guessed: neither the user nor the bytes determine it.
    """

    text: str
    encoding: str = "utf-8"
    is_guess: bool = False


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading; never blocks on a pipe or device.

    Raises:
        FileError: if it is not a regular file.
        OSError: as `open`.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        require_regular(path)  # checked before opening: opening a device can have side effects
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(path, "is a link that points to itself") from error
        raise
    except FileError:
        raise
    except ValueError as error:  # not a valid file name
        raise FileError(short(os.fspath(path)), f"is not a valid file name: {first_line(error)}") from error
    try:
        require_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_to_append(path: str | os.PathLike) -> FileIO:
    """Opens a regular or new file for unbuffered appending; never blocks on a pipe.

    Raises:
        FileError: if it is not a regular file.
        OSError: as `open`.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    if os.path.exists(path):
        require_regular(path)
    descriptor = os.open(path, flags, 0o666)
    try:
        require_regular(path, os.fstat(descriptor))
        return FileIO(descriptor, "ab")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | os.PathLike, facts: os.stat_result | None = None) -> None:
    """Refuses anything but a regular file or a link to one.

    Args:
        facts: the path's stat result, if known.

    Raises:
        FileError: saying what it is.
        OSError: if the path does not exist.
    """
    kind = kind_of((os.stat(path) if facts is None else facts).st_mode)
    if kind != "file":
        raise FileError(path, f"is a {kind}, not a file")


def kind_of(mode: int) -> str:
    """Returns what a stat mode describes: file, folder, pipe, socket or device."""
    kinds = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((name for name, holds in kinds.items() if holds(mode)), "device")


def require_folder(path: str, flag: str, or_file: bool = False) -> None:
    """Refuses a path that is not a folder.

    Args:
        or_file: whether to accept a regular file too.

    Raises:
        UserError: naming the flag and saying what the path is.
    """
    if not (os.path.isdir(path) or (or_file and os.path.isfile(path))):
        require(False, flag, path, "be a folder that exists", what_is_at(path))


def require_file(path: str, flag: str, must: str = "be a file that exists") -> None:
    """Refuses a path that is not a regular file.

    Raises:
        UserError: naming the flag and saying what the path is.
    """
    if not os.path.isfile(path):
        require(False, flag, path, must, what_is_at(path))


def what_is_at(path: str | os.PathLike) -> str:
    """Describes a path that is not what it should be: "it does not exist", "it is a pipe"."""
    try:
        return f"it is a {kind_of(os.stat(path).st_mode)}"
    except FileNotFoundError:
        return "it is a link to a missing file" if os.path.islink(path) else "it does not exist"
    except OSError as error:
        return "it is a link that points to itself" if error.errno == errno.ELOOP else f"{error.strerror or error}"
    except ValueError as error:
        return f"it is not a valid file name: {first_line(error)}"


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """Returns a file's bytes.

    Raises:
        FileError: if it has more than `limit` bytes, which is checked before reading; as `open_regular`.
        OSError: as `open`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise FileError(path, f"has {size_text(max(size, len(content)))}; at most {size_text(limit)} are read")
    return content


def size_text(size: int) -> str:
    """Formats a number of bytes, such as 5.0 GB."""
    for unit, divisor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= divisor:
            return f"{size / divisor:.3g} {unit}"
    return f"{size} bytes"


def check_encoding(name: str, flag: str) -> None:
    """Refuses a name that is not a text encoding.

    Raises:
        UserError: naming the flag.
    """
    try:
        known = codecs.lookup(name)
    except (LookupError, ValueError):
        known = None
    if known is None or known.name.replace("_", "-") in NO_TEXT_CODECS or not getattr(known, "_is_text_encoding", True):
        raise UserError(f"--{flag} must be an encoding, such as utf-8, gb18030, cp932 or cp1252, got {short(name)}")


def decode(content: bytes, encoding: str | None = None) -> Decoded:
    """Decodes bytes, without their byte order mark.

    Args:
        encoding: the encoding that the user gives; a byte order mark overrides it. None: UTF-8, or detected.

    Raises:
        ValueError: if the bytes are not text.
    """
    found = _decode(content, encoding)
    if not _is_binary(found.text):
        return found
    wide = None if encoding is not None else _wide(content, 1 if b"\x00" in content else 2)
    if wide is None:
        raise ValueError("is not text: it contains control characters")
    return wide


def _is_binary(text: str) -> bool:
    """Whether a text contains zero bytes, or more control characters than can be accidental."""
    return "\x00" in text or len(CONTROL.findall(text)) > max(1, len(text) // 20)


def _decode(content: bytes, encoding: str | None) -> Decoded:
    for mark, name in MARKS:
        if content.startswith(mark) and not (name == "utf-16" and len(content) % 2):
            return Decoded(_strictly(content, name).removeprefix("\ufeff"), name)
    if encoding is not None:
        return Decoded(_strictly(content, encoding).removeprefix("\ufeff"), codecs.lookup(encoding).name)
    if b"\x1b$" in content:
        return Decoded(_strictly(content, "iso2022_jp_2"), "iso2022_jp_2", True)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        found = _wide(content, 1) if 0 in content else _guess(content)
        if found is None:
            raise ValueError("is not text: it contains zero bytes") from None
        return found
    found = None if content.startswith(codecs.BOM_UTF8) else _east_asian_after_all(content, text)
    return found or Decoded(text)


def _strictly(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not {encoding}: byte {error.start} can't be decoded") from error


def _wide(content: bytes, least: int) -> Decoded | None:
    """Decodes UTF-16 or UTF-32 without a mark, if the result has at least `least` letters, all common; else None."""
    east_asian = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}
    if 0 not in content:  # byte pairs of GBK look like Korean
        east_asian.remove("HANGUL")
    zeros_first = content[::2].count(0) > content[1::2].count(0)  # true of Latin letters, spaces and line ends
    big, little = ("utf-32-be", "utf-16-be"), ("utf-32-le", "utf-16-le")
    found: list[tuple[int, str, str]] = []
    for name in (*big, *little) if zeros_first else (*little, *big):
        try:
            text = content.decode(name).removeprefix("\ufeff")
        except UnicodeDecodeError:
            continue
        letters = set(text)
        scripts = {_script(letter) for letter in letters} - {"", "LATIN"}
        is_one_language = scripts <= east_asian or (len(scripts) == 1 and "HANGUL" not in scripts)
        if len(text) >= least and is_one_language and all(map(_is_usual, letters)):
            found.append((len(scripts), text, name))
    _, text, name = min(found, key=lambda each: each[0], default=(0, "", ""))
    return Decoded(text, name, True) if name else None


def _is_usual(letter: str) -> bool:
    """Whether a letter is in one of the small legacy character sets, which lack rare letters."""
    if letter.isascii():
        return letter.isprintable() or letter in "\t\n\v\f\r"
    for name, last in (
        ("gb2312", 0xF7),
        ("big5", 0xC6),
        ("shift_jis", 0x97),
        ("euc_kr", 0xC8),
        *((each, 0xFF) for each in SMALL_SETS),
    ):
        try:
            if letter.encode(name)[0] <= last:
                return True
        except UnicodeEncodeError:
            continue
    return False


def _script(letter: str) -> str:
    """Returns a letter's script, such as LATIN; "" for characters that scripts share."""
    if letter.isascii() or not (letter.isalpha() or unicodedata.category(letter) == "Mn"):
        return "LATIN" if letter.isascii() and letter.isalpha() else ""
    script = unicodedata.name(letter, "").partition(" ")[0]
    return "" if script in ("COMBINING", "MODIFIER", "FEMININE", "MASCULINE", "MICRO") else script


def _guess(content: bytes) -> Decoded:
    """Decodes bytes that are not UTF-8, guessing their encoding.

    Raises:
        ValueError: if they are damaged UTF-8, or fit none of the usual encodings.
    """
    # Mostly valid UTF-8 is damaged UTF-8 rather than another encoding.
    others = re.sub(rb"[\x00-\x7f]+", b"", content)
    whole = others.decode("utf-8", "ignore")
    is_long = len(others) >= FEW_BYTES or any(letter > "\u07ff" for letter in whole)  # short pairs may be chance
    if is_long and len(whole.encode()) > 0.8 * len(others):
        raise ValueError(f"is damaged UTF-8 in line {_damaged_line(content)}; repair it, or give --text_encoding")

    # chardet's guess, unless UTF-16 or Western European fits better.
    name, confidence = _likely_encoding(content, EAST_ASIAN + LATIN + OTHER_ALPHABETS)
    if name not in EAST_ASIAN or not all(map(_is_usual, set(content.decode(name, "replace")))):
        wide = _wide(content, 4)
        if wide is not None:
            return wide
    if name not in EAST_ASIAN and _is_western(content, name, confidence):
        name = "cp1252"
    try:
        return Decoded(content.decode(name), name, True)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError("is in an unknown encoding; give --text_encoding") from error


def _damaged_line(content: bytes) -> int:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _is_western(content: bytes, name: str, confidence: float) -> bool:
    """Whether short bytes are Western European although chardet disagrees: it takes "à la carte" for Cyrillic."""
    text = content.decode("cp1252", "replace")
    letters = [letter for letter in text if letter.isalpha() and not letter.isascii()]
    if "\ufffd" in text or SYMBOL_IN_WORD.search(text) or not all(map(WESTERN.match, letters)):
        return False
    if name in OTHER_ALPHABETS:
        return not _is_alphabet(content.decode(name, "replace"))
    return confidence < CERTAIN_ENOUGH


def _likely_encoding(content: bytes, among: tuple[str, ...]) -> tuple[str, float]:
    """Returns (the most likely encoding of the bytes, the confidence from 0 to 1)."""
    try:
        import chardet
    except ImportError as error:
        raise ValueError("is not UTF-8; give its encoding with --text_encoding, or install chardet") from error
    found = chardet.detect(
        content, include_encodings=among, no_match_encoding="cp1252", compat_names=False, prefer_superset=True
    )
    return found["encoding"] or "", found["confidence"]


def _is_alphabet(text: str) -> bool:
    """Whether each word uses a single alphabet, and some word of two or more letters a non-Latin one."""
    words = [{_script(letter) for letter in word} - {""} for word in re.findall(r"[^\W\d_]{2,}", text)]
    return all(len(scripts) <= 1 for scripts in words) and any(scripts - {"LATIN"} for scripts in words)


def _east_asian_after_all(content: bytes, text: str) -> Decoded | None:
    """Decodes East Asian text whose bytes happen to be UTF-8 of letters that never occur together; else None."""
    others = re.findall(r"[^\x00-\x7f]+", text) if len(content) < 1000 and not content.isascii() else []
    if not others or max(max(part) for part in others) > "\u07ff":
        return None
    if all(len({_script(letter) for letter in part} - {""}) <= 1 for part in others):
        return None
    name, _ = _likely_encoding(content, EAST_ASIAN)
    try:
        found = content.decode(name)
    except UnicodeDecodeError:
        return None
    return Decoded(found, name, True) if name in EAST_ASIAN else None


def decode_together(contents: Sequence[bytes], encoding: str | None = None) -> list[Decoded | ValueError]:
    """Decodes the texts of one folder or archive; those too short to detect get the encoding of most others.

    Returns:
        For each one its text, or the error that explains why it can't be decoded.
    """
    found: list[Decoded | ValueError] = [_decoded_or_why(content, encoding) for content in contents]
    if encoding is not None:
        return found

    # The encoding that most of the others are in.
    names = Counter(each.encoding for each in found if isinstance(each, Decoded) and each.is_guess)
    unsure = [number for number, content in enumerate(contents) if _is_unsure(content, found[number])]
    (most, _), *_ = names.most_common(1) or [("", 0)]
    if not most or not unsure:
        return found
    # The short ones joined may be long enough for a guess of their own.
    sample = b"\n".join(contents[number] for number in unsure)[:SAMPLE_LENGTH]
    with contextlib.suppress(ValueError):
        most = _guess(sample).encoding if names.total() == len(unsure) else most

    # Decode the short ones with it.
    num_plain = sum(isinstance(found[number], Decoded) and not found[number].is_guess for number in unsure)
    for number in unsure:
        is_plain = isinstance(found[number], Decoded) and not found[number].is_guess
        if is_plain and (most not in EAST_ASIAN or 2 * num_plain > names.total()):
            continue  # it is valid UTF-8, which is as likely
        with contextlib.suppress(UnicodeDecodeError):
            text = contents[number].decode(most)
            if not _is_binary(text):
                found[number] = Decoded(text, most, True)
    return found


def _decoded_or_why(content: bytes, encoding: str | None) -> Decoded | ValueError:
    try:
        return decode(content, encoding)
    except ValueError as error:
        return error


def _is_unsure(content: bytes, found: Decoded | ValueError) -> bool:
    """Whether a text has so few non-ASCII letters that it could be in another encoding."""
    num_others = len(re.sub(rb"[\x00-\x7f]", b"", content))
    if not 0 < num_others <= FEW_BYTES or 0 in content or content.startswith(codecs.BOM_UTF8):
        return False
    if isinstance(found, ValueError) or found.is_guess:
        return True
    return found.encoding == "utf-8" and max(found.text) <= "\u07ff"


class TextReader:
    """Reads the texts of one source and counts those that are not UTF-8.

    Attributes:
        encoding: the encoding that the user gives; None: UTF-8, or detected from the bytes.
    """

    def __init__(self, encoding: str | None = None):
        self.encoding = encoding
        self._counts: Counter[tuple[str, bool]] = Counter()
        self._samples: dict[tuple[str, bool], str] = {}

    def read(self, path: str | os.PathLike, limit: int = TEXT_LIMIT) -> str:
        """Returns a file's text.

        Raises:
            FileError, OSError: as `read_text`.
        """
        found = read_text(path, limit, self.encoding)
        self._note(os.path.basename(path), found)
        return found.text

    def decode_together(self, contents: Mapping[str, bytes]) -> dict[str, str | FileError]:
        """Decodes the contents of files by name; a file that can't be decoded gets the error instead."""
        found: dict[str, str | FileError] = {}
        decoded = decode_together(list(contents.values()), self.encoding)
        for name, each in zip(contents, decoded, strict=True):
            if isinstance(each, Decoded):
                self._note(name, each)
                found[name] = each.text
            else:
                found[name] = FileError(name, first_line(each))
        return found

    def _note(self, name: str, found: Decoded) -> None:
        key = (found.encoding, found.is_guess)
        if found.encoding == "utf-8" or (self.encoding is not None and not found.encoding.startswith("utf-")):
            return
        self._counts[key] += 1
        if key not in self._samples:
            line = next((line for line in found.text.splitlines() if not line.isascii()), found.text)
            self._samples[key] = f"{name}: {short(line.strip())}"

    @property
    def counts(self) -> dict[str, int]:
        """Number of texts by encoding, leaving out UTF-8 and the encoding that the user gave."""
        return {f"{name} (guessed)" if is_guess else name: count for (name, is_guess), count in self._counts.items()}

    @property
    def has_guessed(self) -> bool:
        """Whether any encoding was guessed."""
        return any(is_guess for _, is_guess in self._counts)

    def findings(self) -> list[str]:
        """Returns one line per counted encoding, with its first text as an example."""
        return [
            f"{count} {'text is' if count == 1 else 'texts are'} not UTF-8 and read as {name}"
            f"{' (a guess; give --text_encoding if it is wrong)' if is_guess else ''}: {self._samples[name, is_guess]}"
            for (name, is_guess), count in self._counts.items()
        ]


class CertainTexts(TextReader):
    """Reads streamed texts, which are too few at a time to guess an encoding: refuses those that need a guess."""

    def decode_together(self, contents: Mapping[str, bytes]) -> dict[str, str | FileError]:
        """Decodes each text by itself."""
        found: dict[str, str | FileError] = {}
        for name, content in contents.items():
            alone = TextReader(self.encoding)
            text = alone.decode_together({name: content})[name]
            reason = "is not UTF-8, and encodings of streamed texts are not guessed; give --text_encoding"
            found[name] = FileError(name, reason) if alone.has_guessed else text
        return found


def read_text(path: str | os.PathLike, limit: int = TEXT_LIMIT, encoding: str | None = None) -> Decoded:
    """Reads and decodes a text file.

    Raises:
        FileError: if it is too long or not text; as `open_regular`.
        OSError: as `open`.
    """
    try:
        return decode(read_bytes(path, limit), encoding)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(path, first_line(error)) from error


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or has only white space and invisible characters."""
    return not text.strip() or not NOT_SHOWN.sub("", text).strip()


def plain_spelling(name: str) -> str:
    """Returns a name in lower case without spaces, underscores and hyphens, to compare spellings."""
    return re.sub(r"[\s_-]", "", name).casefold()


def lines_of(text: str) -> list[str]:
    """Splits a text at line feeds and carriage returns only; U+2028 and the like may occur within a line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def parse_json(text: str, where: object) -> Any:
    """Parses JSON.

    Raises:
        FileError: naming `where` and the line, if the text is not JSON, repeats a key with different values, is nested
            too deeply or contains an overlong integer.
    """
    try:
        value = DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
        if HALF_ESCAPE.search(text):  # lone surrogates, which JSON can contain but no file can store
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError as error:
        raise FileError(where, f"is nested more than {MAX_DEPTH} deep") from error
    except json.JSONDecodeError as error:
        raise FileError(
            where, f"can't be read as JSON: {error.msg}: line {error.lineno}, column {error.colno}"
        ) from error
    except ValueError as error:
        raise FileError(where, first_line(error)) from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    for name, value in pairs:
        if value is not found[name] and (type(value) is not type(found[name]) or value != found[name]):
            raise ValueError(f"has the key {short(name)} twice, with different values; keep one")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"has a number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _check_depth(value: object) -> None:
    """Refuses lists and mappings nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [each for each in level if isinstance(each, dict | list)]
        if not nested:
            return
        level = [each for outer in nested for each in (outer.values() if isinstance(outer, Mapping) else outer)]
    raise ValueError(f"is nested more than {MAX_DEPTH} deep")


def read_json(path: str | os.PathLike, limit: int = CONFIG_LIMIT, encoding: str | None = None) -> Any:
    """Reads a JSON file.

    Raises:
        FileError: as `read_text` and `parse_json`.
        OSError: as `open`.
    """
    return parse_json(read_text(path, limit, encoding).text, path)


def json_lines(
    path: str | os.PathLike, limit: int = TEXT_LIMIT, encoding: str | None = None
) -> Iterator[tuple[int, Any, str]]:
    """Yields (line number, value, error or "") for each line of a JSON Lines file that is not blank.

    Raises:
        FileError, OSError: as `read_text`.
    """
    yield from parse_json_lines(read_text(path, limit, encoding).text)


def parse_json_lines(text: str) -> Iterator[tuple[int, Any, str]]:
    """Same as `json_lines`, from a text."""
    is_begin = True
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            if is_begin and line.lstrip()[0] == "[" and text.rstrip()[-1] == "]" and not _is_json(line):
                yield (
                    number,
                    None,
                    "starts a JSON array; write each of its values on its own line, without brackets",
                )
                return
            is_begin = False
            try:
                yield number, parse_json(line, f"line {number}"), ""
            except FileError as error:
                cure = "; write each value on its own line" if "Extra data" in error.reason else ""
                yield number, None, error.reason.replace(": line 1, column", ": column") + cure


def _is_json(text: str) -> bool:
    try:
        parse_json(text, "")
    except FileError:
        return False
    return True


class _Short(reprlib.Repr):
    """A `repr` of bounded cost, whatever the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 2, 70, 70, 40
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 3

    def repr_int(self, value: int, level: int) -> str:
        return super().repr_int(value, level) if value.bit_length() < 4000 else "<a number of over 1000 digits>"

    def repr_dict(self, value: dict, level: int) -> str:
        some = dict(list(zip(value, value.values(), strict=True))[: self.maxdict + 1]) if len(value) > 1000 else value
        return super().repr_dict(some, level)

    def repr_bytes(self, value: bytes, level: int) -> str:
        return super().repr_str(value[: self.maxstring].decode("latin-1"), level)


def short(value: object) -> str:
    """Returns a value for an error message: one line of at most 100 characters, cut if it is longer."""
    shown = _Short().repr(value)
    return shown if len(shown) <= SHOWN_LENGTH else f"{shown[: SHOWN_LENGTH - 3]}..."
