"""Which images are drawn: prompts of files, datasets and folders, and how many of each."""

import json

import pytest

from utils.config.options import UserError
from utils.sampling.options import GenerationOptions, PromptOptions
from utils.sampling.prompts import Prompt, plan_tasks, read_prompts
from utils.sampling.sample_options import ValidationOptions


def test_prompts_are_read_from_files_datasets_and_folders(images, tmp_path):
    from datasets import Dataset

    rows = ["a cat", "a, dog"]
    (tmp_path / "p.txt").write_text("a cat\n\na, dog\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": row, "tag": "x"}) + "\n" for row in rows))
    (tmp_path / "p.csv").write_text('text,n\na cat,1\n"a, dog",2\n')
    Dataset.from_dict({"caption": rows}).save_to_disk(tmp_path / "saved")
    for options in (
        PromptOptions(prompts_file=str(tmp_path / "p.txt")),
        PromptOptions(prompts_file=str(tmp_path / "p.jsonl")),
        PromptOptions(prompts_file=str(tmp_path / "p.csv")),
        PromptOptions(prompts_dataset=str(tmp_path / "saved")),
        PromptOptions(prompts=rows),
    ):
        assert [prompt.text for prompt in read_prompts(options)] == rows
    captions = read_prompts(PromptOptions(captions_dir=str(images), max_prompts=2))
    assert [prompt.text for prompt in captions] == ["a red square", "a green square"]
    with pytest.raises(UserError, match="did you mean --prompts_column prompt"):
        read_prompts(PromptOptions(prompts_file=str(tmp_path / "p.jsonl"), prompts_column="promt"))


