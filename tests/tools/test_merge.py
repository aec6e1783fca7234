"""utils.tools.merge: the sum of adapters in a pipeline, or in one LoRA."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from tests import random_adapters, tiny
from tests.conftest import message
from utils.models.streamed_pipeline import read_streamed
from utils.tools.convert import main as convert
from utils.tools.merge import main


def merge(*words: object, expect: int = 0) -> None:
    assert main([str(word) for word in words]) == expect


def weights(path: Path) -> dict[str, torch.Tensor]:
    parts = read_streamed(str(path), "--pipeline").parts
    return {f"{part}.{name}": each.read() for part, own in parts.items() for name, each in own.items()}


def summed(base: Path, *adapters) -> dict[str, torch.Tensor]:
    """A base's weights with adapters of (layers, scale), by hand."""
    found = weights(base)
    kept = dict(found)
    for layers, scale in adapters:
        for layer in layers:
            name = f"{layer.component}.{layer.name}.weight"
            found[name] = found[name] + scale * (layer.merged(kept[name]) - kept[name])
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), msg=name)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_merged_lora_is_that_of_diffusers(name, pipelines, tmp_path):
    random_adapters.write(pipelines[name], tmp_path / "a.safetensors", "diffusers")
    merge("--pipeline", pipelines[name], "--lora", f"{tmp_path}/a.safetensors=0.8", "--out", tmp_path / "out")
    theirs = DiffusionPipeline.from_pretrained(pipelines[name])
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    theirs.set_adapters("a", 0.8)
    theirs.fuse_lora(components=list(theirs.get_list_adapters()))
    theirs.unload_lora_weights()
    ours = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for part in ("unet", "text_encoder"):
        own, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert own.keys() == other.keys()
        for key, tensor in other.items():
            torch.testing.assert_close(own[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_adapters_of_all_kinds_add_up(kind, pipelines, tmp_path):
    one = random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", seed=1)
    other = random_adapters.write(pipelines["sd"], tmp_path / "b.safetensors", kind=kind, seed=2)
    given = ["--lora", f"{tmp_path}/a.safetensors=-0.5", tmp_path / "b.safetensors"]
    merge("--pipeline", pipelines["sd"], *given, "--out", tmp_path / "out")
    assert_same(weights(tmp_path / "out"), summed(pipelines["sd"], (one, -0.5), (other, 1.0)))


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_a_single_file_is_merged_without_any_config(name, pipelines, tmp_path):
    file = tiny.write_single_file(
        pipelines[name],
        tmp_path / "base.safetensors",
        {"odd.name": torch.ones(2)},
        {"modelspec.license": "MIT"},
        name == "sd2",
    )
    layers = random_adapters.write(pipelines[name], tmp_path / "a.safetensors")
    given = ["--pipeline", file, "--lora", tmp_path / "a.safetensors"]
    merge(*given, "--out", tmp_path / "out.safetensors")
    merge(*given, "--out", tmp_path / "half.safetensors", "--dtype", "fp16")
    assert_same(weights(tmp_path / "out.safetensors"), summed(file, (layers, 1.0)))
    before, after = load_file(file), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(before["odd.name"], after["odd.name"])
    half = load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(half[key], tensor.half()) for key, tensor in after.items() if tensor.is_floating_point())
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        said = opened.metadata()
    assert said["modelspec.license"] == "MIT"
    assert said["modelspec.merged_from"] == "base.safetensors, a=1"


def test_loras_are_concatenated_without_loss(pipelines, tmp_path):
    one = random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", seed=1, rank=3)
    other = random_adapters.write(pipelines["sd"], tmp_path / "b.safetensors", "diffusers", seed=2, parts=("unet",))
    given = ["--pipeline", pipelines["sd"], "--lora", f"{tmp_path}/a.safetensors=0.5", f"{tmp_path}/b.safetensors=2"]
    merge(*given, "--to", "lora", "--out", tmp_path / "both")
    wanted = summed(pipelines["sd"], (one, 0.5), (other, 2.0))
    for number, file in enumerate(("pytorch_lora_weights.safetensors", "ui/both.safetensors")):
        merge("--pipeline", pipelines["sd"], "--lora", tmp_path / "both" / file, "--out", tmp_path / f"again{number}")
        assert_same(weights(tmp_path / f"again{number}"), wanted)


def test_a_rank_says_what_it_loses(pipelines, tmp_path, caplog):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", kind="loha", seed=1)
    random_adapters.write(pipelines["sd"], tmp_path / "b.safetensors", kind="dora", seed=2)
    given = [
        "--pipeline",
        pipelines["sd"],
        "--lora",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--to",
        "lora",
    ]
    with caplog.at_level("INFO"):
        merge(*given, "--rank", 2, "--out", tmp_path / "low.safetensors")
    assert "relative error" in caplog.text
    merge(*given, "--rank", 999, "--out", tmp_path / "whole.safetensors")
    merge("--pipeline", pipelines["sd"], "--lora", tmp_path / "whole.safetensors", "--out", tmp_path / "out")
    merge(*given[:-2], "--out", tmp_path / "wanted")
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "wanted"), rtol=1e-3, atol=1e-4)


