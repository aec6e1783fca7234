"""What weight files say about themselves."""

import pytest

from utils.formats.modelspec import ModelFacts, modelspec, schedule_marks, written_at


def test_only_what_is_known_is_said(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    found = modelspec(ModelFacts("stable-diffusion-v1", "cats", (512, 768), "v_prediction", None, None, 2))
    assert found == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "cats",
        "modelspec.resolution": "512x768",
        "modelspec.prediction_type": "v",
        "modelspec.date": "1970-01-02T00:00:00Z",
        "modelspec.encoder_layer": "2",
        "modelspec.hash_sha256": "0x" + "0" * 64,
    }


def test_an_adapter_is_one_of_its_architecture():
    assert modelspec(ModelFacts("stable-diffusion-v1", "x"), "lora")["modelspec.architecture"] == (
        "stable-diffusion-v1/lora"
    )


def test_the_date_is_now_without_a_fixed_one(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert written_at() > "2020"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "no number")
    assert written_at() > "2020"


@pytest.mark.parametrize(
    ("config", "marks"),
    [
        ({}, []),
        ({"prediction_type": "v_prediction"}, ["v_pred"]),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ["v_pred", "ztsnr"]),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, []),
    ],
)
def test_marks_of_a_schedule(config, marks):
    assert schedule_marks(config) == marks
