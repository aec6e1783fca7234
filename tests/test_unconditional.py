"""train_unconditional.py: what it computes against closed forms, what it exports against diffusers, what it refuses."""

import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests import tiny
from tests.conftest import message, mostly_slow
from tests.test_equivalences import assert_same_bits, losses, weights
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.class_folders import describe_counts, recorded_folders, warn_of_twins
from utils.data.class_labels import class_numbers, count_classes, listed_numbers
from utils.data.source_options import DataOptions, LabelledSource, LabelOptions, SourceOptions
from utils.data.sources import read_records
from utils.diffusion.losses import loss_weights, weighted_loss
from utils.diffusion.noise import NoiseDraws, timestep_weights
from utils.diffusion.options import SAMPLERS, LossOptions, ProcessOptions
from utils.diffusion.process import ScoreProcess, process_of
from utils.diffusion.samplers import sampler_of
from utils.models.from_scratch import unet_config
from utils.models.options import ShapeOptions
from utils.models.unconditional import fresh_scheduler
from utils.sampling.grid_samples import film
from utils.training.checkpoint import read_state

ROOT = Path(__file__).parent.parent
SHORT = ("--max_train_steps", 2, "--train_batch_size", 2, "--learning_rate", 1e-3)


def named(scheduler) -> tuple[str, Mapping]:
    """A scheduler as `process_of` takes it."""
    return type(scheduler).__name__, scheduler.config


def betas_of(schedule: str, count: int) -> np.ndarray:
    """[T] float64 a schedule's betas by its definition."""
    first, last = 1e-4, 0.02
    if schedule == "linear":
        return np.linspace(first, last, count)
    if schedule in ("scaled_linear", "quadratic"):
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if schedule == "sigmoid":
        return (last - first) / (1 + np.exp(-np.linspace(-6, 6, count))) + first
    bar = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
    return np.array([min(1 - bar[step + 1] / bar[step], 0.999) for step in range(count)])


def alphas_cumprod_of(schedule: str, count: int, zero_snr: bool) -> np.ndarray:
    """[T] float64 alpha_bar; with zero terminal SNR as Lin et al. (2024), algorithm 1, have it."""
    roots = np.sqrt(np.cumprod(1 - betas_of(schedule, count)))
    if zero_snr:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return roots**2


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear", "quadratic", "sigmoid"])
def test_the_forward_process_and_its_target(schedule, prediction, zero_snr):
    if zero_snr and prediction == "epsilon":
        pytest.skip("is refused")
    options = ProcessOptions(
        prediction_type=prediction, beta_schedule=schedule, ddpm_num_steps=500, rescale_betas_zero_snr=zero_snr
    )
    process = process_of(options, *named(fresh_scheduler(options, clips=True)))
    random = np.random.default_rng(0)
    clean, noise = random.standard_normal((2, 20, 3, 4, 4))
    timesteps = random.integers(0, 500, 20)
    timesteps[:2] = 0, 499
    bar = alphas_cumprod_of(schedule, 500, zero_snr)[timesteps].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(bar) * clean + np.sqrt(1 - bar) * noise
    target = {"epsilon": noise, "sample": clean, "v_prediction": np.sqrt(bar) * noise - np.sqrt(1 - bar) * clean}
    found = process.apply(torch.tensor(clean).float(), torch.tensor(noise).float(), torch.from_numpy(timesteps), None)
    np.testing.assert_allclose(found.noisy.numpy(), noisy, atol=2e-5)
    np.testing.assert_allclose(found.target.numpy(), target[prediction], atol=2e-5)
    np.testing.assert_allclose(found.snr.numpy(), (bar / (1 - bar)).ravel(), rtol=2e-3, atol=1e-6)
    if bar.min() > 1e-3:
        np.testing.assert_allclose(process.estimate(found, found.target).numpy(), clean, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_a_straight_line(shift):
    options = ProcessOptions(flow_matching=True, flow_shift=shift, ddpm_num_steps=500)
    process = process_of(options, *named(fresh_scheduler(options, clips=True)))
    random = np.random.default_rng(0)
    clean, noise = random.standard_normal((2, 20, 3, 4, 4))
    timesteps = random.integers(0, 500, 20)
    timesteps[:2] = 0, 499
    sigmas = (timesteps + 1) / 500
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).reshape(-1, 1, 1, 1)
    found = process.apply(torch.tensor(clean).float(), torch.tensor(noise).float(), torch.from_numpy(timesteps), None)
    np.testing.assert_allclose(found.noisy.numpy(), (1 - sigmas) * clean + sigmas * noise, atol=1e-5)
    np.testing.assert_allclose(found.target.numpy(), noise - clean, atol=1e-6)
    np.testing.assert_allclose(found.timesteps.numpy(), 500 * sigmas.ravel(), rtol=1e-6)
    np.testing.assert_allclose(process.estimate(found, found.target).numpy(), clean, atol=1e-5)


def test_a_score_process_adds_noise_alone():
    process = ScoreProcess({"num_train_timesteps": 100, "sigma_min": 0.01, "sigma_max": 50.0})
    clean, noise = torch.randn(2, 5, 3, 4, 4)
    timesteps = torch.tensor([0, 20, 50, 80, 99])
    sigmas = 0.01 * (50 / 0.01) ** (timesteps.double() / 99)
    found = process.apply(clean, noise, timesteps, None)
    torch.testing.assert_close(found.noisy, (clean + sigmas.view(-1, 1, 1, 1) * noise).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.timesteps, sigmas.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.target, -noise)


def test_logit_normal_times_are_those_of_a_normal_logit():
    options = ProcessOptions(flow_matching=True, logit_mean=0.4, logit_std=0.8)
    process = process_of(options, *named(fresh_scheduler(options, clips=True)))
    assert process.default_distribution == "logit_normal"
    shares = timestep_weights(options, np.ones(1000) * 0.5, "logit_normal")
    assert shares.sum() == pytest.approx(1)
    drawn = 1 / (1 + np.exp(-np.random.default_rng(0).normal(0.4, 0.8, 400_000)))
    counted = np.histogram(drawn, 20, (0, 1))[0] / len(drawn)
    np.testing.assert_allclose(shares.reshape(20, 50).sum(1), counted, atol=3e-3)
    draws = NoiseDraws(options, process, 0, 1)
    times = [draws.draw(step, 0, (1, 1, 1)).timestep for step in range(2000)]
    assert np.mean(times) == pytest.approx(1000 * drawn.mean(), abs=12)


