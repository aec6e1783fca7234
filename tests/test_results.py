"""What a run leaves behind: pipelines and LoRA files that diffusers loads, checkpoints, samples, records."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import mostly_slow
from tests.test_equivalences import assert_same_bits, lora, weights
from utils.runtime.engines import Engine

SHORT = ("--max_train_steps", 2, "--train_batch_size", 2, "--learning_rate", 1e-3)


def draw(pipeline, prompt: str = "a red square", seed: int = 0, **more) -> np.ndarray:
    """One sample of a pipeline as pixels."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt,
        height=tiny.RESOLUTION,
        width=tiny.RESOLUTION,
        generator=torch.Generator("cpu").manual_seed(seed),
        **{"num_inference_steps": 3} | more,
    ).images[0]
    return np.asarray(image)


def load(folder: Path):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


VALIDATION = (
    "--validation_prompt",
    "a red square",
    "--num_validation_images",
    2,
    "--validation_num_inference_steps",
    3,
)


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
@pytest.mark.parametrize("ema", [(), ("--use_ema",)], ids=["", "ema"])
def test_the_exported_folder_draws_the_last_validation(train, name, ema):
    out = train(name, *SHORT, *VALIDATION, *ema, "--seed", 5)
    pipeline = load(out)
    for index in range(2):
        sample = np.asarray(Image.open(out / "samples" / "final" / f"00_{index}.png"))
        assert np.array_equal(sample, draw(pipeline, seed=5 + index))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_fine_tuning_moves_all_it_trains_and_nothing_else(train, pipelines, name, precision):
    out = train(name, *SHORT, "--train_text_encoder", "--mixed_precision", precision)
    for part in ("unet", "text_encoder", *(["text_encoder_2"] if name == "sdxl" else [])):
        before, after = weights(pipelines[name], part), weights(out, part)
        same = {key for key in before if torch.equal(before[key], after[key])}
        unread = {key for key in before if "layers.2." in key or "final_layer_norm" in key}
        assert same == (unread if (name, part) == ("sdxl", "text_encoder") else set())
        assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert_same_bits(weights(pipelines[name], "vae"), weights(out, "vae"))


def test_without_train_text_encoder_the_text_encoder_stays(train, pipelines):
    out = train("sd", *SHORT)
    assert_same_bits(weights(pipelines["sd"], "text_encoder"), weights(out, "text_encoder"))


LORAS = {
    "plain": ("sd",),
    "alpha": ("sd", "--rank", 2, "--lora_alpha", 8),
    "rslora": ("sd2", "--use_rslora", "--lora_alpha", 16),
    "dora": ("sd", "--use_dora"),
    "text encoders": ("sdxl", "--train_text_encoder", "--lora_alpha", 2),
    "targets": ("sdxl", "--lora_target_modules", "to_q", "conv1"),
    "bf16": ("sd", "--mixed_precision", "bf16"),
}


@pytest.mark.parametrize("case", LORAS)
def test_lora_loads_and_fuses(train, pipelines, case):
    name, *flags = LORAS[case]
    out = train(name, *SHORT, *VALIDATION, "--adaptation", "lora", "--learning_rate", 5e-2, "--export_fused", *flags)
    tensors = lora(out)
    assert all("lora" in key for key in tensors)
    assert all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    pipeline = load(pipelines[name])
    before = draw(pipeline)
    pipeline.load_lora_weights(out)
    after, fused = draw(pipeline), draw(load(out / "fused"))
    assert np.abs(after.astype(int) - before).max() > 3
    assert np.abs(after.astype(int) - fused).max() <= 1
    if case != "bf16":
        sample = np.asarray(Image.open(out / "samples" / "final" / "00_0.png"))
        assert np.array_equal(after, sample)


