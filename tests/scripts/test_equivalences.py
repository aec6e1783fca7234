"""What a run computes, compared with something known."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests import tiny
from tests.comparing import assert_same_bits, lora, losses, weights
from tests.conftest import mostly_slow
from tests.records import plan
from utils.training.state import TrainingState


class Independent:
    """A training step in a few lines of diffusers, from the pipeline folder and the loader's batch."""

    def __init__(self, folder: Path, gamma: float | None, dtype: torch.dtype = torch.float32):
        from diffusers import DDPMScheduler, DiffusionPipeline

        self.pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.gamma = gamma

    def text(self, batch):
        pipe = self.pipeline
        if not hasattr(pipe, "text_encoder_2"):
            return pipe.text_encoder(batch.input_ids[:, 0])[0], {}
        one = pipe.text_encoder(batch.input_ids[:, 0], output_hidden_states=True)
        two = pipe.text_encoder_2(batch.input_ids[:, 1], output_hidden_states=True)
        hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return hidden, {"added_cond_kwargs": {"text_embeds": two[0], "time_ids": batch.crops}}

    def loss(self, batch) -> torch.Tensor:
        pipe, scheduler = self.pipeline, self.scheduler
        with torch.no_grad():
            moments = pipe.vae.encode(batch.pixels / 127.5 - 1).latent_dist
            latents = (moments.mean + moments.std * batch.posterior_noise) * pipe.vae.config.scaling_factor
            hidden, added = self.text(batch)
        alpha_bar = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * batch.noise
        prediction = pipe.unet(noisy, batch.timesteps, hidden, **added).sample
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        if scheduler.config.prediction_type == "epsilon":
            target, divisor = batch.noise, snr
        else:
            target, divisor = alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * latents, snr + 1
        each = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        weight = torch.ones_like(snr) if self.gamma is None else snr.clamp(max=self.gamma) / divisor
        return (weight * each).mean()


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_loss_and_gradients_equal_an_independent_computation(pipelines, images, name, gamma):
    from utils.data.loader import SampleSpec, TrainingDataset
    from utils.data.options import ImageOptions
    from utils.data.order import Piece
    from utils.diffusion.noise import ForwardProcess, NoiseDraws
    from utils.diffusion.options import LossOptions, NoiseOptions
    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import PipelineSource
    from utils.models.registry import pick_family
    from utils.training.adaptation import FullFineTuning
    from utils.training.encoding import Encoder
    from utils.training.objective import Objective
    from utils.training.options import AdaptationOptions

    source = PipelineSource(ModelOptions(pretrained_model_name_or_path=str(pipelines[name])))
    adaptation_options = AdaptationOptions()
    family = pick_family(source)(source, FullFineTuning.dtypes(adaptation_options, torch.float32), {})
    adaptation = FullFineTuning(family, adaptation_options, None)
    process = ForwardProcess(family.pipeline.scheduler.config, {})
    planned = plan(images, tiny.RESOLUTION)
    spec = SampleSpec(family.latent_space.shape, family.tokenizer())
    draws = NoiseDraws(NoiseOptions(), process, 0, 4)
    dataset = TrainingDataset(planned, planned.batches(4, 1, 0), spec, ImageOptions(), draws)
    batch = dataset[Piece(3, (0, 1, 2, 3))]

    objective = Objective(family, adaptation.modules, process, NoiseOptions(), LossOptions(snr_gamma=gamma))
    loss = objective(Encoder(family, False).encode(batch)).mean()
    loss.backward()
    independent = Independent(pipelines[name], gamma)
    expected = independent.loss(batch)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (key, parameter), reference in zip(
        family.denoiser.named_parameters(), independent.pipeline.unet.parameters(), strict=True
    ):
        scale = float(reference.grad.abs().max())
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=key)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sd", ()),
        pytest.param("sd", ("--adaptation", "lora"), marks=pytest.mark.slow),
        ("pixels", ("--lr_scheduler", "constant")),
        pytest.param("labelled latents", (), marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "pixels", "labelled latents"],
)
def test_batch_4_equals_batch_1_accumulated_4_times(train, name, flags):
    common = [*flags, "--max_train_steps", 10, "--adam_epsilon", 1e-5, "--learning_rate", 1e-3, "--random_flip"]
    whole = train(name, *common, "--train_batch_size", 4, out="whole")
    pieces = train(name, *common, "--train_batch_size", 1, "--gradient_accumulation_steps", 4, out="pieces")
    part = "transformer" if name == "labelled latents" else "unet"
    one, other = (lora(whole), lora(pieces)) if "lora" in flags else (weights(whole, part), weights(pieces, part))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=2e-6, msg=key)
    torch.testing.assert_close(losses(whole), losses(pieces), rtol=1e-5, atol=1e-6)


