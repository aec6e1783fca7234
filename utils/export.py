"""The model card and the upload to the Hub."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from utils.options import UserError, option
from utils.tracking import Sample

logger = logging.getLogger(__name__)
PRIVATE_FILES = ["checkpoint-*/**", ".tmp-*", ".tmp-*/**", ".lock", "logs/**", "data_report.json"]


@dataclass(frozen=True)
class HubOptions:
    push_to_hub: bool = option(False, "upload the result and its card")
    hub_model_id: str | None = option(None, "repository to upload to; by default the name of output_dir")
    hub_token: str | None = option(None, "token of the Hub; it is written nowhere. `hf auth login` does without it")
    hub_private_repo: bool = option(False, "create the repository as a private one")

    def __post_init__(self) -> None:
        if not self.push_to_hub and self.hub_model_id is not None:
            raise UserError("--hub_model_id goes with --push_to_hub; give both or neither")


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        base_model: the pipeline that was trained from.
        data: the dataset's name or folder name.
        is_lora: whether the result is a LoRA file.
        settings: lines of the table of settings, (name, value).
    """

    base_model: str
    data: str
    is_lora: bool
    settings: Sequence[tuple[str, object]]


def write_card(folder: Path, repository: str, facts: CardFacts, samples: Sequence[Sample]) -> None:
    """Writes README.md, a model card, and the samples it shows as one picture."""
    from diffusers.utils import make_image_grid
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

    local = Path(facts.base_model).exists()
    base_model = Path(facts.base_model).name if local else facts.base_model
    shown = ""
    if samples:
        images: list[Image.Image] = [sample.image for sample in samples]
        make_image_grid(images, 1, len(images)).save(folder / "val_imgs_grid.png")
        prompts = "\n".join(f"- {_escaped(sample.caption)}" for sample in samples)
        shown = f"\nSamples of these prompts, in this order:\n\n{prompts}\n\n![samples](./val_imgs_grid.png)\n"
    table = "\n".join(f"| {name} | {_escaped(str(value))} |" for name, value in facts.settings)
    result = "LoRA weights for" if facts.is_lora else "This pipeline was fine-tuned from"
    usage = (
        f'pipeline = DiffusionPipeline.from_pretrained("{base_model}")\npipeline.load_lora_weights("{repository}")'
        if facts.is_lora
        else f'pipeline = DiffusionPipeline.from_pretrained("{repository}")'
    )
    description = f"""
# {repository}

{result} **{base_model}**{", trained" if facts.is_lora else ""} on **{_escaped(facts.data)}**.
{shown}
## Usage

```python
from diffusers import DiffusionPipeline

{usage}
image = pipeline("a prompt").images[0]
```

## Training

| setting | value |
|---|---|
{table}
"""
    card = load_or_create_model_card(
        repo_id_or_path=repository,
        from_training=True,
        model_description=description,
        base_model=None if local else base_model,
        inference=True,
    )
    tags = ["text-to-image", "diffusers", "diffusers-training", *(["lora"] if facts.is_lora else [])]
    populate_model_card(card, tags=tags).save(folder / "README.md")


def upload(folder: Path, repository: str, options: HubOptions) -> str | None:
    """Uploads the result and its card without checkpoints, logs and locks.

    Returns:
        The repository's name, or None if the upload failed: the run's result stands in the folder all the same.
    """
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.errors import HTTPError

    try:
        repository = create_repo(
            repository, token=options.hub_token, private=options.hub_private_repo or None, exist_ok=True
        ).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=options.hub_token,
            commit_message="End of training",
            ignore_patterns=PRIVATE_FILES,
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if options.hub_token:
            reason = reason.replace(options.hub_token, "***")
        logger.warning(
            "the upload to %s failed: %s; the result is in %s, upload it with `hf upload`", repository, reason, folder
        )
        return None
    return repository


def _escaped(text: str) -> str:
    """Text from prompts and options as Markdown shows it literally, in a table too."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|" else character for character in text).replace(
        "\n", " "
    )