def test_fused_is_base_plus_scaled_product(train, pipelines):
    out = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, "--lora_alpha", 8, "--export_fused")
    base, fused, tensors = weights(pipelines["sd"]), weights(out / "fused"), lora(out)
    downs = [key for key in tensors if ".lora.down." in key or "lora_A" in key]
    assert downs
    changed = set()
    for down in downs:
        up = down.replace("lora.down", "lora.up").replace("lora_A", "lora_B")
        layer = down.removeprefix("unet.").partition(".lora")[0] + ".weight"
        expected = base[layer] + 8 / 2 * tensors[up] @ tensors[down]
        torch.testing.assert_close(fused[layer], expected)
        changed.add(layer)
    assert_same_bits(
        {key: base[key] for key in base if key not in changed}, {key: fused[key] for key in fused if key not in changed}
    )


def test_lora_at_step_0_changes_no_pixel(pipelines):
    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import PipelineSource
    from utils.models.registry import pick_family
    from utils.training.adaptation import LowRankAdaptation
    from utils.training.options import AdaptationOptions

    options = AdaptationOptions(adaptation="lora", train_text_encoder=True)
    source = PipelineSource(ModelOptions(pretrained_model_name_or_path=str(pipelines["sd"])))
    family = pick_family(source)(source, LowRankAdaptation.dtypes(options, torch.float32), {})
    before = draw(family.pipeline)
    LowRankAdaptation(family, options, None)
    assert np.array_equal(draw(family.pipeline), before)


def test_lora_metadata_holds_rank_and_alpha(train):
    out = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, "--lora_alpha", 8)
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 2
    assert metadata["unet.lora_alpha"] == 8


@pytest.mark.parametrize("style", ["ours", "kohya", "peft"])
def test_lora_weights_go_on_from_a_file(train, tmp_path, style):
    first = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, out="first")
    file = first / "pytorch_lora_weights.safetensors"
    if style != "ours":
        from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
        from safetensors.torch import save_file

        tensors = lora(first)
        tensors = convert_unet_state_dict_to_peft(tensors)
        if style == "kohya":
            tensors = convert_state_dict_to_kohya(tensors)
        file = tmp_path / f"{style}.safetensors"
        save_file(tensors, file)
    second = train("sd", *SHORT, "--adaptation", "lora", "--lora_weights", file, "--learning_rate", 1e-12, out="second")
    one, other = lora(first), lora(second)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-9)


def test_checkpoints_load_on_their_own_and_are_pruned(train, pipelines):
    from diffusers import UNet2DConditionModel

    common = ("--train_batch_size", 1, "--learning_rate", 1e-3, "--use_ema", "--checkpointing_steps", 2)
    out = train("sd", *common, "--max_train_steps", 4)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    pipeline = load(pipelines["sd"])
    for name in ("unet", "unet_ema"):
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder=f"checkpoint-2/{name}")
        draw(pipeline)
    config = json.loads((out / "checkpoint-2" / "unet_ema" / "config.json").read_text())
    assert config["optimization_step"] == 2
    assert config["decay"] == 0.9999
    (out / "checkpoint-77.tmp").mkdir()
    (out / "checkpoints").mkdir()
    more = ("--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", 2)
    train("sd", *common, "--max_train_steps", 8, *more)
    assert {path.name for path in out.glob("checkpoint-*")} == {
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-77.tmp",
    }


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_finished_run_trains_no_further_step(train, name):
    out = train(name, *SHORT)
    before, lines = weights(out), (out / "metrics.jsonl").read_text()
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train(name, *SHORT, "--resume_from_checkpoint", "latest")
    assert_same_bits(before, weights(out))
    assert (out / "metrics.jsonl").read_text() == lines


def test_latest_without_a_checkpoint_starts_anew(train, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "run.json").write_text("{}")
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    (tmp_path / "out" / ".tmp-checkpoint-2").mkdir()
    out = train("sd", *SHORT, "--resume_from_checkpoint", "latest")
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not list(out.glob(".tmp-*"))


def test_a_checkpoint_that_is_cut_off_is_passed_over(train):
    out = train("sd", *SHORT, "--checkpointing_steps", 1)
    file = out / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    train("sd", *SHORT, "--resume_from_checkpoint", "latest")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    load_file(file)