RESUMED = {
    "full": ("sd", "--use_ema", "--caption_dropout", 0.3, "--random_flip"),
    "text encoder": ("sd", "--train_text_encoder", "--text_encoder_lr", 1e-4, "--gradient_accumulation_steps", 2),
    "lora": ("sd", "--adaptation", "lora", "--lora_dropout", 0.3, "--use_ema", "--lora_alpha", 8),
    "sdxl lora": ("sdxl", "--adaptation", "lora", "--train_text_encoder", "--lora_dropout", 0.1, "--rank", 2),
    "sdxl bf16": ("sdxl", "--mixed_precision", "bf16", "--snr_gamma", 5, "--dataloader_num_workers", 1),
    "lora bf16": ("sd2", "--adaptation", "lora", "--mixed_precision", "bf16", "--use_dora"),
    "8-bit": ("sd2", "--use_8bit_adam", "--lr_scheduler", "cosine"),
    "channels last": ("sd", "--channels_last", "--use_ema", "--train_text_encoder"),
    "channels last 8-bit": ("pixels", "--channels_last", "--use_8bit_adam", "--lr_scheduler", "constant"),
    "pixels": ("pixels", "--use_ema", "--random_flip", "--lr_scheduler", "constant", "--dropout", 0.2),
    "pixels cosine": ("pixels", "--lr_scheduler", "cosine", "--prediction_type", "v_prediction"),
    "flow": ("flow", "--mixed_precision", "bf16", "--dataloader_num_workers", 1, "--lr_scheduler", "constant"),
    "labels": ("labels", "--label_dropout", 0.5, "--gradient_accumulation_steps", 2, "--lr_scheduler", "constant"),
    "latents": ("latents", "--cache_latents", "--use_ema", "--lr_scheduler", "constant"),
    "labelled latents": ("labelled latents", "--pure_bf16", "--mixed_precision", "bf16", "--lr_scheduler", "constant"),
}


@pytest.mark.parametrize("case", mostly_slow(RESUMED, "full", "lora", "pixels"))
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(train, case):
    pipeline, *flags = RESUMED[case]
    flags += ["--train_batch_size", 2, "--learning_rate", 1e-3]
    whole = train(pipeline, *flags, "--max_train_steps", 8, "--checkpointing_steps", 3, out="whole")
    schedule = ["--lr_scheduler", "constant"] if "cosine" not in flags else []
    if schedule:
        train(pipeline, *flags, "--max_train_steps", 3, out="parts")
    else:  # the schedule follows from the length, so the run is stopped by taking away what came later
        train(
            pipeline, *flags, "--max_train_steps", 8, "--checkpointing_steps", 3, "--no_final_checkpoint", out="parts"
        )
        import shutil

        shutil.rmtree(whole.parent / "parts" / "checkpoint-6")
    parts = train(pipeline, *flags, "--max_train_steps", 8, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(whole) == losses(parts)
    for file in sorted((whole / "checkpoint-8").rglob("*.safetensors")):
        relative = file.relative_to(whole)
        assert_same_bits(load_file(file), load_file(parts / relative))
    assert (whole / "checkpoint-8" / "optimizer.safetensors").exists()


def test_deterministic_kernels_are_asked_for_and_train_the_same(train, monkeypatch):
    flags = ["--train_batch_size", 2, "--max_train_steps", 2]
    plain = train("sd", *flags, out="plain")
    seen, update = [], TrainingState.update

    def updated(self: TrainingState, *given: object) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        update(self, *given)

    monkeypatch.setattr(TrainingState, "update", updated)
    chosen = train("sd", *flags, "--deterministic", out="chosen")
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_bits(weights(plain), weights(chosen))
