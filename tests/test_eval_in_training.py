"""The scores of evaluate_pipeline.py while a model trains, by both scripts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.networks import make_own
from tests.test_equivalences import assert_same_bits, losses, weights

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
