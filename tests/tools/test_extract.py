"""utils.tools.extract: the difference of two pipelines as a LoRA."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests import random_adapters, tiny
from tests.conftest import message
from utils.formats.adapter_files import read_adapter
from utils.tools.convert import main as convert
from utils.tools.extract import main
from utils.tools.merge import main as merge


def extract(*words: object, expect: int = 0) -> None:
    assert main([str(word) for word in words]) == expect


def layers_of(file: Path, base: Path) -> dict[tuple[str, str], torch.Tensor]:
    found = read_adapter(file, random_adapters.components(base)).layers
    return {(each.component, each.name): each.delta() for each in found}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_was_merged_is_extracted_again(name, pipelines, tmp_path):
    updates = random_adapters.layers(pipelines[name], rank=3)
    random_adapters.tuned(pipelines[name], tmp_path / "tuned", updates)
    given = ["--base", pipelines[name], "--tuned", tmp_path / "tuned", "--rank", 3]
    extract(*given, "--out", tmp_path / "out")
    for file in ("pytorch_lora_weights.safetensors", "ui/out.safetensors"):
        found = layers_of(tmp_path / "out" / file, pipelines[name])
        assert found.keys() == {(each.component, each.name) for each in updates}
        for each in updates:
            torch.testing.assert_close(found[each.component, each.name], each.delta(), rtol=1e-3, atol=1e-4)
    extract(*given, "--out", tmp_path / "unet.safetensors", "--no_text_encoder", "--dtype", "fp16")
    with safe_open(tmp_path / "unet.safetensors", "pt") as opened:
        assert all(key.startswith("lora_unet_") for key in opened.keys())  # noqa: SIM118
        assert opened.metadata()["ss_network_dim"] == "3"


def test_energy_chooses_ranks_and_is_kept(pipelines, tmp_path, caplog):
    updates = random_adapters.layers(pipelines["sd"], rank=8)
    random_adapters.tuned(pipelines["sd"], tmp_path / "tuned", updates)
    given = ["--base", pipelines["sd"], "--tuned", tmp_path / "tuned", "--energy", 0.9]
    with caplog.at_level("INFO"):
        extract(*given, "--out", tmp_path / "out.safetensors")
    found = layers_of(tmp_path / "out.safetensors", pipelines["sd"])
    for each in updates:
        delta = each.delta()
        lost = (found[each.component, each.name] - delta).square().sum() / delta.square().sum()
        assert lost <= 0.1 + 1e-4
    assert "% of the energy" in caplog.text
    extract(*given, "--rank", 2, "--out", tmp_path / "low.safetensors")
    ranks = read_adapter(tmp_path / "low.safetensors", random_adapters.components(pipelines["sd"])).layers
    assert max(each.rank for each in ranks) == 2


def test_single_files_and_other_dtypes_are_compared(pipelines, tmp_path, caplog):
    updates = random_adapters.layers(pipelines["sd2"], rank=2)
    random_adapters.tuned(pipelines["sd2"], tmp_path / "tuned", updates)
    base = tiny.write_single_file(pipelines["sd2"], tmp_path / "base.safetensors", has_open_clip=True)
    tuned = tiny.write_single_file(tmp_path / "tuned", tmp_path / "tuned.safetensors", has_open_clip=True)
    extract("--base", base, "--tuned", tuned, "--rank", 2, "--out", tmp_path / "a.safetensors")
    extract("--base", pipelines["sd2"], "--tuned", tuned, "--rank", 2, "--out", tmp_path / "b.safetensors")
    assert layers_of(tmp_path / "a.safetensors", pipelines["sd2"]).keys() == {
        (each.component, each.name) for each in updates
    }
    half = tiny.in_half_precision(pipelines["sd2"], tmp_path / "half", ["unet", "text_encoder", "vae"])
    extract("--base", pipelines["sd2"], "--tuned", half, "--rank", 2, "--out", tmp_path / "c.safetensors", expect=2)


@pytest.mark.parametrize(("one", "other"), [("fp16", "bf16"), ("bf16", "fp16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_the_rounding_of_two_dtypes_is_no_difference(one, other, pipelines, tmp_path, capsys, caplog):
    updates = random_adapters.layers(pipelines["sd"], rank=1)[:2]
    tuned = random_adapters.tuned(pipelines["sd"], tmp_path / "tuned", updates)
    for source, name, dtype in ((pipelines["sd"], "a", one), (pipelines["sd"], "b", other), (tuned, "c", other)):
        assert convert([str(source), str(tmp_path / name), "--to", "folder", "--dtype", dtype, "--no_check"]) == 0
    given = ["--base", tmp_path / "a", "--out", tmp_path / "x.safetensors", "--rank", 1]
    with caplog.at_level("INFO"):
        extract(*given, "--tuned", tmp_path / "b", expect=2)
    assert "nothing to extract" in message(capsys)
    assert "differ by no more than the rounding" in caplog.text
    extract(*given, "--tuned", tmp_path / "c")
    found = layers_of(tmp_path / "x.safetensors", pipelines["sd"])
    assert found.keys() == {(each.component, each.name) for each in updates}


def test_what_a_lora_can_not_hold_is_said(pipelines, tmp_path, caplog):
    updates = random_adapters.layers(pipelines["sd"], rank=2)
    more = ["unet.conv_norm_out.weight", "unet.conv_in.bias", "vae.decoder.conv_in.weight"]
    random_adapters.tuned(pipelines["sd"], tmp_path / "tuned", updates, more)
    extract(
        "--base", pipelines["sd"], "--tuned", tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "out.safetensors"
    )
    assert "2 tensors" in caplog.text
    assert "conv_norm_out.weight" in caplog.text
    assert "the vae differs in 1 tensors" in caplog.text


def test_what_was_extracted_at_full_rank_gives_the_tuned_pipeline(pipelines, tmp_path):
    updates = random_adapters.layers(pipelines["sd"], kind="loha")
    tuned = random_adapters.tuned(pipelines["sd"], tmp_path / "tuned", updates)
    lora = tmp_path / "lora.safetensors"
    extract("--base", pipelines["sd"], "--tuned", tuned, "--energy", 1, "--out", lora)
    assert merge(["--pipeline", str(pipelines["sd"]), "--lora", str(lora), "--out", str(tmp_path / "out")]) == 0
    for each in updates:
        own, theirs = (random_adapters.weight(folder, each) for folder in (tmp_path / "out", tuned))
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)


def test_the_prediction_type_is_that_of_the_tuned_one(pipelines, tmp_path, caplog):
    random_adapters.write(pipelines["sd"], tmp_path / "lora.safetensors")
    tuned = tmp_path / "tuned"
    merge(["--pipeline", str(pipelines["sd"]), "--lora", str(tmp_path / "lora.safetensors"), "--out", str(tuned)])
    config = tuned / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    extract("--base", pipelines["sd"], "--tuned", tuned, "--rank", 2, "--out", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        said = opened.metadata()
    assert said["ss_v_parameterization"] == "True"
    assert said["modelspec.prediction_type"] == "v"
    assert "predicts v_prediction, and --base" in caplog.text


def test_what_can_not_be_extracted_is_one_line(pipelines, tmp_path, capsys):
    sd, out = pipelines["sd"], tmp_path / "out.safetensors"
    for words, said in {
        ("--base", sd, "--tuned", sd, "--out", out, "--rank", 2): "nothing to extract",
        ("--base", sd, "--tuned", pipelines["sdxl"], "--out", out, "--rank", 2): "StableDiffusionXLPipeline",
        ("--base", sd, "--tuned", sd, "--out", out): "--rank",
        ("--base", sd, "--tuned", sd, "--out", out, "--energy", 1.5): "--energy",
        ("--base", sd, "--out", out, "--rank", 2): "--tuned is missing",
        ("--base", sd, "--tuned", sd, "--out", out, "--rank", 2, "--to", "both"): "folder",
    }.items():
        extract(*words, expect=2)
        assert said in message(capsys), words
        assert not out.exists()
