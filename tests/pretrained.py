"""Pretrained parts: loaded as the script does, changed, and with a LoRA on top."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHORT = ("--max_train_steps", 1, "--train_batch_size", 1, "--no_final_checkpoint")
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


def changed(folder: Path, target: Path, part: str, change: Callable[[dict], dict]) -> Path:
    """A copy of a pipeline of which a part has other weights."""
    shutil.copytree(folder, target)
    file = target / FILES[part]
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def without(word: str) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name}


def source_of(path: Path, **options: object):
    from utils.models.options import ModelOptions
    from utils.models.pipeline_source import PipelineSource

    return PipelineSource(ModelOptions(pretrained_model_name_or_path=str(path), **options))


def loaded(path: Path, **options: object):
    from utils.models.pipeline_source import ComponentDtypes
    from utils.models.registry import pick_family

    source = source_of(path, **options)
    float32 = ComponentDtypes(*[torch.float32] * 3)
    return pick_family(source)(source, float32, {}).pipeline


def write_lora(folder: Path, pipeline_folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA of diffusers' names on a pipeline's UNet and text encoder, with numbers that change something."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return load_file(folder / "pytorch_lora_weights.safetensors")


def kohya_names(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in lora.items():
        layer, _, half = name.removeprefix("unet.").partition(".lora_")
        word = "lora_unet_" + layer.replace(".", "_")
        found[f"{word}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
        found[f"{word}.alpha"] = torch.tensor(2.0)
    return found
