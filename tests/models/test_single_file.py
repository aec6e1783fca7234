"""Single files: their names, their marks and what they lack."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import message, mostly_slow
from tests.pretrained import FILES, SHORT, loaded, source_of, without
from utils.config.options import UserError
from utils.models.configs_of_files import configs_folder
from utils.models.loading import allowing_missing
from utils.models.options import LoadingOptions
from utils.models.single_file import SingleFile
from utils.sampling.pipelines import PipelineSpec, load_pipeline


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


def test_the_configs_beside_a_file_are_used(pipelines, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    shutil.copytree(pipelines["sd"], folder)
    file = tiny.write_single_file(folder, folder / "run.safetensors")
    pipeline = loaded(file)
    assert f"--pretrained_model {file}: using the configs beside it, in {folder}" in caplog.messages
    assert dict(pipeline.unet.config) | {"_name_or_path": ""} == dict(
        loaded(file, pretrained_model_config=str(pipelines["sd"])).unet.config
    ) | {"_name_or_path": ""}
    assert load_pipeline(PipelineSpec(str(file)), torch.float32).unet.config.sample_size == (
        pipeline.unet.config.sample_size
    )
    assert configs_folder(SingleFile.read(file, "--in"), None) == folder


def test_a_file_without_configs_names_the_flag_that_gives_them(pipelines, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(pipelines["sdxl"], folder)
    file = tiny.write_single_file(pipelines["sd"], folder / "run.safetensors")
    with pytest.raises(
        UserError, match=r"configs of .* not found on the Hub; give --pretrained_model_config the folder"
    ):
        loaded(file)
    assert "the configs beside it are not used, as they are those of a StableDiffusionXLPipeline" in caplog.text
    for flag in ("--pipeline", "--baseline"):
        with pytest.raises(UserError, match=f"{flag} .* give {flag}_config the folder of a pipeline"):
            PipelineSpec(str(file), flag=flag).check_config()
    with pytest.raises(UserError, match="give --pretrained_model_config the folder of a pipeline"):
        SingleFile.read(file, "--pretrained_vae_model_name_or_path").load_vae(None, "vae", torch.float32)


def test_a_folder_may_be_called_as_a_file(pipelines, tmp_path):
    folder = tmp_path / "run.safetensors"
    folder.symlink_to(pipelines["sd"])
    assert not source_of(folder).is_single_file
    assert PipelineSpec(str(folder)).file is None


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
    with pytest.raises(UserError, match=r"unet has .* weights of layers that its config lacks"):
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
    assert "--prediction_type sample overrides the mark" in caplog.text
    capsys.readouterr()
    edm = tiny.write_single_file(pipelines["sd"], tmp_path / "edm.safetensors", {"edm_mean": torch.zeros(4)})
    train(str(edm), *flags, "--dry_run", out="third", expect=2)
    assert "edm_mean" in message(capsys)
    odd = tiny.write_single_file(
        pipelines["sd"], tmp_path / "odd.safetensors", metadata={"modelspec.prediction_type": "w\n"}
    )
    train(str(odd), *flags, "--dry_run", out="fourth")
    assert "which is unknown" in caplog.text


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


def test_a_single_file_without_a_text_encoder_says_what_to_give(pipelines, tmp_path):
    for kind, prefix, part in (
        *(("sd", "cond_stage_model.", "text_encoder"), ("sdxl", "conditioner.embedders.0.", "text_encoder")),
    ):
        tensors = load_file(tiny.write_single_file(pipelines[kind], tmp_path / "a.safetensors"))
        save_file(
            {name: each for name, each in tensors.items() if not name.startswith(prefix)}, tmp_path / "b.safetensors"
        )
        with pytest.raises(UserError, match=rf"b\.safetensors has no {part}, .*give the whole model"):
            loaded(tmp_path / "b.safetensors", pretrained_model_config=str(pipelines[kind]))
