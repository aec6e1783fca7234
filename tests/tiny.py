"""Tiny pipelines of the real classes, and small folders of images, made on the spot."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RESOLUTION = 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (230, 220, 40)}


def tokenizer(folder: Path):
    """A CLIP tokenizer over single bytes, of 77 tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )


def text_config(width: int, **more):
    """The config of a small CLIP text encoder."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        **more,
    )


def vae(scaling_factor: float = 0.18215):
    """A VAE of factor 2 with 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
    )


def scheduler(prediction_type: str = "epsilon"):
    """The scheduler that Stable Diffusion is sampled with by default, DDIM in place of PNDM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def as_published(folder: Path) -> Path:
    """Gives a saved pipeline the files that those on the Hub have, which transformers 4 wrote."""
    from safetensors.torch import load_file, save_file

    for part in folder.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(folder / "vocabulary" / name, part / name)
    for file in folder.glob("text_encoder*/model.safetensors"):
        if not any(name.startswith("text_model.") for name in load_file(file)):
            save_file({f"text_model.{name}": each for name, each in load_file(file).items()}, file, {"format": "pt"})
    return folder


def make_sd(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion pipeline folder."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(32)),
        tokenizer=tokenizer(folder / "vocabulary"),
        unet=unet,
        scheduler=scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return as_published(folder)


def in_half_precision(folder: Path, target: Path, parts: Sequence[str], variant: str = "") -> Path:
    """A copy of a pipeline with some parts in float16, or with these as a variant in the place of the plain files."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for part in parts:
        (file,) = (target / part).glob("*.safetensors")
        halves = {name: each.half() if each.is_floating_point() else each for name, each in load_file(file).items()}
        file.unlink()
        save_file(halves, file.with_suffix(f".{variant}.safetensors") if variant else file, {"format": "pt"})
        config = json.loads((target / part / "config.json").read_text(encoding="utf-8"))
        dtypes = {name: "float16" for name in ("dtype", "torch_dtype") if name in config}
        (target / part / "config.json").write_text(json.dumps(config | dtypes), encoding="utf-8")
    return target


def make_snapshot(folder: Path, root: Path) -> Path:
    """A pipeline as the Hub's cache holds it: links to blobs beside the snapshot."""
    snapshot, blobs = root / "snapshots" / "abc123", root / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        target = snapshot / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    return snapshot


