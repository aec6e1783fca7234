"""Configs and tokenizers of a pipeline, whole and broken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import AutoTokenizer

from tests import tiny
from tests.conftest import message
from tests.pretrained import SHORT, loaded
from utils.config.options import UserError
from utils.evaluation.metrics.features import load_weights
from utils.evaluation.metrics.image_sets import Statistics
from utils.models.loading import Download, load_pipeline_folder


def test_a_repository_of_one_variant_says_so(train, capsys, pipelines, tmp_path):
    from diffusers import DiffusionPipeline

    folder = tmp_path / "fp16"
    DiffusionPipeline.from_pretrained(pipelines["sd"]).save_pretrained(folder, variant="fp16")
    train(str(folder), *SHORT, expect=2)
    assert "add --variant fp16" in message(capsys)
    train(str(folder), *SHORT, "--variant", "fp16", "--dry_run")
    DiffusionPipeline.from_pretrained(pipelines["sd"]).save_pretrained(folder)
    train(str(folder), *SHORT, "--dry_run", out="both")
    train("sd", *SHORT, "--variant", "bf16", "--dry_run", out="none", expect=2)
    assert "--variant" in message(capsys)


def test_a_tokenizer_without_its_length_takes_the_text_encoders(train, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    assert loaded(folder).tokenizer.model_max_length == 77
    train(str(folder), *SHORT, "--dry_run")


@pytest.mark.parametrize(
    "file",
    [
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"),
    ],
)
def test_a_pipe_in_a_pipeline_is_one_line(train, capsys, pipelines, tmp_path, file):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    train(str(folder), *SHORT, "--dry_run", expect=2)
    assert file in message(capsys)


@pytest.mark.parametrize("flag", ["--pretrained_model", "--lora_weights", "--reference", "--feature_network_weights"])
def test_a_pipe_in_place_of_a_file_of_tensors_is_one_line(train, capsys, tmp_path, flag):
    name = {"--reference": "x.npz"}.get(flag, "x.safetensors")
    os.mkfifo(tmp_path / name)
    if flag == "--pretrained_model":
        train(str(tmp_path / name), *SHORT, expect=2)
    elif flag == "--lora_weights":
        train("sd", *SHORT, "--adaptation", "lora", flag, tmp_path / name, expect=2)
    elif flag == "--reference":
        with pytest.raises(UserError, match="pipe"):
            Statistics.read(tmp_path / name)
        return
    else:
        with pytest.raises((UserError, ValueError), match="pipe"):
            load_weights(str(tmp_path / name))
        return
    assert "x.safetensors" in message(capsys)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("text_encoder", "hidden_act", "bogus"), ("text_encoder", "num_attention_heads", 5)),
        *(("unet", "act_fn", "bogus"), ("unet", "down_block_types", ["No", "Block"])),
        ("vae", "norm_num_groups", 7),
    ],
)
def test_a_value_that_a_constructor_refuses_is_named(pipelines, tmp_path, part, key, value):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{folder}: {part}: .*{key}") as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


OTHER_THINGS = {
    "model.gguf": "is a GGUF file, whose quantized weights",
    "model.onnx": "is an ONNX file",
    "model.zip": "is an archive; unpack it",
    "model.json": "is a .json file",
    "model": "is a file",
    "pipe": "is a pipe",
    "pipe.safetensors": "is a pipe",
    "link.gguf": "is a broken link",
    "missing.gguf": "does not exist",
    "/dev/zero": "is a device",
    "/nowhere/model": "does not exist",
}


def put(folder: Path, name: str) -> Path:
    """Something that is no model, by the name of what it is."""
    path = folder / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("link"):
        path.symlink_to(folder / "nothing")
    elif name.startswith("model"):
        path.write_bytes(b"GGUF" + bytes(100))
    return path


@pytest.mark.parametrize("name", OTHER_THINGS)
@pytest.mark.parametrize(
    "flag",
    [
        *("--pretrained_model", "--pretrained_vae_model_name_or_path", "--lora_weights", "--pretrained_model_config"),
        *("--vae", "--pipeline", "--lora", "--baseline", "--pipeline_config", "unconditional --pretrained_model"),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(refused, capsys, pipelines, images, tmp_path, flag, name):
    from evaluate_pipeline import main as evaluate
    from train_unconditional import main as train_unconditional

    path, known = put(tmp_path, name), flag.rpartition(" ")[2]
    said = f"{known} {path} {OTHER_THINGS[name]}"
    if flag in ("--pipeline", "--lora", "--baseline", "--pipeline_config"):
        words = ["--prompts", "a", *["--pipeline", pipelines["sd"]] * (flag != "--pipeline"), flag, path]
        assert evaluate([str(word) for word in words]) == 2
        assert said in message(capsys)
    elif flag in ("--vae", "unconditional --pretrained_model"):
        words = ["--train_data_dir", images, "--output_dir", tmp_path / "out", known, path]
        assert train_unconditional([str(word) for word in words]) == 2
        assert said in message(capsys)
    else:
        refused([*["--adaptation", "lora"] * (flag == "--lora_weights"), "--dry_run", flag, path], said)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\ud800"}}},
        lambda config: config | {"model": {"type": "BPE", "vocab": [], "merges": 1e308}},
        lambda config: config | {"decoder": {"type": "Nothing"}},
        lambda config: {},
    ],
)
def test_a_tokenizer_that_is_broken_is_one_line(pipelines, tmp_path, change):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=f"{folder}") as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", ["1000", "x" * 9999, 0, -1, True, None, [], {"a": 1}, 1000, float("nan"), 2])
def test_a_length_of_a_tokenizer_that_is_none_is_one_line(pipelines, tmp_path, length):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    if length is None:  # the library's own large number
        assert loaded(folder).tokenizer.model_max_length == 77
        return
    with pytest.raises(UserError, match="tokenizer") as raised:
        loaded(folder)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("text", ["a plain one", "a newword"])
def test_a_tokenizer_of_another_model_is_one_line(train, pipelines, tmp_path, capsys, caplog, text, workers):
    """Tokens that the text encoder has no embedding of: special ones, which each caption has, or a word."""
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["newword"]) if "new" in text else tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    tokenizer.save_pretrained(folder / "tokenizer")
    data = tiny.make_images(tmp_path / "data", 4)
    (data / "metadata.jsonl").unlink()
    for number in range(4):
        (data / f"{number:03d}.txt").write_text("a plain one")
    flags = [*SHORT, "--train_batch_size", 4, "--dataloader_num_workers", workers]
    if "new" in text:  # a word that no caption has costs nothing
        train(str(folder), *flags, data=data)
        assert "1 tokens without an embedding in its text encoder, such as 'newword'" in caplog.text
        (data / "002.txt").write_text(text)
    train(str(folder), *flags, data=data, out="refused", expect=2)
    assert "they are from different models" in message(capsys)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "_class_name", {"a": 1}),
        ("model_index.json", "vae", ["diffusers", None]),
        ("model_index.json", "vae", ["diffusers"]),
        ("model_index.json", "unet", ["diffusers", ["UNet2DConditionModel"]]),
        ("model_index.json", "text_encoder", [{"a": 1}, "CLIPTextModel"]),
        ("model_index.json", "tokenizer", [None, None]),
        ("model_index.json", "unet", "UNet"),
        ("model_index.json", "vae", [1, 2]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", True),
        ("scheduler/scheduler_config.json", "beta_start", float("nan")),
        ("scheduler/scheduler_config.json", "beta_end", None),
        ("scheduler/scheduler_config.json", "trained_betas", "none"),
        ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"]),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "scaling_factor", "0.18"),
        ("vae/config.json", "scaling_factor", float("inf")),
        ("vae/config.json", "block_out_channels", None),
        ("vae/config.json", "block_out_channels", []),
        ("unet/config.json", "block_out_channels", [8, "16"]),
        ("unet/config.json", "cross_attention_dim", {}),
        ("unet/config.json", "down_block_types", 5),
        ("unet/config.json", "down_block_types", ["NoBlock", "DownBlock2D"]),
        ("unet/config.json", "act_fn", 3),
        ("unet/config.json", "norm_num_groups", 7),
        ("text_encoder/config.json", "hidden_size", "32"),
        ("text_encoder/config.json", "num_hidden_layers", None),
        ("text_encoder/config.json", "hidden_act", "none"),
        ("text_encoder/config.json", "num_attention_heads", 0),
    ],
    ids=str,
)
def test_configs_of_wrong_types_end_in_one_line(pipelines, tmp_path, file, key, value):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f"{folder}") as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_configs_with_a_mark_are_one_line(pipelines, tmp_path, file, encoding):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (folder / file).write_bytes((folder / file).read_text().encode(encoding))
    with pytest.raises(UserError, match=f"{folder / file} starts with a byte order mark.*save it as UTF-8"):
        loaded(folder)


def test_a_unet_that_says_no_size_gives_a_result_that_draws(train, pipelines, tmp_path, caplog):
    from diffusers import DiffusionPipeline

    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": None}))
    out = train(str(folder), *SHORT)
    edge = 512 // DiffusionPipeline.from_pretrained(out).vae_scale_factor
    assert json.loads((out / "unet/config.json").read_text())["sample_size"] == edge
    assert f"the UNet's config has no sample_size; the exported one gets {edge}" in caplog.text


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 100_000, "[]", "", '{"_class_name": NaN}'])
@pytest.mark.parametrize("file", ["model_index.json", "text_encoder/config.json"])
def test_configs_that_are_none_end_in_one_line(train, capsys, pipelines, tmp_path, file, content):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (folder / file).write_text(content)
    train(str(folder), *SHORT, "--dry_run", expect=2)
    assert str(folder) in message(capsys)


def test_a_distilled_base_is_refused_or_gets_a_line(train, capsys, caplog, pipelines, tmp_path):
    from diffusers import LCMScheduler, UNet2DConditionModel

    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    LCMScheduler.from_pretrained(pipelines["sd"], subfolder="scheduler").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    train(str(folder), *SHORT, "--dry_run")
    assert "LCMScheduler) looks like a model distilled" in caplog.text
    config = UNet2DConditionModel.load_config(pipelines["sd"] / "unet")
    UNet2DConditionModel.from_config(config, time_cond_proj_dim=8).save_pretrained(folder / "unet")
    train(str(folder), *SHORT, "--dry_run", expect=2)
    line = message(capsys)
    assert "time_cond_proj_dim 8" in line
    assert "fine-tune the model that it was distilled from" in line


@pytest.mark.parametrize("length", [None, "gone"])
def test_a_pipeline_whose_tokenizer_says_no_length_is_evaluated(pipelines, tmp_path, length):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config | ({} if length == "gone" else {"model_max_length": None})))
    found = load_pipeline_folder(
        StableDiffusionPipeline,
        str(folder),
        "--pipeline",
        {"default": torch.float32},
        Download(use_safetensors=True),
        given={},
    )
    assert found.tokenizer.model_max_length == 77


@pytest.mark.parametrize(
    ("file", "key"),
    [
        *(("text_encoder/config.json", "num_hidden_layers"), ("unet/config.json", "layers_per_block")),
        *(("vae/config.json", "layers_per_block"), ("unet/config.json", "transformer_layers_per_block")),
    ],
)
def test_models_of_a_million_layers_are_refused_before_they_are_made(pipelines, tmp_path, file, key):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {key: 10**6}))
    with pytest.raises(UserError, match=key):
        loaded(folder)
