"""What is drawn, held against a denoiser whose clean estimate is known and leaves the range of pixels.

Clipping is consistent if a sampler that clips draws what the same sampler without clipping draws of a denoiser whose
estimate is clipped already. So for each sampler the reference is diffusers' own, in which nothing is clipped; of DDIM,
whose steps diffusers takes otherwise, and of DDPM, it is the equation in float64.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tests.conftest import message
from utils.config.options import UserError
from utils.diffusion.options import SAMPLERS, ProcessOptions
from utils.diffusion.samplers import exported, same_steps, sampler_of
from utils.models.conditional_ddpm import ConditionalDDPMPipeline
from utils.models.unconditional import ImplicitPixels, LabelledPixels, Latents, Pixels, fresh_scheduler
from utils.sampling.controls import SamplingControls
from utils.sampling.drawer import Drawer, InMemory, image_seed
from utils.sampling.options import SCHEDULERS, GenerationOptions, SamplingControlOptions
from utils.sampling.prompts import Prompt, Task
from utils.sampling.sample_options import SamplingOptions
from utils.sampling.scheduler_choice import set_scheduler

KINDS = ("epsilon", "v_prediction", "sample")
POINTS = torch.tensor([[0.9, -0.7, 0.2, -0.9], [-0.8, 0.5, -1.0, 0.4], [0.1, 0.9, -0.4, 0.8], [-0.9, -0.9, 0.7, 1.0]])
SEEDS = range(40, 44)
LABELS = [0, 1, 0, 1]
NO_CLASS = 2


def alphas_cumprod(zero_snr: bool = False, count: int = 1000) -> np.ndarray:
    """[T] float64 of the linear schedule."""
    roots = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, count)))
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1]) if zero_snr else roots) ** 2


class Ideal(nn.Module):
    """Predicts by the posterior mean of POINTS, of which a class has two, in float64.

    Attributes:
        overshoot: how much larger its estimate is than the mean, in shares of the noise.
        guidance: what it applies itself, as if it were a part of the model.
        clips: whether its estimate is clipped.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, kind: str, overshoot: float = 0.0, guidance: float = 1.0, clips: bool = False, zero_snr=False):
        super().__init__()
        self.config = FrozenDict(sample_size=2, in_channels=1, out_channels=1, num_class_embeds=NO_CLASS + 1)
        self.kind, self.overshoot, self.guidance, self.clips = kind, overshoot, guidance, clips
        self.bar = alphas_cumprod(zero_snr)

    def level(self, t: float) -> tuple[float, float]:
        if self.kind == "flow":
            return 1 - t / 1000, t / 1000
        if t == int(t):
            return float(self.bar[int(t)] ** 0.5), float((1 - self.bar[int(t)]) ** 0.5)
        sigma = math.exp(np.interp(t, np.arange(1000), np.log((1 - self.bar) / self.bar) / 2))
        return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)

    def mean(self, noisy: Tensor, level: tuple[float, float], labels: Tensor | None) -> Tensor:
        alpha, sigma = level
        points = POINTS.double()
        logits = -((noisy[:, None] - alpha * points) ** 2).sum(2) / (2 * sigma**2)
        if labels is not None:
            other = torch.arange(4) % 2 != labels[:, None]
            logits = logits.masked_fill(other & (labels[:, None] != NO_CLASS), -math.inf)
        return logits.softmax(1) @ points * (1 + self.overshoot * sigma)

    def clean(self, noisy: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """[B, 4] float64 the clean estimate of noisy samples [B, 4] at a timestep."""
        level = self.level(t)
        found = self.mean(noisy, level, labels)
        if self.guidance > 1:
            without = self.mean(noisy, level, torch.full_like(labels, NO_CLASS))
            found = without + self.guidance * (found - without)
        return found.clamp(-1, 1) if self.clips else found

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        t = float(torch.as_tensor(timestep).flatten()[0])
        noisy, (alpha, sigma) = sample.flatten(1).double(), self.level(t)
        clean = self.clean(noisy, t, class_labels)
        output = {
            "sample": lambda: clean,
            "epsilon": lambda: (noisy - alpha * clean) / sigma,
            "v_prediction": lambda: (alpha * noisy - clean) / sigma,
            "flow": lambda: (noisy - clean) / sigma,
        }[self.kind]()
        return SimpleNamespace(sample=output.view(sample.shape).to(sample.dtype))


def first_noise(seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return randn_tensor((len(seeds), 1, 2, 2), generator=generators), generators


def plain_loop(scheduler, model: nn.Module, seeds: Sequence[int], steps: int, labels=LABELS) -> Tensor:
    """[B, 4] what a scheduler of diffusers draws by itself."""
    import inspect

    image, generators = first_noise(seeds)
    scheduler.set_timesteps(steps)
    image = image * scheduler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(image, t), t, torch.tensor(labels)).sample
        image = scheduler.step(output, t, image, **extra).prev_sample
    return image.flatten(1)


def unclipped(scheduler):
    """The same scheduler, which clips nothing."""
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return type(scheduler).from_config(config, clip_sample=False, thresholding=False)


def trailing(steps: int, count: int = 1000) -> list[int]:
    """Of schedulers from scratch."""
    return [round(count - number * count / steps) - 1 for number in range(steps)]


def even(steps: int, count: int = 1000) -> list[int]:
    """Of DPM-Solver++ as it is exported."""
    return [round((count - 1) * (steps - number) / steps) for number in range(steps)]


def ddim(model: Ideal, seeds: Sequence[int], timesteps: Sequence[int], eta: float = 0.0, labels=LABELS) -> Tensor:
    """[B, 4] float64 by equation 12 of Song et al. (2021), with the estimate clipped to [-1, 1]."""
    image, generators = first_noise(seeds)
    image, bar = image.flatten(1).double(), [*model.bar[list(timesteps)], 1.0]
    labels = None if labels is None else torch.tensor(labels)
    for number, t in enumerate(timesteps):
        now, after = bar[number], bar[number + 1]
        clean = model.clean(image, t, labels).clamp(-1, 1)
        noise = (image - now**0.5 * clean) / (1 - now) ** 0.5
        deviation = eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        image = after**0.5 * clean + (1 - after - deviation**2) ** 0.5 * noise
        if eta:
            image = image + deviation * randn_tensor((len(seeds), 1, 2, 2), generator=generators).flatten(1)
    return image


def ddpm(model: Ideal, seeds: Sequence[int], timesteps: Sequence[int], labels=LABELS) -> Tensor:
    """[B, 4] float64 by equations 6 and 7 of Ho et al. (2020), between the timesteps, with the estimate clipped."""
    image, generators = first_noise(seeds)
    image, bar = image.flatten(1).double(), [*model.bar[list(timesteps)], 1.0]
    labels = None if labels is None else torch.tensor(labels)
    for number, t in enumerate(timesteps):
        now, after = bar[number], bar[number + 1]
        clean, beta = model.clean(image, t, labels).clamp(-1, 1), 1 - now / after
        image = after**0.5 * beta / (1 - now) * clean + (now / after) ** 0.5 * (1 - after) / (1 - now) * image
        if t > 0:
            noise = randn_tensor((len(seeds), 1, 2, 2), generator=generators).flatten(1)
            image = image + ((1 - after) / (1 - now) * beta) ** 0.5 * noise
    return image


def pixels(image: Tensor) -> np.ndarray:
    return (image / 2 + 0.5).clamp(0, 1).double().numpy()


def classes_of(model: Ideal, scheduler) -> ConditionalDDPMPipeline:
    pipeline = ConditionalDDPMPipeline(model, scheduler, {0: "a", 1: "b"})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def evaluated(pipeline, labels: Sequence[int] | None = LABELS, **settings) -> np.ndarray:
    """[B, 4] what evaluation draws."""
    options = GenerationOptions(batch_size=len(SEEDS), **settings)
    drawer = Drawer(pipeline, options, SamplingControls(), 0, torch.device("cpu"), in_memory=InMemory())
    tasks = [Task(n, 0, Prompt(None, None if labels is None else labels[n])) for n in range(len(SEEDS))]
    return drawer.call(tasks)[..., 0].reshape(len(SEEDS), -1)


EVALUATED = [image_seed(0, number, 0) for number in range(len(SEEDS))]


def pixel_scheduler(kind: str, **more):
    return fresh_scheduler(ProcessOptions(prediction_type=kind, **more), clips=True)


@pytest.mark.parametrize(
    ("kind", "overshoot", "guidance"),
    [
        *(("epsilon", 0.0, 1.0), ("epsilon", 0.6, 1.0), ("epsilon", 0.0, 3.0)),
        *(("v_prediction", 0.3, 3.0), ("sample", 0.3, 3.0)),
    ],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_evaluation_clips_consistently(name, kind, overshoot, guidance):
    pipeline = classes_of(Ideal(kind, overshoot), pixel_scheduler(kind))
    try:
        set_scheduler(pipeline, name)
    except UserError:
        assert kind == "sample"
        pytest.skip("diffusers does not have it")
    reference = Ideal(kind, overshoot, guidance, clips=True)
    try:
        wanted = (
            ddim(reference, EVALUATED, trailing(8))
            if name == "ddim"
            else plain_loop(unclipped(pipeline.scheduler), reference, EVALUATED, 8)
        )
    except (NotImplementedError, ValueError):  # its schedulers raise one or the other
        pytest.skip("diffusers does not have it")
    found = evaluated(pipeline, num_inference_steps=8, guidance_scale=guidance)
    np.testing.assert_allclose(found, pixels(wanted), atol=3e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_clips_consistently(name, kind, guidance):
    if (name, kind) == ("heun", "sample"):
        pytest.skip("is refused")
    overshoot = 0.4 if guidance == 1 else 0.0
    found = run_draws(name, Ideal(kind, overshoot), pixel_scheduler(kind), 7, guidance)
    reference = Ideal(kind, overshoot, guidance, clips=True)
    if name == "ddim":
        wanted = ddim(reference, SEEDS, even(7))
    elif name == "ddpm":
        wanted = ddpm(reference, SEEDS, trailing(7))
    else:
        wanted = plain_loop(unclipped(sampler_of(pixel_scheduler(kind), name)), reference, SEEDS, 7)
    np.testing.assert_allclose(pixels(found), pixels(wanted), atol=3e-3)


def run_draws(name: str | None, model: Ideal, own, steps: int, guidance: float = 1.0, eta: float = 0.0) -> Tensor:
    """[B, 4] what a run draws of a pipeline that has this scheduler of its own."""
    family = LabelledPixels.__new__(LabelledPixels)
    family.pipeline = SimpleNamespace(unet=model, scheduler=own)
    scheduler = sampler_of(own, name, eta)
    with SamplingControls().attached(family.pipeline, scheduler):
        return family._denoise(SEEDS, LABELS, scheduler, steps, guidance, eta).flatten(1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 61, 100, 400])
def test_ddim_takes_the_equations_steps_whatever_their_number(steps, eta):
    """Also where they do not divide the schedule, and where rounding would add one."""
    model = Ideal("epsilon", 0.6)
    found = run_draws("ddim", model, pixel_scheduler("epsilon"), steps, eta=eta)
    timesteps = trailing(steps) if eta else even(steps)
    np.testing.assert_allclose(found.numpy(), ddim(model, SEEDS, timesteps, eta).numpy(), atol=4e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3, 61, 250])
def test_an_exported_pipeline_draws_by_ddim_without_arguments(tmp_path, kind, steps):
    """By diffusers alone, which reads the scheduler's file, and by the run, whose samples are the same."""
    options = ProcessOptions(prediction_type=kind)
    made = ImplicitPixels._exported(None, fresh_scheduler(options, clips=True), "ddim")
    made.save_pretrained(tmp_path)
    loaded, model = DPMSolverMultistepScheduler.from_pretrained(tmp_path), Ideal(kind, 0.6)
    pipeline = DDPMPipeline(model, loaded)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    found = pipeline(batch_size=4, generator=generators, num_inference_steps=steps, output_type="np").images
    found = found.reshape(4, -1)
    np.testing.assert_allclose(found, pixels(ddim(model, SEEDS, even(steps), labels=None)), atol=2e-3)
    family = Pixels.__new__(Pixels)
    family.pipeline = SimpleNamespace(unet=model, scheduler=made)
    for name in ("ddim", None):
        drawn = family._denoise(SEEDS, [], sampler_of(made, name), steps, 1.0, 0.0)
        assert np.array_equal((drawn / 2 + 0.5).clamp(0, 1).flatten(1).numpy(), found)


@pytest.mark.parametrize("steps", [4, 60, 400])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_an_older_export_is_drawn_right(steps, spacing):
    """A DDIMPipeline that clips, of which diffusers alone draws washed-out images."""
    model = Ideal("epsilon", 0.6)
    timesteps = trailing(steps)
    if spacing == "leading":
        timesteps = [number * (1000 // steps) for number in range(steps)][::-1]
    for eta in (0.0, 0.7):
        pipeline = DDIMPipeline(model, DDIMScheduler(timestep_spacing=spacing))
        pipeline.set_progress_bar_config(disable=True)
        own = pipeline.scheduler
        wanted = pixels(ddim(model, EVALUATED, timesteps, eta, labels=None))
        found = evaluated(pipeline, None, num_inference_steps=steps, eta=eta)
        np.testing.assert_allclose(found, wanted, atol=4e-3)
        assert pipeline.scheduler is own
        assert "step" not in vars(own)


def test_ddims_noise_is_drawn_where_the_pipeline_does_not_take_it():
    """By evaluation, of an export whose scheduler is DPM-Solver++ of order 1."""
    model = Ideal("v_prediction", 0.6)
    pipeline = DDPMPipeline(model, sampler_of(pixel_scheduler("v_prediction"), "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    found = evaluated(pipeline, None, num_inference_steps=12, eta=0.5)
    wanted = ddim(model, EVALUATED, trailing(12), 0.5, labels=None)
    np.testing.assert_allclose(found, pixels(wanted), atol=3e-3)
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(UserError, match="--eta applies to DDIM only"):
        evaluated(pipeline, None, num_inference_steps=12, eta=0.5)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_zero_terminal_snr(name, kind):
    own = pixel_scheduler(kind, rescale_betas_zero_snr=True)
    model = Ideal(kind, 0.6, zero_snr=True)
    found = run_draws(name, model, own, 9)
    wanted = ddpm(model, SEEDS, trailing(9)) if name == "ddpm" else ddim(model, SEEDS, even(9))
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=5e-3)


@pytest.mark.parametrize("name", [*SAMPLERS, None])
@pytest.mark.parametrize("kind", [*KINDS, "flow"])
def test_many_steps_draw_the_points(name, kind):
    """Of an ideal model all samplers draw the distribution, up to the width of their last steps."""
    if (name, kind) == ("heun", "sample") or (kind == "flow" and name not in ("euler", "heun", None)):
        pytest.skip("is refused")
    own = fresh_scheduler(ProcessOptions(flow_matching=True), clips=True) if kind == "flow" else pixel_scheduler(kind)
    schedulers = [own] if kind != "flow" or name else [own, Latents._exported(None, own, None)]
    for scheduler in schedulers:
        found = run_draws(name, Ideal(kind), scheduler, 60).double()
        distances = torch.cdist(found, POINTS.double())
        assert distances.min(1).values.max() < 0.12
        assert (distances.argmin(1) % 2).tolist() == LABELS


def test_what_a_scheduler_of_another_class_is_made_of():
    """Clipping goes along; what says nothing of it does not begin to clip."""
    from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler

    for latents in (EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), UniPCMultistepScheduler()):
        for name in ("ddim", "ddpm"):
            pipeline = classes_of(Ideal("epsilon"), latents)
            set_scheduler(pipeline, name)
            assert not pipeline.scheduler.config.clip_sample
    made = sampler_of(pixel_scheduler("epsilon"), "ddim")
    assert made.config.thresholding
    for name in ("ddim", "ddpm", "heun", "dpm++_2m"):
        pipeline = classes_of(Ideal("epsilon"), made)
        set_scheduler(pipeline, name)
        config = pipeline.scheduler.config
        assert config.get("clip_sample") or config.get("thresholding"), name
    in_latents = sampler_of(fresh_scheduler(ProcessOptions(), clips=False), "ddim")
    assert not in_latents.config.thresholding


def test_a_scheduler_whose_steps_are_right_is_exported_as_it_is(caplog):
    """DDIM that clips nothing and spaces evenly; a range that no other class can clip to is said."""
    own = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    assert exported(own) is own
    assert same_steps(sampler_of(own, None), own)
    assert same_steps(sampler_of(own, "ddim"), own)
    assert same_steps(exported(DDIMScheduler()), sampler_of(DDPMScheduler(), "ddim"))
    assert not caplog.text
    wide = DDIMScheduler(clip_sample_range=2.0)
    assert exported(wide) is not wide
    assert type(exported(wide)) is DDIMScheduler
    assert "clips to 2" in caplog.text
    assert type(sampler_of(wide, None)).__name__ == "ConsistentDDIMScheduler"


def test_numbers_of_steps_that_a_scheduler_does_not_take(caplog):
    """At 61 of 1000, rounding gives diffusers a 62nd step at -1, whose result is noise; some spacings begin late."""
    scheduler = pixel_scheduler("epsilon")
    with pytest.raises(UserError, match=r"--num_inference_steps 61 .*try 60 or 62"):
        SamplingOptions(ddpm_num_inference_steps=61).steps_of(scheduler)
    with pytest.raises(UserError, match=r"--num_inference_steps 61 .*try 60 or 62"):
        evaluated(classes_of(Ideal("epsilon"), scheduler), num_inference_steps=61)
    assert SamplingOptions(ddpm_num_inference_steps=61, sampler="ddim").steps_of(scheduler) == 61
    assert not caplog.text
    for steps, is_late in ((50, False), (30, False), (600, True)):
        caplog.clear()
        SamplingOptions(ddpm_num_inference_steps=steps).steps_of(DDPMScheduler())
        assert ("start at timestep 599 of 1000" in caplog.text) == is_late


def test_controls_and_clipping_go_together():
    """A control's estimate is clipped too, by schedulers that do so themselves and by those that can't."""
    for name in ("euler", "ddim", "dpm++_2m"):
        pipeline = classes_of(Ideal("epsilon", 0.6), pixel_scheduler("epsilon"))
        set_scheduler(pipeline, name)
        plain = evaluated(pipeline, num_inference_steps=5)
        options = SamplingControlOptions(clamp_start=1e6, clamp_end=1e6)
        drawer = Drawer(
            *(pipeline, GenerationOptions(num_inference_steps=5, batch_size=4), SamplingControls(options), 0),
            torch.device("cpu"),
            in_memory=InMemory(),
        )
        found = drawer.call([Task(n, 0, Prompt(None, LABELS[n])) for n in range(4)])[..., 0].reshape(4, -1)
        np.testing.assert_allclose(found, plain, atol=2e-3)


def test_eta_is_refused_by_a_scheduler_that_has_none():
    pipeline = classes_of(Ideal("epsilon"), pixel_scheduler("epsilon"))
    with pytest.raises(ValueError, match="has no eta"):
        pipeline([0], eta=0.5, num_inference_steps=2)


def test_a_runs_noise_that_the_result_does_not_draw_is_said(train, caplog):
    train("pixels", "--max_train_steps", 1, "--sampler", "ddim", "--eta", 0.5)
    assert "--eta 0.5: the samples of this run are drawn with it, but the exported pipeline uses eta 0" in caplog.text


def test_an_exported_scheduler_is_refused_what_it_can_not_do(train, capsys):
    train("pixels", "--num_inference_steps", 61, "--dry_run", expect=2)
    assert "try 60 or 62" in message(capsys)