def test_num_images_goes_round_over_the_prompts():
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    tasks = plan_tasks(prompts, PromptOptions(num_images=5))
    assert [task.name for task in tasks] == [
        *("00000_00000", "00000_00001", "00001_00000", "00001_00001", "00002_00000"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("p.CSV", 'id,prompt\n1,"a, b"\n2,"c\nd"\n', ["a, b", "c\nd"]),
        ("p.JSONL", '{"prompt": "a\u2028b"}\r\n"c"\n', ["a\u2028b", "c"]),
        ("p.json", '["a", {"text": "b"}]', ["a", "b"]),
        ("p.txt", "a\u2028b\r\nc", ["a\u2028b", "c"]),
        ("p.csv", "prompt\na, b\n", "line 2: more cells than the 1 columns"),
        ("p.csv", 'prompt\n"a\n', "can't be read"),
        ("p.json", '{"prompt": "a"}', "must contain a list"),
        ("p.yaml", "- a", "must end with one of"),
    ],
)
def test_prompts_files_are_read_as_they_are_written(tmp_path, name, text, found):
    file = tmp_path / name
    file.write_bytes(text.encode())
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            read_prompts(PromptOptions(prompts_file=str(file)))
    else:
        assert [prompt.text for prompt in read_prompts(PromptOptions(prompts_file=str(file)))] == found


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.txt", "一只猫坐在草地上\n红色的苹果".encode("gbk"), ["一只猫坐在草地上", "红色的苹果"]),
        ("p.txt", "a café".encode("utf-16"), ["a café"]),
        ("p.csv", "nr;prompt\n1;à la plage, l’été\n".encode("cp1252"), ["à la plage, l’été"]),
        ("p.tsv", b"prompt\tn\na, b\t1\n", ["a, b"]),
        ("p.csv", b'n, text\n1, "a, b"\n', ["a, b"]),
        ("p.json", b'["\\ud83d a"]', ["? a"]),
        ("p.csv", b"n,prompt\n1\n", "line 2: fewer cells than the 2 columns"),
        ("p.csv", b"n,prompt\n1,a,b\n", "line 2: more cells than the 2 columns; quote text with a comma"),
        ("p.json", b"[" * 200_000, "is nested more than 100 deep"),
        ("p.jsonl", b'"a"\n' + b"[" * 200_000, "line 2: is nested more than 100 deep"),
        ("p.jsonl", b'{"prompt": ["a"]}', r"line 1: prompt must be a text, got \['a'\]"),
        ("p.json", b"1" * 5000, "has a number of 5000 digits"),
        ("p.txt", b"x" * 100_000, "line 1 has a prompt of 100,000 characters; shorten it to 65,536 at most"),
        ("p.txt", bytes(range(256)), "is not text"),
        ("p.csv", b"prompt,n\na dog,1\nNaN,2\nNA,3\n ,4\n,5\nNan,6\n", ["a dog", "Nan"]),
        ("p.tsv", b"n\tprompt\n1\tNone\n", "p.tsv contains no prompts"),
        ("p.jsonl", b'[\n"a",\n"b"\n]', "line 1: starts a JSON array; write each of its values on its own line"),
    ],
)
def test_prompts_files_in_any_encoding_and_whatever_they_hold(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    options = PromptOptions(prompts_file=str(tmp_path / name))
    if isinstance(found, str):
        with pytest.raises(UserError, match=found) as raised:
            read_prompts(options)
        assert f"--prompts_file {tmp_path / name}" in str(raised.value)
        assert len(str(raised.value)) < 500
    else:
        assert [prompt.text for prompt in read_prompts(options)] == found


def test_the_encoding_of_prompts_can_be_said(tmp_path, caplog):
    (tmp_path / "p.txt").write_bytes("猫".encode("gbk"))  # which is UTF-8 of another letter
    (tmp_path / "r.txt").write_bytes("кот сидит".encode("cp1251"))
    options = {"prompts_file": str(tmp_path / "p.txt")}
    assert [prompt.text for prompt in read_prompts(PromptOptions(**options))] == ["è"]
    assert [prompt.text for prompt in read_prompts(PromptOptions(**options, text_encoding="gbk"))] == ["猫"]
    assert not caplog.records
    assert read_prompts(PromptOptions(prompts_file=str(tmp_path / "r.txt")))[0].text == "кот сидит"
    assert "1 text is not UTF-8 and read as cp1251 (a guess; give --text_encoding if it is wrong)" in caplog.text


def test_ragged_rows_and_numbers_that_are_not_meant_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("id,prompt\n1,a,b\n")
    with pytest.raises(UserError, match="line 2"):
        read_prompts(PromptOptions(prompts_file=str(tmp_path / "p.csv"), prompts_column="idd"))
    for name in ("num_images", "images_per_prompt"):
        with pytest.raises(UserError, match=f"--{name} must be at most 10000000"):
            PromptOptions(**{name: 10**7 + 1})
    with pytest.raises(UserError, match="in total for 2 prompts"):
        plan_tasks([Prompt("a"), Prompt("b")], PromptOptions(images_per_prompt=10**7))
    with pytest.raises(UserError, match="--strength must be above 0"):
        GenerationOptions(strength=0.0)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "p.jsonl",
            '{"prompt": "a", "negative_prompt": "n", "seed": 7}\n{"prompt": "b"}',
            "'negative_prompt', 'seed' in 1 r",
        ),
        (
            "p.json",
            '["b", {"text": "a", "CFG Scale": 7}]',
            "ignored 'CFG Scale' in 1 rows; set them by flags, for all",
        ),
        ("p.csv", "prompt,Width,height\na,512,\nb,,768\n", "'Width', 'height' in 2 rows"),
        (
            "p.txt",
            "a dog --n ugly --w 512\na cat\n",
            "1 prompts contain what look like flags, such as --n; they are used",
        ),
        ("p.jsonl", '"a tower --ar=3:2"', "1 prompts contain what look like flags, such as --ar"),
    ],
)
def test_settings_of_single_prompts_that_are_not_read_are_named(tmp_path, caplog, name, content, told):
    (tmp_path / name).write_text(content)
    assert read_prompts(PromptOptions(prompts_file=str(tmp_path / name)))
    assert told in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a", "tag": "x", "seed": null, "source": "y"}'),
        ("p.csv", "prompt,width,category\na,,b\n"),
        ("p.csv", "File Name,text,width,height,aspect-ratio\n0.png,a,512,512,1\n"),
        ("p.jsonl", '{"url": "x", "text": "a", "WIDTH": 5}'),
        ("p.txt", "a dog -- a good one\nmid-size -- red\n"),
    ],
)
def test_facts_beside_prompts_are_no_fault(tmp_path, caplog, name, content):
    (tmp_path / name).write_text(content)
    assert read_prompts(PromptOptions(prompts_file=str(tmp_path / name)))
    assert not caplog.records


def test_rows_without_a_prompt_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "p.csv").write_text("n,prompt\n1,a\n2,NULL\n3,\n")
    assert [prompt.text for prompt in read_prompts(PromptOptions(prompts_file=str(tmp_path / "p.csv")))] == ["a"]
    assert "skipped 2 rows without a prompt, the first in line 3; cells such as NULL count as empty" in caplog.text


