"""Runs export what they trained in the form that is asked for, and end with 1 if a file is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.conftest import message
from tests.text_runs import SHORT as STEPS
from utils.config.file_names import file_name_of, result_name
from utils.exports import drawing
from utils.models import pipeline_files, single_file_writer
from utils.runtime.processes import LOCK
from utils.sampling.infotext import DrawnModel, single_file_of
from utils.training import exporting
from utils.training.adapter_export import UiExport
from utils.training.exported import ExportedFiles
from utils.training.outdated import remove_outdated

SHORT = (*STEPS, "--export_check")

FILE = "out.safetensors"


def said(caplog, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize(
    ("kind", "flags", "folder"),
    [
        ("sd", (), "."),
        pytest.param("sd2", ("--rescale_betas_zero_snr",), ".", marks=pytest.mark.slow),
        ("sdxl", ("--train_text_encoder", "--use_ema"), "."),
        pytest.param("sd", ("--adaptation", "lora", "--export_fused"), "fused", marks=pytest.mark.slow),
        pytest.param("sdxl", ("--adaptation", "lokr"), "fused", marks=pytest.mark.slow),
        pytest.param("sd2", ("--adaptation", "loha", "--train_text_encoder"), "fused", marks=pytest.mark.slow),
    ],
)
def test_a_single_file_draws_what_the_folder_draws(train, caplog, kind, flags, folder):
    caplog.set_level("INFO")
    out = train(kind, *SHORT, *flags, "--export_single_file")
    (tensors,) = said(caplog, "checked the exported pipeline")
    assert "the run's weights, bit for bit" in tensors
    (images,) = said(caplog, "checked by drawing")
    assert images.count("the same") == (2 if folder == "." else 2 + ("lora" in flags))
    if folder == ".":
        assert images.count("the same bits") == 2
    record = json.loads((out / "run.json").read_text())["export_check"]
    assert not record["wrong"]
    assert (out / folder / FILE).is_file()


def test_best_and_kept_exports_have_their_file_too(train, caplog):
    caplog.set_level("INFO")
    flags = ("--validation_split", 0.4, "--validation_steps", 1, "--export_steps", 1, "--export_single_file")
    out = train("sd", *SHORT, *flags, "--use_ema")
    for folder in ("best", "export-1", "."):
        assert (out / folder / FILE).is_file()
        assert (out / folder / "model_index.json").is_file()
    assert said(caplog, "in export-1/")
    assert said(caplog, "in best/")
    assert not (out / "export-2").exists()
    first, last = (load_file(out / folder / "unet/diffusion_pytorch_model.safetensors") for folder in ("export-1", "."))
    assert any(not torch.equal(first[name], tensor) for name, tensor in last.items())


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_result_in_half_precision_loads_without_a_dtype(train, caplog, pipelines, name, dtype):
    caplog.set_level("INFO")
    flags = ("--export_dtype", name, "--export_variant", name, "--max_shard_size", "300KB", "--export_single_file")
    out = train("sd", *SHORT, *flags)
    files = [*(out / "unet").glob("*.safetensors"), *(out / "text_encoder").glob("*.safetensors")]
    assert len(files) > 2
    assert all(f".{name}" in file.name for file in files)
    for file in (*files, out / FILE):
        assert {each.dtype for each in load_file(file).values()} <= {dtype, torch.int64}
    assert said(caplog, f'from_pretrained(..., variant="{name}")')
    pipeline = DiffusionPipeline.from_pretrained(out, variant=name)
    assert {each.dtype for each in pipeline.unet.parameters()} == {torch.float32}
    assert {each.dtype for each in pipeline.text_encoder.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline("a", num_inference_steps=2, output_type="np").images).all()
    index = json.loads(next((out / "unet").glob("*.index.*")).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in (out / "unet").glob("*.safetensors")}


def test_names_in_the_index_of_a_text_encoders_shards_are_the_older_ones(train):
    out = train("sd", *SHORT, "--max_shard_size", "100KB")
    index = json.loads((out / "text_encoder" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name.startswith("text_model.")
        assert name in load_file(out / "text_encoder" / file)


def test_a_plain_result_stays_as_it_was(train, pipelines):
    out = train("sd", *SHORT, "--no_export_check")
    names = {str(path.relative_to(out)) for path in out.rglob("*.safetensors") if "checkpoint" not in str(path)}
    parts = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    assert names == {f"{part}.safetensors" for part in parts}
    assert "export_check" not in json.loads((out / "run.json").read_text())


def test_a_changed_weight_ends_the_run_with_1(train, monkeypatch, capsys):
    write = single_file_writer.write_single_file

    def harmful(folder: Path, file: Path, *arguments: object) -> str:
        found = write(folder, file, *arguments)
        tensors = load_file(file)
        tensors["model.diffusion_model.out.2.bias"] += 1
        save_file(tensors, file)
        return found

    monkeypatch.setattr(exporting, "write_single_file", harmful)
    out = train("sd", *SHORT, "--export_single_file", expect=1)
    line = message(capsys)
    assert "out.safetensors: unet: 1 tensors are not the run's: conv_out.bias" in line
    assert (out / FILE).is_file()
    assert (out / "model_index.json").is_file()
    assert json.loads((out / "run.json").read_text())["export_check"]["wrong"]
    train("sd", *SHORT, "--export_single_file", "--no_export_check", out="unchecked")


def test_a_changed_copy_ends_the_run_with_1(train, monkeypatch, capsys, caplog):
    copy = shutil.copyfile

    def harmful(source: Path, target: Path) -> None:
        copy(source, target)
        if Path(target).parent.name == "vae" and target.suffix == ".safetensors":
            save_file({name: each + 1 for name, each in load_file(source).items()}, target, {"format": "pt"})

    monkeypatch.setattr(pipeline_files.shutil, "copyfile", harmful)
    train("sd", *SHORT, expect=1)
    assert "tensors are not the run's: decoder.conv_in.bias" in message(capsys)


def test_another_image_ends_the_run_with_1(train, monkeypatch, capsys):
    draw, drawn = drawing._draw, []

    def harmful(family, pipeline) -> np.ndarray:
        drawn.append(1)
        return draw(family, pipeline) * (0.5 if len(drawn) > 1 else 1)

    monkeypatch.setattr(drawing, "_draw", harmful)
    train("sd", *SHORT, expect=1)
    assert "draws another image than the trained weights" in message(capsys)


def test_what_does_not_fit_into_memory_is_left_out(train, monkeypatch, caplog):
    monkeypatch.setattr(drawing, "ROOM", 1e9)
    train("sd", *SHORT)
    assert said(caplog, "not drawn from: that takes")


def test_an_image_that_cannot_be_drawn_is_left_out(train, monkeypatch, caplog):
    def broken(family, pipeline) -> np.ndarray:
        raise ValueError("no such step")

    monkeypatch.setattr(drawing, "_draw", broken)
    train("sd", *SHORT)
    assert said(caplog, "no image to compare with: no such step")


def test_values_beyond_fp16_end_the_run_with_1(train, pipelines, tmp_path, capsys):
    base = shutil.copytree(pipelines["sd"], tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    train(str(base), *SHORT, "--export_dtype", "fp16", expect=1)
    assert "beyond 65504" in message(capsys)


def test_the_file_of_an_earlier_export_does_not_stay(train, tmp_path):
    out = train("sd", *SHORT, "--export_single_file")
    train("sd", *SHORT, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert not (out / FILE).exists()
    (out / FILE).write_bytes(b"mine")
    remove_outdated(out, [], [], [])
    assert (out / FILE).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--export_single_file", "--adaptation", "lora"), "add that"),
        (("--export_variant", "a.b"), "--export_variant a.b"),
        (("--max_shard_size", "much"), "--max_shard_size much"),
        (("--export_steps", 0), "--export_steps"),
    ],
)
def test_what_cannot_be_is_refused_at_once(refused, flags, words):
    refused([*SHORT, *flags], words)


def test_models_without_text_have_no_single_file(train, capsys):
    train("pixels", *SHORT, "--export_single_file", expect=2)
    assert "--export_single_file: models without text" in message(capsys)


@pytest.mark.parametrize("kind", ["pixels", "labels", "latents", "labelled latents", "flow"])
def test_models_without_text_are_checked_too(train, caplog, kind):
    caplog.set_level("INFO")
    out = train(kind, *SHORT, "--export_dtype", "bf16", "--export_variant", "bf16")
    assert said(caplog, "the run's weights, bit for bit")
    assert said(caplog, "draws the same image")
    weights = [file for file in out.rglob("*.safetensors") if "checkpoint" not in str(file)]
    assert all(file.name.endswith(".bf16.safetensors") for file in weights)
    train(kind, *SHORT, out="whole")
    assert said(caplog, "draws the same bits")


def test_a_file_is_called_as_its_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_name_of(Path(".")) == f"{tmp_path.name}.safetensors"
    assert file_name_of(Path("/")) == "model.safetensors"
    assert file_name_of(Path("a/my.model/")) == "my.model.safetensors"
    assert file_name_of(Path("a/my model.safetensors")) == "my model.safetensors"
    assert file_name_of(Path("a/.safetensors")) == "model.safetensors"
    assert file_name_of(Path("a/b:<c>\\d")) == "b__c__d.safetensors"


def test_all_that_look_for_the_files_of_a_result_agree_on_their_name(tmp_path):
    folder = tmp_path / "a:<b>.safetensors"
    (folder / "ui").mkdir(parents=True)
    (folder / LOCK).touch()
    for place in (folder, UiExport(result_name(folder), torch.float32, dict).file(folder).parent):
        (place / file_name_of(folder)).touch()
    found = ExportedFiles.of_run(folder)
    assert found.ui == UiExport(result_name(folder), torch.float32, dict).file(folder)
    assert found.single == single_file_of(folder) == folder / "a__b_.safetensors"
    assert DrawnModel.of_training(folder).name == "a__b_"
