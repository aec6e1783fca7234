"""What a run leaves behind: pipelines that diffusers loads, samples, records."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from tests.comparing import assert_same_bits, lora, weights
from tests.conftest import mostly_slow
from tests.text_runs import SHORT, VALIDATION, draw, load
from utils.runtime.engines import Engine


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
    assert "upload to me/out failed" in caplog.text
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
    assert {path.name for path in (out / "samples").iterdir()} == {"step-0", "step-3", "final", "samples.jsonl"}
    out = train(
        "sd", "--max_train_steps", 5, "--train_batch_size", 2, *VALIDATION, "--validation_steps", 2, out="steps"
    )
    assert {path.name for path in (out / "samples").iterdir()} == {
        "step-0",
        "step-2",
        "step-4",
        "final",
        "samples.jsonl",
    }


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
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png",
        "dry_run_report.json",
        "model_summary.json",
    ]
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


@pytest.mark.parametrize("adaptation", mostly_slow(["full", "lora"], "lora"))
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
    assert "has no text_encoder, whose weights start with" in capsys.readouterr().err.splitlines()[-1]
