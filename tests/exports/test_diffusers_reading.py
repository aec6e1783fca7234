"""Where diffusers reads a LoRA for UIs in another way than UIs, it is said, and nothing counts as wrong."""

import pytest
import torch

from tests.adapters import Adapted
from utils.exports.diffusers_reading import misread_layers
from utils.formats.adapter_writer import write_kohya

START = (
    "--adaptation",
    "lora",
    "--max_train_steps",
    1,
    "--no_final_checkpoint",
    "--export_check",
    "--learning_rate",
    1e-5,
)


def of_uis(adapted: Adapted, file, has_encoders: bool):
    layers = [layer for layer in adapted.layers if has_encoders or layer.component == "unet"]
    write_kohya(layers, adapted.components, file, torch.float32, {})
    return layers


def misscaled(base, source, layers) -> list[str]:
    """The layers that have another scale, or none, once diffusers has loaded a file or folder."""
    from diffusers import DiffusionPipeline

    from utils.models.adapter_layers import modules_of

    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(source), adapter_name="a")
    return [
        f"{layer.component}.{layer.name}"
        for layer, module in zip(layers, modules_of(pipeline, layers), strict=True)
        if abs(getattr(module, "scaling", {}).get("a", 0) - layer.scale) > 1e-6
    ]


@pytest.mark.parametrize(("kind", "lost"), [("lora", set()), ("patterns", {"to_k"})])
def test_layers_that_diffusers_scales_otherwise_are_found(pipelines, tmp_path, kind, lost):
    adapted = Adapted(pipelines["sd"], kind, text_encoders=False)
    layers = of_uis(adapted, tmp_path / "a.safetensors", False)
    found = misread_layers(tmp_path / "a.safetensors", layers, adapted.pipeline)
    assert {name.rpartition(".")[2] for name in found} == lost


def test_it_finds_what_diffusers_has_after_loading(pipelines, tmp_path):
    adapted, file = Adapted(pipelines["sdxl"], "patterns"), tmp_path / "a.safetensors"
    layers = of_uis(adapted, file, True)
    wrong = misscaled(pipelines["sdxl"], file, layers)
    found = misread_layers(file, layers, adapted.pipeline)
    assert found == wrong
    assert any("text_encoder_2" in name for name in found)


@pytest.mark.parametrize(("form", "drawn"), [("both", True), ("kohya", False)])
def test_a_run_with_alphas_of_single_layers_ends_well_and_says_it(train, pipelines, tmp_path, caplog, form, drawn):
    caplog.set_level("INFO")
    file = tmp_path / "a.safetensors"
    adapted = Adapted(pipelines["sd"], "patterns")
    of_uis(adapted, file, True)
    out = train("sd", *START, "--train_text_encoder", "--lora_weights", file, "--lora_format", form)
    said = [record.getMessage() for record in caplog.records]
    assert sum("diffusers reads 11 of its 52 layers without their own scale" in each for each in said) == 1
    assert any("load_lora_weights(out/) draws the same image" in each for each in said) == drawn
    if drawn:
        assert misscaled(pipelines["sd"], out, adapted.layers) == []
    card = (out / "README.md").read_text()
    assert "Do not load `ui/out.safetensors` in diffusers" in card
    assert ('load_lora_weights("out")' in card) == drawn
    assert ("`--lora_format both` writes" in card) != drawn
