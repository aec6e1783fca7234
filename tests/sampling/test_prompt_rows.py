"""Files of prompts with settings of their own."""

import pytest

from utils.config.options import UserError
from utils.sampling.prompt_rows import PromptRow, read_rows_of
from utils.sampling.sample_options import ValidationOptions


def rows(folder, text: str | bytes, name: str = "prompts.txt") -> list[PromptRow]:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows_of("--validation_prompts_file", str(file))


def test_lines_with_the_flags_of_kohya(tmp_path):
    text = "# a comment\n\na red fox, sly --n blurry, bad --w 512 --h 768 --d 7 --s 20 --l 7.5 --am 0.8\r\n"
    text += "a dog--cat -- both --lora_scale=0.5 --Steps 3\nplain\n"
    first, second, third = rows(tmp_path, text)
    assert first == PromptRow("line 3", "a red fox, sly", "blurry, bad", 512, 768, 7, 20, 7.5, 0.8)
    assert second == PromptRow("line 4", "a dog--cat -- both", lora_scale=0.5, steps=3)
    assert third == PromptRow("line 5", "plain")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "x", "negative_prompt": "y", "steps": 3, "seed": 0}\n"plain"\n'),
        ("a.json", '[{"text": "x", "negative": "y", "num_inference_steps": 3, "seed": 0, "width": null}, "plain"]'),
        ("a.json", '{"prompts": [{"prompt": "x", "negative_prompt": "y", "sample_steps": 3, "seed": 0}, "plain"]}'),
        ("a.yaml", "- prompt: x\n  negative_prompt: y\n  steps: 3\n  seed: 0\n- plain\n"),
        ("a.csv", "prompt,negative_prompt,steps,seed\nx,y,3,0\nplain,,,\n"),
        ("a.tsv", "prompt\tnegative_prompt\tsteps\tseed\nx\ty\t3\t0\nplain\t\t\t\n"),
    ],
)
def test_the_other_formats(tmp_path, name, text):
    first, second = rows(tmp_path, text, name)
    assert (first.prompt, first.negative_prompt, first.steps, first.seed) == ("x", "y", 3, 0)
    assert (second.prompt, second.seed, second.width) == ("plain", None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a --w 65", "line 1: width must be divisible by 8, got 65; try 64 or 72"),
        ("a --w", "line 1: --w has no value"),
        ("a --foo 3", "line 1: unknown setting --'foo'; known are --n, --w"),
        ("a --heigth 8", "did you mean --height?"),
        ("a --g 3", "line 1: --g is not supported: give --l"),
        ("a --w 8 --width 8", "line 1 sets width twice"),
        ("--w 8", "line 1 has no prompt"),
        ("a\na --s 0", "line 2: steps must be a whole number from 1 to"),
        ("a --d 1.5", "seed must be a whole number"),
        ("a --l nan", "guidance_scale must be a number, got 'nan'"),
        ("a --l -1", "guidance_scale must be 0 or more"),
        ("a" * 70_000, "has 70,000 characters"),
        (b"a\x00b\x00\x01\x02\x03", "is not text"),
        ("", "contains no prompts"),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        rows(tmp_path, text)
    assert said in str(error.value)
    assert str(error.value).startswith(f"--validation_prompts_file {tmp_path / 'prompts.txt'}")


def test_requests_take_what_a_prompt_does_not_set_from_the_flags(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a\nb --d 5\nc --w 64\n")
    options = ValidationOptions(
        validation_prompts_file=str(file), num_validation_images=2, validation_negative_prompt="bad"
    )
    sizes = [(48, 24), (24, 48), (32, 32)]
    found = options.requests(100, sizes)
    assert [each.seed for each in found] == [100, 101, 5, 6, 104, 105]
    assert [each.size for each in found] == [(48, 24), (24, 48), (32, 32), (48, 24), (64, 24), (64, 24)]
    assert {each.negative_prompt for each in found} == {"bad"}
    assert {each.steps for each in found} == {25}
    assert options.shared_negative_prompt == "bad"
    assert [each.name for each in found[:3]] == ["00_0", "00_1", "01_0"]
