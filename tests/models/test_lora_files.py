"""LoRA files of the usual formats, whole and of another model."""

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import message
from tests.pretrained import SHORT, kohya_names, write_lora
from utils.config.options import UserError


@pytest.fixture(scope="module")
def lora(pipelines, tmp_path_factory) -> dict[str, torch.Tensor]:
    return write_lora(tmp_path_factory.mktemp("lora"), pipelines["sd"])


LORA_CHANGES = {
    "other part": (
        lambda name: name.replace("unet.", "other."),
        "for components that this StableDiffusionPipeline",
    ),
    "no part": (lambda name: name.removeprefix("unet."), "for components that this StableDiffusionPipeline"),
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
    with pytest.raises(UserError, match="only one half of 1 updates"):
        load_lora(pipeline, str(tmp_path / "lora.safetensors"), "a", "--lora x")


@pytest.mark.parametrize("names", [dict, lambda lora: kohya_names(lora)])
def test_a_lora_that_changes_nothing_is_said_and_complex_numbers_are_refused(lora, pipelines, tmp_path, names, caplog):
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    file = tmp_path / "lora.safetensors"
    off = {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in lora.items()}
    save_file(names(off), file)
    load_lora(StableDiffusionPipeline.from_pretrained(pipelines["sd"]), str(file), "a", "--lora x")
    assert caplog.text.count("so it has no effect") == 1
    first = next(iter(lora))
    save_file(names(lora | {first: lora[first].to(torch.complex64)}), file)
    with pytest.raises(UserError, match="as C64; weights must be real numbers"):
        load_lora(StableDiffusionPipeline.from_pretrained(pipelines["sd"]), str(file), "a", "--lora x")


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
        assert "it is a LoRA for another model" in line
        assert "reads text embeddings of width" in line
        assert len(line) < 600
        assert not line.endswith(":")


def test_a_dora_of_other_tools_is_not_read_in_half(lora, pipelines, tmp_path):
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    more = {f"{name.partition('.')[0]}.dora_scale": torch.ones(1) for name in kohya_names(lora)}
    save_file(kohya_names(lora) | more, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    with pytest.raises(UserError, match="16 of its 16 layers have other shapes"):
        load_lora(pipeline, str(tmp_path / "lora.safetensors"), "default", "--lora x")
