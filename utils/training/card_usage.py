"""The part of a model card that says how to use the result: in diffusers, and in tools with a user interface."""

import shlex
from pathlib import Path

from utils.formats.adapter_metadata import DORA_NOTE
from utils.models.base_card import BaseModel, shown_name
from utils.sampling.infotext import short_hash
from utils.training.card_facts import CardFacts, quoted
from utils.training.exported import ExportedFiles


def in_diffusers(facts: CardFacts, base: BaseModel | None, own: str, is_on_hub: bool, files: ExportedFiles) -> str:
    """Returns Markdown with the code that loads the result in diffusers and draws an image.

    Args:
        own: the Hub repository that it is uploaded to, or the name of the output folder.
        is_on_hub: which of the two it is.
    """
    imports, lines, notes = ["from diffusers import DiffusionPipeline"], [], []
    more = f", {facts.load_arguments}" if facts.load_arguments else ""
    if not facts.is_adapter or base is None:
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({quoted(own)}{more})")
    elif facts.adaptation == "lora" and (files.lora is not None or not (facts.is_dora or facts.is_misread)):
        place = "" if files.lora or not files.ui else f', subfolder="ui", weight_name={quoted(files.ui.name)}'
        lines += [*_base_lines(facts, base, imports), f"pipeline.load_lora_weights({quoted(own)}{place})"]
        if files.fused is not None:
            notes.append("`fused/` is the base model with the adapter merged in: a pipeline folder of its own.")
    else:
        if is_on_hub:
            imports.append("from huggingface_hub import snapshot_download")
            lines.append(f'folder = snapshot_download({quoted(own)}, allow_patterns="fused/*")')
        place = 'f"{folder}/fused"' if is_on_hub else quoted(f"{own}/fused")
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({place}{more})")
        what = f"all of `ui/{files.ui.name}`" if facts.is_misread and files.ui else "this kind of adapter"
        notes.append(f"diffusers does not read {what}; `fused/` is the base model with it merged in.")
        if files.fused is None:
            more = "; `--lora_format both` writes a file for `load_lora_weights`" if facts.is_misread else ""
            notes.append(f"This run did not write `fused/`; `--export_fused` does{more}.")
    if files.best is not None:
        notes.append("`best/` is the result at the step with the lowest validation loss.")
    if "torch." in "".join(lines):
        imports.insert(0, "import torch")
    code = "\n".join([*imports, "", *lines, 'pipeline = pipeline.to("cuda")', f"image = {facts.call}.images[0]"])
    return "\n\n".join([f"```python\n{code}\n```", *notes])


def in_other_tools(facts: CardFacts, folder: Path, files: ExportedFiles) -> str:
    """Returns Markdown that says where to put the files that the run wrote for ComfyUI, A1111 and others; "" for none.

    Only files that the run wrote are named.
    """
    if facts.tag != "text-to-image":
        return ""
    # Files, each with the folders that it belongs in.
    rows = []
    for file in filter(None, (files.single, files.fused_single)):
        digest = short_hash(file)
        said_hash = f" (model hash {digest})" if digest else ""
        rows.append((file, said_hash, "models/checkpoints", "models/Stable-diffusion"))
    if files.ui is not None:
        rows.append((files.ui, "", "models/loras", "models/Lora"))
    said = []
    if rows:
        lines = [
            f"| `{_literal(file.relative_to(folder).as_posix())}`{digest} | `{comfy}` | `{web}` |"
            for file, digest, comfy, web in rows
        ]
        said.append("\n".join(["| file | ComfyUI | A1111, Forge |", "|---|---|---|", *lines]))
    else:
        words = [folder.resolve().name, "OUT.safetensors", "--to", "kohya" if facts.is_adapter else "single_file"]
        said.append(
            "ComfyUI, A1111 and Forge read single files, and this run wrote none for them; this command does: "
            f"`python -m utils.tools.convert {_literal(shlex.join(words))}`"
        )
    if files.ui is not None:
        prompt = ", ".join([f"<lora:{files.ui.stem}:1>", *facts.trigger_words])
        said.append(f"In A1111 and Forge, write `{_literal(prompt)}` into the prompt.")

    # Folders, and what to set or to know.
    if files.fused is not None or not facts.is_adapter:
        what = "the folder `fused/`" if facts.is_adapter else "the whole folder"
        said.append(f"InvokeAI and SD.Next read {what} as it is, in diffusers' layout.")
    if facts.is_dora:
        cure = "`fused/`" if files.fused is not None else "A merged model (`--export_fused`)"
        cure = cure if files.fused_single is None else "The single file in `fused/`"
        said.append(
            f"This adapter is a DoRA in LyCORIS' convention, which not every tool follows: {DORA_NOTE}. {cure} is "
            "right in all tools."
        )
    if facts.is_misread and files.ui is not None:
        said.append(
            f"Do not load `{_literal(files.ui.relative_to(folder).as_posix())}` in diffusers or in tools that load it "
            "by diffusers: they lose the scales of single layers."
        )
    return "\n\n".join([*said, *facts.ui_notes])


def _base_lines(facts: CardFacts, base: BaseModel, imports: list[str]) -> list[str]:
    """Lines that load the base model of an adapter, with the scheduler that it was trained for; adds to `imports`."""
    given = {name: facts.base_arguments.get(name) for name in _arguments_of(base)}
    if given.get("config"):
        given["config"] = shown_name(str(given["config"]))
    named = [f"{name}={quoted(str(value))}" for name, value in given.items() if value is not None]
    arguments = ", ".join([quoted(base.name), *named])
    loader = f"{facts.pipeline_class}.from_single_file" if base.is_file else "DiffusionPipeline.from_pretrained"
    if base.is_file:
        imports[0] = f"from diffusers import {facts.pipeline_class}"
    lines = [f"pipeline = {loader}({arguments}){'' if base.is_on_hub else '  # the base model'}"]
    if facts.scheduler_changes:
        names = sorted([facts.scheduler_class, imports[0].removeprefix("from diffusers import ")])
        imports[0] = f"from diffusers import {', '.join(names)}"
        changes = ", ".join(f"{name}={value!r}" for name, value in facts.scheduler_changes.items())
        lines.append(f"pipeline.scheduler = {facts.scheduler_class}.from_config(pipeline.scheduler.config, {changes})")
    return lines


def _arguments_of(base: BaseModel) -> tuple[str, ...]:
    """Names of the arguments that the loader of a base model takes, of those with which the run loaded it."""
    if base.is_file:
        return ("config",)
    return ("revision", "variant") if base.is_on_hub else ("variant",)


def _literal(text: str) -> str:
    """Text for inline code in a table, which knows no escapes."""
    return " ".join(text.replace("`", "'").replace("|", "/").split())
