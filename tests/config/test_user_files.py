"""Text that a user or a stranger wrote ends in a value or in one line, whatever it holds, and in little time."""

import contextlib
import os
import random
import socket
import stat
import time

import pytest

from utils.config import user_files
from utils.config.options import UserError
from utils.config.user_files import (
    FileError,
    check_encoding,
    decode,
    parse_json,
    read_bytes,
    read_json,
    require_file,
    require_folder,
    short,
    what_is_at,
)
from utils.config.yaml_files import parse_yaml
from utils.data.source_options import SourceOptions
from utils.runtime.hub_files import read_config

TEXTS = {
    "gb18030": ["一只猫", "一只猫坐在草地上", "一个女孩,长发,微笑,站在海边"],
    "cp932": ["草の上に座っている猫", "赤いりんごの写真", "女の子"],
    "big5hkscs": ["一隻貓坐在草地上", "長髮的女孩在海邊微笑"],
    "cp949": ["풀밭에 앉아 있는 고양이", "빨간 사과 사진"],
    "euc_jis_2004": ["草の上に座っている猫"],
    "cp1251": ["кот сидит на траве", "Девушка с длинными волосами", "дом"],
    "koi8-r": ["кот сидит на траве"],
    "cp1252": [
        "a café",
        "à la carte",
        "une fille à la plage, l’été",
        "niño",
        "“a dog” – sitting",
        "Müller",
        "½ cup",
        "©2020",
    ],
    "cp1250": ["źdźbło trawy i kot", "pes sedí na trávě"],
    "cp1253": ["μια γάτα στο γρασίδι"],
    "iso2022_jp_2": ["草の上に座っている猫"],
}
UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.fixture(autouse=True)
def _in_time():
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 10  # on a busy machine


class TestOpen:
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_nothing_but_regular_files_is_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("pipe")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "null").symlink_to("/dev/zero")
        (tmp_path / "socket").symlink_to("s")
        (tmp_path / "whole.txt").write_text("a dog")
        (tmp_path / "fine.txt").symlink_to("whole.txt")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "s"))
            reasons = {}
            for name in ("pipe", "link", "loop", "null", "socket", "s", "."):
                with pytest.raises(FileError, match=str(tmp_path)) as raised:
                    read_bytes(tmp_path / name, 10)
                reasons[name] = raised.value.reason
        assert reasons == {
            "pipe": "is a pipe, not a file",
            "link": "is a pipe, not a file",
            "loop": "is a link that points to itself",
            "null": "is a device, not a file",
            "socket": "is a socket, not a file",
            "s": "is a socket, not a file",
            ".": "is a folder, not a file",
        }
        assert read_bytes(tmp_path / "fine.txt", 10) == b"a dog"
        with pytest.raises(FileNotFoundError):
            read_bytes(tmp_path / "nothing", 10)
        with pytest.raises(FileError, match="is not a valid file name"):
            read_bytes("a\0b", 10)

    def test_a_descriptor_is_closed_and_not_inherited(self, tmp_path):
        (tmp_path / "a").write_text("a")
        with user_files.open_regular(tmp_path / "a") as file:
            assert not os.get_inheritable(file.fileno())
            assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)

    def test_a_sparse_file_costs_nothing(self, tmp_path):
        with (tmp_path / "sparse.txt").open("wb") as file:
            file.truncate(5 * 10**9)
        with pytest.raises(FileError, match=r"sparse.txt: has 5 GB; at most 1.07 GB are read"):
            user_files.read_text(tmp_path / "sparse.txt")

    def test_files_without_a_size_are_bounded_too(self):
        with pytest.raises(FileError, match="at most 3 bytes"):
            read_bytes("/proc/self/status", 3)


