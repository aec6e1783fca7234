"""What reaches a terminal, a log or a report: nothing that a stranger's name could do harm with."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import message
from tests.repository import ROOT
from utils.config.foreign_flags import FOREIGN_FLAGS
from utils.config.library_messages import KnownMessages
from utils.config.options import UserError, parse
from utils.config.terminal import (
    Lines,
    LogFormatter,
    json_text,
    markdown,
    markdown_cell,
    one_line,
    print_line,
    progress_bar,
    visible,
)

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07",
    "a\nerror: forged",
    "a\rover",
    "\u202egnp.exe",
    "\x9b31m",
    "tag\U000e0041",
    "zero\u200bwidth",
    "\u2028line",
    "\udce9",
    "back\x08space",
)


def is_plain(text: str) -> bool:
    """Whether a text holds no character that is not shown, but for line breaks."""
    return all(each == "\n" or (each.isprintable() and not "\ud800" <= each <= "\udfff") for each in text)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_foreign_name_stays_on_its_line_and_is_seen(name):
    shown = one_line(f"x{name}y")
    assert is_plain(shown)
    assert "\n" not in shown
    assert shown.startswith("x")
    assert shown.endswith("y")
    assert is_plain(visible(name))


@pytest.mark.parametrize("name", ["Zoë", "一只猫", "👩‍👩‍👧 family", "می‌خواهم", "a  b", "naïve – “quoted”"])
def test_names_in_any_script_are_left_alone(name):
    assert one_line(name) == name


def test_a_long_text_is_cut_in_its_middle():
    assert one_line("a" * 10**6 + "b", 20) == "aaaaaaaaaa... (1,000,001 characters) ...aaaaaaaaab"


def test_a_log_line_holds_its_arguments_on_one_line():
    def formatted(*arguments: object, text: str = "image %s of %s") -> str:
        return LogFormatter("%(message)s").format(logging.LogRecord("utils", 20, "", 0, text, arguments, None))

    assert formatted("a\n12:00:00 INFO forged", Path("b\x1b[1m")) == "image a\\n12:00:00 INFO forged of b\\x1b[1m"
    assert formatted(3, ValueError("x\ny")) == "image 3 of x\\ny"
    assert formatted(Lines("a\nb\x1b"), text="plan\n%s") == "plan\na\nb\\x1b"


def test_json_shows_what_a_terminal_would_act_on_as_escapes():
    value = {"a\u202eb": "\x9b2J \u200b\U000e0041 一只猫 🐱", "line\n": "\udc80"}
    text = json_text(value, indent=2)
    assert json.loads(text) == value
    assert is_plain(text)
    assert "一只猫 🐱" in text


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "a|b", "[x](javascript:y)", "`c`", "*d*", "&lt;", "# e"]
)
def test_markdown_shows_foreign_text_literally(text):
    shown = markdown(text)
    assert re.sub(r"\\(?=[^\w\s])", "", shown) == text
    for mark in "<|[`*&":
        assert not re.search(r"(?<!\\)" + re.escape(mark), shown)
    assert not shown.startswith("#")
    assert markdown("clip_score a\nb") == "clip_score a b"
    assert [markdown(each) for each in ("1. a", "12) b", "- c", "0.5", "-0.5")] == [
        *("1\\. a", "12\\) b", "\\- c"),
        *("0\\.5", "\\-0.5"),
    ]
    assert [markdown_cell(each) for each in ("0.03 (-0.01 to 0.07)", "-0.5", "# a")] == [
        "0.03 (-0.01 to 0.07)",
        "-0.5",
        "# a",
    ]


def test_a_stream_that_lacks_characters_gets_escapes(tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        print_line("größer \U0001f600", stream)
    assert (tmp_path / "out").read_text() == "gr\\xf6\\xdfer \\U0001f600\n"


def test_a_bar_in_a_file_is_lines(capsys):
    with progress_bar(total=3, desc="work\x1b[1m", mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("work\\x1b[1m") for line in lines)
    assert "3/3" in lines[-1]


def test_a_short_bar_that_leaves_nothing_writes_nothing_to_a_file(capsys):
    assert list(progress_bar([1, 2], desc="work", leave=False)) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["closed", "reader gone"])
def test_a_bar_or_a_log_line_that_cannot_be_written_ends_nothing(kind, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", buffering=1)
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=2, mininterval=0) as bar:
        for _ in range(2):
            print_line("a line", sys.stderr)
            bar.update()
    assert bar.n == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'. This is safe", None),
        ("Could not load the weights", "Could not load the weights"),
        ("In this conversion only the non-EMA weights are extracted. If you want", None),
        ("There are modules in UNet2DConditionModel that should be kept in float32: []. Casting directly", None),
        (said := "There are modules in T5 that should be kept in float32: ['wo']. Casting directly", said),
        ("Some weights of the model checkpoint were not used when initializing CLIPTextModel: \n ['a']", None),
        (said := "Some weights of CLIPTextModel were not initialized from the model checkpoint", said),
        (
            "The following part of your input was truncated because CLIP can only handle sequences up to 77 tokens: "
            "['<|endoftext|><|endoftext|>', 'in the rain <|endoftext|>']",
            "The following part of your input was truncated because CLIP can only handle sequences up to 77 tokens: "
            "in the rain",
        ),
        (
            "The following part of your input was truncated because CLIP can only handle sequences up to 77 tokens: "
            "['<|endoftext|><|endoftext|>']",
            None,
        ),
    ],
)
def test_library_messages_without_use_are_dropped_and_no_others(text, shown):
    record = logging.LogRecord("diffusers.x", 30, "", 0, text, (), None)
    assert (record.getMessage() if KnownMessages().filter(record) else None) == shown
    assert KnownMessages().filter(logging.LogRecord("utils.x", 30, "", 0, text, (), None))


class TestWrongFlags:
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("--lr", "--learning_rate"),
            ("--xformers", "--enable_xformers_memory_efficient_attention"),
            ("--network_dim", "--rank"),
            ("--batch_size", "--train_batch_size"),
            ("--lora_rank", "--rank"),
            ("--instance_prompt", "--trigger_word"),
            ("--network-alpha=4", "--lora_alpha"),
            ("--learning_rte", "--learning_rate"),
        ],
    )
    def test_the_name_that_is_meant_is_given(self, refused, given, meant):
        refused([given, "1"] if "=" not in given else [given], f"unknown argument {given.partition('=')[0]} (", meant)

    def test_all_are_named_at_once(self, train, capsys):
        train("sd", "--lr", 1, "--epochs", 2, "--quux", "--rank", "x", expect=2)
        line = message(capsys)
        assert "--lr (use --learning_rate)" in line
        assert "--epochs (use --num_train_epochs)" in line
        assert "--quux;" in line  # with no guess: nothing is like it

    @pytest.mark.parametrize(
        ("flag", "here"),
        [
            ("--pretrained_model", "--pipeline"),
            ("--steps", "--num_inference_steps"),
            ("--cfg_scale", "--guidance_scale"),
            ("--sampler", "--scheduler"),
            ("--lora_path", "--lora"),
            ("--n-iter", "--images_per_prompt"),
        ],
    )
    def test_of_evaluation(self, flag, here, capsys):
        from evaluate_pipeline import main

        assert main([flag, "x"]) == 2
        assert f"{flag} (use {here})" in message(capsys)

    def test_no_guess_is_far(self, refused, capsys, train):
        for flag in ("--zzz", "--foo_bar", "--xl"):
            train("sd", flag, expect=2)
            assert message(capsys).startswith(f"error: unknown argument {flag}; --help")

    def test_every_name_in_the_table_leads_to_a_flag_that_is(self):
        import evaluate_pipeline
        import train_text_to_image
        import train_unconditional

        known = set()
        for script in (train_text_to_image, train_unconditional, evaluate_pipeline):
            with pytest.raises(UserError, match="unknown argument") as caught:
                parse(script.Options, ["--no_such_flag_at_all"], "")
            assert "(" not in str(caught.value)
            known |= flags_of(script.Options)
        known |= {"--num_processes", "--cpu"}  # accelerate launch's
        for name, advice in FOREIGN_FLAGS.items():
            for each in (advice,) if isinstance(advice, str) else advice:
                targets = re.findall(r"--\w+", each)
                assert set(targets) <= known, name
                assert targets or " " in each


def flags_of(options: type) -> set[str]:
    """The flags of a script."""
    import dataclasses
    import typing

    fields = [each for group in typing.get_type_hints(options).values() for each in dataclasses.fields(group)]
    return {f"--{each.name}" for each in fields} | {
        name for each in fields for name in each.metadata.get("aliases", ())
    }


def test_hostile_names_of_files_captions_and_prompts(train, capfd, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, source in enumerate(sorted(tiny.make_images(tmp_path / "plain", 4).glob("*.png"))):
        name = f"{number}\x1b[31m\nerror: forged\u202e"
        (data / f"{name}.png").write_bytes(source.read_bytes())
        (data / f"{name}.txt").write_text(f"a caption \u202e{number}", encoding="utf-8")
    (data / "broken\x1b[2J\nINFO forged.png").write_bytes(b"no image")
    prompt = "red\x1b[2J\n12:00:00 INFO forged"
    more = ("--max_train_steps", 1, "--validation_prompts", prompt, "--validation_num_inference_steps", 1)
    train("sd", *more, "--max_bad_fraction", 1, "--on_bad_image", "skip", data=data, out="out\x1b[5m")
    train("sd", *more, "--max_bad_fraction", 1, "--dry_run", data=data, out="dry")
    train("sd", "--unknown\x1b[1m", expect=2)
    shown = capfd.readouterr()
    for text in (shown.out, shown.err):
        assert is_plain(text.replace("\t", ""))
        assert not [line for line in text.splitlines() if line.startswith(("error: forged", "INFO forged", "12:00:00"))]


def run_script(script: str, *flags: object) -> tuple[subprocess.Popen, str, float]:
    """Starts a script; returns it, its first line, and the seconds to that line."""
    began = time.monotonic()
    command = [sys.executable, f"{script}.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    return process, process.stderr.readline(), time.monotonic() - began


def test_a_used_folder_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    words = [sys.executable, "-X", "importtime", "train_unconditional.py", "--train_data_dir", str(tmp_path)]
    found = subprocess.run([*words, f"--output-dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert "torch" not in {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "contains another run (checkpoint-5)" in found.stderr.splitlines()[-1]


def test_an_interrupt_while_torch_is_loaded_is_silent(tmp_path):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # jobs in the background inherit that it is ignored
    process, _, _ = run_script("train_text_to_image", "--pretrained_model", "a/b", "--train_data_dir", tmp_path)
    process.send_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in (said or "")


def test_the_first_line_says_what_is_loaded_before_torch_is(tmp_path):
    process, line, _ = run_script("train_text_to_image", "--pretrained_model", "a/b", "--train_data_dir", tmp_path)
    process.kill()
    process.communicate()
    assert line == (
        "loading torch and diffusers, which takes a few seconds; model a/b (from the Hub or its cache), "
        f"data {tmp_path}\n"
    )
