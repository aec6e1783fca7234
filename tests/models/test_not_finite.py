"""Encodings and samples that are NaN are named with what is to blame, not shown as black pictures or a bad rate."""

import functools
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from utils.models.latent_space import LatentSpace, PixelSpace


class Broken(nn.Module):
    """A part of a VAE that gives NaN."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, *args, **kwargs):
        return self.own(*args, **kwargs) * float("nan")


def space(dtype: torch.dtype = torch.float32, part: str = "decoder") -> LatentSpace:
    vae = tiny.vae().to(dtype)
    setattr(vae, part, Broken(getattr(vae, part)))
    return LatentSpace(vae)


def test_a_decoder_that_gives_nan_is_named_once_with_a_cure(caplog):
    latents = torch.zeros(1, 4, 8, 8)
    broken = space()
    for _ in range(2):
        assert torch.equal(broken.pictures(latents), torch.full((1, 3, 16, 16), -1.0))
    assert [record.message for record in caplog.records if record.name.startswith("utils.")] == [
        "the VAE decodes to NaN or infinite values: samples are black; give another VAE"
    ]
    caplog.clear()
    space(torch.float16).pictures(latents)
    assert "--mixed_precision bf16, or for SDXL a VAE made for fp16 (madebyollin/sdxl-vae-fp16-fix)" in caplog.text
    caplog.clear()
    LatentSpace(tiny.vae()).pictures(latents * float("nan"))
    assert "the denoiser's samples are NaN" in caplog.text
    caplog.clear()
    assert torch.isfinite(PixelSpace(3).pictures(torch.full((1, 3, 4, 4), float("nan")))).all()
    assert torch.isfinite(LatentSpace(tiny.vae()).pictures(latents)).all()


@pytest.mark.parametrize("flags", [("--cache_latents",), ()])
def test_an_encoder_that_gives_nan_is_named(train, monkeypatch, capsys, caplog, tmp_path, flags):
    own = LatentSpace.moments

    def moments(self, pixels):
        mean, std = own(self, pixels)
        return mean * float("nan"), std

    monkeypatch.setattr(LatentSpace, "moments", moments)
    flags = [*flags, "--encoding_cache_dir", tmp_path] if flags else []
    train("sd", "--max_train_steps", 2, "--no_final_checkpoint", *flags, expect=2 if flags else 1)
    if flags:
        assert "the VAE's encoding of it is not finite" in capsys.readouterr().err + caplog.text
    else:
        said = [record.message for record in caplog.records if "the VAE's encodings are NaN" in record.message]
        assert len(said) == 1
        assert "--mixed_precision bf16" in said[0]


def test_samples_of_a_broken_decoder_say_so(train, monkeypatch, caplog, recwarn):
    own = LatentSpace.decode
    monkeypatch.setattr(LatentSpace, "decode", lambda self, latents: own(self, latents) * float("nan"))
    out = train("sd", "--max_train_steps", 1, "--no_final_checkpoint", "--validation_prompt", "a")
    assert caplog.text.count("the VAE decodes to NaN") == 1
    assert not any("invalid value" in str(each.message) for each in recwarn)
    assert np.array(list(out.glob("samples/final/*.png"))).size


def test_evaluation_names_the_decoder(more_pipelines, tmp_path, caplog):
    from diffusers import StableDiffusionPipeline

    from utils.sampling.controls import SamplingControls
    from utils.sampling.drawer import Drawer, InMemory
    from utils.sampling.options import GenerationOptions
    from utils.sampling.prompts import Prompt, Task

    pipeline = StableDiffusionPipeline.from_pretrained(more_pipelines["sd"])
    pipeline.vae.decoder = Broken(pipeline.vae.decoder)
    drawer = Drawer(
        pipeline,
        GenerationOptions(num_inference_steps=1),
        SamplingControls(),
        0,
        torch.device("cpu"),
        in_memory=InMemory(),
    )
    drawer.call([Task(0, 0, Prompt("a"))])
    assert caplog.text.count("the VAE decodes to NaN") == 1


class Step:
    """A scheduler's step that gives NaN at one of its calls."""

    def __init__(self, own, number: int):
        self.own, self.number, self.__signature__ = own, number, inspect.signature(own)

    def __call__(self, *args, **kwargs):
        found = self.own(*args, **kwargs)
        self.number -= 1
        return (found[0] * float("nan"), *found[1:]) if self.number == 0 else found


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("step", "step 2 of the DDIMScheduler turns finite"),
        ("last step", "step 3 of the DDIMScheduler turns finite"),
        ("unet", "the denoiser's prediction is NaN or infinite from step 1 on"),
        ("text_encoder", "the text embeddings are NaN"),
        ("noise", "the initial noise of sampling is NaN"),
        ("decoder", "the VAE decodes to NaN"),
    ],
)
def test_the_first_place_that_is_not_finite_is_named(more_pipelines, caplog, monkeypatch, part, said):
    from diffusers import StableDiffusionPipeline

    from utils.sampling.controls import SamplingControls
    from utils.sampling.drawer import Drawer, InMemory
    from utils.sampling.options import GenerationOptions
    from utils.sampling.prompts import Prompt, Task

    pipeline = StableDiffusionPipeline.from_pretrained(more_pipelines["sd"])
    settings = GenerationOptions(num_inference_steps=3)
    drawer = Drawer(pipeline, settings, SamplingControls(), 0, torch.device("cpu"), in_memory=InMemory())
    if part.endswith("step"):
        pipeline.scheduler.step = Step(pipeline.scheduler.step, 3 if part == "last step" else 2)
    elif part == "noise":
        pipeline.scheduler.init_noise_sigma = float("inf")
    elif part == "decoder":
        pipeline.vae.decoder = Broken(pipeline.vae.decoder)
    else:
        next(reversed(list(getattr(pipeline, part).parameters()))).data.fill_(float("nan"))
    for _ in range(2):
        drawer.call([Task(0, 0, Prompt("a"))])
    assert [record.message.count(said) for record in caplog.records if "NaN" in record.message] == [1]


def test_samples_of_a_training_name_the_scheduler(train, monkeypatch, caplog):
    from diffusers import DDIMScheduler

    own = DDIMScheduler.step

    @functools.wraps(own)
    def step(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        if not isinstance(found, tuple):
            return found
        return tuple(each * float("nan") for each in found)

    monkeypatch.setattr(DDIMScheduler, "step", step)
    train("sd", "--max_train_steps", 1, "--no_final_checkpoint", "--validation_prompt", "a")
    assert caplog.text.count("step 1 of the DDIMScheduler turns finite predictions into NaN or infinite values") == 1


def test_latents_that_are_far_too_large_are_named_before_the_learning_rate_is(train, monkeypatch, caplog):
    own = LatentSpace.moments
    monkeypatch.setattr(LatentSpace, "moments", lambda self, pixels: tuple(each * 1e25 for each in own(self, pixels)))
    train("sd", "--max_train_steps", 1, "--no_final_checkpoint", expect=1)
    assert caplog.text.count("the VAE's encodings are as large as") == 1
