"""Pretrained parts: weights that are missing, left over or of another shape."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import tiny
from tests.conftest import message
from tests.pretrained import FILES, SHORT, changed, loaded, without
from utils.config.options import UserError
from utils.models.loading import load_module
from utils.models.options import LoadingOptions


def prefixed(prefix: str) -> Callable[[dict], dict]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


CHANGES = {
    "other names": prefixed("wrong."),
    "a prefix of a wrapper": prefixed("module."),
    "model": prefixed("model."),
    "none": lambda tensors: {"other": torch.zeros(1)},
    "another shape": lambda tensors: {
        name: torch.zeros(3) if number == 0 else tensor for number, (name, tensor) in enumerate(tensors.items())
    },
}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_not_there_are_refused(pipelines, tmp_path, part, change):
    folder = changed(pipelines["sd"], tmp_path / "sd", part, CHANGES[change])
    with pytest.raises(UserError) as raised:
        loaded(folder)
    line = str(raised.value)
    assert f"{folder}: {part}" in line
    assert "has the shape [3]" in line if change == "another shape" else "weights" in line


def test_one_missing_weight_is_named_in_training_and_evaluation(train, capsys, pipelines, tmp_path):
    from evaluate_pipeline import main

    for part, name in (
        ("unet", "conv_out.bias"),
        ("vae", "decoder.conv_out.bias"),
        ("text_encoder", "final_layer_norm.bias"),
    ):
        folder = changed(pipelines["sd"], tmp_path / part, part, without(name))
        train(str(folder), *SHORT, expect=2)
        line = message(capsys)
        assert f"{part} lacks 1 of its" in line
        assert f"--allow_missing_weights {name.split('.')[0]}" in line
        words = ["--pipeline", folder, "--prompts", "a", "--metrics", "none", "--output_dir", tmp_path / "out"]
        assert main([str(word) for word in words]) == 2
        assert f"{part} lacks 1 of its" in message(capsys)


def test_the_second_text_encoder_needs_its_projection(train, capsys, pipelines, tmp_path):
    folder = changed(pipelines["sdxl"], tmp_path / "sdxl", "text_encoder_2", without("text_projection"))
    train(str(folder), *SHORT, expect=2)
    assert "text_encoder_2 lacks 1 of its" in message(capsys)


def test_an_unconditional_pipeline_and_a_vae_are_looked_at_too(capsys, more_pipelines, classes, tmp_path):
    from train_unconditional import main

    data = ["--train_data_dir", str(classes), "--resolution", "16", "--output_dir", str(tmp_path / "out")]
    ddpm = changed(more_pipelines["ddpm"], tmp_path / "ddpm", "unet", without("conv_out"))
    assert main(["--pretrained_model", str(ddpm), *data]) == 2
    assert "unet lacks 2 of its" in message(capsys)
    vae = shutil.copytree(more_pipelines["vae"], tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    save_file(without("encoder.conv_in.bias")(load_file(file)), file, metadata={"format": "pt"})
    assert main(["--vae", str(vae), *data]) == 2
    assert f"--vae {vae} lacks 1 of its" in message(capsys)


@pytest.mark.parametrize("flag", ["--pretrained_vae_model_name_or_path"])
def test_a_part_from_elsewhere_is_looked_at_too(train, capsys, pipelines, tmp_path, flag):
    vae = shutil.copytree(pipelines["vae"], tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    save_file(without("post_quant")(load_file(file)), file, metadata={"format": "pt"})
    train("sd", *SHORT, flag, vae, expect=2)
    assert f"{flag} {vae} lacks 2 of its" in message(capsys)


def test_missing_weights_may_be_allowed(train, pipelines, tmp_path, caplog):
    folder = changed(pipelines["sd"], tmp_path / "sd", "unet", without("conv_out.bias"))
    out = train(str(folder), *SHORT, "--allow_missing_weights", "unet.conv_out")
    assert "1 missing weights are initialized randomly: conv_out.bias" in caplog.text
    assert "conv_out.bias" in load_file(out / FILES["unet"])
    with pytest.raises(UserError, match="allow_missing_weights"):
        LoadingOptions([" "])


def test_more_layers_than_the_config_says_are_refused(train, capsys, pipelines, tmp_path):
    def add_layer(tensors: dict) -> dict:
        again = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if ".2." in name}
        return tensors | again

    folder = changed(pipelines["sd"], tmp_path / "sd", "text_encoder", add_layer)
    train(str(folder), *SHORT, expect=2)
    assert "weights of layers that its config lacks: encoder.layers.3." in message(capsys)


def old_names(tensors: dict) -> dict:
    """Those of transformers 4, with the buffer that it saved once."""
    renamed = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return renamed | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def old_vae_names(tensors: dict) -> dict:
    """Those of Stable Diffusion 1.5's VAE on the Hub."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("text_encoder", old_names, ""),
        ("text_encoder", lambda tensors: tensors | {"text_projection.weight": torch.zeros(4, 4)}, "text_projection"),
        (
            "text_encoder",
            lambda tensors: tensors | {"vision_model.post_layernorm.bias": torch.zeros(4)},
            "vision_model",
        ),
        ("vae", old_vae_names, ""),
        ("vae", lambda tensors: tensors | {"loss.logvar": torch.zeros(1)}, "loss.logvar"),
        ("vae", lambda tensors: tensors | {"model_ema.decay": torch.zeros(1)}, "model_ema.decay"),
    ],
)
def test_what_real_files_have_too_much_is_named_alone(pipelines, tmp_path, caplog, part, change, said):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    caplog.set_level("INFO")
    folder = changed(pipelines["sd"], tmp_path / "sd", part, change) / part
    kind = AutoencoderKL if part == "vae" else CLIPTextModel
    found = load_module(kind, str(folder), "--x", part, torch.float32)
    whole = load_module(kind, str(pipelines["sd"] / part), "--x", part, torch.float32)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert ("are not used" in caplog.text) == bool(said)
    assert said in caplog.text


def image_networks() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import transformers as t

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    wide = size | {"intermediate_size": 32}
    text = tiny.text_config(16)
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    clip = {"text_config": text.to_dict(), "vision_config": wide, "projection_dim": 8}
    yield "resnet", lambda: t.ResNetForImageClassification(resnet)
    yield "vit", lambda: t.ViTForImageClassification(t.ViTConfig(**wide))
    yield "dinov2", lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**size, mlp_ratio=2))
    yield "clip classifier", lambda: t.CLIPForImageClassification(t.CLIPConfig(**clip))
    yield "clip", lambda: t.CLIPModel(t.CLIPConfig(**clip))
    yield "clip vision", lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**wide))


@pytest.mark.parametrize("name", ["resnet", "vit", "dinov2", "clip classifier", "clip", "clip vision"])
def test_the_trunk_of_a_classifier_is_enough(tmp_path, name):
    from utils.models.perceptual_loss import Features

    network = dict(image_networks())[name]()
    network.save_pretrained(tmp_path / "network")
    features = Features(str(tmp_path / "network"))
    assert not features.network.training
    assert not any(each.requires_grad for each in features.parameters())
    file = tmp_path / "network" / "model.safetensors"
    tensors = load_file(file)
    trunk = [key for key in tensors if "classifier" not in key and "text_model" not in key and "projection" not in key]
    used = next(key for key in trunk if "pooler" not in key and tensors[key].ndim > 1 and "layer" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != used}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--perceptual_network .* lacks 1 of its"):
        Features(str(tmp_path / "network"))