@pytest.mark.parametrize(("weighting", "on_x0"), [("min_snr", lambda snr: min(snr, 5)), ("snr", lambda snr: snr)])
def test_weights_on_a_flow_are_those_on_its_clean_image(weighting, on_x0):
    for sigma in (0.1, 0.3, 0.9):
        snr = ((1 - sigma) / sigma) ** 2
        found = loss_weights(torch.tensor([snr]), "flow", LossOptions(weighting=weighting))
        assert float(found) == pytest.approx(on_x0(snr) * sigma**2, rel=1e-5)


GAUSSIANS = {
    "epsilon": ProcessOptions(prediction_type="epsilon", beta_schedule="linear"),
    "sample": ProcessOptions(prediction_type="sample", beta_schedule="cosine"),
    "v_prediction": ProcessOptions(
        prediction_type="v_prediction", beta_schedule="sigmoid", rescale_betas_zero_snr=True
    ),
    "flow": ProcessOptions(flow_matching=True),
}
CENTRES = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in np.arange(8) * math.pi / 4])
WIDTH = 0.08


def eight_gaussians(count: int, seed: int) -> torch.Tensor:
    """[n, 2, 1, 1] points around the corners of an octagon of radius 1."""
    random = torch.Generator().manual_seed(seed)
    chosen = CENTRES[torch.randint(8, (count,), generator=random)]
    return (chosen + WIDTH * torch.randn(count, 2, generator=random)).view(-1, 2, 1, 1)


class Points(nn.Module):
    """A denoiser of points."""

    def __init__(self):
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(128, 128), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(18, 128), nn.SiLU(), *hidden, nn.Linear(128, 2))

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        angles = timesteps.float().view(-1, 1) * (math.pi / 1000) * 2.0 ** torch.arange(-1, 7)
        return self.layers(torch.cat([points.flatten(1), angles.sin(), angles.cos()], dim=1)).view(-1, 2, 1, 1)


