"""Schedulers of a user's config and choice: tried before anything is trained or drawn, and offered only if they fit."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from tests import tiny
from tests.conftest import message, mostly_slow
from utils.config.options import UserError
from utils.diffusion.samplers import converted
from utils.sampling.options import SCHEDULERS, GenerationOptions
from utils.sampling.scheduler_choice import scheduler_class, set_scheduler
from utils.sampling.scheduler_trials import check_trial, check_trial_of, kind_of, level_of, misfit, unfit, warn_of_own

SHORT = ("--max_train_steps", 1, "--train_batch_size", 1, "--no_final_checkpoint")
KINDS = ("epsilon", "v_prediction")
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WITHOUT_FIT = (
    *("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "IPNDMScheduler"),
    *("CMStochasticIterativeScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler"),
    *("DDIMInverseScheduler", "CosineDPMSolverMultistepScheduler"),
)


class Drawing:
    """As much of a Stable Diffusion pipeline as choosing a scheduler asks for."""

    __call__ = diffusers.StableDiffusionPipeline.__call__

    def __init__(self, scheduler):
        self.scheduler = scheduler


def offered(own) -> list[str]:
    """The names that the error of a scheduler that does not go offers."""
    with pytest.raises(UserError, match="choose one of") as raised:
        set_scheduler(Drawing(own), "EDMEulerScheduler")
    return str(raised.value).partition("choose one of ")[2].split(", ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_all_that_are_offered_draw_what_the_model_was_trained_for(kind):
    own = tiny.scheduler(kind)
    names = offered(own)
    assert {"ddim", "ddpm", "euler", "dpm++_2m", "unipc"} <= set(names)
    assert not {"EDMEulerScheduler", *WITHOUT_FIT} & set(names)
    for name in names:
        for steps in (4, 20, 50):
            class_name, changes = SCHEDULERS.get(name, (name, {}))
            scheduler = converted(own, getattr(diffusers, class_name), **changes)
            assert misfit(scheduler, level_of(own), kind, steps) == "", (name, steps)


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, *(each for each in SCHEDULERS if "dpm2" not in each)))
def test_all_names_draw_of_epsilon_and_v(name):
    for kind in KINDS:
        pipeline = Drawing(tiny.scheduler(kind))
        set_scheduler(pipeline, name)
        assert type(pipeline.scheduler).__name__ == SCHEDULERS[name][0]


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
@pytest.mark.parametrize("name", WITHOUT_FIT)
def test_schedulers_of_other_noise_do_not_fit(name, kind):
    own = tiny.scheduler(kind)
    try:
        scheduler = converted(own, getattr(diffusers, name))
    except (ImportError, ValueError):
        return
    assert unfit(scheduler, own)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
        {"prediction_type": "v_prediction"},
    ],
)
def test_another_noise_schedule_or_prediction_does_not_fit(changes):
    own = tiny.scheduler()
    assert misfit(DDIMScheduler.from_config(own.config, **changes), level_of(own), "epsilon", 10)
    assert not misfit(own, level_of(own), "epsilon", 10)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_pipelines_own_schedulers_fit(kind, caplog):
    """Of all classes that the tests and the usual models have, whatever their spacing, range or length."""
    for own in (
        *(DDPMScheduler(prediction_type=kind), DDPMScheduler(num_train_timesteps=20, prediction_type=kind)),
        DDPMScheduler(prediction_type=kind, clip_sample=False, variance_type="learned_range"),
        DDIMScheduler.from_config(tiny.scheduler(kind).config, timestep_spacing="trailing"),
        EulerDiscreteScheduler.from_config(tiny.scheduler(kind).config),
    ):
        for steps in (1, 2, 20):
            check_trial(own, steps, "x", "steps")
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "ScoreSdeVeScheduler"):
        check_trial(getattr(diffusers, name)(), 20, "x", "steps")
    assert not caplog.text


def test_an_own_scheduler_that_draws_something_else_is_said(caplog):
    own = EDMEulerScheduler.from_config(tiny.scheduler().config)
    check_trial(own, 10, "--pretrained_model x", "steps")
    assert "--pretrained_model x: its EDMEulerScheduler does not fit the noise that the model is" in caplog.text


V = {"prediction_type": "v_prediction"}
ELSEWHERE = [
    (
        "EulerDiscreteScheduler",
        V | {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0},
        "timestep_type",
    ),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 1.0}, "sigma_max 1.0"),
    ("UniPCMultistepScheduler", {"use_exponential_sigmas": True, "sigma_max": 3.0}, "sigma_max 3.0"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 1.0}, "sigma_min 1.0"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 999}, "steps_offset 999"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": -5}, "steps_offset -5"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": 1.0}, "lambda_min_clipped 1.0"),
]


@pytest.mark.parametrize(("name", "changes", "blamed"), ELSEWHERE, ids=lambda value: str(value)[:40])
def test_noise_levels_other_than_the_trained_ones_are_said(name, changes, blamed, caplog):
    own = getattr(diffusers, name)(**STABLE, **changes)
    for steps in (4, 50):
        caplog.clear()
        check_trial(own, steps, "--pretrained_model x", "steps", has_variance=False)
        assert "does not fit the noise that the model is trained on" in caplog.text
        assert f"change {blamed}" in caplog.text
    caplog.clear()
    warn_of_own(own, None, "--pipeline x")
    assert f"--pipeline x: its {name} does not fit" in caplog.text


def test_the_whole_range_may_be_reached_by_some_number_of_steps_alone(caplog):
    """Few steps, short schedules and schedulers of distilled models begin late or end early, and are honest."""
    for own in (
        *(diffusers.LCMScheduler(**STABLE), diffusers.TCDScheduler(**STABLE)),
        diffusers.LCMScheduler(**STABLE, original_inference_steps=5),
        EulerDiscreteScheduler(**STABLE, use_karras_sigmas=True, sigma_min=0.1, sigma_max=14.6),
        diffusers.DPMSolverMultistepScheduler(**STABLE, timestep_spacing="leading", num_train_timesteps=20),
        diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
        DDIMScheduler(**STABLE, num_train_timesteps=997, clip_sample=False),
        EulerDiscreteScheduler(**STABLE, num_train_timesteps=7),
    ):
        for steps in (1, 2, 4):
            check_trial(own, steps, "x", "steps", has_variance=False)
    assert not caplog.text


def test_what_needs_more_than_a_scheduler_is_not_refused_by_the_warning(caplog):
    warn_of_own(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, "--pipeline x")
    warn_of_own(diffusers.EDMEulerScheduler(), None, "--pipeline x")
    assert not caplog.text


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "SASolverScheduler"])
def test_whatever_draws_is_taken_in_the_place_of_ddim(name, caplog):
    pipeline = Drawing(tiny.scheduler())
    set_scheduler(pipeline, name)
    assert type(pipeline.scheduler).__name__ == name
    assert ("models distilled to draw in few steps" in caplog.text) == (name in ("LCMScheduler", "TCDScheduler"))
    caplog.clear()
    pipeline = Drawing(diffusers.LCMScheduler.from_config(tiny.scheduler().config))
    set_scheduler(pipeline, name)
    pipeline = Drawing(tiny.scheduler())
    pipeline.get_list_adapters = lambda: {"unet": ["evaluated"]}
    set_scheduler(pipeline, name)
    assert not caplog.text


def test_names_of_schedulers_in_any_case_with_blanks():
    for name in ("DDIMScheduler ", " ddimscheduler", "DDIM", "ddim "):
        GenerationOptions(scheduler=name)
        assert scheduler_class(name)[0] is DDIMScheduler
    for name, hint in (("LCM", "LCMScheduler"), ("dpmpp_2m", "dpm++_2m"), ("DDMScheduler", "DD"), ("", "")):
        with pytest.raises(UserError, match="--scheduler must be one of ddim") as raised:
            GenerationOptions(scheduler=name)
        assert f"did you mean {hint}" in str(raised.value) or not hint
    for name in ("UNet2DModel", "NoSuchScheduler"):
        with pytest.raises(UserError, match="--scheduler must be"):
            scheduler_class(name)


BROKEN = [
    ({"trained_betas": [0.5, 0.1]}, "trained_betas has 2 betas, but num_train_timesteps is 1,000"),
    ({"trained_betas": [0.001] * 500}, "trained_betas has 500 betas"),
    ({"trained_betas": [3.0] * 1000}, "betas must be in [0, 1]"),
    ({"timestep_spacing": "odd"}, 'can\'t draw with timestep_spacing "odd"'),
    ({"beta_schedule": "exponential"}, 'beta_schedule "exponential" can\'t be used'),
    ({"prediction_type": "noise"}, "prediction_type"),
    ({"steps_offset": 5000}, "can't draw with steps_offset 5000"),
    ({"set_alpha_to_one": "x", "steps_offset": "one"}, "can't draw with"),
]


@pytest.mark.parametrize(("changes", "said"), BROKEN, ids=str)
def test_a_config_that_can_not_draw_is_refused_before_the_training(changes, said):
    config = dict(tiny.scheduler().config) | changes
    with pytest.raises(UserError) as raised:
        check_trial_of(
            ["diffusers", "DDIMScheduler"], config, {}, 10, "--pretrained_model x", "validation_num_inference_steps"
        )
    line = str(raised.value)
    assert said in line
    assert "scheduler_config.json" in line or "prediction_type" in line


def test_the_scripts_refuse_it_in_one_line(train, capsys, pipelines, more_pipelines, images, tmp_path):
    from train_unconditional import main

    for key, value in (("timestep_spacing", "odd"), ("beta_schedule", "exponential"), ("trained_betas", [0.1, 0.2])):
        folder = shutil.copytree(pipelines["sd"], tmp_path / key)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        train(str(folder), *SHORT, "--validation_prompt", "a", expect=2)
        assert key in message(capsys)
        pixels = shutil.copytree(more_pipelines["ddpm"], tmp_path / f"ddpm {key}")
        file = pixels / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        words = ["--pretrained_model", pixels, "--train_data_dir", images, "--output_dir", tmp_path / "out"]
        assert main([str(word) for word in (*words, *SHORT, "--resolution", 16)]) == 2
        assert key in message(capsys)


def test_more_steps_than_the_schedule_has_name_their_flag(train, capsys, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": 20, "steps_offset": 0}))
    train(str(folder), *SHORT, "--dry_run")
    train(str(folder), *SHORT, "--dry_run", "--validation_prompt", "a", expect=2)
    assert "--validation_num_inference_steps 25 does not work with the pipeline's DDIMScheduler" in message(capsys)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type"),
        ("FlowMatchHeunDiscreteScheduler", {}, "has no init_noise_sigma"),
        ("ScoreSdeVeScheduler", {}, "has no step"),
        ("KarrasVeScheduler", {}, "can't draw with this pipeline"),
    ],
)
def test_what_a_text_to_image_pipeline_can_not_call_is_refused(name, changes, said):
    config = dict(tiny.scheduler().config) | changes
    with pytest.raises(UserError, match="--pretrained_model x") as raised:
        check_trial_of(["diffusers", name], config, {}, 10, "--pretrained_model x", "validation_num_inference_steps")
    assert said in str(raised.value)


def test_a_scheduler_whose_package_is_absent_is_named(train, capsys, pipelines, tmp_path):
    if importlib.util.find_spec("torchsde") is not None:
        pytest.skip("torchsde is installed")
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverSDEScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    train(str(folder), *SHORT, "--dry_run", expect=2)
    assert "torchsde" in message(capsys)


def test_a_trial_leaves_no_trace():
    own, state = tiny.scheduler(), torch.get_rng_state()
    before = dict(vars(own))
    check_trial(own, 10, "x", "steps")
    assert all(before[name] is value for name, value in vars(own).items())
    assert torch.equal(state, torch.get_rng_state())
    assert kind_of(SimpleNamespace(config={"prediction_type": "epsilon"})) == "epsilon"


def test_a_scheduler_that_draws_something_else_is_said_once(train, pipelines, tmp_path, caplog):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    train(str(folder), *SHORT, "--dry_run")
    assert caplog.text.count("does not fit the noise that the model is trained on") == 1