class TestEncodings:
    @pytest.mark.parametrize("encoding", TEXTS)
    def test_legacy_encodings_are_guessed_and_marked(self, encoding):
        for text in TEXTS[encoding]:
            assert decode(text.encode(encoding)) == (text, encoding, True)

    @pytest.mark.parametrize("encoding", UNICODE)
    def test_unicode_with_and_without_a_mark(self, encoding):
        for text in [*TEXTS["cp932"][:2], *TEXTS["cp1252"], *TEXTS["cp1251"], "a dog\nруки\n", "a, b"]:
            found = decode(text.encode(encoding))
            assert found.text == text
            assert found.is_guess == encoding.endswith(("le", "be"))

    def test_what_the_user_says_is_taken(self):
        assert decode("猫".encode("gb18030"), "gbk") == ("猫", "gbk", False)
        assert decode("猫".encode("utf-16"), "gbk") == ("猫", "utf-16", False)  # its mark is certain
        with pytest.raises(ValueError, match="is not cp932: byte 0"):
            decode(b"\x81", "cp932")

    @pytest.mark.parametrize(
        "content", [b"a\x00b\x00\x00\x01\xd8", bytes(range(256)), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]
    )
    def test_binary_files_are_no_text(self, content):
        with pytest.raises(ValueError, match=r"not text|unknown encoding"):
            decode(content)

    def test_damaged_utf_8_is_not_taken_for_another_encoding(self):
        with pytest.raises(ValueError, match="is damaged UTF-8 in line 1"):
            decode("草の上に座っている猫".encode()[:-1])
        lines = [f"{number}.png,une café très sucré".encode() for number in range(9)]
        lines[6] = lines[6].decode().encode("cp1252")
        with pytest.raises(ValueError, match="is damaged UTF-8 in line 7; repair it, or give --text_encoding"):
            decode(b"\n".join(lines))

    @pytest.mark.parametrize("name", ["klingon", "hex", "idna", "unicode_escape", "a\0b", "x" * 10_000])
    def test_what_is_no_encoding_is_refused(self, name):
        with pytest.raises(UserError, match="--text_encoding must be an encoding"):
            check_encoding(name, "text_encoding")