def test_adapters_of_several_flags_add_up(pipelines, tmp_path):
    one = random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", seed=1)
    other = random_adapters.write(pipelines["sd"], tmp_path / "b.safetensors", seed=2)
    flags = ["--lora", tmp_path / "a.safetensors", "--lora", tmp_path / "b.safetensors"]
    merge("--pipeline", pipelines["sd"], *flags, "--out", tmp_path / "out")
    assert_same(weights(tmp_path / "out"), summed(pipelines["sd"], (one, 1.0), (other, 1.0)))


def test_sums_that_are_not_finite_are_refused_by_name(pipelines, tmp_path, capsys):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors")
    convert([str(pipelines["sd"]), str(tmp_path / "half"), "--to", "folder", "--dtype", "fp16"])
    base = ["--pipeline", tmp_path / "half", "--out", tmp_path / "out"]
    merge(*base, "--lora", f"{tmp_path}/a.safetensors=1e7", expect=2)
    assert "self_attn.q_proj.weight beyond 65504" in (said := message(capsys))
    assert "--dtype bf16 or fp32" in said
    assert not (tmp_path / "out").exists()
    merge(*base, "--lora", f"{tmp_path}/a.safetensors=1e7", "--dtype", "fp32")
    for more in ([], ["--rank", 2]):
        lora = ["--to", "lora", "--out", tmp_path / "sum.safetensors", *more]
        merge(*base[:2], "--lora", f"{tmp_path}/a.safetensors=1e300", *lora, expect=2)
        assert "float32" in message(capsys)


def test_what_can_not_be_merged_is_one_line(pipelines, tmp_path, capsys):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", kind="loha")
    random_adapters.write(pipelines["sdxl"], tmp_path / "xl.safetensors")
    base, out = ["--pipeline", pipelines["sd"]], ["--out", tmp_path / "out"]
    for words, said in {
        ("--lora", tmp_path / "a.safetensors", *base, *out, "--to", "lora"): "--rank",
        ("--lora", tmp_path / "xl.safetensors", *base, *out): "another model",
        ("--lora", tmp_path / "none.safetensors", *base, *out): "does not exist",
        ("--lora", f"{tmp_path}/a.safetensors=nan", *base, *out): "finite",
        (*base, *out): "--lora is missing",
        ("--lora", tmp_path / "a.safetensors", *base, "--out", pipelines["sd"] / "x"): "inside",
        ("--lora", tmp_path / "a.safetensors", *base, "--out", tmp_path / "a.safetensors"): "would replace",
    }.items():
        merge(*words, expect=2)
        assert said in message(capsys)
        assert not (tmp_path / "out").exists()


def test_one_adapter_twice_is_refused_and_a_scale_of_0_said(pipelines, tmp_path, capsys):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors")
    random_adapters.write(pipelines["sd"], tmp_path / "b.safetensors", "diffusers")
    random_adapters.write(pipelines["sd"], tmp_path / "c.safetensors", seed=3)
    base, a, b, c = ["--pipeline", pipelines["sd"]], *(f"{tmp_path}/{name}.safetensors" for name in "abc")
    merge(*base, "--lora", a, b, "--out", tmp_path / "out", expect=2)
    assert f"--lora {b} is the same adapter as --lora {a}" in message(capsys)
    merge(*base, "--lora", a, f"{c}=0", "--out", tmp_path / "out")
    assert capsys.readouterr().err.count("so it has no effect") == 1
