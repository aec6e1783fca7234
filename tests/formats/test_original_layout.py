"""Names and shapes in the original layout: at true size those of the published files, both ways.

`original_keys.json.xz` holds names and shapes of SD 1.5, SD 2.1 and SDXL: the names are those of public key maps made
from the published files, the shapes follow from these maps' operators and the true configs. No code of ours made it.
"""

import json
import lzma
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from utils.formats.original_layout import Change, OriginalTensor, original_modules
from utils.models.registry import FAMILIES

TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, **TEXT}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, **TEXT}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, **TEXT}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": SDXL_UNET,
}
SCHEDULE = ("betas", "alphas_", "sqrt_", "log_one_minus", "posterior_", "model_ema.")
SPARE = ("cond_stage_model.model.transformer.resblocks.23.", "cond_stage_model.model.text_projection")
SPARE += ("cond_stage_model.model.logit_scale",)


def true_pipeline(kind: str) -> dict[str, torch.nn.Module]:
    """The components of a published pipeline at true size, without values."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        parts = {"unet": UNet2DConditionModel(**UNETS[kind]), "vae": vae}
        first = CLIP_H | {"hidden_act": "gelu"} if kind == "sd2" else CLIP_L
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**first))
        if kind == "sdxl":
            config = CLIPTextConfig(**CLIP_G, projection_dim=1280, hidden_act="gelu")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return parts


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of published files."""
    return json.loads(lzma.decompress(Path(__file__).with_name("original_keys.json.xz").read_bytes()))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_true_sizes_have_the_names_and_shapes_of_published_files(published, kind):
    parts = true_pipeline(kind)
    family = FAMILIES["StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"]
    configs = {
        name: dict(part.config if name in ("unet", "vae") else part.config.to_dict()) for name, part in parts.items()
    }
    model = family.original_model(configs | {"scheduler": {}})
    ours = {}
    for name, place in model.parts.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in parts[name].state_dict().items()}
        for each in place.layout(shapes, configs[name]):
            assert place.prefix + each.name not in ours
            ours[place.prefix + each.name] = list(each.shape([shapes[source] for source in each.sources]))
    theirs = {name: shape for name, shape in published[kind].items() if not name.startswith(SCHEDULE)}
    expected = {name: shape for name, shape in theirs.items() if kind != "sd2" or not name.startswith(SPARE)}
    assert ours == expected
    assert len(expected) == {"sd1": 1131, "sd2": 1242 - 28, "sdxl": 2515}[kind]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_modules_have_the_names_of_their_weights(published, kind):
    found = original_modules(UNETS[kind])
    names = {f"model.diffusion_model.{name}" for name in found.values()}
    prefix = "model.diffusion_model."
    assert names == {key.rpartition(".")[0] for key in published[kind] if key.startswith(prefix)}
    assert len(set(found.values())) == len(found)


def test_a_tensor_goes_back_to_its_sources():
    three = [torch.randn(2, 3) for _ in range(3)]
    joined = OriginalTensor("in_proj", ("q", "k", "v"))
    parts = joined.taken_apart(joined.made_of(three))
    assert all(torch.equal(parts[name], each) for name, each in zip("qkv", three, strict=True))
    for change, shape in ((Change.CONVOLUTION, (2, 3, 1, 1)), (Change.TRANSPOSED, (3, 2)), (Change.NONE, (2, 3))):
        single = OriginalTensor("x", ("a",), change)
        assert tuple(single.made_of(three[:1]).shape) == single.shape([(2, 3)]) == shape
        assert torch.equal(single.taken_apart(single.made_of(three[:1]))["a"], three[0])


@pytest.mark.parametrize(
    "config",
    [
        {"down_block_types": ("AttnDownBlock2D",) * 4},
        {"mid_block_type": None},
        {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"},
    ],
)
def test_a_unet_that_the_original_code_lacks_is_refused(config):
    with pytest.raises(ValueError, match="its UNet has"):
        original_modules(UNETS["sd1"] | config)