def sliced_wasserstein(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean over 64 directions of the Wasserstein-1 distance of the projections of as many points."""
    angles = torch.arange(64) * math.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    return float((((one @ directions).sort(0).values) - (other @ directions).sort(0).values).abs().mean())


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=pytest.mark.slow) if each != "flow" else each for each in GAUSSIANS]
)
def test_eight_gaussians_are_learnt(kind):
    """Within 0.06 of the true density, whose own samples are 0.016 apart; noise is 0.23 away."""
    options = GAUSSIANS[kind]
    scheduler = fresh_scheduler(options, clips=False)
    process, draws_of = process_of(options, *named(scheduler)), torch.Generator().manual_seed(0)
    shares = timestep_weights(options, process.alphas_cumprod.double().numpy(), process.default_distribution)
    torch.manual_seed(0)
    model, loss_options = Points(), LossOptions()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for step in range(2500):
        clean = eight_gaussians(384, step)
        timesteps = torch.multinomial(torch.from_numpy(shares), 384, True, generator=draws_of)
        noised = process.apply(clean, torch.randn(clean.shape, generator=draws_of), timesteps, None)
        prediction = model(noised.noisy, noised.timesteps)
        weighted_loss(prediction, noised, process.prediction_type, loss_options).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    sampler = sampler_of(scheduler, "euler" if kind == "flow" else "ddim")
    sampler.set_timesteps(100)
    points = torch.randn(4000, 2, 1, 1, generator=draws_of) * getattr(sampler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in sampler.timesteps:
            points = sampler.step(model(points, t.expand(4000)), t, points).prev_sample
    points, true = points.flatten(1), eight_gaussians(4000, 10**6).flatten(1)
    assert sliced_wasserstein(points, true) < 0.06
    nearest = torch.cdist(points, CENTRES)
    assert (nearest.min(1).values < 4 * WIDTH).float().mean() > 0.8
    counts = nearest.argmin(1).bincount(minlength=8) / 4000
    assert ((counts > 0.08) & (counts < 0.17)).all()


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


def load(folder: Path):
    from diffusers import DiffusionPipeline

    more = {"custom_pipeline": str(folder), "trust_remote_code": True} if (folder / "pipeline.py").exists() else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed: int, **more) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed + number) for number in range(2)]
    return np.stack([np.asarray(each) for each in pipeline(generator=generators, num_inference_steps=3, **more).images])


def samples(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{number:03d}.png")) for number in range(2)])


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


@pytest.mark.parametrize("name", ["pixels", "flow", "labels", "latents", "labelled latents"])
def test_fine_tuning_begins_with_the_pretrained_weights(train, name, pipelines, images, classes, tmp_path):
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    first = train(name, *SHORT, out="first")
    reset_accelerate()
    is_labelled = "label" in name
    argv = ["--pretrained_model", first, "--train_data_dir", classes if is_labelled else images, "--resolution", 32]
    argv += ["--output_dir", tmp_path / "second", *SHORT, "--learning_rate", 1e-12, "--report_to", "none"]
    argv += [*tiny.SMALL_DRAWING, *(["--class_conditional", "--guidance_scale", 2] if is_labelled else [])]
    assert main([str(word) for word in argv]) == 0
    part = "transformer" if name == "labelled latents" else "unet"
    before, after = weights(first, part), weights(tmp_path / "second", part)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-8)
    assert type(load(first).scheduler) is type(load(tmp_path / "second").scheduler)


def put_classes(folder: Path, *names: str) -> Path:
    """Two images in a folder for each class."""
    for number, name in enumerate(names):
        for each in range(2):
            path = folder / name / f"{number}{each}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (40 * number, 90 * each, 60)).save(path)
    return folder


def fine_tuned(first: Path, data: Path, out: Path, *flags: object, expect: int = 0) -> Path:
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    reset_accelerate()
    words = ["--pretrained_model", first, "--train_data_dir", data, "--output_dir", out, "--class_conditional", *SHORT]
    words += [*tiny.SMALL_DRAWING, "--resolution", 32, "--report_to", "none", *flags]
    assert main([str(word) for word in words]) == expect
    return out


def test_classes_keep_the_numbers_by_which_they_were_learnt(train, tmp_path):
    """Of a DiT, to which classes are added, and of which a subset is trained."""
    first = train("labelled latents", *SHORT, data=put_classes(tmp_path / "a", "cat", "dog"), out="first")
    more = fine_tuned(first, put_classes(tmp_path / "b", "ant", "cat", "dog", "10"), tmp_path / "more")
    assert load(more).labels == {"cat": 0, "dog": 1, "10": 2, "ant": 3}
    drawn_of = json.loads((more / "samples" / "final" / "samples.json").read_text())["samples"]
    assert [each["of"] for each in drawn_of] == ["cat", "dog"]
    fewer = fine_tuned(more, put_classes(tmp_path / "c", "ant", "dog"), tmp_path / "fewer")
    assert load(fewer).labels == load(more).labels
    drawn_of = json.loads((fewer / "samples" / "final" / "samples.json").read_text())["samples"]
    assert [each["of"] for each in drawn_of] == ["dog", "ant"]


def test_a_class_for_which_there_is_no_room_is_refused(train, tmp_path, capsys):
    first = train("labels", *SHORT, data=put_classes(tmp_path / "a", "cat", "dog"), out="first")
    fine_tuned(first, put_classes(tmp_path / "b", "ant", "cat"), tmp_path / "more", expect=2)
    line = message(capsys)
    assert "room for 2 classes" in line
    assert "ant" in line
    fewer = fine_tuned(first, put_classes(tmp_path / "c", "dog", "cat"), tmp_path / "same")
    assert load(fewer).labels == {"cat": 0, "dog": 1}


def test_names_of_classes_that_a_dit_can_not_list(train, tmp_path, caplog, capsys):
    names = ["small, grey", "small, red", " spaced ", "10", "naïve"]
    out = train("labelled latents", *SHORT, data=put_classes(tmp_path / "a", *names), out="first")
    labels = load(out).labels
    numbers = {name: number for number, name in enumerate(sorted(name.strip() for name in names))}
    shown = {name.replace(",", ";"): number for name, number in numbers.items()}
    assert labels == shown
    assert "the class 'small, grey' is called 'small; grey' in the result" in caplog.text
    assert load(out).get_label_ids(["small; red", "spaced", "naïve"]) == [
        shown[n] for n in ("small; red", "spaced", "naïve")
    ]
    again = fine_tuned(out, tmp_path / "a", tmp_path / "again")
    assert load(again).labels == shown
    data = put_classes(tmp_path / "b", "a, b", "a; b")
    train("labelled latents", *SHORT, data=data, out="second", expect=2)
    assert "two classes called 'a; b'" in message(capsys)
    pixels = train("labels", *SHORT, data=put_classes(tmp_path / "c", *names), out="third")
    assert load(pixels).labels == numbers


def test_numbers_of_classes():
    assert class_numbers(["b", "a"], {}, 5) == {"b": 0, "a": 1}
    assert class_numbers(["new", "dog", "new 2"], {"cat": 0, "dog": 2}, 5) == {"new": 1, "dog": 2, "new 2": 3}
    known = listed_numbers({0: "tench, Tinca tinca", 7: "great shark"})
    assert class_numbers(["Tinca tinca", "tench, Tinca tinca", "x"], known, 1000)["x"] == 1
    assert class_numbers(["cafe\u0301"], {"caf\u00e9": 4}, 5) == {"cafe\u0301": 4}
    assert class_numbers(["a, b"], {"a; b": 3}, 5) == {"a, b": 3}
    with pytest.raises(UserError, match="the data has 3 classes, the model has room for 2"):
        class_numbers(["a", "b", "c"], {}, 2)


def small_unet(**more):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(**{"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 8} | types | more)


def small_dit(**more):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    slots = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}
    return DiTTransformer2DModel(**shape | slots | more)


def own_pipeline(name: str):
    import diffusers

    if name == "dit":  # with a learned variance and names of classes, as the published ones have them
        names = {"0": "dog, hound", "5": "cat"}
        pipeline = diffusers.DiTPipeline(small_dit(out_channels=8), tiny.vae(), diffusers.DDIMScheduler(), names)
        pipeline.register_to_config(id2label=names)
        return pipeline
    if name == "variance":
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
        return diffusers.DDPMPipeline(small_unet(out_channels=6), scheduler)
    return diffusers.DDIMPipeline(small_unet(), diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.mark.parametrize("name", ["ddim", "variance", "dit"])
def test_pipelines_that_others_made_are_fine_tuned(name, images, classes, tmp_path):
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    first, out = tmp_path / "first", tmp_path / "out"
    own_pipeline(name).save_pretrained(first)
    reset_accelerate()
    words = ["--pretrained_model", first, "--output_dir", out, "--max_train_steps", 20, "--train_batch_size", 4]
    words += ["--learning_rate", 3e-3, "--lr_warmup_steps", 0, *tiny.SMALL_DRAWING, "--num_inference_steps", 3]
    words += ["--report_to", "none", "--adam_weight_decay", 0, "--train_data_dir", classes if name == "dit" else images]
    words += ["--class_conditional", "--guidance_scale", 2] if name == "dit" else []
    assert main([str(word) for word in words]) == 0
    assert np.mean(losses(out)[-5:]) < np.mean(losses(out)[:5])
    pipeline = load(out)
    kind = json.loads((first / "model_index.json").read_text())["_class_name"]  # of which a DDIMPipeline draws wrongly
    assert type(pipeline).__name__ == ("DDPMPipeline" if kind == "DDIMPipeline" else kind)
    assert samples(out / "samples" / "final").shape[1] == 16  # what the pipeline drew before
    more = {"class_labels": [0, 5], "guidance_scale": 2} if name == "dit" else {"batch_size": 2}
    assert np.array_equal(drawn(pipeline, 0, **more), samples(out / "samples" / "final"))
    part, last = ("transformer", "proj_out_2.bias") if name == "dit" else ("unet", "conv_out.bias")
    before, after = weights(first, part)[last], weights(out, part)[last]
    if name == "variance":
        assert torch.equal(before[3:], after[3:])
    assert not torch.equal(before[:3], after[:3])


@pytest.mark.parametrize("name", ["ddim", "score"])
def test_a_flow_is_refused_where_the_pipeline_has_its_own_noise(name, images, tmp_path, capsys):
    from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    made = own_pipeline(name) if name == "ddim" else ScoreSdeVePipeline(small_unet(), ScoreSdeVeScheduler())
    made.save_pretrained(tmp_path / "first")
    reset_accelerate()
    words = ["--pretrained_model", tmp_path / "first", "--train_data_dir", images, "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--flow_matching"]]) == 2
    assert "--flow_matching" in message(capsys)


def test_samples_take_no_more_steps_than_a_short_schedule_has(train, capsys, caplog):
    from utils.sampling.options import SamplingOptions

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
        "train_unconditional.publish", lambda folder, repository, hub, facts, samples: calls.append(facts.call)
    )
    for name in ("pixels", "labels"):
        train(name, *SHORT, "--ddpm_num_steps", 8, "--num_inference_steps", 2, "--max_train_steps", 1, out=name)
    assert calls == ["pipeline(num_inference_steps=8)", "pipeline([0], num_inference_steps=8)"]


def test_a_score_pipeline_is_fine_tuned(images, tmp_path):
    from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    unet = small_unet(layers_per_block=1, time_embedding_type="fourier")
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=50, sigma_max=20.0)
    ScoreSdeVePipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "score")
    reset_accelerate()
    argv = ["--pretrained_model", tmp_path / "score", "--train_data_dir", images, "--output_dir", tmp_path / "out"]
    argv += ["--max_train_steps", 30, "--train_batch_size", 4, "--learning_rate", 3e-3, "--lr_warmup_steps", 0]
    argv += [*tiny.SMALL_DRAWING, "--num_inference_steps", 3, "--report_to", "none"]
    assert main([str(word) for word in argv]) == 0
    assert np.mean(losses(tmp_path / "out")[-5:]) < np.mean(losses(tmp_path / "out")[:5])
    pipeline = load(tmp_path / "out")
    assert np.array_equal(drawn(pipeline, 0, batch_size=2), samples(tmp_path / "out" / "samples" / "final"))


@pytest.mark.parametrize("said", ["nothing", "null"])
def test_a_vae_without_a_scaling_has_one_measured(train, pipelines, said, tmp_path):
    folder = shutil.copytree(pipelines["vae"], tmp_path / "bare")
    config = json.loads((folder / "config.json").read_text())
    del config["scaling_factor"]
    config |= {"scaling_factor": None} if said == "null" else {}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ("--vae", folder, "--lr_scheduler", "constant", "--train_batch_size", 2)
    out = train("latents", *flags, "--max_train_steps", 2)
    factor = json.loads((out / "latent_scaling.json").read_text())["scaling_factor"]
    exported = load(out)
    assert exported.vqvae.config.scaling_factor == factor
    pixels = torch.stack([torch.from_numpy(np.asarray(_centre(path))) for path in sorted(train.images.glob("*.png"))])
    with torch.no_grad():
        posterior = exported.vqvae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    assert factor * posterior.sample(torch.Generator().manual_seed(0)).std() == pytest.approx(1, rel=0.03)
    (out / "latent_scaling.json").write_text(json.dumps({"scaling_factor": 0.5}))
    train("latents", *flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert load(out).vqvae.config.scaling_factor == 0.5  # a resumed run measures nothing anew


def _centre(path: Path) -> Image.Image:
    from utils.config.batch import RecordPass
    from utils.data.crop_plan import make_cut, plan_cut
    from utils.data.options import ImageOptions

    image, options = Image.open(path).convert("RGB"), ImageOptions(center_crop=True)
    cut = plan_cut(image.size, (32, 32), options, 0, RecordPass(0, 0))
    return Image.fromarray(make_cut(image, cut, options).transpose(1, 2, 0))


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


@pytest.mark.parametrize("kind", ["names", "numbers", "class labels", "truths"])
def test_labels_of_a_column(train, images, tmp_path, kind):
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    paths = [str(path) for path in sorted(images.glob("*.png"))]
    labels = {"names": ["b", "a"], "numbers": [10, 9], "class labels": [2, 0], "truths": [True, False]}[kind]
    named = {"class labels": ClassLabel(names=["b", "c", "a"]), "truths": Value("bool")}
    feature = ({"names": Value("string"), "numbers": Value("int64")} | named)[kind]
    features = Features({"image": ImageFeature(), "kind": feature})
    rows = {"image": paths, "kind": [labels[number % 2] for number in range(len(paths))]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    reset_accelerate()
    words = ["--dataset_name", tmp_path / "data", "--label_column", "kind", "--output_dir", tmp_path / "out"]
    words += [*tiny.UNCONDITIONAL["labels"], *SHORT, "--resolution", 32, "--report_to", "none"]
    assert main([str(word) for word in words]) == 0
    expected = {"names": ["a", "b"], "numbers": ["9", "10"], "class labels": ["b", "a"], "truths": ["False", "True"]}
    labels_by_number = sorted(load(tmp_path / "out").labels.items(), key=lambda pair: pair[1])
    assert [name for name, _ in labels_by_number] == expected[kind]


def test_the_whole_name_of_a_folder_is_the_class(train, classes, tmp_path):
    names = ["5_1", "6_1", "images", "a b", "日本"]
    for name in names:
        shutil.copytree(classes / "cat", tmp_path / "data" / "deep" / name)
    (tmp_path / "data" / "empty").mkdir()
    assert load(train("labels", *SHORT, data=tmp_path / "data")).labels.keys() == set(names)


def test_labels_that_are_not_there(classes, capsys, tmp_path):
    from datasets import Dataset

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(classes.rglob("*.png"))]
    rows = {"image": images, "kind": ["a", "b", None] * 2, "share": [0.5] * 6}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    for flags, said in (([], "no folders"), (["kind"], "2 images have no label"), (["share"], "--label_column share")):
        reset_accelerate()
        words = ["--dataset_name", tmp_path / "data", "--class_conditional", "--output_dir", tmp_path / "out"]
        assert main([str(word) for word in [*words, *(["--label_column", *flags] if flags else [])]]) == 2
        line = message(capsys)
        assert said in line
        assert "--label_column" in line


@pytest.mark.parametrize("kind", ["metadata", "dataset"])
def test_a_wrong_column_is_named_by_this_scripts_flag(train, images, tmp_path, capsys, kind):
    from datasets import Dataset

    flags = ["--class_conditional", "--label_column", "labl"]
    if kind == "dataset":
        rows = {"image": [str(path) for path in sorted(images.rglob("*.png"))], "label": [0, 1] * 3}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
        train("pixels", *SHORT, *flags, "--dataset_name", tmp_path / "data", expect=2)
    else:
        train("pixels", *SHORT, *flags, expect=2)
    line = message(capsys)
    assert "--label_column labl is not a column" in line
    assert "--caption_column" not in line
    assert ("did you mean --label_column label?" in line) == (kind == "dataset")


LAYOUTS = {
    "a class called train": ("train cat dog", "cat dog train", "taken for classes, as folders beside them are: train;"),
    "classes called test and val": ("test val cat", "cat test val", "beside them are: test, val;"),
    "deeper": ("all/train all/cat", "cat train", "all/train"),
    "within splits": ("train/train train/cat val/train val/cat", "cat train", "train/train, val/train"),
    "splits": ("train/cat train/dog test/cat test/dog", "cat dog", None),
    "a split beside folders": (
        "train/cat train/dog more/cat",
        "cat dog",
        "train is taken for the split train, and 1 im",
    ),
    "another split alone": ("test/cat cat dog", "cat dog", "trained on too, as there is no folder train: test;"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_class_folders_called_as_splits_are(tmp_path, classes, caplog, case):
    folders, names, said = LAYOUTS[case]
    image = next(classes.rglob("*.png"))
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(image, tmp_path / folder / "a.png")
        (tmp_path / folder / "a.txt").write_text("beside it")
    source = LabelledSource(train_data_dir=str(tmp_path))
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).for_source(source), 0)
    found = {records.captions(index)[0] for index in range(len(records))}
    assert found == set(names.split())
    assert said in caplog.text if said else not caplog.text


def class_records(folder: Path, rule: str | None = None) -> dict[str, str]:
    """The class of each image of a folder."""
    source = LabelledSource(train_data_dir=str(folder))
    captions = LabelOptions(class_conditional=True, class_folders=rule).for_source(source)
    records = read_records(DataOptions(), source, captions, 0)
    return {records.key(index): records.captions(index)[0] for index in range(len(records))}


def touch_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


MERGED = {
    "of two parents": ("cat/old/0.png cat/young/0.png dog/old/0.png dog/young/0.png", "old young", "cat dog"),
    "at two depths": ("cat/0.png more/cat/0.png more/dog/0.png", "cat dog", "cat more"),
    "of one name": ("n1/images/0.png n2/images/0.png", "images", "n1 n2"),
    "below a split": ("train/a/cat/0.png train/b/cat/0.png test/a/cat/0.png", "cat", "a b"),
    "below a shared folder": ("all/cat/x/0.png all/dog/x/0.png", "x", "cat dog"),
}


@pytest.mark.parametrize("case", MERGED)
def test_folders_of_one_name_in_several_places_are_refused_until_a_rule_is_given(tmp_path, case):
    names, inner, outer = MERGED[case]
    touch_images(tmp_path, *names.split())
    with pytest.raises(UserError, match=rf"--train_data_dir {tmp_path}: .*stand in several places, such as .*/.*inner"):
        class_records(tmp_path)
    assert set(class_records(tmp_path, "inner").values()) == set(inner.split())
    assert set(class_records(tmp_path, "outer").values()) == set(outer.split())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            "cat/0.png dog/0.png banner.png",
            "1 images lie in no folder of a class (in its top), beside the folders cat",
        ),
        ("train/cat/0.png train/dog/0.png train/1.png", "(in train/), beside the folders cat, dog; put them into"),
    ],
)
def test_images_beside_the_folders_of_classes_are_refused(tmp_path, names, said):
    touch_images(tmp_path, *names.split())
    with pytest.raises(UserError) as raised:
        class_records(tmp_path)
    assert said in str(raised.value)


def test_folders_that_mean_what_they_say_are_no_fault(tmp_path, caplog):
    touch_images(tmp_path / "a", "all/cat/0.png", "all/dog/0.png")
    assert set(class_records(tmp_path / "a").values()) == {"cat", "dog"}
    touch_images(tmp_path / "b", "cat/train/0.png", "dog/train/0.png", "cat/test/0.png")
    assert class_records(tmp_path / "b") == {"cat/train/0.png": "cat", "dog/train/0.png": "dog"}
    touch_images(tmp_path / "cats", "0.png")
    touch_images(tmp_path / "dogs", "train/0.png")
    (tmp_path / "sources.yaml").write_text("- {train_data_dir: cats}\n- {train_data_dir: dogs}\n")
    source = LabelledSource()
    captions = LabelOptions(class_conditional=True).for_source(source)
    records = read_records(DataOptions(dataset_file=str(tmp_path / "sources.yaml")), source, captions, 0)
    assert [records.captions(index)[0] for index in range(2)] == ["cats", "dogs"]
    assert not caplog.records


def test_nested_folders_without_a_contradiction_are_named(tmp_path, caplog):
    touch_images(tmp_path, "cat/persian/0.png", "cat/siamese/0.png", "dog/0.png")
    assert set(class_records(tmp_path).values()) == {"persian", "siamese", "dog"}
    assert "such as persian of cat/persian; --class_folders outer takes the outer one, such as cat" in caplog.text
    caplog.clear()
    assert set(class_records(tmp_path, "outer").values()) == {"cat", "dog"}
    assert not caplog.records


def test_classes_within_shards(tmp_path):
    import io
    import tarfile

    def shard(name: str, *members: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as archive:
            for member in members:
                content = io.BytesIO()
                Image.new("RGB", (8, 8)).save(content, "PNG")
                info = tarfile.TarInfo(member)
                info.size = content.tell()
                archive.addfile(info, io.BytesIO(content.getvalue()))

    for number in range(2):
        shard(f"a/{number}.tar", f"./cat/{number}.png", f"train/{number}.png")
        shard(f"b/{('cat', 'dog')[number]}-{number}.tar", f"{number}.png")
    assert set(class_records(tmp_path / "a").values()) == {"cat", "train"}
    assert set(class_records(tmp_path / "b").values()) == {"b"}


INVISIBLE = ["\u200b", "\ufeff", "\u200f", "\xad", "\xa0", " ", "\u2060"]


@pytest.mark.parametrize("mark", INVISIBLE)
@pytest.mark.parametrize("is_column", [True, False])
def test_what_is_not_shown_sets_no_classes_apart(tmp_path, caplog, mark, is_column):
    names = ("cat", f"cat{mark}", f"{mark}dog", "a b", "a\xa0b")
    if is_column:
        touch_images(tmp_path, *(f"{number}.png" for number in range(5)))
        rows = [{"file_name": f"{number}.png", "kind": name} for number, name in enumerate(names)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        touch_images(tmp_path, *(f"{name}/{number}.png" for number, name in enumerate(names)))
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column="kind" if is_column else None)
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).captions(source), 0)
    assert count_classes(records) == {"cat": 2, "dog": 1, "a b": 2}
    told = [line for line in caplog.messages if "characters that are not shown" in line]
    assert len(told) == 1
    assert "'a b' and 'a\\xa0b' as 'a b'" in told[0]


def test_joiners_that_letters_and_emoji_need_stay(tmp_path, caplog):
    man, woman, persian = "\U0001f468", "\U0001f469", "\u0645\u06cc"
    names = (f"{man}\u200d{woman}", f"{man}{woman}", f"{persian}\u200c\u062e", f"{persian}\u062e", "\u200b")
    touch_images(tmp_path, *(f"{name}/{number}.png" for number, name in enumerate(names)))
    assert set(class_records(tmp_path).values()) == set(names)
    assert not caplog.records


def test_folders_called_tar_are_classes(tmp_path):
    touch_images(tmp_path, "cat.tar/0.png", "dog.tar/1.png", "mouse/2.png")
    assert set(class_records(tmp_path).values()) == {"cat.tar", "dog.tar", "mouse"}
    source = SourceOptions(train_data_dir=str(tmp_path))
    records = read_records(DataOptions(), source, CaptionOptions(on_missing_caption="folder"), 0)
    assert {records.captions(row)[0] for row in range(3)} == {"cat.tar", "dog.tar", "mouse"}


@pytest.mark.parametrize("ending", ["cls", ".CLS", "label.txt"])
def test_labels_that_are_members_of_shards(tmp_path, ending):
    import io
    import tarfile

    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    labels = [b"3", b"03\n", b" cat", b"cat\r\n", b"\xef\xbb\xbfcat"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, label in enumerate(labels):
            members = (("png", image.getvalue()), (ending.strip(".").lower(), label), ("txt", b"a caption"))
            for suffix, content in members:
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column=ending)
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).captions(source), 0)
    is_number = ending != "label.txt"
    assert count_classes(records) == ({"3": 2, "cat": 3} if is_number else {"3": 1, "03": 1, "cat": 3})


def test_one_text_is_one_class_and_twins_are_named(tmp_path, caplog):
    touch_images(tmp_path, "caf\u00e9/0.png", "cafe\u0301/1.png", "cat/0.png", "cat /0.png")
    assert set(class_records(tmp_path).values()) == {"caf\u00e9", "cat"}
    assert r"'caf\xe9' and 'cafe\u0301' as 'café'; 'cat ' and 'cat' as 'cat'" in caplog.text
    caplog.clear()
    warn_of_twins(["Cat", "cat", "golden retriever", "golden_retriever", "1", "01", "dog"])
    assert "3 groups of classes differ only in" in caplog.text
    caplog.clear()
    warn_of_twins(["cat", "cats", "10", "100"])
    assert not caplog.records


@pytest.mark.parametrize(
    "rows",
    [
        [("0.png", "cat"), ("0.png", "dog"), ("1.png", "dog")],
        [("0.png", ["cat", "dog"]), ("1.png", "dog")],
        [("0.png", 1), ("./0.png", "01"), ("1.png", 2)],
    ],
)
def test_an_image_of_two_classes_is_refused(train, tmp_path, capsys, rows):
    touch_images(tmp_path / "data", "0.png", "1.png")
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    train("labels", *SHORT, "--label_column", "label", data=tmp_path / "data", expect=2)
    assert "--label_column: 1 images have several labels; give each image one: 0.png: " in message(capsys)


def test_the_plan_names_classes_with_their_counts(train, classes, capsys):
    train("labels", *SHORT, "--dry_run", data=classes)
    assert "2 classes (cat: 3, dog: 3), " in capsys.readouterr().out
    assert describe_counts(list("abcdefg"), dict.fromkeys("abcdefg", 1000)).endswith("e: 1,000, and 2 more)")


def test_class_folders_go_with_classes_by_folders(tmp_path):
    touch_images(tmp_path, "cat/0.png")
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column="label")
    for is_conditional in (False, True):
        with pytest.raises(UserError, match="--class_folders outer is for classes by folders"):
            LabelOptions(class_conditional=is_conditional, class_folders="outer").for_source(source)


def test_one_class_that_is_a_split_is_named(train, classes, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(classes / "cat", tmp_path / "data" / split)
    train("labels", *SHORT, data=tmp_path / "data", expect=2)
    assert "got one, data, as the folder train is taken for a split;" in message(capsys)


def test_an_error_of_one_process_keeps_its_kind_under_this_scripts_names(capsys, monkeypatch):
    from train_unconditional import OWN_NAMES
    from utils.config.options import ProcessError, run_script

    def run(argv):
        raise ProcessError("--caption_column labl: row 3 holds no class")

    monkeypatch.setenv("RANK", "1")
    assert run_script(run, [], OWN_NAMES) == 2
    assert message(capsys) == "error: --label_column labl: row 3 holds no class"


def test_sixteen_bits_reach_the_model(tmp_path):
    from utils.config.batch import RecordPass
    from utils.data.crop_pixels import cut_out
    from utils.data.options import PixelOptions

    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found = {}
    for deep in (False, True):
        options = PixelOptions(image_channels=1, center_crop=True, preserve_input_precision=deep)
        pixels = cut_out(str(tmp_path / "ramp.png"), None, (64, 64), options, 0, RecordPass(0, 0)).pixels
        assert pixels.shape == (1, 64, 64)
        found[deep] = pixels
    np.testing.assert_allclose(found[True][0], ramp / 257, atol=1e-3)
    assert len(np.unique(found[True])) == 4096
    assert len(np.unique(found[False])) <= 256


def png_of(values: np.ndarray) -> bytes:
    """A PNG of 16-bit colours [H, W, 3 or 4], which PIL can't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of(values: np.ndarray, order: str, is_compressed: bool) -> bytes:
    """A TIFF of 16-bit colours [H, W, 3 or 4], its bytes in the order "<" or ">"."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    content = zlib.compress(content) if is_compressed else content
    content += b"\0" * (len(content) % 2)
    tags = {256: width, 257: height, 258: 0, 259: 8 if is_compressed else 1, 262: 2, 273: 8, 277: channels, 278: height}
    tags |= {279: len(content), 284: 1} | ({338: 2} if channels == 4 else {})
    begin = 8 + len(content)
    tags[258] = begin + 2 + 12 * len(tags) + 4  # where the bits of each channel stand
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items() if tag != 258]
    entries.insert(2, struct.pack(f"{order}HHII", 258, 3, channels, tags[258]))
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", begin)
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + struct.pack(f"{order}I", 0)
    return magic + content + directory + struct.pack(f"{order}H", 16) * channels


SIXTEEN_BITS = {
    "png": png_of,
    "tiff": lambda values: tiff_of(values, "<", False),
    "big-endian tiff": lambda values: tiff_of(values, ">", False),
    "compressed tiff": lambda values: tiff_of(values, "<", True),
    "compressed big-endian tiff": lambda values: tiff_of(values, ">", True),
}


@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("form", SIXTEEN_BITS)
def test_sixteen_bits_of_colours_reach_the_model(form, has_alpha):
    from utils.data.pixels import read_deep

    colours = np.random.default_rng(0).integers(0, 65536, (24, 40, 3), np.uint16)
    alpha = np.full((24, 40, 1), 40001, np.uint16)
    file = SIXTEEN_BITS[form](np.concatenate([colours, alpha], axis=2) if has_alpha else colours)
    plain = colours / 257
    on_black = plain * (40001 / 65535 if has_alpha else 1)
    expected = {
        1: on_black @ [[0.299], [0.587], [0.114]],
        3: on_black,
        4: np.concatenate([plain, alpha / 257 if has_alpha else alpha * 0.0 + 255], axis=2),
    }
    for channels, values in expected.items():
        found, seen = read_deep(file, channels, "black")
        np.testing.assert_allclose(np.asarray(found), values, atol=1e-3)
        assert (seen is not None) == has_alpha


def test_integers_beyond_sixteen_bits_are_not_all_white(tmp_path):
    from utils.data.pixels import read_deep

    values = np.linspace(0, 2**31 - 1, 64 * 64).reshape(64, 64).astype(np.int32)
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    found, _ = read_deep(str(tmp_path / "deep.tiff"), 1, "white")
    np.testing.assert_allclose(np.asarray(found)[..., 0], values / (2**31 - 1) * 255, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_channels_of_an_image(tmp_path, channels, deep):
    from utils.config.batch import RecordPass
    from utils.data.crop_pixels import cut_out
    from utils.data.options import PixelOptions

    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[:, :4, 3] = 200, 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    options = PixelOptions(image_channels=channels, preserve_input_precision=deep, center_crop=True)
    found = cut_out(str(tmp_path / "half.png"), None, (8, 8), options, 0, RecordPass(0, 0)).pixels
    assert found.dtype == (np.float32 if deep else np.uint8)
    seen = {1: ([60], [255]), 3: ([200, 0, 0], [255, 255, 255]), 4: ([200, 0, 0, 255], None)}[channels]
    np.testing.assert_allclose(found[:, 4, 0], seen[0], atol=1)
    if seen[1] is not None:
        np.testing.assert_allclose(found[:, 4, 7], seen[1], atol=1)
    else:
        assert found[3, 4, 7] == 0


SIZES = {8: 2, 16: 3, 32: 4, 64: 5, 128: 6, 256: 6}


@pytest.mark.parametrize("edge", SIZES)
def test_a_built_in_size_has_no_level_under_4(edge):
    from utils.models.from_scratch import unet_config
    from utils.models.options import ShapeOptions

    config = unet_config(ShapeOptions(), edge, 3, None)
    assert len(config["block_out_channels"]) == SIZES[edge]
    assert edge // 2 ** (SIZES[edge] - 1) >= 4


@pytest.mark.parametrize("init", ["default", "xavier_kaiming"])
@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel"])
def test_first_weights(name, init):
    from utils.models.from_scratch import make_denoiser, transformer_config, unet_config
    from utils.models.options import ShapeOptions

    torch.manual_seed(0)
    options = ShapeOptions(model_size="tiny", weight_init=init)
    config = unet_config(options, 16, 3, None) if name == "UNet2DModel" else transformer_config(options, 16, 3)
    model = make_denoiser(name, config, init)
    classes = {} if name == "UNet2DModel" else {"class_labels": torch.tensor([0])}
    output = model(torch.randn(1, 3, 16, 16), torch.tensor([10]), **classes).sample
    assert bool(output.any()) == (init != "default")  # zeroed last layers predict nothing
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.any())
    if init == "xavier_kaiming":
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.9 * bound < float(linear.weight.detach().abs().max()) <= bound


def test_a_config_file_says_the_shape(train, tmp_path):
    first = train("pixels", *SHORT, out="first")
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    reset_accelerate()
    words = ["--model_config_name_or_path", first, "--train_data_dir", train.images, "--output_dir", tmp_path / "out"]
    words += [*SHORT, *tiny.SMALL_DRAWING, "--resolution", 16, "--report_to", "none"]
    assert main([str(word) for word in words]) == 0
    assert weights(first).keys() == weights(tmp_path / "out").keys()
    assert load(tmp_path / "out").unet.config.sample_size == 16


def three_levels():
    types = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    return small_unet(block_out_channels=(8, 16, 16), **types)


def test_a_configs_levels_stay_at_4_or_over(train, tmp_path, capsys):
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    three_levels().save_config(tmp_path / "config")
    reset_accelerate()
    words = ["--train_data_dir", train.images, "--output_dir", tmp_path / "out", "--resolution", 8]
    words += ["--model_config_name_or_path", tmp_path / "config"]
    assert main([str(word) for word in words]) == 2
    line = message(capsys)
    assert "--model_config_name_or_path has 3 levels, of which the last would see 2x2 of 8 pixels" in line
    assert "an edge of at least 16" in line
    with pytest.raises(UserError, match=r"--model_size has 1 level,.*at least 4"):
        unet_config(ShapeOptions(model_size="tiny"), 2, 4, None)
    with pytest.raises(UserError, match=r"try an edge of 16$"):
        unet_config(ShapeOptions(model_config_name_or_path=str(tmp_path / "config")), 10, 3, None)


def test_what_a_fine_tuned_pipeline_does_otherwise_is_said(train, tmp_path, caplog):
    """A level under 4x4, and samples by another sampler than the result's; nothing where there is neither."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    DDPMPipeline(three_levels(), DDPMScheduler()).save_pretrained(tmp_path / "first")
    words = ["--pretrained_model", tmp_path / "first", "--train_data_dir", train.images, "--dry_run"]
    words += ["--output_dir", tmp_path / "out", *tiny.SMALL_DRAWING, "--report_to", "none"]
    for flags, is_small, is_other in (([], False, False), (["--resolution", 8, "--sampler", "ddim"], True, True)):
        reset_accelerate()
        caplog.clear()
        assert main([str(word) for word in [*words, *flags]]) == 0
        assert ("sees 2x2 then, under 4x4" in caplog.text) == is_small
        said = "samples are drawn by DPMSolverMultistepScheduler, but the exported pipeline has DDPMScheduler"
        assert (said in caplog.text) == is_other


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
    assert ("the run's samples are drawn by" in caplog.text) == is_other


@pytest.mark.parametrize("name", ["latents", "labelled latents"])
def test_what_a_pipeline_does_not_know_of_a_vae_is_said(train, pipelines, tmp_path, caplog, name):
    train(name, "--dry_run")
    assert "scaled alone" not in caplog.text
    folder = shutil.copytree(pipelines["vae"], tmp_path / "shifted")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1, "latents_mean": [0.5] * 4}))
    train(name, "--dry_run", "--vae", folder)
    assert caplog.text.count("the VAE's shift_factor, latents_mean: left out in training") == 1


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
    assert {path.name for path in (out / "samples").iterdir()} == {"step-2", "final", "film_strip.png"}