def test_prediction_type_is_in_the_exported_scheduler(train):
    out = train("sd", *SHORT, "--prediction_type", "v_prediction")
    assert load(out).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_fresh_unet(train, pipelines, name):
    config = pipelines[name] / "unet" / "config.json"
    out = train(name, *SHORT, "--unet_config", config, "--use_ema")
    before, after = weights(pipelines[name]), weights(out)
    assert before.keys() == after.keys()
    assert not torch.allclose(before["conv_in.weight"], after["conv_in.weight"], atol=0.01)
    draw(load(out))


def test_a_separate_vae_is_used_and_exported(train, tmp_path, pipelines):
    torch.manual_seed(7)
    tiny.vae(0.5).save_pretrained(tmp_path / "vae")
    out = train("sdxl", *SHORT, "--pretrained_vae_model_name_or_path", tmp_path / "vae")
    assert load(out).vae.config.scaling_factor == 0.5
    assert_same_bits(weights(tmp_path, "vae"), weights(out, "vae"))


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_the_token_is_in_no_file(train, monkeypatch, caplog, name):
    import huggingface_hub

    token = "hf_PlantedSecretPlantedSecretPlanted"
    url = huggingface_hub.RepoUrl("https://huggingface.co/me/out")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, name, **more: url)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda api, name, **more: None)
    validation = VALIDATION if name == "sd" else ()
    out = train(name, *SHORT, "--push_to_hub", "--hub_token", token, "--report_to", "tensorboard", *validation)
    assert (out / "README.md").exists()
    assert "the upload to me/out failed" in caplog.text
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if token.encode() in path.read_bytes()]


def test_validation_is_drawn_when_due(train):
    out = train(
        "sd",
        "--max_train_steps",
        6,
        "--train_batch_size",
        2,
        *VALIDATION,
        "--validation_epochs",
        1,
        "--report_to",
        "all",
    )
    assert {path.name for path in (out / "samples").iterdir()} == {"step-3", "final"}
    out = train(
        "sd", "--max_train_steps", 5, "--train_batch_size", 2, *VALIDATION, "--validation_steps", 2, out="steps"
    )
    assert {path.name for path in (out / "samples").iterdir()} == {"step-2", "step-4", "final"}


def test_validation_changes_nothing_in_the_training(train):
    plain = train("sd", "--max_train_steps", 3, "--train_batch_size", 2, "--use_ema", out="plain")
    flags = (*VALIDATION, "--validation_steps", 1, "--checkpointing_steps", 1)
    busy = train("sd", "--max_train_steps", 3, "--train_batch_size", 2, "--use_ema", *flags, out="busy")
    assert_same_bits(weights(plain), weights(busy))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_clip_skip(train, name):
    one = train(name, *SHORT, *VALIDATION, "--train_text_encoder", "--clip_skip", 1, "--gradient_checkpointing")
    other = train(name, *SHORT, "--train_text_encoder", out="other")
    assert not torch.equal(weights(one)["conv_in.weight"], weights(other)["conv_in.weight"])


def test_gradient_checkpointing_changes_nothing(train):
    one = train("sd", *SHORT, out="one")
    other = train("sd", *SHORT, "--gradient_checkpointing", out="other")
    for key, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[key], rtol=1e-5, atol=1e-7)


def test_dry_run_writes_only_what_it_found(train, capsys):
    out = train("sdxl", *SHORT, "--adaptation", "lora", "--dry_run")
    printed = capsys.readouterr().out
    assert "StableDiffusionXLPipeline" in printed
    assert "2 optimizer steps" in printed
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "dry_run_report.json"]
    train("sdxl", *SHORT, "--adaptation", "lora")  # which does not refuse the folder


