"""LoHa and LoKr: what is exported is what was trained, and loads by peft and by diffusers."""

import pytest
import torch
from safetensors.torch import load_file

from tests.comparing import assert_same_bits, losses


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("adaptation", ["loha", "lokr"])
def test_the_adapter_folder_and_the_fused_pipeline_are_the_same_model(train, pipelines, adaptation, name):
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    flags = ["--adaptation", adaptation, "--rank", 3, "--lora_alpha", 5, "--max_train_steps", 6, "--use_ema"]
    out = train(name, *flags, "--learning_rate", 1e-2, "--train_batch_size", 2, "--train_text_encoder")
    base, fused = DiffusionPipeline.from_pretrained(pipelines[name]), DiffusionPipeline.from_pretrained(out / "fused")
    before = {key: tensor.clone() for key, tensor in base.unet.state_dict().items()}
    merged = PeftModel.from_pretrained(base.unet, out / "unet").merge_and_unload()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, fused.unet.state_dict()[key], msg=key)
    moved = [key for key, tensor in fused.unet.state_dict().items() if not torch.equal(tensor, before[key])]
    assert moved
    assert all(".attn" in key for key in moved)
    assert (out / "text_encoder" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("adaptation", ["loha", "lokr"])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(train, adaptation):
    flags = ["--adaptation", adaptation, "--learning_rate", 1e-2, "--train_batch_size", 2, "--use_ema"]
    flags += ["--lora_dropout", 0.2]
    whole = train("sd", *flags, "--max_train_steps", 6, out="whole")
    train("sd", *flags, "--max_train_steps", 3, out="parts")
    parts = train("sd", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(whole) == losses(parts)
    for file in sorted((whole / "checkpoint-6").rglob("*.safetensors")):
        assert_same_bits(load_file(file), load_file(parts / file.relative_to(whole)))


def test_at_the_first_step_nothing_has_moved(train, pipelines):
    out = {
        name: train("sd", "--adaptation", name, "--max_train_steps", 1, out=name) for name in ("loha", "lokr", "lora")
    }
    assert losses(out["loha"]) == losses(out["lokr"]) == losses(out["lora"])


def test_what_does_not_go(refused):
    named = "--use_dora True goes with --adaptation lora, got --adaptation lokr"
    refused(["--adaptation", "lokr", "--use_dora"], named)


@pytest.mark.parametrize("adaptation", ["lora", "loha"])
def test_a_rank_that_no_layer_can_have_is_refused_before_it_is_built(refused, adaptation):
    flags = ("--adaptation", adaptation, "--dry_run", "--rank")
    refused([*flags, 10**6], "--rank must be at most 32, the width of the widest adapted layer, got 1000000")
    refused([*flags, 33, "--train_text_encoder"], "at most 32")
    conv = ("--lora_target_modules", "conv1") if adaptation == "lora" else ()
    if conv:
        refused([*flags, 33, *conv], "at most 32, the width")


def test_a_rank_above_some_layers_is_named_and_a_large_one_of_lokr_is_not(train, caplog):
    train("sdxl", "--adaptation", "lora", "--train_text_encoder", "--rank", 24, "--dry_run")
    assert "--rank 24 is above the width of 12 of the " in caplog.text
    caplog.clear()
    train("sd", "--adaptation", "lokr", "--rank", 10**6, "--dry_run")
    train("sd", "--adaptation", "lora", "--rank", 32, "--dry_run")
    assert "above the width" not in caplog.text