@pytest.mark.parametrize("name", ["pixels", "labelled latents"])
def test_dry_run(train, capsys, name):
    out = train(name, *SHORT, "--dry_run")
    printed = capsys.readouterr().out
    assert {"pixels": "DDPMPipeline", "labelled latents": "DiTPipeline"}[name] in printed
    assert {"pixels": "no classes", "labelled latents": "2 classes"}[name] in printed
    assert "2 optimizer steps" in printed
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "dry_run_report.json"]


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
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
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
            ["--use_aspect_ratio_buckets", "squares"],
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
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    flags = (ROOT / "tests" / "diffusers_unconditional_flags.txt").read_text().split()
    assert not [flag for flag in flags if f" {flag} " not in shown and f" {flag}," not in shown]


EXAMPLE = """--train_batch_size=1 --num_epochs=1 --gradient_accumulation_steps=1 --ddpm_num_inference_steps 2
    --learning_rate=1e-3 --lr_warmup_steps=5"""


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


def test_a_model_of_classes_goes_on_with_the_same_classes_alone(train, classes, tmp_path, capsys):
    train("labels", *SHORT)
    resume = ("--resume_from_checkpoint", "latest")
    train("labels", *SHORT, *resume, "--class_folders", "inner")  # which is what it did unasked
    train("labels", *SHORT, *resume, "--class_folders", "outer", expect=2)
    assert "--class_folders outer (it was None)" in message(capsys)
    more = shutil.copytree(classes, tmp_path / "more")
    shutil.copytree(more / "cat", more / "mouse")
    train("labels", *SHORT, "--resume_from_checkpoint", "latest", data=more, expect=2)
    assert "--classes" in message(capsys)


