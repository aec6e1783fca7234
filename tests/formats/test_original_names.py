"""Names of the original layout are read without a config: the inverse of how they are written, at true size too."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from utils.formats.flat_names import dotted
from utils.formats.original_layout import (
    UNET_PREFIX,
    VAE_PREFIX,
    clip_layout,
    open_clip_layout,
    unet_layout,
    unet_name,
    unet_places,
    vae_layout,
)
from utils.formats.original_names import TENSORS_OF, blocks_of, unet_tensors
from utils.models.registry import FAMILIES_OF_TEXT
from utils.models.streamed_pipeline import read_streamed


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_names_that_are_written_are_read_as_what_they_were(name, pipelines):
    pipeline = read_streamed(str(pipelines[name]), "--pipeline")
    for layout in (unet_layout, vae_layout, clip_layout, open_clip_layout):
        part = {unet_layout: "unet", vae_layout: "vae"}.get(layout, "text_encoder")
        written = layout(pipeline.shapes(part), pipeline.configs[part])
        read = {each.name: each for each in TENSORS_OF[layout]([each.name for each in written])}
        for each in (each for each in written if each.constant is None):
            assert (read[each.name].sources, read[each.name].change) == (each.sources, each.change)


@pytest.mark.parametrize("family", FAMILIES_OF_TEXT)
def test_blocks_of_the_published_models_are_counted(family):
    blocks = family.published_blocks
    count = len(blocks["down_block_types"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**blocks, block_out_channels=[32] * count, cross_attention_dim=8)
    own = list(unet.state_dict())
    names = [unet_name(each, unet_places(blocks)) for each in own]
    assert blocks_of(names) == blocks
    assert [each.sources for each in unet_tensors(names)] == [(each,) for each in own]


def test_blocks_of_a_unet_of_one_level_and_layer_are_counted():
    blocks = {"layers_per_block": 1, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    names = [f"{each}.x.weight" for each in unet_places(blocks).values() if ".op" not in each and ".conv" not in each]
    assert blocks_of([name for name in names if "_blocks." not in name or ".1.x" not in name]) == blocks


def test_names_of_no_unet_are_refused():
    with pytest.raises(ValueError, match="input blocks"):
        blocks_of(["input_blocks.0.0.weight", "input_blocks.7.0.op.weight"])
    with pytest.raises(ValueError, match="its UNet has"):
        TENSORS_OF[unet_layout](["input_blocks.0.0.weight", "input_blocks.1.0.odd.weight", "output_blocks.0.0.weight"])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_dots_return_to_where_they_were(name, pipelines):
    pipeline = read_streamed(str(pipelines[name]), "--pipeline")
    for part in pipeline.adapted_names:
        for weight in (each for each in pipeline.parts[part] if "embedding." not in each and "norm" not in each):
            layer = weight.rpartition(".")[0]
            assert dotted(layer.replace(".", "_")) == layer
    assert dotted("down_blocks_0__x") is None


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_all_names_of_the_published_files_are_known(name):
    published = json.loads(lzma.decompress(Path(__file__).with_name("original_keys.json.xz").read_bytes()))[name]
    unet = [key.removeprefix(UNET_PREFIX) for key in published if key.startswith(UNET_PREFIX)]
    places = unet_places(blocks_of(unet))
    assert [unet_name(each.sources[0], places) for each in unet_tensors(unet)] == unet
    vae = [key.removeprefix(VAE_PREFIX) for key in published if key.startswith(VAE_PREFIX)]
    assert len(TENSORS_OF[vae_layout](vae)) == len(vae)
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model."):
        text = [key.removeprefix(prefix) for key in published if key.startswith(prefix)]
        read = TENSORS_OF[open_clip_layout](text)
        assert {each.name for each in read} == set(text) - {"logit_scale", "attn_mask"}
