"""The scores of evaluate_pipeline.py while a model trains, by both scripts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import reset_accelerate
from tests.networks import make_own
from tests.scripts.conftest import PROMPTS
from utils.config.options import UserError
from utils.config.progress import Progress

STEPS = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--train_batch_size", 2]
WORDS = ["--validation_prompts", "red", "blue", "--validation_num_inference_steps", 1]


@pytest.fixture
def scoring(tmp_path, images) -> list[object]:
    """Flags for two scores at steps 2 and 4."""
    flags = ["--eval_metrics", "kid", "vendi", "--eval_steps", 2, "--eval_num_images", 6, "--eval_reference", images]
    return [*flags, "--eval_num_inference_steps", 2, "--feature_module", make_own(tmp_path / "small.py")]


def scores(out: Path) -> dict[int, dict[str, float]]:
    lines = (out / "evaluation" / "evaluation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: {name: each["value"] for name, each in record["scores"].items()} for record in records}


@pytest.mark.parametrize("kind", ["sd", "pixels"])
def test_scores_leave_the_training_as_it_is_and_come_again_on_a_resume(train, scoring, kind):
    more = WORDS if kind == "sd" else []
    plain = train(kind, *STEPS, *more, out="plain")
    whole = train(kind, *STEPS, *more, *scoring, out="whole")
    assert losses(plain) == losses(whole)
    assert_same_bits(weights(plain), weights(whole))
    found = scores(whole)
    assert list(found) == [2, 4]
    assert all(np.isfinite([each["kid"], each["vendi"]]).all() for each in found.values())
    assert found[2]["kid"] != found[4]["kid"]
    drawn = sorted((whole / "evaluation" / "step-4").rglob("*.png"))
    assert len(drawn) == 6
    train(kind, *STEPS, *more, *scoring, "--resume_from_checkpoint", "checkpoint-2", out="whole")
    assert scores(whole) == found


def test_the_images_trained_on_are_compared_with_where_no_others_are_named(train, scoring):
    place = scoring.index("--eval_reference")
    flags = scoring[:place] + scoring[place + 2 :]
    steps = flags.index("--eval_num_inference_steps")
    out = train("pixels", *STEPS, *flags[:steps], *flags[steps + 2 :], "--ddpm_num_steps", 5, "--image_channels", 1)
    assert np.isfinite([each["kid"] for each in scores(out).values()]).all()


class Three:
    """The records of three images, and what `PlannedImages` says of them."""

    def __init__(self, folder: Path):
        self.records = self
        self.paths = sorted(folder.glob("*.png"))[:3]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return self.paths[index].name

    def image(self, index: int) -> str:
        return str(self.paths[index])

    def identity(self, index: int) -> int:
        return index

    def target(self, index: int) -> tuple[int, int]:
        return 24, 16


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_the_images_trained_on_are_those_that_the_model_sees(images, channels, deep):
    from utils.data.options import CHANNELS, PixelOptions
    from utils.evaluation.references import trained_images

    options = PixelOptions(image_channels=channels, preserve_input_precision=deep, random_flip=True)
    three = Three(images)
    for picture, path in zip(trained_images(three, options).pictures, three.paths, strict=True):
        with Image.open(path) as image:
            width, height = image.size
            scale = min(width / 24, height / 16)
            left, top = (width - 24 * scale) / 2, (height - 16 * scale) / 2
            box = (left, top, left + 24 * scale, top + 16 * scale)
            seen = image.convert(CHANNELS[channels]).resize((24, 16), Image.Resampling.LANCZOS, box).convert("RGB")
        found = picture.read()
        assert found.mode == "RGB"
        assert np.abs(np.asarray(found).astype(int) - np.asarray(seen)).mean() < 3  # cut by whole pixels


def test_images_are_drawn_at_the_runs_resolution(train, scoring):
    out = train("sd", *STEPS, *WORDS, *scoring)
    for file in (out / "evaluation" / "step-4").rglob("*.png"):
        with Image.open(file) as image:
            assert image.size == (32, 32)


def test_controls_change_the_samples_alone(train):
    plain = train("sd", *STEPS, *WORDS, out="plain")
    held = train("sd", *STEPS, *WORDS, "--clamp_start", 0.5, "--clamp_end", 0.1, out="held")
    assert_same_bits(weights(plain), weights(held))
    name = Path("samples") / "final" / "00_0.png"
    assert (plain / name).read_bytes() != (held / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--eval_metrics", "kid"], ["--eval_metrics kid", "--eval_reference"]),
        (["--eval_steps", 2], ["--eval_steps", "--eval_metrics"]),
        (["--eval_metrics", "vendi", "--eval_steps", 0], ["--eval_steps"]),
    ],
)
def test_what_can_not_be_scored(refused, flags, named):
    refused([*STEPS, *flags], *named)


# While training


@pytest.fixture
def in_training(pipelines, models, real_images, tmp_path):
    """in_training(first_step=...) is a TrainingEvaluation and a pipeline that it draws from."""
    from accelerate import Accelerator

    from utils.evaluation.options import EvaluationOptions, FeatureOptions
    from utils.evaluation.while_training import TrainingEvaluation
    from utils.runtime.stop_requests import StopRequests
    from utils.sampling.pipelines import PipelineSpec, load_pipeline
    from utils.sampling.samples import Surroundings

    def make(first_step=0, prompts=PROMPTS, **more):
        reset_accelerate()
        options = {"eval_metrics": ["kid", "clip_score"], "eval_steps": 2, "eval_num_images": 6} | more
        options = {"eval_reference": str(real_images), "eval_num_inference_steps": 2} | options
        features = FeatureOptions(feature_module=str(models["own"]), clip_model=str(models["clip"]), no_download=True)
        surroundings = Surroundings(Accelerator(cpu=True), tmp_path, 3, StopRequests(tmp_path, None))
        pipeline = load_pipeline(PipelineSpec(str(pipelines["sd"])), torch.float32)
        evaluation = TrainingEvaluation(EvaluationOptions(**options), features, surroundings, pipeline, prompts)
        evaluation.begin(first_step)
        return evaluation, pipeline

    return make


def test_training_is_scored_by_the_same_code(in_training, evaluate, pipelines, flags, real_images, tmp_path):
    evaluation, pipeline = in_training()
    assert [step for step in range(1, 8) if evaluation.is_due(Progress(step, 7, 0, 0))] == [2, 4, 6, 7]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    found = evaluation.measure(pipeline, 2)
    torch.testing.assert_close(torch.rand(3), expected)  # the training's randomness is left alone
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert evaluation.measure(pipeline, 4)["kid"] != found["kid"]
    results, _ = evaluate(
        *("--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--num_images", 6, "--seed", 3, *flags),
        *("--reference", real_images, "--metrics", "kid", "clip_score"),
    )
    scores = results["entries"]["pipeline"]["scores"]
    assert set(found) == {"kid", "clip_score", "clip_score_hessel", "clip_r_precision"}
    assert all(found[name] == pytest.approx(scores[name]["value"], rel=1e-3, abs=1e-4) for name in found)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "evaluation" / "evaluation.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 4]
    in_training(first_step=2)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "evaluation" / "evaluation.jsonl").read_text().splitlines()
    ]
    assert steps == [2]


def test_under_autocast_the_vae_decodes_in_its_own_dtype(in_training, monkeypatch):
    from diffusers import AutoencoderKL

    seen = []
    decode = AutoencoderKL.decode

    def watched(self, latents, *args, **kwargs):
        seen.append((latents.dtype, torch.is_autocast_enabled("cpu")))
        return decode(self, latents, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", watched)
    evaluation, pipeline = in_training()
    evaluation.measure(pipeline, 2, around=lambda: torch.autocast("cpu", torch.bfloat16))
    assert set(seen) == {(torch.float32, False)}


def test_prompts_may_be_encoded_by_another(in_training, tmp_path):
    """As a family does, which knows clip skip and long prompts; prompts of different lengths are drawn one by one."""
    evaluation, pipeline = in_training()
    expected = evaluation.measure(pipeline, 2)

    def encode(text, longer=()):
        states = pipeline.encode_prompt(text, torch.device("cpu"), 1, True)
        states = [torch.cat([each, each[:, :3]], 1) if text in longer else each for each in states]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), states, strict=True))

    found = evaluation.measure(pipeline, 4, encode)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert evaluation.measure(pipeline, 6, lambda text: encode(text, PROMPTS[1:2]))["kid"] != expected["kid"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval_metrics": None}, "--eval_steps needs --eval_metrics"),
        ({"eval_steps": 0}, "--eval_steps must be"),
        ({"eval_prompts_file": "/nowhere.txt"}, "--eval_prompts_file must be"),
        ({"eval_reference": None}, "--eval_metrics kid compares"),
        ({"eval_reference": "/nowhere"}, "--eval_reference must be"),
        ({"eval_metrics": ["lpips_diversity"]}, "--eval_metrics lpips_diversity: alexnet"),
    ],
)
def test_bad_options_of_evaluation_in_training(in_training, options, named):
    with pytest.raises(UserError, match=named):
        in_training(**options)


def test_a_pipeline_without_prompts_is_refused_before_the_first_step(in_training, pipelines):
    in_training()
    with pytest.raises(UserError, match="give --prompts"):
        in_training(prompts=[])