def test_debug_loss_and_trackers(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train("sd", *SHORT, *VALIDATION, "--debug_loss", "--report_to", "tensorboard")
    events = EventAccumulator(str(out / "logs" / "text2image-fine-tune"))
    events.Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [event.value for event in events.Scalars("train_loss")]
    assert logged == pytest.approx([line["train_loss"] for line in lines])
    by_image = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss_for_")]
    assert len(by_image) == 4
    first = [event.value for tag in by_image for event in events.Scalars(tag) if event.step == 1]
    assert sum(first) / 2 == pytest.approx(lines[0]["train_loss"], rel=1e-5)
    assert "test/image/0" in events.Tags()["images"] or "test" in events.Tags()["images"]


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_single_file_trains_as_its_folder_does(train, pipelines, tmp_path, adaptation):
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors")
    flags = (*SHORT, "--adaptation", adaptation)
    one = train(str(file), *flags, "--pretrained_model_config", pipelines["sd"], out="one")
    other = train("sd", *flags, out="other")
    if adaptation == "lora":
        assert_same_bits(lora(one), lora(other))
    else:
        for part in ("unet", "vae"):
            assert_same_bits(weights(one, part), weights(other, part))
        assert np.array_equal(draw(load(one)), draw(load(other)))


def test_dropped_captions_are_what_inference_has_without_a_prompt(pipelines):
    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import ComponentDtypes, PipelineSource
    from utils.models.registry import pick_family

    for name in ("sd", "sdxl"):
        source = PipelineSource(ModelOptions(pretrained_model_name_or_path=str(pipelines[name])))
        family = pick_family(source)(source, ComponentDtypes(*[torch.float32] * 3), {})
        with torch.no_grad():
            states = family.encode_text(family.tokenizer()(["a cat", ""]), torch.tensor([False, True]))
        embeds = family.pipeline.encode_prompt(
            prompt="a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        torch.testing.assert_close(states["encoder_hidden_states"], torch.cat([embeds[0], embeds[1]]))
        if name == "sdxl":
            torch.testing.assert_close(states["text_embeds"], torch.cat([embeds[2], embeds[3]]))
            assert not states["encoder_hidden_states"][1].any()


def test_the_upload_holds_the_result_and_its_card_alone(train, monkeypatch):
    import fnmatch

    import huggingface_hub

    calls = {}

    class Repository:
        repo_id = "me/model"

    def create_repo(api, name, **arguments):
        calls["create"] = {"name": name, "token": api.token, **arguments}
        return Repository()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda api, name, **more: calls.update({name: more}))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **arguments: calls.update(upload=arguments))
    flags = ("--push_to_hub", "--hub_model_id", "me/model", "--hub_private_repo", "--hub_token", "hf_secret")
    out = train("sd", *SHORT, *VALIDATION, *flags)
    assert calls["create"] == {"name": "me/model", "token": "hf_secret", "private": True, "exist_ok": True}
    assert calls["me/model"] == {"write": True}
    assert calls["upload"]["token"] == "hf_secret"
    allowed = calls["upload"]["allow_patterns"]
    names = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    sent = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allowed)]
    assert "README.md" in sent
    assert "model_index.json" in sent
    assert "unet/diffusion_pytorch_model.safetensors" in sent
    assert not [name for name in sent if name.startswith(("checkpoint", "logs", ".", "samples", "run.json", "metrics"))]
    card = (out / "README.md").read_text()
    assert "a red square" in card
    assert str(out) not in card


