"""What tests run in the environment of the older libraries, which has nothing else of this repository.

python tests/older_libraries.py make FOLDER        makes a Stable Diffusion pipeline as older releases save it
python tests/older_libraries.py draw TASKS FILE    draws from pipelines without arguments, into one .npz file
python tests/older_libraries.py tokenize FOLDER TEXTS FILE
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from tests import tiny

TOKEN = "<my-cat>"


def make(folder: Path) -> None:
    """A pipeline with a safety checker, an image processor and a token more than its vocabulary has."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipeline = StableDiffusionPipeline.from_pretrained(tiny.make_sd(folder.with_name("plain")), tokenizer=None)
    pipeline.tokenizer = tiny.tokenizer(folder.with_name("vocabulary"))
    pipeline.tokenizer.add_tokens([TOKEN])
    pipeline.text_encoder.resize_token_embeddings(515)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 16, "projection_dim": 8, **small}
    text = {"vocab_size": 514, "projection_dim": 8, **small}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    StableDiffusionPipeline(
        **{name: pipeline.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32}),
        requires_safety_checker=True,
    ).save_pretrained(folder)


def draw(tasks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The image of each task by its number: a pipeline's folder and how it is called.

    A task may name a LoRA file, or a folder whose parts stand in for the pipeline's.
    """
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    images = {}
    for number, task in enumerate(tasks):
        pipeline = DiffusionPipeline.from_pretrained(task["folder"], **task.get("load", {}))
        for name, folder in task.get("parts", {}).items():
            kind = type(getattr(pipeline, name)).__name__
            library = diffusers if hasattr(diffusers, kind) else transformers
            part, said = getattr(library, kind).from_pretrained(folder, output_loading_info=True)
            assert not said["missing_keys"], (folder, said)
            setattr(pipeline, name, part)
        if "lora" in task:
            pipeline.load_lora_weights(task["lora"], weight_name="pytorch_lora_weights.safetensors")
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = pipeline(**task["call"], generator=generator, output_type="np")
        assert not any(getattr(drawn, "nsfw_content_detected", None) or ()), task
        images[str(number)] = drawn.images[0]
    return images


def tokenize(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids of texts."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)(texts).input_ids


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    elif sys.argv[1] == "tokenize":
        ids = tokenize(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
        Path(sys.argv[4]).write_text(json.dumps(ids), encoding="utf-8")
    else:
        np.savez(sys.argv[3], **draw(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
