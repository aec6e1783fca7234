"""The last check of a result: images by its files equal one by the weights in memory."""

import logging
from collections.abc import Iterator

import torch
from torch import nn

from utils.config.file_names import FUSED
from utils.config.terminal import one_line
from utils.exports.drawing import (
    Exported,
    bytes_to_draw,
    compare,
    exported_file,
    exported_lora,
    exported_pipeline,
    lacking_memory,
    reference_image,
    same_widths,
)
from utils.models.base import Family
from utils.runtime.processes import on_main_process
from utils.training.exporting import RESULT
from utils.training.options import TrainingOptions
from utils.training.session import Session
from utils.training.state import TrainingState

logger = logging.getLogger(__name__)
DRAWN = "drawing"  # place of the faults that drawing finds


def draw_reference(options: TrainingOptions, session: Session, state: TrainingState) -> None:
    """Draws an image by the exported weights while they are in memory, on the main process, for `verify`."""
    exporter, family = state.adaptation.exporter, state.adaptation.family
    if not exporter.is_checked or state.verdict or not session.accelerator.is_main_process:
        return
    if session.engine.spreads or getattr(family.options, "sampling_cpu_offload", False):
        logger.info("the exported files are not drawn from: the weights are not on one device")
        return
    with session.accelerator.autocast():
        exporter.reference = reference_image(family, _is_exact(options, session, family))


def _is_exact(options: TrainingOptions, session: Session, family: Family) -> bool:
    """Whether the same weights draw the same bits: in float32, by the plain kernels of a device that repeats them."""
    speed, model = options.speed, options.model
    plain = not (speed.compiled or speed.channels_last or speed.attention_backend or model.attention_slicing)
    plain = plain and not model.enable_xformers_memory_efficient_attention
    repeats = session.device.type == "cpu" or options.runtime.deterministic
    modules = (part for part in family.pipeline.components.values() if isinstance(part, nn.Module))
    dtypes = {each.dtype for module in modules for each in module.parameters()}
    return plain and repeats and session.accelerator.mixed_precision == "no" and dtypes == {torch.float32}


def verify(session: Session, state: TrainingState) -> None:
    """Draws from the exported files, and notes what is wrong; call it when the weights in memory are needed no more."""
    exporter = state.adaptation.exporter
    reference, exporter.reference = exporter.reference, None
    if reference is None:
        return
    family, device = state.adaptation.family, session.device
    needed = bytes_to_draw(family)
    if lacking_memory(needed, device):
        state.release()
    if lacking := lacking_memory(needed, device):
        logger.warning("the exported files are not drawn from: that takes %s", lacking)
        return
    faults, drawn = [], []
    for exported in _exported(session, state):
        with session.accelerator.autocast():
            said, fault = compare(exported, family, reference, device)
        drawn += [said] if said else []
        faults += [fault] if fault else []
    exporter.faults[DRAWN] = faults
    for fault in faults:
        logger.error("the exported files are wrong: %s", one_line(fault, 500))
    if drawn:
        exporter.checked[DRAWN] = "; ".join(drawn)
        logger.info("checked by drawing with diffusers: %s", "; ".join(drawn))


def _exported(session: Session, state: TrainingState) -> Iterator[Exported]:
    """Yields what the result consists of, to draw from."""
    adaptation = state.adaptation
    exporter, family, folder = adaptation.exporter, adaptation.family, session.folder.path
    for place in (RESULT, FUSED):
        if place not in exporter.checked:
            continue
        is_merged, path = place != RESULT, folder / place
        yield exported_pipeline(family, path, exporter.form, is_merged)
        if exporter.file_name is None:
            continue
        if same_widths({name: encoder.config for name, encoder in _encoders(family).items()}):
            logger.warning(
                "%s is not drawn from: its text encoders have the same width, and diffusers would load the first one's "
                "weights for both",
                exporter.file_name,
            )
            continue
        yield exported_file(family, path / exporter.file_name, exporter.form, is_merged)
    if adaptation.exports_lora:
        yield exported_lora(family, folder)
    elif (file := adaptation.lora_for_uis(folder)) is not None:
        yield exported_lora(family, file, exporter.form.dtype)


def _encoders(family: Family) -> dict[str, nn.Module]:
    return dict(zip(family.text_encoder_names, family.text_encoders, strict=True))


def wrong_export(session: Session, state: TrainingState) -> str:
    """Returns what is wrong with the exported files, and records what was checked in `run.json`; "" if all is right.

    All processes must call it.
    """
    exporter = state.adaptation.exporter

    def read() -> str:
        faults = [fault for found in exporter.faults.values() for fault in found]
        if exporter.checked:
            session.folder.add_to_record(export_check={"compared": exporter.checked, "wrong": faults})
        if not faults:
            return ""
        more = f" (and {len(faults) - 1} more, see the log)" if len(faults) > 1 else ""
        return one_line(faults[0], 500) + more

    return on_main_process(session.accelerator, read)
