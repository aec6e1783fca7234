"""Writes the model card of a run, and uploads it with the result to the Hub."""

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from utils.config.terminal import markdown, markdown_cell, one_line
from utils.models.base_card import BaseModel
from utils.runtime.atomic_files import or_without
from utils.sampling.grid_samples import grid_of
from utils.sampling.samples import Sample
from utils.training.card_facts import CardFacts
from utils.training.card_files import write_card_file
from utils.training.card_usage import in_diffusers, in_other_tools
from utils.training.exported import ExportedFiles
from utils.training.hub_upload import GALLERY, GRID, result_files, upload, upload_command
from utils.training.options import HubOptions

logger = logging.getLogger(__name__)
COLUMNS = 4  # of the grid of samples
NO_CARD = "The base model has no card here that names a licence"
LISTED = 16  # most prompts of samples, and most images of the Hub's gallery


def publish(
    folder: Path, repository: str | None, options: HubOptions, facts: CardFacts, samples: Sequence[Sample]
) -> None:
    """Writes the model card, and uploads the result if there is a repository and no check found it wrong."""
    exported = ExportedFiles.of_run(folder)
    write_card(folder, repository, facts, samples, exported)
    if repository is None:
        return
    files = result_files(folder, exported)
    if facts.failures:
        command = upload_command(folder, repository, files)
        told = "nothing is uploaded to %s, because the check of the exported files failed; to upload them anyway:\n%s"
        logger.warning(told, repository, command)
        return
    upload(folder, repository, options, files)


def write_card(
    folder: Path, repository: str | None, facts: CardFacts, samples: Sequence[Sample], exported: ExportedFiles
) -> Path | None:
    """Writes the model card, and its samples as one image grid.

    Returns:
        The file of the card; None if it can't be written, which the log says.
    """
    revision = facts.base_arguments.get("revision")
    base = None
    if facts.base_model is not None:
        base = BaseModel.read(facts.base_model, revision if isinstance(revision, str) else None)
    gallery = _copied(folder, samples[:LISTED] if facts.tag == "text-to-image" else [])
    with or_without(folder / GRID):
        (folder / GRID).unlink(missing_ok=True)
        if samples:
            images: list[Image.Image] = [sample.image for sample in samples]
            grid_of(images, min(COLUMNS, len(images))).save(folder / GRID)
    name = repository or folder.resolve().name
    elsewhere = in_other_tools(facts, folder, exported)
    body = [*_head(name, facts, base), "## Samples", _samples(folder, samples, facts)]
    body += ["## Use it with diffusers", in_diffusers(facts, base, name, repository is not None, exported)]
    body += ["## Use it in other tools", elsewhere] if elsewhere else []
    table = "\n".join(f"| {markdown_cell(name)} | {markdown_cell(value)} |" for name, value in facts.settings)
    body += ["## Training", f"| setting | value |\n|---|---|\n{table}"]
    return write_card_file(folder, f"---\n{_metadata(facts, base, gallery)}---\n\n" + "\n\n".join(body))


def _copied(folder: Path, samples: Sequence[Sample]) -> list[Sample]:
    """Copies samples, with their PNG texts, to where the Hub's gallery finds them; returns those that are there."""
    target, found = folder / GALLERY, []
    with or_without(target):
        for old in target.glob("[0-9]*.png"):
            old.unlink()
        for number, sample in enumerate(samples):
            if sample.file and (folder / sample.file).is_file():
                target.mkdir(exist_ok=True)
                shutil.copyfile(folder / sample.file, target / f"{number}.png")
                found.append(sample._replace(file=f"{GALLERY}/{number}.png"))
    return found


