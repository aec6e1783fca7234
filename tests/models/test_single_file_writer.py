"""Single files that are written: read by our own reader, by diffusers, and compared with other conversions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from utils.config.options import UserError
from utils.models.single_file import SingleFile
from utils.models.single_file_writer import FileFacts, licence_of, write_single_file


def written(folder: Path, file: Path, **arguments: object) -> dict[str, torch.Tensor]:
    write_single_file(folder, file, **arguments)
    return load_file(file)


def edited(folder: Path, target: Path, part: str, **values: object) -> Path:
    """A copy of a pipeline with other values in a config."""
    shutil.copytree(folder, target)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = target / part / name if part else target / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return target


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_it_holds_what_another_conversion_holds(pipelines, tmp_path, kind):
    ours = written(pipelines[kind], tmp_path / "ours.safetensors")
    theirs = load_file(tiny.write_single_file(pipelines[kind], tmp_path / "theirs.safetensors"))
    more = {name for name in ours if name not in theirs}
    assert {name.rpartition(".")[2] for name in more} == {"position_ids"}
    assert theirs.keys() <= ours.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]) or name.endswith("logit_scale")


def test_a_text_encoder_of_stable_diffusion_2_is_open_clips(pipelines, tmp_path):
    folder = edited(pipelines["sd2"], tmp_path / "sd2", "text_encoder", hidden_act="gelu")
    ours = written(folder, tmp_path / "ours.safetensors")
    theirs = load_file(tiny.write_single_file(folder, tmp_path / "theirs.safetensors", has_open_clip=True))
    spare = {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}
    assert ours.keys() - {"v_pred"} == theirs.keys() - spare
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - spare)
    metadata = SingleFile.read(tmp_path / "ours.safetensors", "--x").metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"


@pytest.mark.parametrize(
    ("values", "marks", "said"),
    [
        ({}, {}, "epsilon"),
        ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}, "v"),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "v",
        ),
        ({"prediction_type": "sample"}, {"prediction_type": "sample"}, "x0"),
    ],
)
def test_our_own_reader_reads_the_marks_back(pipelines, tmp_path, values, marks, said):
    folder = edited(pipelines["sd"], tmp_path / "base", "scheduler", **values)
    write_single_file(folder, tmp_path / "x.safetensors")
    file = SingleFile.read(tmp_path / "x.safetensors", "--x")
    assert file.scheduler_marks == {"prediction_type": "epsilon"} | marks
    assert file.metadata["modelspec.prediction_type"] == said


def test_metadata_says_what_is_known(pipelines, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    facts = FileFacts("Cats", (640, 512), "base", "openrail++", 2)
    digest = write_single_file(pipelines["sdxl"], tmp_path / "a.safetensors", facts)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        found = {name.removeprefix("modelspec."): value for name, value in file.metadata().items()}
    assert found["hash_sha256"] == f"0x{digest}"
    assert (found["title"], found["resolution"], found["merged_from"]) == ("Cats", "640x512", "base")
    assert (found["license"], found["encoder_layer"]) == ("openrail++", "2")
    assert found["architecture"] == "stable-diffusion-xl-v1-base"
    write_single_file(pipelines["sdxl"], tmp_path / "b.safetensors", facts)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\ntags: [broken\nlicense: mit\n---\n", "mit"),
        ("no metadata", None),
        ("---\n: [broken\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == licence


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_and_integers_stay(pipelines, tmp_path, dtype):
    whole = written(pipelines["sd"], tmp_path / "whole.safetensors")
    for name, tensor in written(pipelines["sd"], tmp_path / "half.safetensors", dtype=dtype).items():
        expected = whole[name].to(dtype) if whole[name].is_floating_point() else whole[name]
        assert torch.equal(tensor, expected)
        assert tensor.dtype == expected.dtype


def test_shards_and_variants_are_read(pipelines, tmp_path):
    plain = written(pipelines["sd"], tmp_path / "plain.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sd"])
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="200KB", variant="x")
    assert list((tmp_path / "shards" / "unet").glob("*00001-of*"))
    for variant in (None, "x"):
        found = written(tmp_path / "shards", tmp_path / "x.safetensors", variant=variant)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_a_vae_saved_by_old_diffusers_is_written_alike(pipelines, tmp_path):
    plain = written(pipelines["sd"], tmp_path / "plain.safetensors")
    folder = shutil.copytree(pipelines["sd"], tmp_path / "old")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    found = written(folder, tmp_path / "x.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_values_that_fp16_cannot_hold_are_named(pipelines, tmp_path, caplog):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "base")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"][:2] = 1e5
    save_file(tensors, file, {"format": "pt"})
    write_single_file(folder, tmp_path / "x.safetensors", dtype=torch.float16)
    (line,) = (record.message for record in caplog.records if "65504" in record.message)
    assert "2 values of 1 tensors" in line
    assert "model.diffusion_model.out.2.bias" in line


@pytest.mark.parametrize(("kind", "is_warned"), [("sd2", True), ("sdxl", False), ("sd", False)])
def test_marks_that_tools_do_not_read_are_said(pipelines, tmp_path, caplog, kind, is_warned):
    prediction = {"sdxl": "v_prediction", "sd": "epsilon"}.get(kind)
    folder = pipelines[kind]
    if prediction:
        folder = edited(folder, tmp_path / "base", "scheduler", prediction_type=prediction)
    write_single_file(folder, tmp_path / "x.safetensors")
    assert any("ModelSamplingDiscrete" in record.message for record in caplog.records) == is_warned


def test_what_a_file_cannot_say_is_said(pipelines, tmp_path, caplog):
    folder = edited(pipelines["sd"], tmp_path / "base", "scheduler", beta_end=0.02)
    edited(folder, tmp_path / "other", "vae", scaling_factor=0.5)
    write_single_file(tmp_path / "other", tmp_path / "x.safetensors")
    said = " ".join(record.message for record in caplog.records)
    assert "beta_end 0.012, but it is 0.02" in said
    assert "scaling factor of 0.18215, but it is 0.5" in said


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("", {"_class_name": "StableDiffusionImg2ImgPipeline"}, "is a StableDiffusionImg2ImgPipeline"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "its UNet has a block of type UNetMidBlock2D"),
        ("unet", {"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]}, "a block of type Simple"),
    ],
)
def test_what_has_no_such_layout_is_refused(pipelines, tmp_path, part, values, said):
    folder = edited(pipelines["sd"], tmp_path / "base", part, **values)
    with pytest.raises(UserError, match=said) as raised:
        write_single_file(folder, tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_without_weights_or_pipeline_is_refused(pipelines, tmp_path):
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        write_single_file(tmp_path, tmp_path / "x.safetensors")
    folder = shutil.copytree(pipelines["sd"], tmp_path / "base")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"vae has no \.safetensors weights"):
        write_single_file(folder, tmp_path / "x.safetensors")
