"""train_unconditional.py: what it exports against diffusers, what it says, what it refuses."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import message
from tests.launching import succeed
from tests.repository import ROOT
from tests.unconditional_runs import SHORT, drawn, load, samples
from utils.diffusion.options import SAMPLERS, ProcessOptions
from utils.diffusion.samplers import sampler_of
from utils.models.unconditional import fresh_scheduler
from utils.sampling.grid_samples import film

EXPORTS = {
    "ddpm": ("pixels",),
    "ddpm v ema": ("pixels", "--prediction_type", "v_prediction", "--use_ema", "--rescale_betas_zero_snr"),
    "ddpm sigmoid": ("pixels", "--beta_schedule", "sigmoid", "--prediction_type", "sample"),
    "grey": ("pixels", "--image_channels", 1),
    "transparent": ("pixels", "--image_channels", 4, "--preserve_input_precision"),
    "ddim": ("pixels", "--sampler", "ddim"),
    "ddim sigmoid": ("pixels", "--sampler", "ddim", "--ddpm_beta_schedule", "sigmoid"),
    "flow": ("flow", "--flow_shift", 2),
    "labels": ("labels",),
    "labels ddim": ("labels", "--sampler", "ddim", "--guidance_scale", 1),
    "labels flow": ("labels", "--flow_matching"),
    "latents": ("latents",),
    "latents flow": ("latents", "--flow_matching"),
    "labelled latents": ("labelled latents", "--use_ema"),
    "labelled latents flow": ("labelled latents", "--flow_matching"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_an_exported_folder_draws_the_runs_own_samples(train, case):
    name, *flags = EXPORTS[case]
    out = train(name, *SHORT, *flags, "--seed", 7, "--num_inference_steps", 3)
    pipeline = load(out)
    has_classes = "label" in name
    more = {"class_labels": [0, 1], "guidance_scale": 1 if "--guidance_scale" in flags else 2} if has_classes else {}
    more = more or {"batch_size": 2}
    assert np.array_equal(drawn(pipeline, 7, **more), samples(out / "samples" / "final"))
    if has_classes:
        assert pipeline.labels == {"cat": 0, "dog": 1}
        assert pipeline.get_label_ids(["dog", "cat"]) == [1, 0]
    assert (out / "samples" / "final" / "grid.png").exists()
    assert (out / "samples" / "film_strip.png").exists()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddpm", "ddim")])
def test_other_samplers_draw_from_the_same_model(train, name):
    out = train("pixels", *SHORT, "--sampler", name, "--beta_schedule", "sigmoid", "--num_inference_steps", 3)
    assert type(load(out).scheduler).__name__ == "DDPMScheduler"
    from diffusers import UNet2DModel

    unet, sampler = UNet2DModel.from_pretrained(out / "unet"), sampler_of(load(out).scheduler, name)
    sampler.set_timesteps(3)
    generators = [torch.Generator().manual_seed(number) for number in range(2)]
    image = torch.cat([torch.randn(1, 3, 32, 32, generator=each) for each in generators]) * sampler.init_noise_sigma
    with torch.no_grad():
        for number, t in enumerate(sampler.timesteps):
            output = unet(sampler.scale_model_input(image, t), t).sample
            if name == "euler":  # whose class can't clip: the noise is what the clipped estimate leaves
                sigma = sampler.sigmas[number]
                output = (image - (image - sigma * output).clamp(-1, 1)) / sigma
            image = sampler.step(output, t, image).prev_sample
    pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.abs(pixels.astype(int) - samples(out / "samples" / "final")).max() <= 1


def test_samples_take_no_more_steps_than_a_short_schedule_has(train, capsys, caplog):
    from utils.sampling.sample_options import SamplingOptions

    options = ProcessOptions(ddpm_num_steps=12)
    assert SamplingOptions().steps_of(fresh_scheduler(options, clips=True)) == 12
    assert SamplingOptions().steps_of(fresh_scheduler(ProcessOptions(), clips=True)) == 1000
    train("pixels", *SHORT, "--ddpm_num_steps", 150, "--num_inference_steps", 2, "--dry_run")
    assert "ends with 4" in caplog.text  # 47 %, the root of alpha_bar
    caplog.clear()
    train("pixels", *SHORT, "--ddpm_num_steps", 12, "--beta_schedule", "cosine", "--dry_run")
    assert "ends with" not in caplog.text
    train("pixels", *SHORT, "--ddpm_num_steps", 12, "--num_inference_steps", 13, "--sampler", "dpmsolver++", expect=2)
    line = message(capsys)
    assert "--num_inference_steps" in line
    assert "at most 12" in line


def test_the_model_card_draws_from_a_short_schedule(train, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "utils.training.result.publish", lambda folder, repository, hub, facts, samples: calls.append(facts.call)
    )
    for name in ("pixels", "labels"):
        train(name, *SHORT, "--ddpm_num_steps", 8, "--num_inference_steps", 2, "--max_train_steps", 1, out=name)
    assert calls == ["pipeline(num_inference_steps=8)", "pipeline([0], num_inference_steps=8)"]


def test_a_transformer_of_classes_has_the_slots_that_its_pipeline_expects(train):
    out = train("labelled latents", *SHORT)
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["num_embeds_ada_norm"] == 1000
    tables = {key: value for key, value in weights(out, "transformer").items() if "embedding_table" in key}
    assert tables
    assert all(len(table) == 1001 for table in tables.values())
    index = json.loads((out / "model_index.json").read_text())
    assert index["id2label"] == {"0": "cat", "1": "dog"}


def test_dropped_labels_train_the_slot_of_no_class(train):
    out = train("labels", *SHORT, "--label_dropout", 1.0, "--weight_init", "xavier_kaiming", "--adam_weight_decay", 0)
    other = train(
        "labels", *SHORT, "--label_dropout", 0.0, "--weight_init", "xavier_kaiming", "--adam_weight_decay", 0, out="b"
    )
    one, two = (weights(each)["class_embedding.weight"] for each in (out, other))
    assert one.shape == (3, 32)
    changed = (one != two).any(1)
    assert changed[2]
    assert changed[:2].any()


def test_an_error_of_one_process_keeps_its_kind_under_this_scripts_names(capsys, monkeypatch):
    from train_unconditional import OWN_NAMES
    from utils.config.options import ProcessError, run_script

    def run(argv):
        raise ProcessError("--caption_column labl: row 3 holds no class")

    monkeypatch.setenv("RANK", "1")
    assert run_script(run, [], OWN_NAMES) == 2
    assert message(capsys) == "error: --label_column labl: row 3 holds no class"


@pytest.mark.parametrize(
    ("name", "flags", "is_other"),
    [
        ("pixels", ("--sampler", "ddim"), False),
        ("pixels", ("--sampler", "euler"), True),
        ("latents", ("--sampler", "ddpm"), True),
        ("latents", ("--flow_matching", "--sampler", "euler"), True),
        ("latents", ("--flow_matching",), False),
        ("latents", ("--sampler", "ddim"), False),
        ("labels", ("--sampler", "ddim"), False),
        ("flow", ("--sampler", "heun"), True),
    ],
)
def test_samples_by_another_sampler_than_the_results_are_said(train, caplog, name, flags, is_other):
    train(name, "--dry_run", *flags)
    assert ("the run samples with" in caplog.text) == is_other


@pytest.mark.parametrize("name", ["latents", "labelled latents"])
def test_what_a_pipeline_does_not_know_of_a_vae_is_said(train, pipelines, tmp_path, caplog, name):
    train(name, "--dry_run")
    assert "only scaled" not in caplog.text
    folder = shutil.copytree(pipelines["vae"], tmp_path / "shifted")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1, "latents_mean": [0.5] * 4}))
    train(name, "--dry_run", "--vae", folder)
    assert caplog.text.count("the VAE's shift_factor, latents_mean: ignored in training") == 1


def test_the_cached_run_trains_what_the_live_one_does(train, tmp_path):
    flags = (*SHORT, "--center_crop", "--encoding_cache_dir", tmp_path / "cache")
    live, cached = train("latents", *flags, out="live"), train("latents", *flags, "--cache_latents", out="cached")
    torch.testing.assert_close(losses(live), losses(cached), rtol=1e-5, atol=0)


def test_the_validation_loss_is_measured_and_the_best_is_kept(train):
    flags = ("--validation_split", 0.4, "--save_images_steps", 2, "--max_train_steps", 4, "--train_batch_size", 2)
    out = train("labels", *flags, "--num_validation_timesteps", 4)
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert len(lines[0]["curve"]) == 4
    assert load(out / "best").unet
    assert {path.name for path in (out / "samples").iterdir()} == {
        "step-0",
        "step-2",
        "final",
        "film_strip.png",
        "samples.jsonl",
    }


@pytest.mark.parametrize("name", ["pixels", "labelled latents"])
def test_dry_run(train, capsys, name):
    out = train(name, *SHORT, "--dry_run")
    printed = capsys.readouterr().out
    assert {"pixels": "DDPMPipeline", "labelled latents": "DiTPipeline"}[name] in printed
    assert {"pixels": "no classes", "labelled latents": "2 classes"}[name] in printed
    assert "2 optimizer steps" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png",
        "dry_run_report.json",
        "model_summary.json",
    ]


def test_a_run_that_is_ended_in_time_goes_on_bit_by_bit(train):
    flags = ("--train_batch_size", 2, "--use_ema", "--max_train_steps", 3)
    whole = train("labels", *flags, out="whole")
    train("labels", *flags, "--max_train_time", "0:00:00", out="parts")
    assert {path.name for path in (whole.parent / "parts").glob("checkpoint-*")} == {"checkpoint-1"}
    parts = train("labels", *flags, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(whole) == losses(parts)
    for name in ("unet", "unet_ema"):
        assert_same_bits(weights(whole / "checkpoint-3", name), weights(parts / "checkpoint-3", name))
    assert np.array_equal(samples(whole / "samples" / "final"), samples(parts / "samples" / "final"))


def test_aspect_ratio_buckets(train):
    flags = ("--use_aspect_ratio_buckets", "--bucket_step", 8, "--bucket_group_size", 1, "--random_flip")
    out = train("pixels", *SHORT, *flags)
    assert load(out).unet.config.sample_size == 32


@pytest.mark.slow
def test_two_processes_train_what_one_does(train, images, tmp_path):
    flags = ("--max_train_steps", 4, "--adam_epsilon", 1e-5, "--learning_rate", 1e-3)
    alone = train("pixels", *flags, "--train_batch_size", 4)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29641"]
    words += [ROOT / "train_unconditional.py", "--train_data_dir", images, "--output_dir", tmp_path / "two"]
    words += [*tiny.UNCONDITIONAL["pixels"], *flags, "--resolution", 32, "--lr_warmup_steps", 0, "--report_to", "none"]
    words += ["--train_batch_size", 1, "--gradient_accumulation_steps", 2]
    succeed(words)
    for key, tensor in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], tensor, rtol=1e-4, atol=2e-6)
    assert len(list((tmp_path / "two" / "samples" / "final").glob("0*.png"))) == 2


@pytest.mark.parametrize(
    ("name", "flags", "parts"),
    [
        ("pixels", ["--channel_mult", 1, 2, 2, 2, 2], ["--channel_mult", "number 5, 2", "2x2", "4x4"]),
        ("pixels", ["--attention_resolutions", 9], ["--attention_resolutions 9", "32, 16"]),
        ("pixels", ["--cache_latents"], ["--cache_latents", "--vae"]),
        ("pixels", ["--model_size", "huge"], ["--model_size", "huge"]),
        ("pixels", ["--label_column", "x"], ["--label_column", "--class_conditional"]),
        ("pixels", ["--guidance_scale", 3], ["--guidance_scale", "--class_conditional"]),
        ("pixels", ["--class_conditional"], ["--class_conditional", "at least two classes"]),
        ("pixels", ["--sampler", "heun", "--prediction_type", "sample"], ["--sampler heun", "sample"]),
        ("pixels", ["--eta", 0.5], ["--eta", "--sampler ddim"]),
        ("pixels", ["--rescale_betas_zero_snr"], ["--prediction_type", "zero terminal SNR"]),
        ("pixels", ["--model_config_name_or_path", "/nowhere"], ["--model_config_name_or_path", "leave out"]),
        ("pixels", ["--vae", "/nowhere"], ["--vae /nowhere"]),
        ("pixels", ["--image_channels", 2], ["--image_channels", "2"]),
        ("pixels", ["--dropout", 1], ["--dropout", "1"]),
        ("pixels", ["--flow_shift", 3], ["--flow_shift", "--flow_matching"]),
        ("pixels", ["--pretrained_model", "/nowhere"], ["--model_size", "--pretrained_model"]),
        ("flow", ["--prediction_type", "epsilon"], ["--prediction_type", "--flow_matching"]),
        ("flow", ["--sampler", "ddpm"], ["--sampler", "euler, heun", "ddpm"]),
        ("latents", ["--image_channels", 1], ["--image_channels", "3"]),
        ("latents", ["--resolution", 500], ["--resolution", "500"]),
        ("labelled latents", ["--patch_size", 3], ["--patch_size", "3"]),
        (
            "labelled latents",
            ["--use_aspect_ratio_buckets", "--bucket_step", 8, "--train_batch_size", 1],
            ["--use_aspect_ratio_buckets", "square images"],
        ),
        ("labels", ["--streaming"], ["--class_conditional", "--streaming"]),
    ],
)
def test_refused_options(train, capsys, name, flags, parts):
    train(name, *SHORT, *flags, expect=2)
    line = message(capsys)
    assert all(part in line for part in parts), line


def test_help_names_every_flag_of_the_diffusers_example():
    words = [sys.executable, str(ROOT / "train_unconditional.py"), "--help"]
    shown = succeed(words)
    flags = (ROOT / "tests" / "diffusers_unconditional_flags.txt").read_text().split()
    assert not [flag for flag in flags if f" {flag} " not in shown and f" {flag}," not in shown]


EXAMPLE = """--train_batch_size=1 --num_epochs=1 --gradient_accumulation_steps=1 --ddpm_num_inference_steps 2
    --learning_rate=1e-3 --lr_warmup_steps=5"""


@pytest.mark.slow
def test_the_diffusers_examples_own_tests(train):
    from tests.conftest import reset_accelerate

    out = train("pixels", *EXAMPLE.split())
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    flags = [*EXAMPLE.split(), "--checkpointing_steps=2"]
    out = train("pixels", *flags, "--checkpoints_total_limit=2", out="limit")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    reset_accelerate()
    out = train("pixels", *EXAMPLE.split(), "--checkpointing_steps=1", out="many")
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in range(1, 7)}
    more = ("--num_epochs=2", "--resume_from_checkpoint=checkpoint-6", "--checkpoints_total_limit=2")
    train("pixels", *flags, *more, out="many")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}


def test_overwriting_another_run(train, capsys):
    train("pixels", *SHORT)
    train("pixels", *SHORT, expect=2)
    assert "--overwrite_output_dir" in message(capsys)
    train("pixels", *SHORT, "--overwrite_output_dir")


def test_the_pipeline_is_saved_while_it_trains(train, monkeypatch):
    from utils.training.state import TrainingState

    saved = []
    export = TrainingState.export
    monkeypatch.setattr(TrainingState, "export", lambda self, folder: (saved.append(folder), export(self, folder)))
    train("pixels", "--num_epochs", 3, "--train_batch_size", 2, "--save_model_epochs", 1, "--save_images_epochs", 2)
    assert len(saved) == 3


def test_channels_last_and_fused_adamw_are_named_and_train_the_same(train, caplog):
    plain = train("pixels", *SHORT, out="plain")
    fast = train("pixels", *SHORT, "--channels_last", "--fused_adamw", "true", out="fast")
    lines = [each for each in caplog.messages if each.startswith("active for speed: ")]
    assert any("--channels_last, " in line and "--fused_adamw" in line for line in lines)
    for key, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(fast)[key], rtol=1e-4, atol=3e-4)


def test_training_through_the_script_lowers_the_loss(train):
    out = train("flow", "--max_train_steps", 60, "--train_batch_size", 6, "--learning_rate", 3e-3, "--center_crop")
    assert np.mean(losses(out)[-10:]) < 0.6 * np.mean(losses(out)[:5])
    assert_same_bits(weights(out), weights(out / "checkpoint-60"))


def test_the_readmes_commands_parse(tmp_path):
    import re
    import shlex

    from train_unconditional import Options
    from utils.config.options import parse

    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if "train_unconditional.py " in line]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command)
        words = words[words.index("train_unconditional.py") + 1 :]
        parse(Options, [str(tmp_path) if word == "path/to/images" else word for word in words], "")


@pytest.mark.nightly
def test_the_demo_trains_draws_and_judges(tmp_path, monkeypatch, capsys):
    import unconditional
    from tests.conftest import reset_accelerate

    reset_accelerate()
    shortened = [*unconditional.ARGUMENTS, "--max_train_steps", "2", "--train_batch_size", "4"]
    monkeypatch.setattr(unconditional, "ARGUMENTS", [*shortened, "--num_inference_steps", "2"])
    monkeypatch.setattr(unconditional, "NUM_DRAWN", 12)
    monkeypatch.setattr(unconditional, "SAMPLING_STEPS", 2)
    monkeypatch.setattr("sys.argv", ["unconditional.py", "--output_dir", str(tmp_path)])
    unconditional.main()
    assert "of which the classifier is sure" in capsys.readouterr().out
    assert (tmp_path / "unconditional_grid.png").stat().st_size > 500
    assert (tmp_path / "unconditional_film_strip.png").exists()


@pytest.mark.nightly
def test_real_digits_of_another_half_are_what_the_judge_is_sure_of(tmp_path):
    import classifier
    import digits
    import unconditional

    drawing, _ = digits.split_digits()
    few = digits.Digits(drawing.ink[:300], drawing.labels[:300])
    unconditional.write_images(few, tmp_path / "few")
    ink = unconditional.read_images(tmp_path / "few")
    np.testing.assert_allclose(ink.numpy(), few.ink, atol=1 / 255)
    said = unconditional.verdict(ink, classifier.train_classifier(), ink, ink[:50])
    assert "10 of 10" in said
    assert "0.000 for drawn digits" in said


def test_the_film_goes_on_with_the_run_and_without_what_it_left_behind(train):
    def film_and_folders(out: Path) -> tuple[int, set[str]]:
        with Image.open(out / "samples" / "film_strip.png") as strip:
            folders = {path.name for path in (out / "samples").iterdir() if path.is_dir()}
            return (strip.width - 2) // 66, {name for name in folders if not name.startswith("abandoned-")}

    flags = ("--train_batch_size", 2, "--save_images_steps", 2, "--checkpointing_steps", 2, "--resolution", 16)
    flags += ("--attention_resolutions", 8)
    out = train("labels", *flags, "--max_train_steps", 4)
    assert film_and_folders(out) == (3, {"step-0", "step-2", "final"})
    record = json.loads((out / "samples" / "final" / "samples.json").read_text())
    assert record["step"] == 4
    assert [each["of"] for each in record["samples"]] == ["cat", "dog"]
    train("labels", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert film_and_folders(out) == (4, {"step-0", "step-2", "step-4", "final"})
    train("labels", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert film_and_folders(out) == (4, {"step-0", "step-2", "step-4", "final"})
    train("labels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "checkpoint-2")
    assert film_and_folders(out) == (3, {"step-0", "step-2", "final"})
    train("labels", *flags, "--max_train_steps", 1, "--overwrite_output_dir")
    assert film_and_folders(out) == (2, {"step-0", "final"})


def test_the_film_has_few_frames_and_most_of_them_early(tmp_path):
    for step in range(10, 1510, 10):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        Image.new("L", (1, 1), step // 10).save(folder / "000.png")
    (tmp_path / "final").mkdir()
    Image.new("L", (1, 1), 255).save(tmp_path / "final" / "000.png")
    steps = [frame.getpixel((0, 0)) * 10 for frame in film(tmp_path)]
    assert len(steps) <= 20
    assert steps[0] == 10
    assert steps[-1] == 2550
    assert sum(step <= 100 for step in steps) >= 5