def make_sdxl(folder: Path) -> Path:
    """A Stable Diffusion XL pipeline folder."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=24 + 6 * 8,
        cross_attention_dim=32 + 16,
    )
    StableDiffusionXLPipeline(
        vae=vae(0.13025),
        text_encoder=CLIPTextModel(text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, projection_dim=24, hidden_act="gelu")),
        tokenizer=tokenizer(folder / "vocabulary"),
        tokenizer_2=tokenizer(folder / "vocabulary"),
        unet=unet,
        scheduler=scheduler(),
    ).save_pretrained(folder)
    return as_published(folder)


SMALL_UNET = ("--model_size", "tiny", "--model_channels", 8, "--channel_mult", 1, 2, "--attention_resolutions", 16)
SMALL_DRAWING = ("--eval_batch_size", 2, "--num_inference_steps", 2)
UNCONDITIONAL: dict[str, tuple[object, ...]] = {
    "pixels": (*SMALL_UNET, *SMALL_DRAWING),
    "flow": (*SMALL_UNET, *SMALL_DRAWING, "--flow_matching"),
    "labels": (*SMALL_UNET, *SMALL_DRAWING, "--class_conditional", "--guidance_scale", 2),
    "latents": (*SMALL_UNET, *SMALL_DRAWING, "--vae", "vae"),
    "labelled latents": (
        *("--model_size", "tiny", "--layers_per_block", 2, *SMALL_DRAWING),
        *("--vae", "vae", "--class_conditional", "--guidance_scale", 2),
    ),
}
"""Flags of train_unconditional.py by a name that `train` knows; "vae" stands for the folder of one."""


def make_vae(folder: Path) -> Path:
    """The folder of a VAE."""
    torch.manual_seed(0)
    vae().save_pretrained(folder)
    return folder


def make_classes(images: Path, folder: Path) -> Path:
    """The images of a folder in turn in the folders `cat` and `dog`."""
    for number, path in enumerate(sorted(images.glob("*.png"))):
        target = folder / ("cat", "dog")[number % 2]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def make_images(folder: Path, count: int = 6) -> Path:
    """An imagefolder of rectangles in several sizes, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = []
    for index in range(count):
        name = list(COLOURS)[index % len(COLOURS)]
        width, height = 40 + 8 * (index % 3), 40 + 8 * (index % 4)
        pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
        pixels[8:-8, 8:-8] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        lines.append(json.dumps({"file_name": f"{index:03d}.png", "text": f"a {name} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_single_file(
    pipeline_folder: Path,
    file: Path,
    more: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    has_open_clip: bool = False,
) -> Path:
    """Writes a pipeline's weights under the names of the original code, as one .safetensors file.

    Args:
        more: further tensors.
        has_open_clip: whether the text encoder is OpenCLIP's, as in Stable Diffusion 2.
    """
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    tensors = {
        f"model.diffusion_model.{_original_unet_name(name, pipeline.unet.config)}": tensor
        for name, tensor in pipeline.unet.state_dict().items()
    }
    tensors |= original_vae(pipeline.vae, "first_stage_model.")
    text = {name.removeprefix("text_model."): each for name, each in pipeline.text_encoder.state_dict().items()}
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        tensors |= _open_clip(second.state_dict(), "conditioner.embedders.1.model.")
    if has_open_clip:
        tensors |= _open_clip(text, "cond_stage_model.model.")
    else:
        prefix = "cond_stage_model." if second is None else "conditioner.embedders.0."
        tensors |= {f"{prefix}transformer.text_model.{name}": tensor for name, tensor in text.items()}
    whole = {name: tensor.contiguous().clone() for name, tensor in (tensors | dict(more or {})).items()}
    save_file(whole, file, metadata=dict(metadata or {}))
    return file


def original_vae(vae, prefix: str) -> dict[str, torch.Tensor]:
    """A VAE's weights under the names of the original code, its attention as convolutions."""
    tensors, levels = {}, len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        is_attention = any(part in name for part in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
        tensors[prefix + _original_vae_name(name, levels)] = tensor[:, :, None, None] if is_attention else tensor
    return tensors


RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _original_unet_name(name: str, config) -> str:
    """The original name of a weight of a UNet."""
    tops = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    size = config.layers_per_block + 1
    for level in range(len(config.block_out_channels)):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        place = 2 if "CrossAttn" in config.up_block_types[level] else 1
        tops[f"{down}downsamplers.0.conv."] = f"input_blocks.{size * (level + 1)}.0.op."
        tops[f"{up}upsamplers.0.conv."] = f"output_blocks.{size * level + size - 1}.{place}.conv."
        for layer in range(size):
            tops[f"{down}resnets.{layer}."] = f"input_blocks.{1 + size * level + layer}.0."
            tops[f"{down}attentions.{layer}."] = f"input_blocks.{1 + size * level + layer}.1."
            tops[f"{up}resnets.{layer}."] = f"output_blocks.{size * level + layer}.0."
            tops[f"{up}attentions.{layer}."] = f"output_blocks.{size * level + layer}.1."
    top = next(top for top in tops if name.startswith(top))
    layer, _, kind = name.removeprefix(top).rpartition(".")
    return tops[top] + ".".join(filter(None, [RESNET_NAMES.get(layer, layer), kind]))


def _open_clip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A CLIP text encoder's weights under OpenCLIP's names, which keep the three matrices of attention as one."""
    found = {f"{prefix}logit_scale": torch.tensor(4.6)}
    words = {
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
        "final_layer_norm": "ln_final",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    }
    for name, tensor in tensors.items():
        old = name.removeprefix("text_model.")
        for theirs, original in words.items():
            old = old.replace(theirs, original)
        if ".q_proj." in old:
            three = [tensors[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            found[prefix + old.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
        elif ".k_proj." not in old and ".v_proj." not in old:
            found[prefix + old] = tensor.T if old == "text_projection" else tensor
    width = tensors[next(name for name in tensors if name.endswith("final_layer_norm.bias"))].shape[0]
    found.setdefault(f"{prefix}text_projection", torch.zeros(width, width))
    return found


def _original_vae_name(name: str, levels: int) -> str:
    """The original name of a weight of a VAE."""
    ups = {f"up_blocks.{level}.": f"up.{levels - 1 - level}." for level in range(levels)}
    for ours, theirs in {
        "down_blocks.": "down.",
        ".downsamplers.0.": ".downsample.",
        ".upsamplers.0.": ".upsample.",
        **ups,
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.",
        ".resnets.": ".block.",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }.items():
        name = name.replace(ours, theirs)
    return name


def unconditional(folder: Path) -> Path:
    """A DDPM pipeline of 16 pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


def class_conditional(folder: Path) -> Path:
    """A DiT pipeline of 3 classes."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=8,
    )
    DiTPipeline(transformer, vae(), DDIMScheduler()).save_pretrained(folder)
    return folder
