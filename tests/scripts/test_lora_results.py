"""LoRA files of runs: load them, fuse them, and resume from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.comparing import assert_same_bits, lora, weights
from tests.conftest import mostly_slow
from tests.text_runs import SHORT, VALIDATION, draw, load

LORAS = {
    "plain": ("sd",),
    "alpha": ("sd", "--rank", 2, "--lora_alpha", 8),
    "rslora": ("sd2", "--use_rslora", "--lora_alpha", 16),
    "dora": ("sd", "--use_dora"),
    "text encoders": ("sdxl", "--train_text_encoder", "--lora_alpha", 2),
    "targets": ("sdxl", "--lora_target_modules", "to_q", "conv1"),
    "bf16": ("sd", "--mixed_precision", "bf16"),
}


@pytest.mark.parametrize("case", mostly_slow(LORAS, "plain", "dora", "text encoders"))
def test_lora_loads_and_fuses(train, pipelines, case):
    name, *flags = LORAS[case]
    out = train(name, *SHORT, *VALIDATION, "--adaptation", "lora", "--learning_rate", 5e-2, "--export_fused", *flags)
    tensors = lora(out)
    assert all("lora" in key for key in tensors)
    assert all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    pipeline = load(pipelines[name])
    before = draw(pipeline)
    pipeline.load_lora_weights(out)
    after, fused = draw(pipeline), draw(load(out / "fused"))
    assert np.abs(after.astype(int) - before).max() > 3
    assert np.abs(after.astype(int) - fused).max() <= 1
    if case != "bf16":
        sample = np.asarray(Image.open(out / "samples" / "final" / "00_0.png"))
        assert np.array_equal(after, sample)


def test_fused_is_base_plus_scaled_product(train, pipelines):
    out = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, "--lora_alpha", 8, "--export_fused")
    base, fused, tensors = weights(pipelines["sd"]), weights(out / "fused"), lora(out)
    downs = [key for key in tensors if ".lora.down." in key or "lora_A" in key]
    assert downs
    changed = set()
    for down in downs:
        up = down.replace("lora.down", "lora.up").replace("lora_A", "lora_B")
        layer = down.removeprefix("unet.").partition(".lora")[0] + ".weight"
        expected = base[layer] + 8 / 2 * tensors[up] @ tensors[down]
        torch.testing.assert_close(fused[layer], expected)
        changed.add(layer)
    assert_same_bits(
        {key: base[key] for key in base if key not in changed}, {key: fused[key] for key in fused if key not in changed}
    )


def test_lora_at_step_0_changes_no_pixel(pipelines):
    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import PipelineSource
    from utils.models.registry import pick_family
    from utils.training.adaptation import LowRankAdaptation
    from utils.training.options import AdaptationOptions

    options = AdaptationOptions(adaptation="lora", train_text_encoder=True)
    source = PipelineSource(ModelOptions(pretrained_model_name_or_path=str(pipelines["sd"])))
    family = pick_family(source)(source, LowRankAdaptation.dtypes(options, torch.float32), {})
    before = draw(family.pipeline)
    LowRankAdaptation(family, options, None)
    assert np.array_equal(draw(family.pipeline), before)


def test_lora_metadata_holds_rank_and_alpha(train):
    out = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, "--lora_alpha", 8)
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 2
    assert metadata["unet.lora_alpha"] == 8


@pytest.mark.parametrize("style", ["ours", "kohya", "peft"])
def test_lora_weights_go_on_from_a_file(train, tmp_path, style):
    first = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, out="first")
    file = first / "pytorch_lora_weights.safetensors"
    if style != "ours":
        from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
        from safetensors.torch import save_file

        tensors = lora(first)
        tensors = convert_unet_state_dict_to_peft(tensors)
        if style == "kohya":
            tensors = convert_state_dict_to_kohya(tensors)
        file = tmp_path / f"{style}.safetensors"
        save_file(tensors, file)
    second = train("sd", *SHORT, "--adaptation", "lora", "--lora_weights", file, "--learning_rate", 1e-12, out="second")
    one, other = lora(first), lora(second)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-9)


def test_a_lora_of_text_encoders_must_go_on_training_them(train, capsys):
    first = train("sdxl", *SHORT, "--adaptation", "lora", "--train_text_encoder", out="first")
    flags = (*SHORT, "--adaptation", "lora", "--lora_weights", first)
    train("sdxl", *flags, out="second", expect=2)
    assert "add --train_text_encoder" in capsys.readouterr().err
    train("sdxl", *flags, "--train_text_encoder", out="third")


def test_a_lora_files_metadata_has_no_field_that_older_releases_lack(train):
    out = train("sd", *SHORT, "--adaptation", "lora", "--rank", 2, "--use_rslora")
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    known = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
    assert {name.removeprefix("unet.") for name in metadata} == known
