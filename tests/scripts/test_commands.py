"""The commands of the diffusers examples' READMEs run with this script's name, and those of our README parse."""

import re
import shlex

import pytest

from tests import tiny
from tests.comparing import lora, weights
from tests.repository import ROOT
from utils.config.options import UserError

# What the READMEs of examples/text_to_image say, flag for flag, but for model, data and sizes, which `small` replaces.
DIFFUSERS_COMMANDS = {
    "sd": """--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4
        --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1
        --lr_scheduler="constant" --lr_warmup_steps=0""",
    "sd min-snr": """--resolution=512 --train_batch_size=1 --max_train_steps=15000 --learning_rate=1e-05 --snr_gamma=5.0
        --lr_scheduler="constant" --lr_warmup_steps=0""",
    "sd lora": """--caption_column="text" --resolution=512 --random_flip --train_batch_size=1 --num_train_epochs=100
        --checkpointing_steps=5000 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
        --validation_prompt="cute dragon creature" --adaptation lora""",
    "sdxl": """--resolution=512 --center_crop --random_flip --proportion_empty_prompts=0.2 --train_batch_size=1
        --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam
        --learning_rate=1e-06 --lr_scheduler="constant" --lr_warmup_steps=0
        --validation_prompt="a cute Sundar Pichai creature" --validation_epochs 5 --checkpointing_steps=5000
        --push_to_hub""",
    "sdxl lora": """--caption_column="text" --resolution=1024 --random_flip --train_batch_size=1 --num_train_epochs=2
        --checkpointing_steps=500 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
        --validation_prompt="cute dragon creature" --push_to_hub --adaptation lora""",
    "sdxl lora text encoder": """--caption_column="text" --resolution=1024 --random_flip --train_batch_size=1
        --num_train_epochs=2 --checkpointing_steps=500 --learning_rate=1e-04 --lr_scheduler="constant"
        --lr_warmup_steps=0 --seed=42 --train_text_encoder --validation_prompt="cute dragon creature" --push_to_hub
        --adaptation lora""",
}


def small(command: str) -> list[str]:
    """The command's words at tiny size."""
    command = re.sub(r"--resolution=\d+", f"--resolution={tiny.RESOLUTION}", command)
    command = re.sub(r"--max_train_steps=\d+", "--max_train_steps=2", command)
    command = re.sub(r"--num_train_epochs=\d+", "--num_train_epochs=1", command)
    return [*shlex.split(command), "--validation_num_inference_steps", "2"]


@pytest.mark.parametrize("case", DIFFUSERS_COMMANDS)
def test_a_command_of_the_diffusers_examples(train, pipelines, case, monkeypatch):
    monkeypatch.setattr("utils.training.session.create_repository", lambda folder, options: folder.name)
    monkeypatch.setattr("utils.training.model_card.upload", lambda *arguments: None)
    name, *rest = case.split()
    out = train(name, *small(DIFFUSERS_COMMANDS[case]))
    if "lora" in rest:
        assert lora(out)
    else:
        assert weights(out).keys() == weights(pipelines[name]).keys()


def test_the_readmes_commands_parse(tmp_path):
    from train_text_to_image import Options
    from utils.config.options import parse

    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    commands = [block.replace("\\\n", " ") for block in blocks if "train_text_to_image.py \\" in block]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command)
        words = words[words.index("train_text_to_image.py") + 1 :]
        words = [str(tmp_path) if word == "path/to/images" else word for word in words]
        parse(Options, words, "")


def test_the_readmes_evaluations_parse(tmp_path):
    from evaluate_pipeline import Options
    from utils.config.options import parse
    from utils.evaluation.metrics.table import METRICS

    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", readme, flags=re.S)
    commands = [block.replace("\\\n", " ") for block in blocks if "evaluate_pipeline.py \\" in block]
    assert commands
    (tmp_path / "prompts.txt").write_text("a cat\n")
    for command in commands:
        words = shlex.split(command)
        words = words[words.index("evaluate_pipeline.py") + 1 :]
        known = {"path/to/images": str(tmp_path), "prompts.txt": str(tmp_path / "prompts.txt")}
        parse(Options, [known.get(word, word) for word in words], "")
    table = readme.partition("| `--metrics` | default")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_0-9]+)`", table)) >= set(METRICS)


def test_a_dry_run_refuses_the_folder_of_its_model_as_the_run_does(tmp_path):
    from utils.training.text_to_image_options import read_options

    (tmp_path / "model_index.json").write_text("{}")
    words = ["--train_data_dir", str(tmp_path), "--pretrained_model", str(tmp_path), "--output_dir", f"{tmp_path}/"]
    for more, said in (([], "contains another run"), (["--dry_run"], "is the folder of --pretrained_model")):
        with pytest.raises(UserError, match=said):
            read_options([*words, *more])
    for more in (["--dry_run", "--resume_from_checkpoint", "latest"], ["--dry_run", "--overwrite_output_dir"]):
        read_options([*words, *more])
    read_options([*words[:4], "--output_dir", str(tmp_path / "out"), "--dry_run"])
