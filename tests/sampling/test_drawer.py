"""Drawing: each image depends on the seed, its prompt and its number alone, whatever is drawn beside it."""

import inspect
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.comparing import CPU, assert_same, images_in
from utils.config.options import UserError
from utils.sampling.controls import SamplingControls
from utils.sampling.drawer import (
    Drawer,
    claim_images,
    complete_prompts,
    for_init_images,
    image_seed,
    invalid_images,
    state_of,
)
from utils.sampling.options import GenerationOptions, PromptOptions, SamplingControlOptions
from utils.sampling.pipelines import PipelineSpec, load_pipeline
from utils.sampling.prompts import Prompt, plan_tasks, read_prompts
from utils.sampling.scheduler_choice import set_scheduler


def drawn(path, folder, prompts=(), batch_size=None, seed=7, scheduler=None, order=1, each=2, **settings):
    """The images of a pipeline, by name."""
    pipeline = load_pipeline(PipelineSpec(str(path)), torch.float32)
    set_scheduler(pipeline, scheduler)
    options = GenerationOptions(num_inference_steps=3, batch_size=batch_size, **settings)
    drawer = Drawer(pipeline, options, SamplingControls(), seed, CPU)
    labels = ["0", "2", "1"] if "DiT" in type(pipeline).__name__ and not prompts else None
    complete = complete_prompts(pipeline, [Prompt(text) for text in prompts], labels)
    tasks = plan_tasks(complete, PromptOptions(images_per_prompt=each))
    claim_images(folder, drawer.facts(complete), False)
    drawer.draw(tasks[::order], folder)
    return images_in(folder)


def test_no_two_images_share_a_seed():
    seeds = {image_seed(3, number, sample) for number in range(300) for sample in range(300)}
    assert len(seeds) == 90000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert image_seed(3, 0, 0) != image_seed(4, 0, 0)
    assert image_seed(3, 1 << 17, 0) != image_seed(3, 0, 0)
    word = np.array([image_seed(3, 0, sample) for sample in range(2000)])
    assert 0.45 < np.mean([bin(seed).count("1") / 32 for seed in word.tolist()]) < 0.55


