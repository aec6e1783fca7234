"""Bad input ends in one line on stderr, with flag, value and cure, and exit status 2."""

import json
import os
import shutil

import pytest
from PIL import Image

from tests import tiny
from tests.conftest import message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--resolution", "500"], ["--resolution", "500", "496 or 504"]),
        (["--learning_rate", "-1e-4"], ["--learning_rate", "-0.0001"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--train_batch_size", "0"], ["--train_batch_size", "0"]),
        (["--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps", "0"]),
        (["--max_train_steps", "0"], ["--max_train_steps", "0"]),
        (["--learning_rat", "1"], ["--learning_rat", "--learning_rate"]),
        (["--use_emma"], ["--use_emma", "--use_ema"]),
        (["--rank", "4"], ["--rank", "--adaptation lora"]),
        (["--lora_dropout", "0.1"], ["--lora_dropout", "--adaptation lora"]),
        (["--adaptation", "lora", "--rank", "0"], ["--rank", "0"]),
        (["--adaptation", "lora", "--lora_target_modules", "nothing"], ["--lora_target_modules", "nothing"]),
        (["--adaptation", "lora", "--lora_weights", "missing.safetensors"], ["--lora_weights", "missing"]),
        (["--text_encoder_lr", "1e-5"], ["--text_encoder_lr", "--train_text_encoder"]),
        (["--caption_dropout", "1.5"], ["--caption_dropout", "1.5"]),
        (["--image_column", "picture"], ["--image_column", "picture", "leave it out"]),
        (["--caption_column", "txt"], ["--caption_column", "txt", "did you mean --caption_column text?"]),
        (["--resume_from_checkpoint", "checkpoint-7"], ["--resume_from_checkpoint", "checkpoint-7"]),
        (["--mixed_precision", "fp16"], ["--mixed_precision", "fp16", "GPU"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "fp8"]),
        (["--dream_training", "--prediction_type", "v_prediction"], ["--dream_training", "v_prediction"]),
        (["--train_layers", "attn9"], ["--train_layers", "attn9"]),
        (["--train_layers", "("], ["--train_layers", "regular expression"]),
        (["--train_layers", "attn", "--adaptation", "lora"], ["--train_layers", "--lora_target_modules"]),
        (["--rescale_betas_zero_snr"], ["--prediction_type", "zero terminal SNR"]),
        (["--min_timestep", "500", "--max_timestep", "400"], ["--max_timestep", "400", "(500, 1000]"]),
        (["--snr_gamma", "5", "--weighting", "p2"], ["--snr_gamma", "--weighting p2"]),
        (["--enable_xformers_memory_efficient_attention"], ["--enable_xformers_memory_efficient_attention"]),
        (["--enable_npu_flash_attention"], ["--enable_npu_flash_attention"]),
        (["--lr_scheduler", "sawtooth"], ["--lr_scheduler", "sawtooth", "cosine"]),
        (["--lr_scheduler", "piecewise_constant"], ["--lr_step_rules"]),
        (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "x"], ["piecewise_constant"]),
        (["--snr_gamma", "0"], ["--snr_gamma", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--clip_skip", "5"], ["--clip_skip", "5"]),
        (["--unet_config", "missing.json"], ["--unet_config", "missing.json"]),
        (["--hub_model_id", "me/model"], ["--hub_model_id", "--push_to_hub"]),
        (["--pretrained_vae_model_name_or_path", "/missing"], ["--pretrained_vae_model_name_or_path", "/missing"]),
        (["--timestep_bias_strategy", "range", "--timestep_bias_end", "2000"], ["--timestep_bias_end", "2000"]),
        (["--validation_prompt", "a", "--validation_prompts", "b"], ["--validation_prompt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_options(refused, flags, parts):
    refused(["--max_train_steps", 1, *flags], *parts)


def test_no_data(pipelines, capsys, tmp_path):
    from train_text_to_image import main

    assert main(["--pretrained_model", str(pipelines["sd"]), "--output_dir", str(tmp_path)]) == 2
    assert "--dataset_name, --train_data_dir or --dataset_file" in message(capsys)


def test_no_pipeline(images, capsys):
    from train_text_to_image import main

    assert main(["--train_data_dir", str(images)]) == 2
    assert "--pretrained_model" in message(capsys)


def test_a_pipeline_that_does_not_exist(train, capsys):
    train("/nowhere/pipeline", expect=2)
    assert "/nowhere/pipeline does not exist" in message(capsys)
    train("nobody/nothing", expect=2)
    assert "nobody/nothing is not a local folder" in message(capsys)


def test_a_pipeline_of_an_unsupported_class(train, capsys, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    train(str(folder), expect=2)
    line = message(capsys)
    assert "StableDiffusion3Pipeline" in line
    assert "StableDiffusionXLPipeline" in line


def test_weights_that_would_need_unpickling(train, capsys, pipelines, tmp_path):
    import torch

    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    train(str(folder), expect=2)
    assert "unpickling" in message(capsys)
    train(str(tmp_path / "model.ckpt"), expect=2)
    assert "unpickling" in message(capsys)


def test_a_unet_that_does_not_fit_the_text_encoder(train, capsys, pipelines, tmp_path):
    config = json.loads((pipelines["sd"] / "unet" / "config.json").read_text())
    (tmp_path / "unet.json").write_text(json.dumps(config | {"cross_attention_dim": 48}))
    train("sd", "--unet_config", tmp_path / "unet.json", expect=2)
    assert "cross_attention_dim 48" in message(capsys)


def test_data_without_captions(train, capsys, tmp_path):
    tiny.make_images(tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").unlink()
    train("sd", "--on_missing_caption", "error", data=tmp_path / "data", expect=2)
    assert "6 images have no caption (--on_missing_caption error), such as 000.png" in message(capsys)


def test_an_empty_dataset(train, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    train("sd", data=tmp_path / "data", expect=2)
    assert "there are no images in" in message(capsys)


def test_an_output_folder_that_cannot_be_written(train, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    train("sd", expect=2)
    assert "--output_dir" in message(capsys)


@pytest.mark.parametrize(
    ("path", "said"), [("", "must be a path, got ''"), (" ", "must be a path"), ("x" * 300, "at most 255 bytes")]
)
def test_an_output_folder_that_is_no_name(refused, path, said):
    refused(["--dry_run", "--output_dir", path], "--output_dir", said)


@pytest.mark.parametrize("flag", ["--output_dir", "--encoding_cache_dir", "--cache_dir", "--logging_dir"])
@pytest.mark.parametrize("is_below", [False, True])
@pytest.mark.parametrize("is_dry", [False, True])
def test_a_path_to_write_to_that_is_or_lies_below_a_file(refused, tmp_path, flag, is_below, is_dry):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, kind in (("file", "a file"), ("link", "not a folder")):
        place = tmp_path / name / "deep" / "er" if is_below else tmp_path / name
        where = tmp_path / name if is_below else "it"
        refused([flag, place, *["--dry_run"] * is_dry], f"{flag} {place} can't be written: {where} is {kind}")


def test_evaluation_refuses_such_paths_too(pipelines, capsys, tmp_path):
    from evaluate_pipeline import main

    (tmp_path / "file").write_text("a file")
    for flag, name in (("--output_dir", "file"), ("--export_geneval", "file/x"), ("--save_reference", "file/x.npz")):
        words = ["--pipeline", pipelines["sd"], "--prompts", "a", "--reference", tmp_path, flag, tmp_path / name]
        assert main([str(word) for word in words]) == 2
        assert f"{flag} {tmp_path / name} can't be written: " in message(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_dry_run_into_a_folder_that_may_not_be_written(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(["--dry_run", "--output_dir", tmp_path / "closed" / "out"], "can't be written: Permission denied")


def test_an_output_folder_that_holds_another_run(train, capsys):
    out = train("sd", "--max_train_steps", 1, "--train_batch_size", 1)
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    train("sd", "--max_train_steps", 2, "--train_batch_size", 1, expect=2)
    assert "contains another run" in message(capsys)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_an_output_folder_in_use(train, capsys, tmp_path):
    from utils.runtime.processes import OutputFolder

    other = OutputFolder(str(tmp_path / "out"))
    other.claim(resuming=False, overwrite=False)
    train("sd", "--resume_from_checkpoint", "latest", expect=2)
    assert "in use" in message(capsys)
    other.release()


@pytest.mark.parametrize("flag", ["--output_dir", "--logging_dir", "--encoding_cache_dir", "--cache_dir"])
def test_a_path_to_write_to_that_is_not_unicode(refused, tmp_path, flag):
    """No tokenizer can be written there, which would be found out after the training."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    refused([flag, path], f"{flag} must be UTF-8, got {tmp_path}/caf\\udce9; choose another name")


def test_unreadable_images_are_skipped_named_and_counted(train, capsys, tmp_path):
    data = tiny.make_images(tmp_path / "data")
    (data / "000.png").write_bytes(b"")
    (data / "001.png").write_bytes(b"no image")
    whole = (data / "002.png").read_bytes()
    (data / "002.png").write_bytes(whole[: len(whole) // 2])  # its header is right
    Image.new("L", (50, 40)).save(data / "003.png")
    flags = ("--max_train_steps", 4, "--train_batch_size", 2)
    train("sd", *flags, data=data, expect=2)
    assert "2 of 6 images can't be read, more than --max_bad_fraction 0.05" in message(capsys)
    out = train("sd", *flags, "--max_bad_fraction", 0.6, "--resume_from_checkpoint", "latest", data=data)
    report = json.loads((out / "data_report.json").read_text())
    assert {name.rpartition("/")[2] for name in report["unreadable"]} == {"000.png", "001.png", "002.png"}
    assert report["images"] == 6


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (("--adaptation", "lora"), (), "--adaptation full"),
        ((), ("--train_text_encoder",), "--train_text_encoder True"),
        ((), ("--use_8bit_adam",), "--optimizer adamw8bit"),
        ((), ("--seed", 3), "--seed 3"),
        (("--adaptation", "lora"), ("--adaptation", "lora", "--rank", 8), "--rank 8"),
        (("--adaptation", "lora"), ("--adaptation", "lora", "--lora_target_modules", "to_q"), "--lora_target_modules"),
    ],
)
def test_resuming_with_what_the_checkpoint_is_not_of(train, capsys, first, second, named):
    common = ("--max_train_steps", 1, "--train_batch_size", 1)
    train("sd", *common, *first)
    train("sd", *common, *second, "--resume_from_checkpoint", "latest", expect=2)
    assert named in message(capsys)


@pytest.mark.parametrize(
    "change",
    [
        5,
        {"block_out_channels": [-8, 8]},
        {"out_channels": 8},
        {"addition_embed_type": "text_time"},
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": 8},
    ],
    ids=str,
)
def test_unet_configs_that_could_not_train(train, capsys, pipelines, tmp_path, change):
    config = json.loads((pipelines["sd"] / "unet" / "config.json").read_text())
    (tmp_path / "unet.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    train("sd", "--unet_config", tmp_path / "unet.json", expect=2)
    assert "--unet_config" in message(capsys)


def test_broken_weights(train, capsys, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    train(str(folder), expect=2)
    assert "can't be loaded" in message(capsys)
    (tmp_path / "lora.safetensors").write_bytes(b"nothing")
    train("sd", "--adaptation", "lora", "--lora_weights", tmp_path / "lora.safetensors", expect=2)
    assert "lora.safetensors" in message(capsys)
    (tmp_path / "lora.bin").write_bytes(b"nothing")
    train("sd", "--adaptation", "lora", "--lora_weights", tmp_path / "lora.bin", expect=2)
    assert "unpickling" in message(capsys)
    train(str(tmp_path / "lora.safetensors"), expect=2)
    assert "can't be read as safetensors" in message(capsys)


def test_a_pipeline_without_a_tokenizer(train, capsys, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    shutil.rmtree(folder / "tokenizer")
    train(str(folder), expect=2)
    assert "tokenizer" in message(capsys)


def test_a_scheduler_without_betas(train, capsys, pipelines, tmp_path):
    from diffusers import EDMEulerScheduler

    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    train(str(folder), expect=2)
    assert "EDMEulerScheduler" in message(capsys)


def test_only_truncated_images(train, capsys, tmp_path):
    data = tiny.make_images(tmp_path / "data")
    for file in data.glob("*.png"):
        file.write_bytes(file.read_bytes()[:200])
    for workers in (0, 1):
        flags = ("--dataloader_num_workers", workers, "--train_batch_size", 1, "--resume_from_checkpoint", "latest")
        flags += ("--max_bad_fraction", 1)
        train("sd", *flags, data=data, expect=2)
        assert "images in a row can't be read" in message(capsys)


def test_a_tracker_that_is_not_installed(train, capsys, monkeypatch):
    monkeypatch.setattr("utils.runtime.tracker_table.find_spec", lambda name: None)
    train("sd", "--report_to", "wandb", expect=2)
    assert "pip install wandb" in message(capsys)


def test_a_token_that_a_tracker_would_record(train, capsys, monkeypatch):
    monkeypatch.setattr("utils.runtime.tracker_table.missing_package", lambda name: "")
    train("sd", "--report_to", "wandb", "--push_to_hub", "--hub_token", "hf_x", expect=2)
    assert "hf auth login" in message(capsys)


def test_resuming_with_options_that_change_the_training(train, capsys, caplog, tmp_path):
    data = tiny.make_images(tmp_path / "data", 4)
    common = ("--max_train_steps", 1, "--train_batch_size", 2, "--lr_scheduler", "cosine")
    train("sd", *common, data=data)
    resumed = (*common[2:], "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    changed = ("--learning_rate", 0.5, "--noise_offset", 0.1, "--gradient_accumulation_steps", 2)
    train("sd", *resumed, *changed, data=data, expect=2)
    error = message(capsys)
    said = (
        "--learning_rate 0.5 (the checkpoint used 0.0001)",
        "--noise_offset 0.1 (the checkpoint used 0.0)",
        "--global_batch 4 (the checkpoint used 2)",
    )
    assert all(part in error for part in (*said, "--allow_changed_options"))
    free = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 7, "--use_ema")
    caplog.clear()
    train("sd", *resumed, *free, data=data)
    assert any(
        "depends on the run's length, which was 1 steps and is now 2" in record.message for record in caplog.records
    )
    tiny.make_images(data, 5)
    more = (*resumed, "--max_train_steps", 3)
    train("sd", *more, data=data, expect=2)
    assert "was trained on other data: 1 added (004.png)" in message(capsys)
    caplog.clear()
    train("sd", *more, *changed, "--allow_changed_options", data=data)
    assert any("resuming from" in record.message and "--noise_offset" in record.message for record in caplog.records)
