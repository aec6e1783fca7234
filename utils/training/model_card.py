"""Writes the model card and uploads the result to the Hub."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from utils.config.options import UserError, first_line
from utils.config.terminal import markdown, markdown_cell
from utils.config.user_files import read_json
from utils.sampling.samples import Sample
from utils.training.options import HubOptions

logger = logging.getLogger(__name__)
CARD, GRID = "README.md", "val_imgs_grid.png"


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    Attributes:
        base_model: the pipeline that training started from; None from scratch.
        data: name of the dataset or its folder.
        is_lora: whether the result is a LoRA file.
        settings: (name, value) rows of the table of settings.
        call: Python expression that draws an image.
        tag: the Hub's tag for the task of the model.
        verdict: why the run has diverged; empty if it has not.
    """

    base_model: str | None
    data: str
    is_lora: bool
    settings: Sequence[tuple[str, object]] = ()
    call: str = 'pipeline("a prompt")'
    tag: str = "text-to-image"
    verdict: str = ""


def create_repository(folder: Path, options: HubOptions) -> str | None:
    """Creates the Hub repository for the result, unless it exists, before training starts.

    Returns:
        Its full name; None without --push_to_hub.

    Raises:
        UserError: without a login, or if the Hub can't be reached or denies creating or writing the repository.
    """
    if not options.push_to_hub:
        return None
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError

    wanted = options.hub_model_id or folder.resolve().name
    if options.hub_token is None and get_token() is None:
        raise UserError("--push_to_hub: not logged in; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=options.hub_token)
    try:
        repository = api.create_repo(wanted, private=options.hub_private_repo or None, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # create_repo succeeds for an existing repository without write access
    except (HTTPError, OSError, ValueError) as error:
        cure = "give --hub_model_id, run `hf auth login` with a token that may write there, or leave out --push_to_hub"
        raise UserError(
            f"--push_to_hub: {wanted} can't be written to: {_without_token(error, options)}; {cure}"
        ) from error
    return repository


def publish(
    folder: Path, repository: str | None, options: HubOptions, facts: CardFacts, samples: Sequence[Sample]
) -> None:
    """Writes the model card and uploads the result, if there is a repository."""
    if repository is not None:
        write_card(folder, repository, facts, samples)
        upload(folder, repository, options)


def write_card(folder: Path, repository: str, facts: CardFacts, samples: Sequence[Sample]) -> None:
    """Writes the model card README.md, and its samples as one image grid."""
    from diffusers.utils import make_image_grid
    from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH, populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    # Samples and settings.
    local = facts.base_model is None or Path(facts.base_model).exists()
    base_model = Path(facts.base_model).name if facts.base_model and local else facts.base_model
    shown = ""
    if samples:
        images: list[Image.Image] = [sample.image for sample in samples]
        make_image_grid(images, 1, len(images)).save(folder / GRID)
        prompts = "\n".join(f"- {markdown(sample.caption)}" for sample in samples)
        shown = f"\nSamples of these prompts, in this order:\n\n{prompts}\n\n![samples](./{GRID})\n"
    table = "\n".join(f"| {name} | {markdown_cell(value)} |" for name, value in facts.settings)
    # Origin, and how to load the result.
    result = "LoRA weights for" if facts.is_lora else "This pipeline was fine-tuned from"
    origin = f"{result} **{markdown(base_model)}**" if base_model else "This pipeline was trained from scratch"
    trained = ", trained" if facts.is_lora else ""
    usage = (
        f"pipeline = DiffusionPipeline.from_pretrained({_quoted(base_model)})\n"
        f"pipeline.load_lora_weights({_quoted(repository)})"
        if facts.is_lora
        else f"pipeline = DiffusionPipeline.from_pretrained({_quoted(repository)})"
    )
    warning = f"\n**The training has diverged: {facts.verdict}.**\n" if facts.verdict else ""
    description = f"""
# {markdown(repository)}

{origin}{trained} on **{markdown(facts.data)}**.
{warning}{shown}
## Usage

```python
from diffusers import DiffusionPipeline

{usage}
image = {facts.call}.images[0]
```

## Training

| setting | value |
|---|---|
{table}
"""
    # The card, with the Hub's metadata.
    card = ModelCard.from_template(
        card_data=ModelCardData(
            license=None, library_name="diffusers", base_model=None if local else base_model, inference=True
        ),
        template_path=MODEL_CARD_TEMPLATE_PATH,
        model_description=description,
    )
    tags = [facts.tag, "diffusers", "diffusers-training", *(["lora"] if facts.is_lora else [])]
    populate_model_card(card, tags=tags).save(folder / CARD)


def result_files(folder: Path) -> list[str]:
    """Returns patterns of the files to upload: the result and its card, but no checkpoints, logs or run records."""
    index = folder / "model_index.json"
    parts = [f"{name}/**" for name in read_json(index)] if index.exists() else []
    return ["model_index.json", *parts, "pipeline.py", "pytorch_lora_weights.safetensors", "fused/**", CARD, GRID]


def upload(folder: Path, repository: str, options: HubOptions) -> None:
    """Uploads only the result and its card; a failed upload is a warning, as the result is still in the folder."""
    from huggingface_hub import upload_folder
    from huggingface_hub.errors import HTTPError

    try:
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=options.hub_token,
            commit_message="End of training",
            allow_patterns=result_files(folder),
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        reason = _without_token(error, options)
        logger.warning(
            "upload to %s failed: %s; the result is in %s; upload it with `hf upload`", repository, reason, folder
        )


def _without_token(error: BaseException, options: HubOptions) -> str:
    """Returns an error in one line, with the given token masked."""
    reason = first_line(error)
    return reason.replace(options.hub_token, "***") if options.hub_token else reason


def _quoted(name: str | None) -> str:
    """Returns a name as a Python string literal that can't end a Markdown code block."""
    return json.dumps(name).replace("`", "\\u0060")
