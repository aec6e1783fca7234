"""Options from files of --config: YAML, JSON, and records of earlier runs."""

import json
from pathlib import Path

import pytest

from utils.config.options import UserError, as_record, parse
from utils.training.text_to_image_options import PURPOSE, Options

GIVEN = ["--pretrained_model", "x", "--dataset_name", "y"]


def read(*words: str) -> dict[str, object]:
    return as_record(parse(Options, list(words), PURPOSE))


def written(tmp_path: Path, text: str, name: str = "my.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_file_gives_what_the_command_line_would(tmp_path):
    text = """
        pretrained_model: base
        --dataset-name: photographs   # dashes are accepted
        learning_rate: 1e-5
        max_train_steps: 100.0
        use_ema: yes
        no_random_flip: null
        validation_prompts: [a cat, "yes", 5]
        optimizer:                       # a section
          snr_gamma: 5
          mixed_precision: bf16
          trackers:
        lora_target_modules: to_k
        adaptation: lora
    """
    flags = ["--pretrained_model", "base", "--dataset_name", "photographs", "--learning_rate", "1e-5"]
    flags += ["--max_train_steps", "100", "--use_ema", "--validation_prompts", "a cat", "yes", "5"]
    flags += ["--snr_gamma", "5", "--mixed_precision", "bf16", "--lora_target_modules", "to_k", "--adaptation", "lora"]
    lines = [line for line in text.splitlines() if "trackers" not in line and "no_random" not in line]
    assert read("--config", written(tmp_path, "\n".join(lines))) == read(*flags)


def test_later_files_and_flags_win(tmp_path):
    one = written(tmp_path, "pretrained_model: base\ndataset_name: a\nseed: 1\nvalidation_prompts: [a, b]\nuse_ema: on")
    two = written(tmp_path, '{"seed": 2, "rank": 8, "adaptation": "lora"}', "two.json")
    found = read("--seed=3", "--config", one, two, "--validation_prompts", "c", "--use_ema", "false")
    assert (found["seed"], found["rank"], found["validation_prompts"], found["use_ema"]) == (3, 8, ["c"], False)
    assert read(f"--config={one}")["seed"] == 1
    assert read("--config", one, two)["seed"] == 2
    three = written(tmp_path, "seed: null\nmax_train_steps: 1e3\nlearning_rate: 1e-3", "three.yaml")
    found = read("--config", one, three)
    assert (found["seed"], found["max_train_steps"], found["learning_rate"]) == (read(*GIVEN)["seed"], 1000, 1e-3)


def test_the_record_of_a_run_repeats_it(tmp_path):
    words = [*GIVEN, "--learning_rate", "3e-7", "--validation_prompts", "- x", "a  b", "--snr_gamma", "5", "--use_ema"]
    first = read(*words)
    record = {"options": first, "versions": {"torch": "2"}, "command": ["x"], "outcome": {"verdict": ""}}
    file = written(tmp_path, json.dumps(record), "run.json")
    assert read("--config", file) == first
    assert read("--config", file, "--seed", "5") == first | {"seed": 5}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "lerning_rate: 1\nrank: 4\nnetwork_dim: 4",
            ["--lerning_rate (did you mean --learning_rate?)", "--network_dim (use --rank"],
        ),
        ("learning_rate: fast", ["learning_rate must be a number, got fast"]),
        ("rank: 4.5", ["rank must be an integer, got 4.5"]),
        ("rank: true", ["rank must be an integer, got True"]),
        ("use_ema: maybe", ["use_ema", "true or false, got maybe"]),
        ("use_ema: 2", ["use_ema", "true or false, got 2"]),
        ("adaptation: lara", ["adaptation must be one of", "lora", "got lara"]),
        ("rank: [4, 5]", ["rank takes one value, got a list of 2"]),
        ("validation_prompts: []", ["validation_prompts is an empty list"]),
        ("validation_prompts: [[a]]", ["validation_prompts must be text"]),
        ("seed: 1\n--seed: 2", ["seed is set twice"]),
        ("pretrained_model: a\npretrained_model_name_or_path: b", ["is set twice"]),
        ("a: {b: {c: 1}}", ["a: b is a section in a section"]),
        ("- seed", ["must be a mapping of flags"]),
        ("", ["must be a mapping of flags"]),
        ("seed: [", ["can't be read as YAML"]),
        ("config: other.yaml", ["--config"]),
        ("help: true", ["--help"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_place(tmp_path, text, parts):
    with pytest.raises(UserError) as caught:
        read("--config", written(tmp_path, text), *GIVEN)
    assert all(part in str(caught.value) for part in ["--config", "my.yaml", *parts]), str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "damaged JSON"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "damaged JSON":
        path.write_text('{"seed": 1')
    with pytest.raises(UserError, match=r"--config .*x\.json"):
        read("--config", str(path), *GIVEN)


def test_a_value_that_its_group_refuses_is_refused_from_a_file_too(tmp_path):
    with pytest.raises(UserError, match="--rank must be"):
        read("--config", written(tmp_path, "rank: -4\nadaptation: lora"), *GIVEN)