def test_settings_in_a_dataset_are_counted_and_sizes_of_its_images_are_none(tmp_path, caplog):
    from datasets import Dataset

    rows = {"text": ["a", "b --w 5", None], "image": ["0.png"] * 3, "width": [5] * 3, "seed": [1] * 3}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    assert [prompt.text for prompt in read_prompts(PromptOptions(prompts_dataset=str(tmp_path / "data")))] == rows[
        "text"
    ][:2]
    told = [
        "ignored 'seed' in 3 rows",
        "skipped 1 rows without 'text'",
        "1 prompts contain what look like",
    ]
    assert len(caplog.messages) == 3
    assert all(part in line for part, line in zip(told, caplog.messages, strict=True))
    caplog.clear()
    Dataset.from_dict({"text": ["a"], "width": [5]}).save_to_disk(tmp_path / "sizes")
    read_prompts(PromptOptions(prompts_dataset=str(tmp_path / "sizes")))
    assert "ignored 'width' in 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "seed": 0}], "ignored 'seed' in 1 rows"),
        ([{"prompt": "a", "steps": 0.0, "cfg": None}, {"prompt": "b", "steps": 0}], "'steps' in 2 rows"),
        ([{"prompt": "a", "seed": None, "steps": "", "loras": [], "eta": "NULL"}], ""),
    ],
)
def test_settings_of_zero_are_settings(tmp_path, caplog, rows, said):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(rows))
    read_prompts(PromptOptions(prompts_file=str(file)))
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a dog --n ugly --w 512", "contain what look like flags, such as --n"),
        ("a dog --d 7", "such as --d"),
        (
            "a dog\nSteps: 20, Sampler: Euler a, Size: 512x512",
            "settings of other programs, such as Steps: 20",
        ),
        ("a dog. Negative prompt: ugly", "such as Negative prompt: ugly"),
        ("a dog, CFG scale: 7.5", "such as CFG scale: 7"),
        ("a flight of steps: stone, seed: sunflower, size: big -- well", ""),
    ],
)
def test_settings_within_prompts_are_said_whichever_way_they_come(tmp_path, caplog, text, said):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": text}))
    for options, flag in (
        (PromptOptions(prompts=[text, "a cat"]), "--prompts: 1 prompts"),
        (PromptOptions(prompts_file=str(file)), f"--prompts_file {file}: 1 prompts"),
    ):
        caplog.clear()
        read_prompts(options)
        assert said in caplog.text
        assert bool(said) == (flag in caplog.text)


def test_settings_within_validation_prompts_are_said_once(train, caplog):
    short = ("--max_train_steps", 2, "--validation_steps", 1, "--no_final_checkpoint")
    train("sd", *short, "--validation_prompts", "a --n b")
    assert caplog.text.count("--validation_prompts: 1 prompts contain what look like flags, such as --n") == 1


def test_a_file_in_the_place_of_prompts_is_named(tmp_path):
    file = tmp_path / "p.txt"
    assert len(read_prompts(PromptOptions(prompts=[str(file), "x" * 5000 + ".txt"]))) == 2
    file.write_text("a")
    with pytest.raises(UserError, match=r"--prompts .*p.txt is a file, .*; give --prompts_file"):
        read_prompts(PromptOptions(prompts=[str(file)]))
    for name, value in (("validation_prompts", [str(file)]), ("validation_prompt", str(file))):
        with pytest.raises(UserError, match=rf"--{name} .*p.txt is a file"):
            ValidationOptions(**{name: value})


@pytest.mark.parametrize("header", ["Prompt", "PROMPT", "Text", "id,Caption"])
def test_columns_of_prompts_are_found_in_any_case(tmp_path, header):
    from datasets import Dataset

    file, last = tmp_path / "p.csv", header.rpartition(",")[2]
    file.write_text(f"{header}\n{'1,' if ',' in header else ''}a cat\n{'2,' if ',' in header else ''}NULL\n")
    assert [prompt.text for prompt in read_prompts(PromptOptions(prompts_file=str(file)))] == ["a cat"]
    Dataset.from_dict({last: ["a cat"]}).save_to_disk(tmp_path / "saved")
    assert read_prompts(PromptOptions(prompts_dataset=str(tmp_path / "saved")))[0].text == "a cat"
    file.write_text("Prompt,prompt\na,b\n")
    assert read_prompts(PromptOptions(prompts_file=str(file)))[0].text == "b"