@pytest.mark.parametrize("is_column", [True, False])
def test_a_model_whose_classes_had_another_spelling_goes_on(train, tmp_path, monkeypatch, is_column):
    """Classes keep the numbers by which they were learnt, though e with an accent now comes behind f."""
    names, data = ("cafe\u0301", "caff", "cat"), tmp_path / "data"
    put_classes(data, *names)
    flags = [*SHORT, "--class_conditional"]
    if is_column:
        rows = [{"file_name": str(file.relative_to(data)), "kind": file.parent.name} for file in data.glob("*/*.png")]
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags += ["--label_column", "kind"]
    with monkeypatch.context() as earlier:
        earlier.setattr("utils.data.class_folders.same_text", lambda name: name)
        train("labels", *flags, data=data)
    out = train("labels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", data=data)
    assert load(out).labels == {"caf\u00e9": 0, "caff": 1, "cat": 2}


EARLIER_FOLDERS = {
    "twins": (("cafe\u0301", "caf\u00e9", "dog"), {"cafe\u0301", "caf\u00e9", "dog"}),
    "loose": ((".", "cat", "dog"), {"data", "cat", "dog"}),
    "two places": (("a/x", "b/x", "c/y"), {"x", "y"}),
    "all": ((".", "a/x", "b/x", "cafe\u0301", "caf\u00e9", "dog "), {"data", "x", "cafe\u0301", "caf\u00e9", "dog "}),
}