def _metadata(facts: CardFacts, base: BaseModel | None, gallery: Sequence[Sample]) -> str:
    """The front matter: YAML that the Hub reads, with the names that it knows."""
    from huggingface_hub import ModelCardData

    licence = None if base is None else base.licence
    known: dict[str, object] = {}
    if licence is not None:
        known |= licence.front_matter
    if base is not None and base.is_on_hub:
        known |= {"base_model": base.name, "base_model_relation": "adapter" if facts.is_adapter else "finetune"}
    if facts.trigger_words:
        known["instance_prompt"] = _text(", ".join(facts.trigger_words))
    if gallery:
        known["widget"] = [_shown_on_hub(each, each.negative_prompt or facts.negative_prompt) for each in gallery]
    adapter = ["lora", "template:sd-lora"] if facts.adaptation == "lora" else []
    tags = [facts.tag, "diffusers", "diffusers-training", *adapter]
    data = ModelCardData(library_name="diffusers", pipeline_tag=facts.tag, tags=tags, inference=True, **known)
    return data.to_yaml() + "\n"


def _shown_on_hub(sample: Sample, negative_prompt: str) -> dict[str, object]:
    """A sample as the Hub's gallery takes it."""
    settings = {"parameters": {"negative_prompt": _text(negative_prompt)}} if negative_prompt else {}
    return {"text": _text(sample.caption), **settings, "output": {"url": sample.file}}


def _text(prompt: str) -> str:
    """A prompt in one line, as text encoders read it: line breaks and tabs are spaces to them."""
    return one_line(" ".join(prompt.split()))


def _head(title: str, facts: CardFacts, base: BaseModel | None) -> list[str]:
    """The first paragraphs: what the model is, what is wrong with it, its licence and its trigger words."""
    paragraphs = [f"# {markdown(title)}", _origin(facts, base)]
    if facts.verdict:
        paragraphs.append(f"**The training has diverged: {facts.verdict}.**")
    if facts.judgement:
        paragraphs.append(f"Verdict on the training: {markdown(facts.judgement)}.")
    if facts.failures:
        found = "\n".join(f"- {markdown(each)}" for each in facts.failures)
        paragraphs.append(f"**The check of the exported files failed; they may draw other images:**\n\n{found}")
    if base is not None:
        paragraphs.append(_licence(base))
    if facts.trigger_words:
        words = ", ".join(f"**{markdown(word)}**" for word in facts.trigger_words)
        paragraphs.append(f"Trigger words: {words}")
    return paragraphs


def _origin(facts: CardFacts, base: BaseModel | None) -> str:
    """The sentence that says what the model is, and from what it was trained."""
    name = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}.get(facts.adaptation, facts.adaptation)
    data = f"on **{markdown(facts.data)}**"
    if base is None:
        return f"This pipeline was trained from scratch {data}."
    if facts.is_adapter:
        return f"{'DoRA' if facts.is_dora else name} weights for **{markdown(base.name)}**, trained {data}."
    return f"This pipeline was fine-tuned from **{markdown(base.name)}** {data}."


def _licence(base: BaseModel) -> str:
    """The sentence on the licence of the base model."""
    licence = base.licence
    if licence is None:
        found = f"The {base.said_by} of the base model names no licence" if base.said_by else NO_CARD
        return f"{found}; ask its author before you pass this model on."
    names = ", ".join(f"**{markdown(each)}**" for each in licence.identifiers)
    more = ", ".join(markdown(each) for each in (licence.name, licence.link) if each)
    return f"Licence of the base model, as its own {base.said_by} says: {names}{f' ({more})' if more else ''}."


def _samples(folder: Path, samples: Sequence[Sample], facts: CardFacts) -> str:
    """The grid of samples and their prompts."""
    if not samples or not (folder / GRID).is_file():
        return "None were drawn."
    listed = [each.caption for each in samples[:LISTED]]
    lines = "\n".join(f"{number}. {markdown(caption)}" for number, caption in enumerate(listed, 1))
    left = f"\n\nand {len(samples) - LISTED} more" if len(samples) > LISTED else ""
    rows = math.ceil(len(samples) / COLUMNS)
    order = ", row by row" if rows > 1 else ", from left to right"
    what = "of these prompts" if facts.tag == "text-to-image" else "of the model"
    negative = f"\n\nNegative prompt: {markdown(facts.negative_prompt)}" if facts.negative_prompt else ""
    return f"![samples](./{GRID})\n\nSamples {what}{order}:\n\n{lines}{left}{negative}"
