"""The web UI's line of settings in the PNGs that are drawn, read by a parser written after the web UI's."""

import hashlib
import json
import os
import re

import diffusers
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from utils.sampling.infotext import (
    Drawing,
    DrawnModel,
    call_default,
    parameters_text,
    png_texts,
    sampler_name,
    short_hash,
)
from utils.sampling.options import SCHEDULERS

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parsed(text: str) -> dict[str, str]:
    """The settings as the web UI reads them: the last line holds pairs, if there are at least three."""
    *lines, last = text.strip().split("\n")
    if len(PAIR.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, found = [], [], {}
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            negative.append(line.removeprefix("Negative prompt:").strip())
        else:
            (negative or prompt).append(line)
    for name, value in PAIR.findall(last):
        found[name] = json.loads(value) if value[:1] == value[-1:] == '"' else value
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)} | found


def drawing(**changes) -> Drawing:
    settings = {"seed": 1, "size": (512, 768), "sampler": ("DDIM", ""), "steps": 30, "guidance": 7.5, "prompt": "a fox"}
    return Drawing(**settings | changes)


def test_the_line_is_the_web_uis():
    text = parameters_text(drawing(negative_prompt="ugly", model=DrawnModel("fox model")))
    assert text == (
        "a fox\nNegative prompt: ugly\n"
        "Steps: 30, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 512x768, Model: fox model, RNG: CPU"
    )


@pytest.mark.parametrize(
    "name", ['a, b: "c"', '"quoted"', '"half', "two\nlines", "back\\slash, x", "Füchse 🦊", "plain"]
)
@pytest.mark.parametrize(
    "prompt", ["a fox, red: (1.2)", "two\nlines", "Füchse 🦊 狐", "Steps: 1, Sampler: a, Seed: 2", ""]
)
def test_what_is_written_is_read_again(name, prompt):
    found = parsed(parameters_text(drawing(prompt=prompt, model=DrawnModel(name), guidance=1.0)))
    assert found == {
        "Prompt": prompt,
        "Negative prompt": "",
        "Steps": "30",
        "Sampler": "DDIM",
        "CFG scale": "1",
        "Seed": "1",
        "Size": "512x768",
        "Model": name,
        "RNG": "CPU",
    }


def test_a_prompt_that_looks_like_a_negative_prompt_stays_the_prompt():
    for prompt in ("Negative prompt: x", "a\n \tNegative prompt: x", "a Negative prompt: x"):
        for negative in ("", prompt, "ugly"):
            found = parsed(parameters_text(drawing(prompt=prompt, negative_prompt=negative)))
            words = [" ".join(found[name].lower().split()) for name in ("Prompt", "Negative prompt")]
            assert words == [" ".join(each.lower().split()) for each in (prompt, negative)]
    assert "a Negative prompt: x\n" in parameters_text(drawing(prompt="a Negative prompt: x"))


@pytest.mark.parametrize("prompt", ["a fox", "Füchse", "狐 🦊", "half \udc80"])
def test_a_png_holds_it_beside_our_own_texts(tmp_path, prompt):
    texts = png_texts({"prompt": prompt, "seed": 1, "class": None}, drawing(prompt=prompt))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png", pnginfo=texts)
    info = Image.open(tmp_path / "a.png").info
    assert info.keys() == {"prompt", "seed", "parameters"}
    assert info["prompt"] == parsed(info["parameters"])["Prompt"] == prompt.replace("\udc80", "?")


NAMES = {
    "ddim": ("DDIM", ""),
    "ddpm": ("DDPMScheduler", ""),
    "pndm": ("PLMS", ""),
    "lms": ("LMS", "Uniform"),
    "euler": ("Euler", "Uniform"),
    "euler_a": ("Euler a", "Uniform"),
    "heun": ("Heun", "Uniform"),
    "dpm++_2m": ("DPM++ 2M", "Uniform"),
    "dpm++_2m_karras": ("DPM++ 2M", "Karras"),
    "dpm++_2m_sde": ("DPM++ 2M SDE", "Uniform"),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", ""),
    "dpm2": ("DPM2", "Uniform"),
    "dpm2_a": ("DPM2 a", "Uniform"),
    "unipc": ("UniPC", ""),
    "deis": ("DEISMultistepScheduler", ""),
}


def test_samplers_have_the_web_uis_names():
    found = {}
    for name, (kind, changes) in SCHEDULERS.items():
        found[name] = sampler_name(getattr(diffusers, kind).from_config(tiny.scheduler().config, **changes))
    assert found == NAMES
    other = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    assert sampler_name(other) == ("DPMSolverMultistepScheduler", "")


def test_defaults_of_a_pipelines_call():
    pipeline = object.__new__(diffusers.StableDiffusionPipeline)
    assert call_default(pipeline, "guidance_scale") == 7.5
    assert call_default(pipeline, "prompt") is None
    assert call_default(pipeline, "nothing") is None


def test_the_hash_is_that_of_the_whole_file(tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    index, file = folder / "model_index.json", folder / "my model.safetensors"
    index.write_text("{}")
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:10]
    assert short_hash(file) == digest
    assert parsed(parameters_text(drawing(model=DrawnModel.at(str(file)))))["Model hash"] == digest
    assert (DrawnModel.at(f"{folder}/").name, DrawnModel.at(f"{folder}/").digest) == ("my model", digest)
    file.write_bytes(b"others")
    assert short_hash(file) == hashlib.sha256(b"others").hexdigest()[:10]
    # A file of another training than the folder's says nothing; nor does one whose weights a checkpoint replaces.
    os.utime(file, ns=(0, 0))
    assert DrawnModel.at(str(folder)).digest == ""
    assert DrawnModel.at(str(file), folder / "checkpoint-5") == DrawnModel("my model checkpoint-5")
    assert "Model hash" not in parameters_text(drawing(model=DrawnModel.at("owner/model")))


def test_a_model_of_the_hubs_cache_has_its_name(tmp_path):
    snapshot = tmp_path / "models--me--my-model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert DrawnModel.at(str(snapshot)).name == "my-model"


def test_adapters_are_named():
    model = DrawnModel.at("owner/base", adapters=["owner/one", "other/two"])
    found = parsed(parameters_text(drawing(model=model)))
    assert (found["Model"], found["LoRA"]) == ("base", "one, two")
