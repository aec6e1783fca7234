"""Whole runs leave a model card, and samples whose texts the web UI reads."""

import hashlib
import re

import pytest
import yaml
from PIL import Image

from tests.conftest import mostly_slow

DRAWN = ["--max_train_steps", 1, "--validation_num_inference_steps", 2]


def front(out) -> dict:
    return yaml.safe_load((out / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("kind", mostly_slow(["full", "lora", "loha"], "lora"))
def test_a_run_writes_its_card(train, kind, pipelines):
    out = train("sd", *DRAWN, "--adaptation", kind, "--validation_prompts", "a red fox", "a, b: c")
    text = (out / "README.md").read_text()
    widget = front(out)["widget"]
    assert [each["text"] for each in widget] == ["a red fox", "a, b: c"]
    assert all((out / each["output"]["url"]).is_file() for each in widget)
    assert ('load_lora_weights("out")' in text) == (kind == "lora")
    assert str(pipelines["sd"].parent) not in text
    assert 'image = pipeline("a red fox").images[0]' in text
    info = Image.open(out / "samples" / "final" / "01_0.png").info
    model = "out" if kind == "full" else "sd, LoRA: out"
    assert info["parameters"] == (
        f"a, b: c\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 32x32, Model: {model}, RNG: CPU"
    )
    assert info["prompt"] == "a, b: c"


@pytest.mark.slow
def test_a_resumed_run_writes_its_card_anew_unless_it_was_edited(train):
    out = train("sd", *DRAWN, "--validation_prompts", "a red fox")
    train("sd", *DRAWN, "--resume_from_checkpoint", "latest")
    assert "widget" not in front(out)
    (out / "README.md").write_text("mine")
    train("sd", *DRAWN, "--resume_from_checkpoint", "latest")
    assert (out / "README.md").read_text() == "mine"
    assert (out / "MODEL_CARD.md").is_file()


def test_a_run_that_predicts_v_says_what_uis_need(train):
    out = train("sd2", *DRAWN, "--clip_skip", 1, "--validation_prompt", "a fox", "--num_validation_images", 1)
    text = (out / "README.md").read_text()
    assert "ModelSamplingDiscrete" in text
    assert "Set the clip skip to 2" in text
    assert 'pipeline("a fox", clip_skip=1)' in text
    assert "Clip skip: 2" in Image.open(out / "samples" / "final" / "00_0.png").info["parameters"]


@pytest.mark.parametrize("kind", ["pixels", "labels"])
def test_an_unconditional_run_writes_its_card(train, kind):
    out = train(kind, "--max_train_steps", 1, "--num_samples", 2)
    text = (out / "README.md").read_text()
    assert "trained from scratch" in text
    assert front(out)["pipeline_tag"] == "unconditional-image-generation"
    said = Image.open(out / "samples" / "final" / "000.png").info["parameters"]
    assert re.search(r"^Steps: 2, Sampler: \w+, .*Seed: 0, Size: 32x32, Model: out", said)
    assert ("Class: cat" in said) == (kind == "labels")


@pytest.mark.slow
def test_the_hash_of_the_single_file_is_in_the_last_samples(train):
    more = ["--export_single_file", "--export_dtype", "fp16", "--export_variant", "fp16"]
    out = train("sd", *DRAWN, "--validation_prompts", "a fox", *more)
    digest = hashlib.sha256((out / "out.safetensors").read_bytes()).hexdigest()[:10]
    png = out / "samples" / "final" / "00_0.png"
    assert f"Model hash: {digest}" in Image.open(png).info["parameters"]
    assert f"`out.safetensors` (model hash {digest})" in (out / "README.md").read_text()
    assert 'from_pretrained("out", torch_dtype=torch.float16, variant="fp16")' in (out / "README.md").read_text()
    # A run that exports none does not name the one that is left.
    train("sd", *DRAWN, "--validation_prompts", "a fox", "--overwrite_output_dir")
    assert "Model hash" not in Image.open(png).info["parameters"]
    assert "out.safetensors`" not in (out / "README.md").read_text()


def test_an_export_that_failed_its_check_is_in_the_card_and_not_uploaded(train, monkeypatch, caplog):
    uploads = []
    monkeypatch.setattr("utils.training.session.create_repository", lambda folder, options: "me/x")
    monkeypatch.setattr("utils.training.model_card.upload", lambda *given: uploads.append(given))
    monkeypatch.setattr("utils.training.result.wrong_export", lambda session, state: "unet: conv differs")
    out = train("sd", "--max_train_steps", 1, "--push_to_hub", "--export_check", expect=1)
    assert "unet: conv differs" in (out / "README.md").read_text()
    assert "nothing is uploaded to me/x" in caplog.text
    assert not uploads