@pytest.mark.parametrize("scheduler", [None, "euler_a"])
def test_batch_size_and_order_change_nothing(more_pipelines, tmp_path, scheduler):
    prompts = ["a red square", "a blue square"]
    one = drawn(more_pipelines["sd"], tmp_path / "one", prompts, 1, scheduler=scheduler)
    assert list(one) == ["00000_00000.png", "00000_00001.png", "00001_00000.png", "00001_00001.png"]
    assert len({image.tobytes() for image in one.values()}) == 4
    assert_same(one, drawn(more_pipelines["sd"], tmp_path / "three", prompts, 3, scheduler=scheduler, order=-1))
    other = drawn(more_pipelines["sd"], tmp_path / "other", prompts, 2, seed=8, scheduler=scheduler)
    assert all((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize("kind", ["ddpm", "dit", "sdxl"])
def test_other_pipelines_too(more_pipelines, tmp_path, kind):
    prompts = ["a red square"] if kind == "sdxl" else []
    one = drawn(more_pipelines[kind], tmp_path / "one", prompts, 1)
    assert_same(one, drawn(more_pipelines[kind], tmp_path / "three", prompts, 3, order=-1))
    assert len(one) == (6 if kind == "dit" else 2)


def test_what_draws_from_the_global_generator_draws_one_at_a_time(more_pipelines, tmp_path):
    """DiT hands no generator to its scheduler, which with DDPM's draws noise at each step."""
    one = drawn(more_pipelines["dit"], tmp_path / "one", (), 1, scheduler="ddpm")
    torch.manual_seed(99)
    assert_same(one, drawn(more_pipelines["dit"], tmp_path / "four", (), 4, scheduler="ddpm", order=-1), 0)


def test_more_images_of_a_prompt_leave_the_first_as_they_are(more_pipelines, tmp_path):
    few = drawn(more_pipelines["sd"], tmp_path / "few", ["a"], 2, each=2)
    more = drawn(more_pipelines["sd"], tmp_path / "more", ["a"], 2, each=3)
    assert_same(few, {name: more[name] for name in few})


def test_an_interrupted_run_draws_what_is_missing_or_broken(more_pipelines, tmp_path, monkeypatch):
    whole = drawn(more_pipelines["sd"], tmp_path / "whole", ["a", "b"], 2)
    half = tmp_path / "half"
    drawn(more_pipelines["sd"], half, ["a", "b"], 2)
    kept = half / "00000_00000.png"
    (half / "00001_00001.png").unlink()
    (half / "00000_00001.png").write_bytes((half / "00000_00001.png").read_bytes()[:60])
    (half / ".tmp-00001_00000.png").write_bytes(b"half")
    before = kept.stat().st_mtime_ns
    assert_same(whole, drawn(more_pipelines["sd"], half, ["a", "b"], 2))
    assert kept.stat().st_mtime_ns == before
    assert not list(half.glob(".tmp*"))
    for changed in ({"prompts": ["a", "c"]}, {"scheduler": "euler"}, {"seed": 8}, {"guidance_scale": 3.0}):
        arguments = {"prompts": ["a", "b"]} | changed
        with pytest.raises(UserError, match="drawn with another"):
            drawn(more_pipelines["sd"], half, **arguments)


def test_what_images_depend_on_is_the_same_in_another_process(more_pipelines):
    """diffusers keeps the names of defaults in the order of a set, which each process has its own of."""
    found = []
    for turn in (1, -1):
        pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"])), torch.float32)
        set_scheduler(pipeline, "dpm++_2m")
        names = sorted(pipeline.scheduler.config["_use_default_values"])
        assert len(names) > 1
        pipeline.scheduler.register_to_config(**{"_use_default_values": names[::turn]})
        found.append(Drawer(pipeline, GenerationOptions(), SamplingControls(), 0, CPU).facts([Prompt("a")]))
    assert found[0] == found[1]


def test_batches_grow_and_shrink_with_the_memory(more_pipelines, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    counts, call = [], StableDiffusionPipeline.__call__

    def limited(self, prompt=None, **arguments):
        counts.append(len(prompt))
        if len(prompt) > 3:
            raise RuntimeError("CUDA error: out of memory")
        return call(self, prompt=prompt, **arguments)

    limited.__signature__ = inspect.signature(call)
    expected = drawn(more_pipelines["sd"], tmp_path / "a", ["a"], 1, each=9)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", limited)
    assert_same(expected, drawn(more_pipelines["sd"], tmp_path / "b", ["a"], None, each=9))
    assert counts == [1, 2, 4, 2, 2, 2]


def test_one_image_that_does_not_fit_is_an_error(more_pipelines, tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    with pytest.raises(UserError, match="with a single image"):
        drawn(more_pipelines["sd"], tmp_path / "a", ["a"])


def test_nan_and_black_images_are_counted(more_pipelines, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode

    def broken(self, latents, **arguments):
        found = decode(self, latents, **arguments)
        found[0][0] = float("nan")
        found[0][1] = -5.0
        found[0][2] = 0.5
        return found

    monkeypatch.setattr(AutoencoderKL, "decode", broken)
    drawn(more_pipelines["sd"], tmp_path / "a", ["a"], 4, each=4)
    found = invalid_images(sorted((tmp_path / "a").glob("*.png")))
    expected = {"nan": ["00000_00000.png"], "black": ["00000_00001.png"], "constant": ["00000_00002.png"]}
    assert found == {"unreadable": []} | expected
    assert state_of(np.random.default_rng(0).random((4, 4, 3))) == "ok"


def test_variations_of_an_image(more_pipelines, images, tmp_path):
    prompts = read_prompts(PromptOptions(prompts=["a red square"], init_images=str(images)))
    assert len(prompts) == 6
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"])), torch.float32)
    found = {}
    for batch_size, strength in ((1, 0.34), (4, 0.34), (4, 1.0)):
        options = GenerationOptions(num_inference_steps=3, batch_size=batch_size, strength=strength)
        drawer = Drawer(for_init_images(pipeline), options, SamplingControls(), 0, CPU)
        tasks = plan_tasks(prompts, PromptOptions(images_per_prompt=1))
        folder = tmp_path / f"{batch_size}-{strength}"
        drawer.draw(tasks, folder)
        found[batch_size, strength] = images_in(folder)
    assert_same(found[1, 0.34], found[4, 0.34])
    assert any((found[4, 0.34][name] != found[4, 1.0][name]).any() for name in found[4, 1.0])


@pytest.mark.parametrize(("steps", "strength"), [(1, None), (5, 0.1), (3, 0.33)])
def test_variations_of_no_step_are_refused(more_pipelines, steps, strength):
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"])), torch.float32)
    options = GenerationOptions(num_inference_steps=steps, strength=strength)
    with pytest.raises(UserError, match=rf"--strength .* leaves none of {steps} denoising steps"):
        Drawer(for_init_images(pipeline), options, SamplingControls(), 0, CPU)


@pytest.mark.parametrize(("guidance", "is_said"), [(1.0, True), (0.5, True), (None, False), (1.5, False)])
def test_a_negative_prompt_without_guidance_is_named(more_pipelines, caplog, guidance, is_said):
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"])), torch.float32)
    options = GenerationOptions(guidance_scale=guidance, negative_prompt="b")
    Drawer(pipeline, options, SamplingControls(), 0, CPU)
    assert ("--negative_prompt has no effect" in caplog.text) == is_said


@pytest.mark.parametrize(("part", "key"), [("vae", "scaling_factor"), ("unet", "sample_size")])
def test_a_config_that_leaves_a_size_or_a_factor_open_is_refused(more_pipelines, tmp_path, part, key):
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"])), torch.float32)
    getattr(pipeline, part).register_to_config(**{key: None})
    with pytest.raises(UserError, match=f"has no {key}"):
        Drawer(pipeline, GenerationOptions(), SamplingControls(), 0, CPU)


def test_pictures_that_nothing_reads_are_named_by_the_flag(images, tmp_path, caplog):
    folder = shutil.copytree(images, tmp_path / "start")
    (folder / "raw.NEF").write_bytes(b"x")
    assert len(read_prompts(PromptOptions(prompts=["a"], init_images=str(folder)))) == 6
    assert f"--init_images {folder}: 1 files are not read, such as raw.NEF: camera raw images" in caplog.text
    (folder / "b.mkv").write_bytes(b"x")
    read_prompts(PromptOptions(captions_dir=str(folder)))
    assert f"--captions_dir {folder}: 1 files are not read, such as b.mkv: videos" in caplog.text


@pytest.mark.parametrize(
    ("kind", "prompts", "settings", "named"),
    [
        ("ddpm", ["a"], {}, "takes no prompts"),
        ("ddpm", [], {"guidance_scale": 2.0}, "--guidance_scale is not supported by a DDPMPipeline"),
        ("ddpm", [], {"scheduler": "euler"}, "needs scaled inputs"),
        ("dit", ["a"], {}, "draws classes"),
        ("sd", [], {}, "give --prompts"),
        ("sd", ["a"], {"scheduler": "FlowMatchEulerDiscreteScheduler"}, "does not work with"),
        ("sd", ["a"], {"scheduler": "euler", "eta": 0.5}, "--eta applies to DDIM only"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(more_pipelines, tmp_path, kind, prompts, settings, named):
    with pytest.raises(UserError, match=named):
        drawn(more_pipelines[kind], tmp_path / "a", prompts, **settings)


# Sampling controls


def latents_drawn(path, controls=None, scheduler="ddim", **settings):
    pipeline = load_pipeline(PipelineSpec(str(path)), torch.float32)
    set_scheduler(pipeline, scheduler)
    with SamplingControls(controls).attached(pipeline):
        return pipeline(
            "a", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent", **settings
        ).images


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++_2m", "unipc", "deis", "euler", "euler_a", "lms"])
@pytest.mark.parametrize("kind", ["sd", "sd2"])  # epsilon and v
def test_a_control_that_changes_nothing_changes_nothing(more_pipelines, scheduler, kind):
    """Its way to the clean sample and back is exact, whatever the scheduler and the prediction type."""
    plain = latents_drawn(more_pipelines[kind], None, scheduler)
    wide = latents_drawn(more_pipelines[kind], SamplingControlOptions(clamp_start=1e6, clamp_end=1e6), scheduler)
    assert (plain - wide).abs().max() < 2e-3 * plain.abs().max()


@pytest.mark.parametrize("scheduler", ["dpm++_2m", "euler"])
def test_clamping_bounds_the_last_clean_sample(more_pipelines, scheduler):
    """The last step's result is its clean sample."""
    held = latents_drawn(more_pipelines["sd"], SamplingControlOptions(clamp_start=2.0, clamp_end=0.25), scheduler)
    assert held.abs().max() < 0.26
    assert latents_drawn(more_pipelines["sd"], None, scheduler).abs().max() > 0.5


def test_dynamic_thresholding_is_diffusers_own(more_pipelines):
    """DDPM's `thresholding`, which is Imagen's sampler: its step is of the clean sample and the noisy one."""
    from diffusers import DDPMScheduler

    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["ddpm"])), torch.float32)
    config = dict(pipeline.scheduler.config) | {"clip_sample": False}
    found = []
    for own in (True, False):
        thresholding = {"thresholding": own, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e6}
        pipeline.scheduler = DDPMScheduler.from_config(config, **thresholding)
        options = SamplingControlOptions() if own else SamplingControlOptions(dynamic_thresholding=90.0)
        with SamplingControls(options).attached(pipeline):
            generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
            found.append(pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images)
    np.testing.assert_allclose(*found, atol=2e-3)
    pipeline.scheduler = DDPMScheduler.from_config(config)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    plain = pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images
    assert np.abs(plain - found[0]).max() > 0.05


def test_thresholding_in_pixels_goes_through_the_vae(more_pipelines):
    options = SamplingControlOptions(dynamic_thresholding=60.0, thresholding_space="pixel", thresholding_limit=0.01)
    held = latents_drawn(more_pipelines["sd"], options)
    assert torch.isfinite(held).all()
    assert (held - latents_drawn(more_pipelines["sd"])).abs().max() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_the_initial_noise_is_scaled(more_pipelines, scheduler):
    """As if the pipeline had been given scaled latents."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    scaled = latents_drawn(more_pipelines["sd"], None, scheduler, latents=0.7 * noise)
    factor = latents_drawn(
        more_pipelines["sd"], SamplingControlOptions(initial_noise_scale=0.7), scheduler, latents=noise
    )
    torch.testing.assert_close(scaled, factor, atol=1e-4, rtol=1e-4)


def test_controls_leave_no_trace(more_pipelines):
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"])), torch.float32)
    set_scheduler(pipeline, "ddim")
    with SamplingControls(SamplingControlOptions(initial_noise_scale=0.5)).attached(pipeline):
        assert "step" in vars(pipeline.scheduler)
    assert "step" not in vars(pipeline.scheduler)
    assert not pipeline.unet._forward_pre_hooks
    set_scheduler(pipeline, "pndm")
    with pytest.raises(UserError, match="does not support sampling controls"):
        SamplingControls(SamplingControlOptions(clamp_start=2.0, clamp_end=1.0)).check(pipeline)


def test_what_does_not_belong_into_a_folder_of_images(tmp_path):
    """Records that are none, files that are no images, and texts of other programs."""
    from PIL.PngImagePlugin import PngInfo

    (tmp_path / "generation.json").write_text("[1]")
    claim_images(tmp_path, {"seed": 0}, False)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name, texts in (("ours", {"seed": "3", "state": "nan"}), ("other", {"state": "nan", "prompt": "{}"})):
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        noise.save(tmp_path / f"{name}.png", pnginfo=info)
    whole = (tmp_path / "ours.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:3000])
    (tmp_path / "garbage.jpg").write_bytes(b"garbage")
    large = b"\0\0\0\rIHDR" + (20000).to_bytes(4, "big") + (10000).to_bytes(4, "big") + b"\x08\2\0\0\0"
    (tmp_path / "large.png").write_bytes(whole[:8] + large + zlib.crc32(large[4:]).to_bytes(4, "big") + whole[33:])
    paths = [*sorted(tmp_path.glob("*.png")), tmp_path / "garbage.jpg"]
    found = invalid_images(paths)
    assert found == {
        "unreadable": ["cut.png", "large.png", "garbage.jpg"],
        "nan": ["ours.png"],
        "black": [],
        "constant": [],
    }