@pytest.mark.parametrize("case", mostly_slow(EARLIER_FOLDERS, "twins"))
def test_a_model_of_folders_that_are_refused_today_goes_on(train, tmp_path, monkeypatch, case):
    names, classes = EARLIER_FOLDERS[case]
    data = put_classes(tmp_path / "data", *names)
    flags = [*SHORT, "--class_conditional", "--checkpointing_steps", 2]
    with monkeypatch.context() as earlier:
        for module in ("train_unconditional", "utils.data.class_labels", "utils.data.class_folders"):
            earlier.setattr(f"{module}.same_text", lambda name: name)
        by_own_name = {folder: PurePosixPath(folder).name or "data" for folder in ("", *names)}
        earlier.setattr("utils.data.class_labels.names_of_folders", lambda *_: by_own_name)
        out = train("labels", *flags, data=data)
    assert set(read_state(out / "checkpoint-2").facts.structure["classes"]) == classes
    train("labels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", data=data)


@pytest.mark.parametrize(
    ("folders", "recorded", "names"),
    [
        (("cafe\u0301", "caf\u00e9"), ["cafe\u0301", "caf\u00e9"], ["cafe\u0301", "caf\u00e9"]),
        (("cafe\u0301", "caf\u00e9"), ["caf\u00e9"], None),
        (("cafe\u0301", "dog"), ["cafe\u0301", "dog"], None),
        (("", "cat", "dog"), ["cat", "data", "dog"], ["data", "cat", "dog"]),
        (("", "cat", "dog"), ["cat", "other", "dog"], None),
        (("a/x", "b/x", "c/y"), ["x", "y"], ["x", "x", "y"]),
        (("a/x", "b/x", "c/y"), ["a", "b", "c"], None),
        (("a/x", "b/x", "c/y"), [], None),
        (("cat/p", "cat/s", "dog"), ["p", "s", "dog"], None),
    ],
)
def test_the_classes_of_a_checkpoint_decide_where_its_release_named_them_so(folders, recorded, names):
    """None leaves it to today's rule."""
    found = recorded_folders(dict.fromkeys(folders, 2), recorded, "", "data")
    assert found == (None if names is None else dict(zip(folders, names, strict=True)))


