"""The samples of runs: of the base before the first step, of files of prompts, at the sizes of buckets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.comparing import assert_same_bits, lora, weights
from tests.conftest import message

SHORT = ("--train_batch_size", 2, "--max_train_steps", 2, "--learning_rate", 1e-2, "--no_final_checkpoint")
STEPS = ("--validation_num_inference_steps", 2)
LORA = ("--adaptation", "lora", "--rank", 2)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples" / "samples.jsonl").read_text().splitlines()]


def pixels(out: Path, name: str) -> np.ndarray:
    with Image.open(out / name) as image:
        return np.asarray(image)


def info(out: Path, name: str) -> dict[str, str]:
    with Image.open(out / name) as image:
        return dict(image.info)


@pytest.fixture
def prompts(tmp_path):
    """Writes a file of prompts, and gives the flags that name it."""

    def write(text: str, name: str = "prompts.txt") -> tuple:
        (tmp_path / name).write_text(text)
        return ("--validation_prompts_file", tmp_path / name, *STEPS)

    return write


def test_settings_of_single_prompts(train, prompts):
    text = "# comment\nred\nred --w 24 --h 40 --d 5 --s 3 --l 1.5 --n blue\nred --am 0\nred --d 0 --am 0.5\n"
    out = train("sd", *SHORT, *LORA, *prompts(text), "--validation_negative_prompt", "dull", "--seed", 0)
    first, second, off, half = lines(out)[:4]
    assert first == first | {"step": 0, "file": "samples/step-0/00_0.png", "prompt": "red", "negative_prompt": "dull"}
    assert first == first | {"width": 32, "height": 32, "seed": 0, "steps": 2, "guidance_scale": 7.5, "lora_scale": 1}
    assert second == second | {"width": 24, "height": 40, "seed": 5, "steps": 3, "guidance_scale": 1.5}
    assert second["negative_prompt"] == "blue"
    assert (off["lora_scale"], half["lora_scale"]) == (0, 0.5)
    assert [each["step"] for each in lines(out)] == [0] * 4 + [2] * 4
    assert pixels(out, "samples/final/01_0.png").shape == (40, 24, 3)
    # the adapter is zero at first, and off with --am 0
    assert not np.array_equal(pixels(out, "samples/step-0/00_0.png"), pixels(out, "samples/final/00_0.png"))
    assert np.array_equal(pixels(out, "samples/step-0/02_0.png"), pixels(out, "samples/final/02_0.png"))
    assert not np.array_equal(pixels(out, "samples/final/03_0.png"), pixels(out, "samples/final/00_0.png"))
    # the texts of the images
    texts = info(out, "samples/final/01_0.png")
    assert "Negative prompt: blue\nSteps: 3" in texts["parameters"]
    assert "CFG scale: 1.5, Seed: 5, Size: 24x40" in texts["parameters"]
    assert "LoRA: out=0.5" in info(out, "samples/final/03_0.png")["parameters"]
    assert "LoRA" not in info(out, "samples/final/02_0.png")["parameters"]
    assert info(out, "samples/final/03_0.png")["lora_scale"] == "0.5"
    # the card shows the adapter as it is
    assert len(list((out / "gallery").glob("*.png"))) == 2


@pytest.mark.parametrize("name", [pytest.param("sd", marks=pytest.mark.slow), "pixels"])
def test_samples_before_the_first_step_change_no_bit(train, name, pipelines):
    drawn = (
        ("--validation_prompt", "red", *STEPS)
        if name == "sd"
        else ("--num_samples", 2, "--ddpm_num_inference_steps", 2)
    )
    plain = train(name, *SHORT, *drawn, "--use_ema", "--no_sample_at_start", out="plain")
    out = train(name, *SHORT, *drawn, "--use_ema", out="first")
    assert_same_bits(weights(plain), weights(out))
    assert not (plain / "samples" / "step-0").exists()
    first = sorted(path.name for path in (out / "samples" / "step-0").glob("*_*.png" if name == "sd" else "00*.png"))
    last = sorted(path.name for path in (out / "samples" / "final").glob("*_*.png" if name == "sd" else "00*.png"))
    assert first == last
    assert first
    assert {each["step"] for each in lines(out)} == {0, 2}
    assert {each["step"] for each in lines(plain)} == {2}
    assert [each["seed"] for each in lines(out)[: len(first)]] == [each["seed"] for each in lines(plain)]


@pytest.mark.slow
def test_the_base_beside_an_adapter_that_is_continued(train, pipelines):
    drawn = ("--validation_prompts", "red", *STEPS)
    start = train("sd", *SHORT, *LORA, out="start")
    more = ("--adaptation", "lora", "--lora_weights", start)
    out = train("sd", *SHORT, *more, *drawn, out="more")
    base, first = pixels(out, "samples/base/00_0.png"), pixels(out, "samples/step-0/00_0.png")
    assert not np.array_equal(base, first)
    plain = train("sd", *SHORT, *LORA, *drawn, out="plain")
    assert np.array_equal(base, pixels(plain, "samples/step-0/00_0.png"))
    found = [(each["step"], each["file"], each["lora_scale"]) for each in lines(out)]
    assert found[:2] == [(0, "samples/step-0/00_0.png", 1), (0, "samples/base/00_0.png", 0)]
    assert_same_bits(lora(out), lora(train("sd", *SHORT, *more, out="without")))


@pytest.mark.slow
def test_a_resumed_run_keeps_its_record(train):
    flags = ("--train_batch_size", 2, "--validation_prompts", "red", *STEPS)
    flags += ("--validation_steps", 2, "--checkpointing_steps", 2)
    out = train("sd", *flags, "--max_train_steps", 4)
    assert [each["file"] for each in lines(out)] == [f"samples/{at}/00_0.png" for at in ("step-0", "step-2", "final")]
    first = (out / "samples" / "step-0" / "00_0.png").stat().st_mtime_ns
    train("sd", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    expected = ["step-0", "step-2", "step-4", "final"]
    assert [each["file"] for each in lines(out)] == [f"samples/{at}/00_0.png" for at in expected]
    assert all((out / each["file"]).is_file() for each in lines(out))
    train("sd", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "checkpoint-2")
    assert [each["step"] for each in lines(out)] == [0, 2, 4]
    there = {path.name for path in (out / "samples").iterdir()}
    assert there > {"abandoned-step-4", "final", "samples.jsonl", "step-0", "step-2"}
    assert "step-4" not in there
    assert (out / "samples" / "step-0" / "00_0.png").stat().st_mtime_ns == first  # it is not drawn again
    train("sd", *flags, "--max_train_steps", 2, "--no_sample_at_start", "--overwrite_output_dir")
    assert [each["file"] for each in lines(out)] == ["samples/final/00_0.png"]


def test_samples_have_the_sizes_of_the_buckets(train, tmp_path):
    data = tmp_path / "shapes"
    data.mkdir()
    for number, size in enumerate([(64, 32)] * 3 + [(32, 64)] * 2 + [(32, 32)] * 2):
        Image.new("RGB", size, (30 * number, 0, 200)).save(data / f"{number}.png")
    flags = ("--use_aspect_ratio_buckets", "--buckets", "48x24", "24x48", "32x32", "--validation_prompt", "red", *STEPS)
    out = train("sd", *SHORT, *flags, data=data)
    sizes = [(each["width"], each["height"]) for each in lines(out)[:4]]
    assert sizes == [(48, 24), (24, 48), (32, 32), (48, 24)]
    assert pixels(out, "samples/step-0/00_0.png").shape == (24, 48, 3)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("red --am 0.5", "a.txt", "a.txt, line 1: lora_scale 0.5: --adaptation full trains no adapter"),
        ("red\nred --w 30", "a.txt", "a.txt, line 2: width must be divisible by 8, got 30; try 24 or 32"),
        ("red --ss euler", "a.txt", "line 1: --ss is not supported: samples are drawn with the scheduler"),
        ('{"prompt": "red", "sed": 3}', "a.jsonl", "line 1: unknown setting 'sed'; did you mean seed?"),
        ("- prompt: red\n  steps: 0", "a.yaml", "row 1: steps must be a whole number from 1 to 100000, got 0"),
        ("# nothing", "a.txt", "contains no prompts"),
        ("red", "a.md", "must end with one of .txt, .jsonl"),
    ],
)
def test_bad_files_of_prompts(train, prompts, capsys, text, name, said):
    train("sd", *SHORT, *prompts(text, name), expect=2)
    found = message(capsys)
    assert said in found
    assert "--validation_prompts_file" in found


def test_prompts_come_from_one_place(train, prompts, capsys):
    train("sd", *SHORT, *prompts("red"), "--validation_prompt", "blue", expect=2)
    assert "--validation_prompt and --validation_prompts_file both set the prompts" in message(capsys)