def bomb(levels: int = 9) -> str:
    """YAML of a few lines that is 10^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


class TestStructured:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[" * 200_000, "is nested more than 100 deep"),
            ("[" * 101 + "]" * 101, "is nested more than 100 deep"),
            ('{"a":' * 150 + "1" + "}" * 150, "is nested more than 100 deep"),
            ("[1,\n2,]", "can't be read as JSON: .*: line 2, column 3"),
            ("1" * 5000, "has a number of 5000 digits; at most 300 are read"),
            ('{"a": 1, "a": 2}', "has the key 'a' twice, with different values"),
            ("", "can't be read as JSON: .*: line 1, column 1"),
        ],
    )
    def test_json(self, text, reason):
        with pytest.raises(FileError, match=f"^f.json: {reason}"):
            parse_json(text, "f.json")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (bomb(), r"more than 100000 values at line 5, counting expanded aliases \(\*name\)"),
            ("&a [*a]", r"\*a at line 1 refers to a value that contains it"),
            ("[" * 200_000, "is nested more than 100 deep at line 1"),
            ("- a: 1\n  a: 2", "'a' appears twice in a mapping: line 1, column 3"),
            ("x: " + "1" * 1000, "a number of 1000 digits: line 1, column 4"),
            ("x: 1" + ":00" * 1000, "a number of 3001 digits"),
            ("x: 2001-99-99", "'x': YAML reads '2001-99-99' as a date; if it is meant as text, quote it"),
            ("x: 2001-01-01", "'x': YAML reads '2001-01-01' as a date"),
            ("x: 2001-01-01 10:00:00", "'x': YAML reads '2001-01-01 10:00:00' as a date"),
            ("x: 010", "'x': YAML reads '010' as the number 8; .* else write the number 8: line 1, column 4"),
            ("x: -0_1_0", "'x': YAML reads '-0_1_0' as the number -8"),
            ("x: 1:30", "'x': YAML reads '1:30' as the number 90"),
            ("x: 1:30.5", "'x': YAML reads '1:30.5' as the number 90.5"),
            ("x: 0b11", "'x': YAML reads '0b11' as the number 3"),
            ("x: 1_000", "'x': YAML reads '1_000' as the number 1000"),
            ("x: No", "'x': YAML reads 'No' as false"),
            ("x: {y: [a, on]}", "'y': YAML reads 'on' as true"),
            ("- 1:30", "YAML reads '1:30' as the number 90"),
            ("x: !!timestamp z", ""),
            ("x: !!set [1]", ""),
            ("x: !!bool z", ""),
            ("x: !!python/object/apply:os.system [id]", "could not determine a constructor"),
            ("{a: 1, b", "expected ',' or '}', but got '<stream end>': line 1, column 9"),
            ("x: " + "y" * 10**5, "a value of 100000 characters at line 1"),
            ("a\x01", "unacceptable character"),
        ],
    )
    def test_yaml(self, text, reason):
        with pytest.raises(FileError, match=f"^f.yaml: can't be read as YAML: {reason}"):
            parse_yaml(text, "f.yaml")

    def test_values_that_all_read_alike_are_fine(self):
        text = "[1, -2, 0, 0x1F, 1.5, .5, 1., 1.5e+3, .inf, true, False, null, ~, '010', \"no\", 1:30x, y]"
        assert parse_yaml(text, "") == [
            *(1, -2, 0, 31, 1.5, 0.5, 1.0, 1500.0, float("inf"), True, False, None, None),
            *("010", "no", "1:30x", "y"),
        ]
        assert parse_yaml("a: &x yes\nb: *x\nc: [*x]", "", {"a", "b", "c"}) == {"a": True, "b": True, "c": [True]}
        assert parse_yaml("a: yes\nb: [off]\nc: 'on'", "", {"a", "b"}) == {"a": True, "b": [False], "c": "on"}

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("{a: &x yes, name: *x}", "'a' and 'name': YAML reads 'yes' as true"),
            ("{name: &x no, a: *x}", "'a' and 'name': YAML reads 'no' as false"),
            ("- {a: &x on}\n- {name: *x}", "'a' and 'name': YAML reads 'on' as true"),
            ("{a: &x on, name: [*x]}", "'a' and 'name': YAML reads 'on' as true"),
            ("{a: &x on, b: {*x : 1}}", "'a': YAML reads 'on' as true"),
        ],
    )
    def test_a_value_under_several_keys_is_held_against_each(self, text, told):
        with pytest.raises(FileError, match=told):
            parse_yaml(text, "", {"a"})

    @pytest.mark.parametrize(
        "text",
        [
            "7",
            "007",
            "0x1F",
            "1.50",
            "1e5",
            "true",
            "No",
            "2001-01-01",
            "1:30",
            "1_000",
            "=",
            "<<",
            ".inf",
            "C#",
            "a#b",
        ],
    )
    def test_a_plain_value_is_the_text_that_stands_there_where_a_text_is_expected(self, text):
        assert parse_yaml(f"a: {text}\nb: [{text}, x]", "", texts={"a", "b"}) == {"a": text, "b": [text, "x"]}
        assert parse_yaml(f"a: &x {text}\nb: *x", "", texts={"a", "b"}) == {"a": text, "b": text}
        assert parse_yaml(f"a:\n  {text} # said\nb: '{text}' #x", "", texts={"a", "b"}) == {"a": text, "b": text}

    @pytest.mark.parametrize("text", ["", " null", " ~", " # to do", "\n# to do", " null # to do"])
    def test_nothing_is_nothing_where_a_text_is_expected(self, text):
        assert parse_yaml(f"a:{text}\nb: 1", "", texts={"a"}) == {"a": None, "b": 1}

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("a: #sks", r"'a': '#sks' is a comment in YAML; quote it \(\"#sks\"\), or leave the key out: line 1"),
            ("- a:    #\n  b: 1", r"'a': '#' is a comment in YAML"),
            ("a: Null", r"'a': YAML reads 'Null' as nothing; .*quote it \(\"Null\"\); else write null"),
            ("a: &x NULL\nb: *x", "'a' and 'b': YAML reads 'NULL' as nothing"),
        ],
    )
    def test_texts_that_yaml_takes_for_nothing_are_named(self, text, told):
        with pytest.raises(FileError, match=told):
            parse_yaml(text, "", texts={"a", "b"})

    def test_a_text_that_a_comment_may_have_cut_is_named(self, caplog):
        assert parse_yaml("a: photo of #sks  \nb: 1 #x\nc: x # y", "f", texts={"a", "c"}) == {
            "a": "photo of",
            "b": 1,
            "c": "x",
        }
        (told,) = caplog.messages
        cure = 'if that is part of the text, quote it: "photo of #sks"'
        assert told == f"f: 'a': 'photo of' is followed by a comment, '#sks'; {cure}"

    @pytest.mark.parametrize("key", ["1", "0x1F", "yes", "null", "~", "=", "2001-01-01", "1.50"])
    def test_plain_keys_are_texts(self, key):
        assert parse_yaml(f"{key}: 1", "") == {key: 1}

    def test_the_cure_quotes_a_value_so_that_yaml_reads_it(self):
        for value in ("1:30", "0_1"):
            with pytest.raises(FileError, match=rf"quote it \(\"{value}\"\)"):
                parse_yaml(f"a: {value}", "")

    def test_aliases_in_bounds_are_fine(self):
        assert parse_yaml("a: &a {k: 1}\nb: {<<: *a, l: 2}\nc: *a", "") == {
            "a": {"k": 1},
            "b": {"k": 1, "l": 2},
            "c": {"k": 1},
        }

    def test_values_are_shown_in_short(self):
        nested = ["x"] * 10
        for _ in range(12):
            nested = [nested] * 10
        endless: list = []
        endless.append(endless)
        for value in (
            nested,
            endless,
            "x" * 10**7,
            b"x" * 10**7,
            10**10_000,
            dict.fromkeys(range(10**5), nested),
            "a\nb\x1b",
        ):
            assert len(short(value)) <= 100
            assert short(value).isprintable()

    def test_json_files_in_any_encoding(self, tmp_path):
        (tmp_path / "a.json").write_bytes('{"a": "é"}'.encode("utf-16"))
        assert read_json(tmp_path / "a.json") == {"a": "é"}

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            (b"[" * 200_000, "is nested more than 100 deep"),
            (b"[1]", "is not a config, which would be a JSON object"),
            (b"null", "is not a config"),
            (b"", "can't be read as JSON"),
            (b"{" + b" " * (50 << 20) + b"}", "has 52.4 MB; at most 16.8 MB are read"),
            ("é".encode("cp1252"), "is not utf-8: byte 0"),
            (b"\x00\x01\x02", "is not text"),
        ],
    )
    def test_configs_are_objects_or_one_line(self, tmp_path, content, named):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=f"^--unet_config: .*config.json {named}"):
            read_config(tmp_path / "config.json", "--unet_config")

    def test_mutated_files_end_in_a_value_or_one_line(self):
        draw = random.Random(0)
        seeds = ['{"file_name": "a.png", "text": ["x", null, 1e5]}', "- &a {x: 1}\n- *a\n- 2001-01-01\n- !!set {a}\n"]
        pieces = [
            b"[",
            b"*a",
            b"&a ",
            b"!!int ",
            b"\0",
            b"\xff\xfe",
            b"? ",
            b"<<: ",
            b"9" * 400,
            b'"',
            b"\\ud800",
            b"NaN",
        ]
        for _ in range(500):
            content = bytearray(draw.choice(seeds).encode(draw.choice(["utf-8", "utf-16", "gb18030"])))
            for _ in range(draw.randrange(1, 5)):
                place = draw.randrange(len(content))
                if draw.random() < 0.5:
                    content[place] ^= 1 << draw.randrange(8)
                else:
                    content[place:place] = draw.choice(pieces) * draw.choice([1, 120])
            try:
                text = decode(bytes(content)).text
            except ValueError:
                text = content.decode("latin-1")
            for parse in (parse_json, parse_yaml):
                with contextlib.suppress(FileError):
                    assert len(short(parse(text, "file"))) <= 100


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "it is a pipe"),
        ("file", "it is a file"),
        ("folder", "it is a folder"),
        ("device", "it is a device"),
        ("nothing", "it does not exist"),
        ("link to nothing", "it is a link to a missing file"),
        ("link to itself", "it is a link that points to itself"),
        ("a" * 300, "File name too long"),
    ],
)
def test_what_stands_in_the_place_of_a_file_or_folder_is_named(tmp_path, kind, words):
    path = tmp_path / (kind if len(kind) > 100 else "x")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind.startswith("link"):
        path.symlink_to(path if "itself" in kind else "nowhere")
    assert what_is_at(path) == words
    for require, good in ((require_folder, "folder"), (require_file, "file")):
        if kind == good:
            require(str(path), "some_flag")
        else:
            with pytest.raises(UserError, match=rf"--some_flag must be a {good} that exists, got .*; {words}$"):
                require(str(path), "some_flag")
    for flags in ({"mask_dir": str(path)}, {"train_data_dir": str(path)}):
        if kind == "folder" or (kind == "file" and "train_data_dir" in flags):
            SourceOptions(**flags)
        else:
            with pytest.raises(UserError, match=words):
                SourceOptions(**flags)
