"""Loads exports with plain diffusers, draws an image, and measures the loss on fixed images.

    python -I benchmarks/evaluate.py --base PIPELINE --images FOLDER --resolution 128 --out FILE EXPORT...

With -I this repository is not on Python's path. The loss is the mean squared error of the predicted noise over all
images, at evenly spaced timesteps, with the same noise for each export. An export is the folder of a pipeline, or of a
`pytorch_lora_weights.safetensors`, which the base pipeline loads.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

TIMESTEPS = 8  # per image
DRAWING_STEPS = 2


def load(base: str, export: str) -> Any:
    """Loads the pipeline of an export."""
    if (Path(export) / "model_index.json").exists():
        return DiffusionPipeline.from_pretrained(export)
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(export)
    return pipeline


def draws(pipeline: Any) -> bool:
    """Whether the pipeline draws a valid image."""
    pipeline.set_progress_bar_config(disable=True)
    more = {"prompt": "a picture", "guidance_scale": 3.0} if hasattr(pipeline, "tokenizer") else {}
    image = pipeline(num_inference_steps=DRAWING_STEPS, output_type="np", **more).images[0]
    return image.ndim == 3 and bool(np.isfinite(image).all())


def read_images(folder: Path, edge: int) -> tuple[Tensor, list[str]]:
    """Returns centre-cropped pixels [N, 3, edge, edge] in [-1, 1], and their captions."""
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pixels = []
    for entry in entries:
        image = Image.open(folder / entry["file_name"]).convert("RGB")
        scale = edge / min(image.size)
        image = image.resize([max(edge, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        cut = np.asarray(image.crop((left, top, left + edge, top + edge)), np.float32)
        pixels.append(torch.from_numpy(cut / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(pixels), [entry["text"] for entry in entries]


@torch.no_grad()
def inputs(pipeline: Any, pixels: Tensor, captions: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """Returns (clean images or latents, the denoiser's other arguments) for some images."""
    if not hasattr(pipeline, "vae"):
        return pixels, {}
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    device = latents.device
    if not hasattr(pipeline, "text_encoder_2"):
        states, _ = pipeline.encode_prompt(captions, device, 1, False)
        return latents, {"encoder_hidden_states": states}
    states, _, pooled, _ = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
    edge = pixels.shape[-1]
    ids = torch.tensor([[edge, edge, 0, 0, edge, edge]] * len(captions), device=device, dtype=torch.float32)
    return latents, {
        "encoder_hidden_states": states,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids},
    }


@torch.no_grad()
def losses(pipeline: Any, pixels: Tensor, captions: list[str]) -> Tensor:
    """Returns the noise-prediction losses [N, TIMESTEPS]."""
    random = np.random.default_rng(0)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    stratum = scheduler.config.num_train_timesteps / TIMESTEPS
    timesteps = torch.tensor([int((number + 0.5) * stratum) for number in range(TIMESTEPS)], device=pixels.device)
    found = []
    for image, caption in zip(pixels, captions, strict=True):
        clean, more = inputs(pipeline, image[None], [caption])
        noise = torch.from_numpy(random.standard_normal((TIMESTEPS, *clean.shape[1:]), np.float32)).to(clean)
        noisy = scheduler.add_noise(clean.expand_as(noise), noise, timesteps)
        predicted = pipeline.unet(noisy, timesteps, **repeated(more)).sample
        found.append((predicted - noise).square().mean((1, 2, 3)))
    return torch.stack(found)


def repeated(more: dict[str, Any]) -> dict[str, Any]:
    """Repeats the arguments of one image for all its timesteps."""
    return {
        name: repeated(each) if isinstance(each, dict) else each.repeat(TIMESTEPS, *[1] * (each.ndim - 1))
        for name, each in more.items()
    }


def count_flops(pipeline: Any, edge: int) -> int:
    """Returns the FLOPs of the denoiser's forward and backward pass per image; attention counts as matrix products.

    They are counted on the meta device, and only for trained weights; recomputation and encoders do not count.
    """
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    clean, more = inputs(pipeline, torch.zeros(1, 3, edge, edge, device=pipeline.device), ["a picture"])
    unet = pipeline.unet.to("meta").train()
    for module in unet.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    is_adapter = any("lora" in name for name, _ in unet.named_parameters())
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora" in name or not is_adapter)
    with FlopCounterMode(display=False) as counter:
        unet(clean.to("meta"), torch.zeros(1, device="meta"), **on_meta(more)).sample.sum().backward()
    return counter.get_total_flops()


def on_meta(more: dict[str, Any]) -> dict[str, Any]:
    """Moves the arguments to the meta device."""
    return {name: on_meta(each) if isinstance(each, dict) else each.to("meta") for name, each in more.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes for each export whether it draws, its loss, and the standard error of the loss over the images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("exports", nargs="+")
    args = parser.parse_args(argv)
    pixels, captions = read_images(args.images, args.resolution)
    pixels = pixels.to("cuda" if torch.cuda.is_available() else "cpu")
    found, flops = {}, None
    for export in args.exports:
        try:
            pipeline = load(args.base, export).to(pixels.device)
            each = losses(pipeline, pixels, captions).double().mean(1)
            error = float(each.std()) / math.sqrt(len(each))
            found[export] = {"loss": float(each.mean()), "error": error, "draws": draws(pipeline)}
            flops = count_flops(pipeline, args.resolution)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            found[export] = {"loss": None, "error": None, "draws": False, "why": f"{type(error).__name__}: {error}"}
    alone = importlib.util.find_spec("train_text_to_image") is None
    args.out.write_text(json.dumps({"alone": alone, "flops": flops, "exports": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