def test_labels_of_a_column_that_were_twins_stay_so():
    options, twins = LabelOptions(class_conditional=True), ("cafe\u0301", "caf\u00e9")
    source = LabelledSource(train_data_dir=".", caption_column="kind")
    assert options.captions(source, twins).of(twins) == twins
    assert options.captions(source, twins[:1]).of(twins) == twins[1:]


def test_names_that_tables_write_for_nothing_are_classes(tmp_path, caplog):
    labels = ("NA", "None", "DE", "N/A", "NaN", "")
    touch_images(tmp_path, *(f"{number}.png" for number in range(len(labels))))
    rows = "".join(f"{number}.png,{label},NA\n" for number, label in enumerate(labels))
    (tmp_path / "metadata.csv").write_text(f"file_name,kind,more\n{rows}")
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column="kind")
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).for_source(source), 0)
    assert [records.captions(row)[0] for row in range(len(records))] == ["NA", "None", "DE", "N/A", "", ""]
    assert count_classes(records) == {"NA": 1, "None": 1, "DE": 1, "N/A": 1}
    assert "3 cells hold NA, None, N/A, the first in line 2, and are read as names" in caplog.text
    assert "1 cells hold NaN, the first in line 6, and are read as empty" in caplog.text


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "0.000 of drawn ones" in said


def test_the_film_goes_on_with_the_run_and_without_what_it_left_behind(train):
    def film_and_folders(out: Path) -> tuple[int, set[str]]:
        with Image.open(out / "samples" / "film_strip.png") as strip:
            return (strip.width - 2) // 66, {path.name for path in (out / "samples").iterdir() if path.is_dir()}

    flags = ("--train_batch_size", 2, "--save_images_steps", 2, "--checkpointing_steps", 2, "--resolution", 16)
    flags += ("--attention_resolutions", 8)
    out = train("labels", *flags, "--max_train_steps", 4)
    assert film_and_folders(out) == (2, {"step-2", "final"})
    record = json.loads((out / "samples" / "final" / "samples.json").read_text())
    assert record["step"] == 4
    assert [each["of"] for each in record["samples"]] == ["cat", "dog"]
    train("labels", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert film_and_folders(out) == (3, {"step-2", "step-4", "final"})
    train("labels", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert film_and_folders(out) == (3, {"step-2", "step-4", "final"})
    train("labels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "checkpoint-2")
    assert film_and_folders(out) == (2, {"step-2", "final"})
    train("labels", *flags, "--max_train_steps", 1, "--overwrite_output_dir")
    assert film_and_folders(out) == (1, {"final"})


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
