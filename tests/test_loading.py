"""Pretrained parts: weights that are missing, left over or of another shape, and the marks of single files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from tests import tiny
from tests.conftest import message, mostly_slow
from utils.config.options import UserError
from utils.evaluation.metrics.features import load_weights
from utils.evaluation.metrics.image_sets import Statistics
from utils.models.loading import allowing_missing, load_module, load_pipeline_folder
from utils.models.options import LoadingOptions

SHORT = ("--max_train_steps", 1, "--train_batch_size", 1, "--no_final_checkpoint")
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


def changed(folder: Path, target: Path, part: str, change: Callable[[dict], dict]) -> Path:
    """A copy of a pipeline of which a part has other weights."""
    shutil.copytree(folder, target)
    file = target / FILES[part]
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def without(word: str) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name}


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
    assert "1 missing weights are random: conv_out.bias" in caplog.text
    assert "conv_out.bias" in load_file(out / FILES["unet"])
    with pytest.raises(UserError, match="allow_missing_weights"):
        LoadingOptions([" "])


def test_more_layers_than_the_config_says_are_refused(train, capsys, pipelines, tmp_path):
    def add_layer(tensors: dict) -> dict:
        again = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if ".2." in name}
        return tensors | again

    folder = changed(pipelines["sd"], tmp_path / "sd", "text_encoder", add_layer)
    train(str(folder), *SHORT, expect=2)
    assert "weights of layers that its config has not: encoder.layers.3." in message(capsys)


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


def true_pipeline(folder: Path, kind: str) -> Path:
    """A pipeline folder with the blocks and layers of Stable Diffusion 1.5, 2.1 or SDXL, a few channels wide."""
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    is_xl, width = kind == "sdxl", 8
    cross = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if is_xl else {}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16) if is_xl else (8, 8, 16, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=["DownBlock2D", *cross[0][:2]] if is_xl else [*cross[0], "DownBlock2D"],
        up_block_types=[*cross[1][:2], "UpBlock2D"] if is_xl else ["UpBlock2D", *cross[1]],
        transformer_layers_per_block=[1, 2, 10] if is_xl else 1,
        use_linear_projection=kind != "sd1",
        cross_attention_dim=3 * width if is_xl else width,
        projection_class_embeddings_input_dim=2 * width + 6 * 4 if is_xl else None,
        **more,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
    )

    def text(layers: int, size: int, **more: object):
        config = tiny.text_config(size, **more)
        config.num_hidden_layers = layers
        return config

    parts = {
        "vae": vae,
        "unet": unet,
        "text_encoder": CLIPTextModel(text(23 if kind == "sd2" else 12, width)),
        "tokenizer": tiny.tokenizer(folder / "vocabulary"),
        "scheduler": tiny.scheduler(),
    }
    if is_xl:
        second = CLIPTextModelWithProjection(text(32, 2 * width, projection_dim=2 * width))
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tiny.tokenizer(folder / "vocabulary")
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


def real_extras(kind: str) -> dict[str, torch.Tensor]:
    """What the files of the Hub hold beside the parts: buffers of the schedule, averages, a layer that is not read."""
    names = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "posterior_variance"]
    found = {name: torch.zeros(1000) for name in names}
    if kind == "sdxl":
        return found | {"denoiser.sigmas": torch.zeros(1000), "conditioner.embedders.1.model.attn_mask": torch.zeros(1)}
    found |= {f"model_ema.diffusion_modelinput_blocks{number}0weight": torch.zeros(2) for number in range(120)}
    found |= {"model_ema.decay": torch.tensor(1.0), "model_ema.num_updates": torch.tensor(1)}
    if kind == "sd1":
        text = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        return found | {text: torch.arange(77)[None], "embedding_manager.embedder.transformer.x": torch.zeros(1)}
    last = "cond_stage_model.model.transformer.resblocks.23."
    shapes = {"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,), "attn.out_proj.weight": (8, 8)}
    shapes |= {"mlp.c_fc.weight": (16, 8), "mlp.c_fc.bias": (16,), "mlp.c_proj.weight": (8, 16)}
    eights = ("attn.out_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_proj.bias")
    shapes |= dict.fromkeys(eights, (8,))
    return found | {last + name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def true_files(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """(pipeline folder, single file with all that real ones hold) by kind."""
    root, found = tmp_path_factory.mktemp("true"), {}
    for kind in ("sd1", "sd2", "sdxl"):
        folder, file = true_pipeline(root / kind, kind), root / f"{kind}.safetensors"
        found[kind] = folder, tiny.write_single_file(folder, file, real_extras(kind), has_open_clip=kind == "sd2")
    return found


def source_of(path: Path, **options: object):
    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import PipelineSource

    return PipelineSource(ModelOptions(pretrained_model_name_or_path=str(path), **options))


def loaded(path: Path, **options: object):
    from utils.models.pipeline_source import ComponentDtypes
    from utils.models.registry import pick_family

    source = source_of(path, **options)
    float32 = ComponentDtypes(*[torch.float32] * 3)
    return pick_family(source)(source, float32, {}).pipeline


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_names_of_real_files_load_without_a_flag(true_files, kind, caplog):
    caplog.set_level("INFO")
    folder, file = true_files[kind]
    single = loaded(file, pretrained_model_config=str(folder))
    for name, weights in FILES.items():
        if (folder / weights).is_file():
            found = getattr(single, name).state_dict()
            assert all(torch.equal(tensor, found[key]) for key, tensor in load_file(folder / weights).items())
    said = [record.message for record in caplog.records if "weights are not used" in record.message]
    assert any("alphas_cumprod" in line for line in said)
    if kind != "sdxl":
        assert any("127 weights" in line or "128 weights" in line for line in said), said


@pytest.mark.parametrize(
    ("kind", "prefix", "part"),
    [
        ("sd1", "model.diffusion_model.output_blocks.7.", "unet"),
        ("sd1", "model.diffusion_model.time_embed.0.", "unet"),
        ("sd1", "first_stage_model.decoder.up.2.block.0.conv1.", "vae"),
        ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.", "text_encoder"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.5.mlp.c_fc.", "text_encoder"),
        ("sdxl", "model.diffusion_model.label_emb.0.2.weight", "unet"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.", "text_encoder"),
        ("sdxl", "conditioner.embedders.1.model.text_projection", "text_encoder_2"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.31.attn.", "text_encoder_2"),
    ],
)
@pytest.mark.parametrize("is_renamed", mostly_slow([False, True], False))
def test_single_files_that_lack_weights_are_refused(true_files, tmp_path, kind, prefix, part, is_renamed):
    folder, file = true_files[kind]
    tensors = load_file(file)
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert chosen
    others = {name: tensor for name, tensor in tensors.items() if name not in chosen}
    moved = {f"wrong.{name}": tensor for name, tensor in chosen.items()} if is_renamed else {}
    save_file(others | moved, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: {part} lacks (\d+ of its|label_emb)") as raised:
        loaded(tmp_path / "model.safetensors", pretrained_model_config=str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("output_blocks.3.0.out_layers.3", "up_blocks.1.resnets.1.conv2"),
        ("layers.1.mlp.fc2", "encoder.layers.1.mlp.fc2"),
    ],
)
def test_missing_weights_of_a_single_file_may_be_allowed(pipelines, tmp_path, word, name):
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "whole.safetensors")
    save_file(without(word)(load_file(file)), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks 2 of its"):
        loaded(tmp_path / "model.safetensors", pretrained_model_config=str(pipelines["sd"]))
    with allowing_missing(LoadingOptions([name])):
        pipeline = loaded(tmp_path / "model.safetensors", pretrained_model_config=str(pipelines["sd"]))
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not any(each.is_meta or not each.isfinite().all() for each in module.state_dict().values())


def test_more_blocks_than_the_config_says_are_refused_in_single_files(true_files, tmp_path):
    folder, file = true_files["sd1"]
    tensors = load_file(file)
    last = "model.diffusion_model.input_blocks.11.0."
    more = {name.replace(".11.0.", ".13.0."): each.clone() for name, each in tensors.items() if name.startswith(last)}
    more |= {name.replace(".11.0.", ".12.0."): each.clone() for name, each in tensors.items() if name.startswith(last)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unet has .* weights of layers that its config has not"):
        loaded(tmp_path / "model.safetensors", pretrained_model_config=str(folder))


@pytest.mark.parametrize(
    ("more", "metadata", "expected"),
    [
        ((), {}, ("epsilon", False)),
        (("v_pred",), {}, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
        ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
        ((), {"modelspec.predict_key": "v"}, ("v_prediction", False)),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ("v_prediction", True)),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
        ((), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v_prediction", False)),
    ],
    ids=str,
)
def test_the_marks_of_a_single_file_set_the_scheduler(pipelines, tmp_path, more, metadata, expected):
    tensors = {name: torch.zeros(0) for name in more}
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors", tensors, metadata)
    config = loaded(file, pretrained_model_config=str(pipelines["sd"])).scheduler.config
    assert (config.prediction_type, bool(config.rescale_betas_zero_snr)) == expected
    if expected[1]:
        assert config.timestep_spacing == "trailing"


def test_marks_are_in_the_plan_and_in_the_result_and_flags_go_before_them(train, pipelines, tmp_path, capsys, caplog):
    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors", marks)
    flags = ("--pretrained_model_config", pipelines["sd"], *SHORT)
    train(str(file), *flags, "--dry_run")
    assert "v_prediction, scaled_linear betas from 0.00085 to 0.012 in 1,000 timesteps, terminal SNR zero" in (
        capsys.readouterr().out
    )
    out = train(str(file), *flags)
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    caplog.clear()
    train(str(file), *flags, "--prediction_type", "sample", "--dry_run", out="other")
    assert "--prediction_type sample goes before the mark" in caplog.text
    capsys.readouterr()
    edm = tiny.write_single_file(pipelines["sd"], tmp_path / "edm.safetensors", {"edm_mean": torch.zeros(4)})
    train(str(edm), *flags, "--dry_run", out="third", expect=2)
    assert "edm_mean" in message(capsys)
    odd = tiny.write_single_file(
        pipelines["sd"], tmp_path / "odd.safetensors", metadata={"modelspec.prediction_type": "w\n"}
    )
    train(str(odd), *flags, "--dry_run", out="fourth")
    assert "which is not known here" in caplog.text


def test_a_single_file_is_drawn_from_by_its_marks(pipelines, tmp_path):
    from utils.sampling.pipelines import PipelineSpec, load_pipeline, pipeline_class

    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors", marks)
    spec = PipelineSpec(str(file), config=str(pipelines["sd"]))
    pipeline = load_pipeline(spec, torch.float32)
    assert type(pipeline) is pipeline_class(spec)
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    whole = load_pipeline(PipelineSpec(str(pipelines["sd"])), torch.float32)
    assert all(torch.equal(each, pipeline.unet.state_dict()[name]) for name, each in whole.unet.state_dict().items())
    save_file(without("time_embed.0")(load_file(file)), tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"--pipeline .*less\.safetensors: unet lacks 2 of its"):
        load_pipeline(PipelineSpec(str(tmp_path / "less.safetensors"), config=str(pipelines["sd"])), torch.float32)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_in_a_single_file_is_taken(pipelines, tmp_path, prefix):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(pipelines["sd"] / "vae")
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 7.0)
    tensors = {name: each.clone().contiguous() for name, each in tiny.original_vae(vae, prefix).items()}
    more = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(tensors | more, tmp_path / "vae.safetensors")
    pipeline = loaded(pipelines["sd"], pretrained_vae_model_name_or_path=str(tmp_path / "vae.safetensors"))
    assert all(torch.equal(tensor, pipeline.vae.state_dict()[name]) for name, tensor in vae.state_dict().items())
    assert pipeline.vae.config.scaling_factor == 0.18215
    whole = source_of(pipelines["sd"], pretrained_vae_model_name_or_path=str(tmp_path / "vae.safetensors"))
    assert whole.config("vae")["latent_channels"] == 4
    save_file({name: each for name, each in tensors.items() if "conv_out" not in name}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"--pretrained_vae_model_name_or_path .*less\.safetensors.* lacks 4 of its"):
        loaded(pipelines["sd"], pretrained_vae_model_name_or_path=str(tmp_path / "less.safetensors"))


def test_a_vae_file_of_diffusers_own_names_is_taken(pipelines):
    file = pipelines["sd"] / FILES["vae"]
    pipeline = loaded(pipelines["sd"], pretrained_vae_model_name_or_path=str(file))
    assert torch.equal(pipeline.vae.decoder.conv_out.bias, load_file(file)["decoder.conv_out.bias"])


def test_the_hint_for_a_vae_names_a_flag_that_takes_it(train, capsys, pipelines, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(pipelines["sd"] / "vae")
    tensors = {name: each.clone().contiguous() for name, each in tiny.original_vae(vae, "").items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    train(str(tmp_path / "vae.safetensors"), *SHORT, expect=2)
    assert "a VAE to --pretrained_vae_model_name_or_path" in message(capsys)
    train("sd", *SHORT, "--pretrained_vae_model_name_or_path", tmp_path / "vae.safetensors", "--dry_run")
    train("sd", *SHORT, "--pretrained_vae_model_name_or_path", tmp_path / "vae.ckpt", "--dry_run", expect=2)
    assert "unpickling" in message(capsys)


def test_a_repository_of_one_variant_says_so(train, capsys, pipelines, tmp_path):
    from diffusers import DiffusionPipeline

    folder = tmp_path / "fp16"
    DiffusionPipeline.from_pretrained(pipelines["sd"]).save_pretrained(folder, variant="fp16")
    train(str(folder), *SHORT, expect=2)
    assert "add --variant fp16" in message(capsys)
    train(str(folder), *SHORT, "--variant", "fp16", "--dry_run")
    DiffusionPipeline.from_pretrained(pipelines["sd"]).save_pretrained(folder)
    train(str(folder), *SHORT, "--dry_run", out="both")
    train("sd", *SHORT, "--variant", "bf16", "--dry_run", out="none", expect=2)
    assert "--variant" in message(capsys)


def test_a_tokenizer_without_its_length_takes_the_text_encoders(train, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    assert loaded(folder).tokenizer.model_max_length == 77
    train(str(folder), *SHORT, "--dry_run")


@pytest.mark.parametrize(
    "file",
    [
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"),
    ],
)
def test_a_pipe_in_a_pipeline_is_one_line(train, capsys, pipelines, tmp_path, file):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    train(str(folder), *SHORT, "--dry_run", expect=2)
    assert file in message(capsys)


@pytest.mark.parametrize("flag", ["--pretrained_model", "--lora_weights", "--reference", "--feature_network_weights"])
def test_a_pipe_in_place_of_a_file_of_tensors_is_one_line(train, capsys, tmp_path, flag):
    name = {"--reference": "x.npz"}.get(flag, "x.safetensors")
    os.mkfifo(tmp_path / name)
    if flag == "--pretrained_model":
        train(str(tmp_path / name), *SHORT, expect=2)
    elif flag == "--lora_weights":
        train("sd", *SHORT, "--adaptation", "lora", flag, tmp_path / name, expect=2)
    elif flag == "--reference":
        with pytest.raises(UserError, match="pipe"):
            Statistics.read(tmp_path / name)
        return
    else:
        with pytest.raises((UserError, ValueError), match="pipe"):
            load_weights(str(tmp_path / name))
        return
    assert "x.safetensors" in message(capsys)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("text_encoder", "hidden_act", "bogus"), ("text_encoder", "num_attention_heads", 5)),
        *(("unet", "act_fn", "bogus"), ("unet", "down_block_types", ["No", "Block"])),
        ("vae", "norm_num_groups", 7),
    ],
)
def test_a_value_that_a_constructor_refuses_is_named(pipelines, tmp_path, part, key, value):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{folder}: {part}: .*{key}") as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


def test_a_single_file_without_a_text_encoder_says_what_to_give(pipelines, tmp_path):
    for kind, prefix, part in (
        *(("sd", "cond_stage_model.", "text_encoder"), ("sdxl", "conditioner.embedders.0.", "text_encoder")),
    ):
        tensors = load_file(tiny.write_single_file(pipelines[kind], tmp_path / "a.safetensors"))
        save_file(
            {name: each for name, each in tensors.items() if not name.startswith(prefix)}, tmp_path / "b.safetensors"
        )
        with pytest.raises(UserError, match=rf"b\.safetensors holds no {part}, .*give the whole model"):
            loaded(tmp_path / "b.safetensors", pretrained_model_config=str(pipelines[kind]))


OTHER_THINGS = {
    "model.gguf": "is a GGUF file, whose weights are quantised",
    "model.onnx": "is an ONNX file",
    "model.zip": "is an archive; unpack it",
    "model.json": "is a .json file",
    "model": "is a file",
    "pipe": "is a pipe",
    "pipe.safetensors": "is a pipe",
    "link.gguf": "is a link to nothing",
    "missing.gguf": "does not exist",
    "/dev/zero": "is a device",
    "/nowhere/model": "does not exist",
}


def put(folder: Path, name: str) -> Path:
    """Something that is no model, by the name of what it is."""
    path = folder / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("link"):
        path.symlink_to(folder / "nothing")
    elif name.startswith("model"):
        path.write_bytes(b"GGUF" + bytes(100))
    return path


@pytest.mark.parametrize("name", OTHER_THINGS)
@pytest.mark.parametrize(
    "flag",
    [
        *("--pretrained_model", "--pretrained_vae_model_name_or_path", "--lora_weights", "--pretrained_model_config"),
        *("--vae", "--pipeline", "--lora", "--baseline", "--pipeline_config", "unconditional --pretrained_model"),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(refused, capsys, pipelines, images, tmp_path, flag, name):
    from evaluate_pipeline import main as evaluate
    from train_unconditional import main as train_unconditional

    path, known = put(tmp_path, name), flag.rpartition(" ")[2]
    said = f"{known} {path} {OTHER_THINGS[name]}"
    if flag in ("--pipeline", "--lora", "--baseline", "--pipeline_config"):
        words = ["--prompts", "a", *["--pipeline", pipelines["sd"]] * (flag != "--pipeline"), flag, path]
        assert evaluate([str(word) for word in words]) == 2
        assert said in message(capsys)
    elif flag in ("--vae", "unconditional --pretrained_model"):
        words = ["--train_data_dir", images, "--output_dir", tmp_path / "out", known, path]
        assert train_unconditional([str(word) for word in words]) == 2
        assert said in message(capsys)
    else:
        refused([*["--adaptation", "lora"] * (flag == "--lora_weights"), "--dry_run", flag, path], said)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\ud800"}}},
        lambda config: config | {"model": {"type": "BPE", "vocab": [], "merges": 1e308}},
        lambda config: config | {"decoder": {"type": "Nothing"}},
        lambda config: {},
    ],
)
def test_a_tokenizer_that_is_broken_is_one_line(pipelines, tmp_path, change):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=f"{folder}") as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", ["1000", "x" * 9999, 0, -1, True, None, [], {"a": 1}, 1000, float("nan"), 2])
def test_a_length_of_a_tokenizer_that_is_none_is_one_line(pipelines, tmp_path, length):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    if length is None:  # the library's own large number
        assert loaded(folder).tokenizer.model_max_length == 77
        return
    with pytest.raises(UserError, match="tokenizer") as raised:
        loaded(folder)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("text", ["a plain one", "a newword"])
def test_a_tokenizer_of_another_model_is_one_line(train, pipelines, tmp_path, capsys, caplog, text, workers):
    """Tokens that the text encoder has no embedding of: special ones, which each caption has, or a word."""
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["newword"]) if "new" in text else tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    tokenizer.save_pretrained(folder / "tokenizer")
    data = tiny.make_images(tmp_path / "data", 4)
    (data / "metadata.jsonl").unlink()
    for number in range(4):
        (data / f"{number:03d}.txt").write_text("a plain one")
    flags = [*SHORT, "--train_batch_size", 4, "--dataloader_num_workers", workers]
    if "new" in text:  # a word that no caption has costs nothing
        train(str(folder), *flags, data=data)
        assert "1 tokens that its text encoder has no embeddings of, such as 'newword'" in caplog.text
        (data / "002.txt").write_text(text)
    train(str(folder), *flags, data=data, out="refused", expect=2)
    assert "they are not of one model" in message(capsys)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "_class_name", {"a": 1}),
        ("model_index.json", "vae", ["diffusers", None]),
        ("model_index.json", "vae", ["diffusers"]),
        ("model_index.json", "unet", ["diffusers", ["UNet2DConditionModel"]]),
        ("model_index.json", "text_encoder", [{"a": 1}, "CLIPTextModel"]),
        ("model_index.json", "tokenizer", [None, None]),
        ("model_index.json", "unet", "UNet"),
        ("model_index.json", "vae", [1, 2]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", True),
        ("scheduler/scheduler_config.json", "beta_start", float("nan")),
        ("scheduler/scheduler_config.json", "beta_end", None),
        ("scheduler/scheduler_config.json", "trained_betas", "none"),
        ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"]),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "scaling_factor", "0.18"),
        ("vae/config.json", "scaling_factor", float("inf")),
        ("vae/config.json", "block_out_channels", None),
        ("vae/config.json", "block_out_channels", []),
        ("unet/config.json", "block_out_channels", [8, "16"]),
        ("unet/config.json", "cross_attention_dim", {}),
        ("unet/config.json", "down_block_types", 5),
        ("unet/config.json", "down_block_types", ["NoBlock", "DownBlock2D"]),
        ("unet/config.json", "act_fn", 3),
        ("unet/config.json", "norm_num_groups", 7),
        ("text_encoder/config.json", "hidden_size", "32"),
        ("text_encoder/config.json", "num_hidden_layers", None),
        ("text_encoder/config.json", "hidden_act", "none"),
        ("text_encoder/config.json", "num_attention_heads", 0),
    ],
    ids=str,
)
def test_configs_of_wrong_types_end_in_one_line(pipelines, tmp_path, file, key, value):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f"{folder}") as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_configs_with_a_mark_are_one_line(pipelines, tmp_path, file, encoding):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (folder / file).write_bytes((folder / file).read_text().encode(encoding))
    with pytest.raises(UserError, match=f"{folder / file} begins with a byte order mark.*save it as UTF-8"):
        loaded(folder)


def test_a_unet_that_says_no_size_gives_a_result_that_draws(train, pipelines, tmp_path, caplog):
    from diffusers import DiffusionPipeline

    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": None}))
    out = train(str(folder), *SHORT)
    edge = 512 // DiffusionPipeline.from_pretrained(out).vae_scale_factor
    assert json.loads((out / "unet/config.json").read_text())["sample_size"] == edge
    assert f"the UNet's config says no sample_size; the result's says {edge}" in caplog.text


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 100_000, "[]", "", '{"_class_name": NaN}'])
@pytest.mark.parametrize("file", ["model_index.json", "text_encoder/config.json"])
def test_configs_that_are_none_end_in_one_line(train, capsys, pipelines, tmp_path, file, content):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (folder / file).write_text(content)
    train(str(folder), *SHORT, "--dry_run", expect=2)
    assert str(folder) in message(capsys)


def test_a_distilled_base_is_refused_or_gets_a_line(train, capsys, caplog, pipelines, tmp_path):
    from diffusers import LCMScheduler, UNet2DConditionModel

    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    LCMScheduler.from_pretrained(pipelines["sd"], subfolder="scheduler").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    train(str(folder), *SHORT, "--dry_run")
    assert "LCMScheduler) looks like a model distilled" in caplog.text
    config = UNet2DConditionModel.load_config(pipelines["sd"] / "unet")
    UNet2DConditionModel.from_config(config, time_cond_proj_dim=8).save_pretrained(folder / "unet")
    train(str(folder), *SHORT, "--dry_run", expect=2)
    line = message(capsys)
    assert "time_cond_proj_dim 8" in line
    assert "fine-tune the model that it was distilled from" in line


def write_lora(folder: Path, pipeline_folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA of diffusers' names on a pipeline's UNet and text encoder, with numbers that change something."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def lora(pipelines, tmp_path_factory) -> dict[str, torch.Tensor]:
    return write_lora(tmp_path_factory.mktemp("lora"), pipelines["sd"])


LORA_CHANGES = {
    "other part": (
        lambda name: name.replace("unet.", "other."),
        "for parts that this StableDiffusionPipeline",
    ),
    "no part": (lambda name: name.removeprefix("unet."), "for parts that this StableDiffusionPipeline"),
    "wrapped": (lambda name: f"base_model.model.{name}", "names of PEFT's own files.*save_lora_weights"),
    "other layers": (lambda name: name.replace("attn1", "attn7"), "are not in this model"),
    "one layer": (lambda name: name.replace("mid_block", "middle"), "are not in this model"),
    "other halves": (lambda name: name.replace("lora_B", "lora_C"), "one half"),
}


@pytest.mark.parametrize("change", LORA_CHANGES)
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_lora_of_which_a_part_matches_nothing_is_refused(lora, pipelines, tmp_path, change, script):
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    rename, said = LORA_CHANGES[change]
    save_file({rename(name): tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    with pytest.raises(UserError, match=said) as raised:
        load_lora(pipeline, str(tmp_path / "lora.safetensors"), script, "--lora_weights x")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("half", ["lora_A", "lora_B", "lora_up", "lora_down"])
def test_a_lora_of_which_a_half_is_missing_is_refused(lora, pipelines, tmp_path, half):
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    tensors = kohya_names(lora) if half in ("lora_up", "lora_down") else dict(lora)
    del tensors[next(name for name in tensors if half in name)]
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    with pytest.raises(UserError, match="one half of 1 updates alone"):
        load_lora(pipeline, str(tmp_path / "lora.safetensors"), "a", "--lora x")


@pytest.mark.parametrize("names", [dict, lambda lora: kohya_names(lora)])
def test_a_lora_that_changes_nothing_is_said_and_complex_numbers_are_refused(lora, pipelines, tmp_path, names, caplog):
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    file = tmp_path / "lora.safetensors"
    off = {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in lora.items()}
    save_file(names(off), file)
    load_lora(StableDiffusionPipeline.from_pretrained(pipelines["sd"]), str(file), "a", "--lora x")
    assert caplog.text.count("so that it changes nothing") == 1
    first = next(iter(lora))
    save_file(names(lora | {first: lora[first].to(torch.complex64)}), file)
    with pytest.raises(UserError, match="as C64: weights are real numbers"):
        load_lora(StableDiffusionPipeline.from_pretrained(pipelines["sd"]), str(file), "a", "--lora x")


def kohya_names(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in lora.items():
        layer, _, half = name.removeprefix("unet.").partition(".lora_")
        word = "lora_unet_" + layer.replace(".", "_")
        found[f"{word}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
        found[f"{word}.alpha"] = torch.tensor(2.0)
    return found


@pytest.mark.parametrize("names", [dict, kohya_names])
def test_loras_of_the_usual_formats_are_read_alike(lora, pipelines, tmp_path, names):
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    from utils.models.lora_files import load_lora

    save_file(names(lora), tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    load_lora(pipeline, str(tmp_path / "lora.safetensors"), "default", "--lora_weights x")
    found = get_peft_model_state_dict(pipeline.unet)
    assert all(torch.equal(found[name.removeprefix("unet.")], tensor) for name, tensor in lora.items())


def test_a_lora_of_another_model_is_one_whole_line(train, capsys, pipelines, tmp_path):
    for theirs, ours in (("sdxl", "sd"), ("sd", "sdxl")):
        write_lora(tmp_path / f"lora of {theirs}", pipelines[theirs])
        flags = ("--adaptation", "lora", "--lora_weights", tmp_path / f"lora of {theirs}")
        train(ours, *SHORT, *flags, out=f"out of {ours}", expect=2)
        line = message(capsys)
        assert "it is the LoRA of another model" in line
        assert "reads text states of width" in line
        assert len(line) < 500
        assert not line.endswith(":")


def test_a_dora_of_other_tools_is_not_read_in_half(lora, pipelines, tmp_path):
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    more = {f"{name.partition('.')[0]}.dora_scale": torch.ones(1) for name in kohya_names(lora)}
    save_file(kohya_names(lora) | more, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    with pytest.raises(UserError, match="DoRA file of other tools"):
        load_lora(pipeline, str(tmp_path / "lora.safetensors"), "default", "--lora x")


@pytest.mark.parametrize("length", [None, "gone"])
def test_a_pipeline_whose_tokenizer_says_no_length_is_evaluated(pipelines, tmp_path, length):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config | ({} if length == "gone" else {"model_max_length": None})))
    found = load_pipeline_folder(
        StableDiffusionPipeline,
        str(folder),
        "--pipeline",
        {"default": torch.float32},
        revision=None,
        variant=None,
        use_safetensors=True,
        given={},
    )
    assert found.tokenizer.model_max_length == 77


@pytest.mark.parametrize(
    ("file", "key"),
    [
        *(("text_encoder/config.json", "num_hidden_layers"), ("unet/config.json", "layers_per_block")),
        *(("vae/config.json", "layers_per_block"), ("unet/config.json", "transformer_layers_per_block")),
    ],
)
def test_models_of_a_million_layers_are_refused_before_they_are_made(pipelines, tmp_path, file, key):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {key: 10**6}))
    with pytest.raises(UserError, match=key):
        loaded(folder)