def test_later_checkpoints_of_another_branch_are_set_aside(train):
    common = ("--train_batch_size", 1, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    out = train("sd", *common[:4], "--max_train_steps", 4)
    train("sd", *common, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3"}
    assert (out / "abandoned-checkpoint-4" / "manifest.json").exists()
    train("sd", *common, "--max_train_steps", 2, "--overwrite_output_dir")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2"}


def test_a_lora_of_text_encoders_must_go_on_training_them(train, capsys):
    first = train("sdxl", *SHORT, "--adaptation", "lora", "--train_text_encoder", out="first")
    flags = (*SHORT, "--adaptation", "lora", "--lora_weights", first)
    train("sdxl", *flags, out="second", expect=2)
    assert "add --train_text_encoder" in capsys.readouterr().err
    train("sdxl", *flags, "--train_text_encoder", out="third")


def test_clip_skip_samples_as_the_pipeline_does(train):
    flags = ("--clip_skip", 1, "--validation_negative_prompt", "blue")
    out = train("sdxl", *SHORT, *VALIDATION, *flags, "--train_text_encoder")
    sample = np.asarray(Image.open(out / "samples" / "final" / "00_0.png"))
    assert np.array_equal(sample, draw(load(out), negative_prompt="blue", clip_skip=1))


@pytest.mark.parametrize("options", [{}, {"offload_ema": True}, {"ema_every": 3}])
def test_an_overflowed_fp16_step_leaves_the_average(monkeypatch, options):
    from utils.training.ema import MovingAverage
    from utils.training.options import EmaOptions
    from utils.training.state import TrainingState

    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Accelerator:
        pass

    class Scaled:
        def step(self):
            scaler.step(optimizer)
            scaler.update()

        def zero_grad(self):
            optimizer.zero_grad()

    accelerator = Accelerator()
    accelerator.scaler = scaler
    average = MovingAverage([parameter], EmaOptions(use_ema=True, **options))
    state = TrainingState(Engine(accelerator), None, [average], None, Scaled(), [], [], [], *4 * [None])
    monkeypatch.setattr(scaler, "get_scale", None)  # it would wait for the device
    found = [torch.ones(4)]
    for value in (1.0, float("inf"), 1.0, 1.0, 1.0, float("inf")):
        scaler.scale((parameter * value).sum()).backward()
        state.update(torch.tensor(value))
        found.append(average.averages[0].clone())
    if "ema_every" in options:  # an update after a step that was left out is that of the steps before
        assert [torch.equal(*pair) for pair in itertools.pairwise(found)] == [True, True, False, True, True, False]
        return
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss", "huber", "--weighting", "p2"),
        ("--dream_training", "--timestep_sampling", "stratified"),
        ("--multires_noise_iterations", 4, "--timestep_distribution", "log_normal", "--weighting", "debiased"),
    ],
)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_losses_and_noise_of_every_kind_train(train, name, flags):
    plain, other = train(name, *SHORT, out="plain"), train(name, *SHORT, *flags, out="other")
    assert not torch.equal(weights(plain)["conv_out.weight"], weights(other)["conv_out.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in weights(other).values())


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_end_to_end(train, pipelines, tmp_path, prediction_type):
    import shutil

    from diffusers import PNDMScheduler

    folder = shutil.copytree(pipelines["sd"], tmp_path / "pndm")
    PNDMScheduler.from_config(load(folder).scheduler.config).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    flags = ("--rescale_betas_zero_snr", "--prediction_type", prediction_type, "--snr_gamma", 5)
    out = train(str(folder), *SHORT, *VALIDATION, *flags)
    pipeline = load(out)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    sample = np.asarray(Image.open(out / "samples" / "final" / "00_0.png"))
    assert np.array_equal(sample, draw(pipeline))


def poison(monkeypatch, steps: range) -> None:
    """Has the losses of some optimizer steps be NaN."""
    from utils.training.objective import Objective

    forward = Objective.forward
    monkeypatch.setattr(
        Objective,
        "forward",
        lambda self, encoded: forward(self, encoded) * (float("nan") if encoded.batch.step in steps else 1.0),
    )


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_poisoned_batch_is_skipped_and_named(train, monkeypatch, caplog, name):
    flags = ("--max_train_steps", 6, "--train_batch_size", 2, "--use_ema", "--checkpointing_steps", 1)
    poison(monkeypatch, range(4, 5))
    out = train(name, *flags)
    four, five, six = (weights(out / f"checkpoint-{step}") for step in (4, 5, 6))
    assert_same_bits(four, five)
    assert not torch.equal(five["conv_in.weight"], six["conv_in.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in weights(out).values())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] is None for line in lines] == [False] * 4 + [True, False]
    (named,) = [record.getMessage() for record in caplog.records if "was skipped" in record.getMessage()]
    assert "step 5" in named
    assert named.count(".png") == 2


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_a_run_that_diverges_ends_with_its_last_checkpoint_named(train, monkeypatch, capsys, name):
    poison(monkeypatch, range(3, 100))
    flags = ("--train_batch_size", 2, "--checkpointing_steps", 2, "--max_skipped_steps", 3, "--max_train_steps", 50)
    out = train(name, *flags, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 steps in a row" in error
    assert "checkpoint-6" in error
    assert all(torch.isfinite(tensor).all() for tensor in weights(out / "checkpoint-6").values())


def test_a_fused_optimizer_skips_on_the_device():
    from utils.training.state import TrainingState

    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)

    class Accelerator:
        scaler = None

    state = TrainingState(Engine(Accelerator()), None, [], None, optimizer, [], [], [], *4 * [None])
    for value, moved in ((1.0, True), (float("nan"), False), (1.0, True)):
        before = parameter.detach().clone()
        parameter.grad = torch.full((4,), value)
        state.update(parameter.grad.norm())
        assert torch.equal(before, parameter) != moved
        assert torch.isfinite(parameter).all()


def test_train_layers_trains_those_layers_alone(train, pipelines):
    flags = ("--train_layers", r"attn2\.", "--train_text_encoder", "--use_ema")
    out = train("sd", *SHORT, *flags)
    before, after = weights(pipelines["sd"]), weights(out)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {k for k in before if "attn2." in k}
    assert_same_bits(weights(pipelines["sd"], "text_encoder"), weights(out, "text_encoder"))
    train("sd", *flags, *SHORT[2:], "--max_train_steps", 3, "--resume_from_checkpoint", "latest")


def test_a_single_file_of_another_architecture_is_refused(train, pipelines, tmp_path, capsys):
    from safetensors.torch import save_file

    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("cond_stage_model")}
    save_file(tensors, file)
    train(str(file), *SHORT, "--pretrained_model_config", pipelines["sd"], expect=2)
    assert "holds no text_encoder, whose weights begin with" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "flip", "is not what was written (its sha256 differs)"),
        ("optimizer.safetensors", "cut", "bytes, "),
        ("training_state.json", "remove", "training_state.json is missing"),
        ("manifest.json", "cut", "manifest.json can't be read"),
        ("manifest.json", "remove", "manifest.json is missing"),
    ],
)
@pytest.mark.parametrize("name", mostly_slow(["sd", "labels"], "sd"))
def test_a_damaged_checkpoint_is_passed_over_or_refused(train, capsys, caplog, file, harm, said, name):
    flags = ["--train_batch_size", 2, "--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    out = train(name, *flags, "--max_train_steps", 4)
    path = out / "checkpoint-4" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    train(name, *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "checkpoint-4", expect=2)
    error = capsys.readouterr().err
    assert "--resume_from_checkpoint checkpoint-4 is damaged: " in error
    assert said in error
    train(name, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert any(
        "latest passes over checkpoint-4" in record.message and said in record.message for record in caplog.records
    )
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.fixture
def as_older(pipelines, tmp_path) -> Path:
    """A pipeline with what transformers 4 saved of a safety checker and an image processor, and files never copied."""
    folder = shutil.copytree(pipelines["sd"], tmp_path / "base")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"crop_size": 32}')
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text('{"torch_dtype": "float32", "a": {"torch_dtype": null}}')
    save_file({"vision_model.vision_model.bias": torch.ones(2)}, folder / "safety_checker" / "model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    index |= {"requires_safety_checker": True, "_name_or_path": str(folder), "../evil": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/evil.py"):
        (folder / name).write_bytes(b"never copied")
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("result", [".", "fused"])
def test_what_does_not_train_is_the_bases_own_files(train, as_older, result):
    flags = ("--adaptation", "lora", "--export_fused") if result == "fused" else ()
    out = train(str(as_older), *SHORT, *flags) / result
    frozen = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    for part in frozen:
        theirs = files_below(as_older / part)
        kept = {name: content for name, content in theirs.items() if not name.endswith((".bin", ".py"))}
        assert files_below(out / part) == kept
        assert not any(path.is_symlink() for path in (out / part).rglob("*"))
    index, given = (json.loads((folder / "model_index.json").read_text()) for folder in (out, as_older))
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert all(index[part] == given[part] for part in ("vae", "unet", "text_encoder", "tokenizer", "safety_checker"))
    assert index["requires_safety_checker"] is True
    assert not {"_name_or_path", "../evil"} & set(index)


def test_trained_text_encoders_have_the_names_that_older_libraries_read(train, pipelines):
    flags = (*SHORT, "--train_text_encoder", "--use_ema")
    for out in (train("sd", *flags, out="at once"), train("sd", *flags, "--async_checkpointing", out="copied")):
        for folder, part in ((out, ""), (out / "checkpoint-2", ""), (out / "checkpoint-2", "_ema")):
            assert weights(folder, f"text_encoder{part}").keys() == weights(pipelines["sd"], "text_encoder").keys()
    assert draw(load(out)) is not None


HALVES = {
    "all": (("unet", "vae", "text_encoder"), "", ()),
    "some": (("text_encoder",), "", ()),
    "a variant alone": (("vae", "text_encoder", "unet"), "fp16", ("--variant", "fp16")),
}


@pytest.mark.parametrize("case", HALVES)
def test_a_base_in_half_precision_gives_a_result_of_one_dtype(train, pipelines, tmp_path, case):
    parts, variant, flags = HALVES[case]
    base = tiny.in_half_precision(pipelines["sd"], tmp_path / "half", parts, variant)
    out = train(str(base), *SHORT, *VALIDATION, *flags)
    for part in ("unet", "vae", "text_encoder"):
        files = list((out / part).glob("*.safetensors"))
        assert [file.name for file in files] == [next((pipelines["sd"] / part).glob("*.safetensors")).name]
        assert all(each.dtype == torch.float32 for each in weights(out, part).values())
        assert "float16" not in (out / part / "config.json").read_text()
    sample = np.asarray(Image.open(out / "samples" / "final" / "00_0.png"))
    assert np.array_equal(draw(load(out)), sample)


@pytest.mark.parametrize("harm", ["dtype in its config", "newer names", "two heads", "header cut", "flat shards"])
def test_frozen_files_that_would_not_do_are_saved_anew(train, pipelines, tmp_path, harm):
    base = shutil.copytree(pipelines["sd"], tmp_path / "base")
    part = base / "text_encoder"
    file, tensors = part / "model.safetensors", weights(base, "text_encoder")
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if harm == "dtype in its config":
        config = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps(config | {"dtype": None, "torch_dtype": "bfloat16"}))
    elif harm == "newer names":
        save_file(flat, file, {"format": "pt"})
    elif harm == "two heads":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
    elif harm == "flat shards":
        file.unlink()
        save_file(flat, part / "model-00001-of-00001.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(flat, "model-00001-of-00001.safetensors")}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        part = base / "vae"
        (part / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"cut")  # which nobody asked for
    out = train(str(base), *SHORT)
    assert [path.name for path in (out / part.name).glob("*.safetensors*")] == [
        "diffusion_pytorch_model.safetensors" if part.name == "vae" else "model.safetensors"
    ]
    assert_same_bits(weights(pipelines["sd"], part.name), weights(out, part.name))
    assert {str(each.dtype) for each in load(out).text_encoder.parameters()} == {"torch.float32"}


def test_links_of_the_hubs_cache_become_files_and_links_to_elsewhere_are_not_followed(train, as_older, tmp_path):
    snapshot = tiny.make_snapshot(as_older, tmp_path / "hub")
    out = train(str(snapshot), *SHORT, out="snapshot")
    assert (out / "tokenizer" / "merges.txt").read_bytes() == (as_older / "tokenizer" / "merges.txt").read_bytes()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    (tmp_path / "secret.txt").write_text("a secret of this machine")
    (as_older / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    out = train(str(as_older), *SHORT, out="linked")
    assert not [name for name, content in files_below(out).items() if b"a secret of this machine" in content]
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(files_below(out / "tokenizer"))


def test_a_tokenizer_of_newer_libraries_is_completed(train, pipelines, tmp_path):
    from transformers import CLIPTokenizer

    base = shutil.copytree(pipelines["sd"], tmp_path / "base")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    shutil.rmtree(base / "tokenizer")
    tokenizer.save_pretrained(base / "tokenizer")
    given = files_below(base / "tokenizer")
    assert "vocab.json" not in given
    pipeline = load(base)
    pipeline.text_encoder.resize_token_embeddings(515)
    pipeline.text_encoder.save_pretrained(base / "text_encoder")
    out = train(str(base), *SHORT)
    made = files_below(out / "tokenizer")
    assert {name: made[name] for name in given} == given
    assert json.loads(made["vocab.json"]) == json.loads((pipelines["sd"] / "tokenizer" / "vocab.json").read_text())
    assert made["merges.txt"] == b"#version: 0.2\n"
    assert json.loads(made["added_tokens.json"]) == {"<my-cat>": 514}
    assert load(out).tokenizer("a <my-cat>").input_ids == tokenizer("a <my-cat>").input_ids


def test_a_result_over_its_own_base_and_one_over_another_kind(train, pipelines, tmp_path):
    base = shutil.copytree(pipelines["sd"], tmp_path / "out")
    before = weights(base, "vae"), weights(base)
    train(str(base), *SHORT, "--overwrite_output_dir")
    assert_same_bits(before[0], weights(base, "vae"))
    assert not torch.equal(before[1]["conv_in.weight"], weights(base)["conv_in.weight"])
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")  # of an earlier, sharded result
    train("sd2", *SHORT, "--overwrite_output_dir")
    assert set(files_below(base / "unet")) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not list(base.glob(".tmp-*"))
    load(base)


def test_a_lora_files_metadata_has_no_field_that_older_releases_lack(train):
    out = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, "--use_rslora")
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    known = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
    assert {name.removeprefix("unet.") for name in metadata} == known


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_that_the_umask_says(train, umask):
    before = os.umask(umask)
    try:
        flags = (
            "--ema_lengths",
            0.1,
            "--ema_snapshot_steps",
            1,
            "--report_to",
            "tensorboard",
            "--validation_split",
            0.4,
        )
        outs = [train("sd", *SHORT, *VALIDATION, *flags, out="full")]
        outs.append(train("sd", *SHORT, "--adaptation", "lora", "--export_fused", out="lora"))
        outs.append(train("pixels", *SHORT, out="pixels"))
    finally:
        os.umask(before)
    paths = [path for out in outs for path in (out, *out.rglob("*")) if path.name != ".lock"]
    usual = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    wrong = {
        str(path): oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o777 != usual[path.is_dir()]
    }
    assert not wrong


def test_usual_modes_only_add_and_touch_no_link(tmp_path):
    from utils.runtime.atomic_files import usual_modes

    (tmp_path / "outside").write_text("")
    (tmp_path / "outside").chmod(0o600)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "script").write_text("")
    (folder / "script").chmod(0o755)
    (folder / "link").symlink_to(tmp_path / "outside")
    usual_modes(folder)
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o600
    assert (folder / "script").stat().st_mode & 0o777 == 0o755
    assert {path.name for path in folder.iterdir()} == {"script", "link"}


def test_the_vae_of_an_unconditional_result_is_the_bases_own_file(train, pipelines):
    out = train("latents", *SHORT)
    assert files_below(out / "vqvae") == files_below(pipelines["vae"])
