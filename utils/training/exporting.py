"""Exports pipelines as the options ask, and checks the weights that were written."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from utils.config.file_names import file_name_of, result_name
from utils.config.terminal import one_line
from utils.exports.drawing import Reference
from utils.exports.frozen_check import check_frozen
from utils.exports.tensor_check import Findings, check_folder, check_single_file
from utils.models.base import Family
from utils.models.base_card import BaseModel
from utils.models.folder_form import FLOAT32, NAMES_OF_DTYPES, FolderForm
from utils.models.single_file_writer import FileFacts, check_has_original, write_single_file
from utils.training.export_options import ExportOptions
from utils.training.options import TrainingOptions

logger = logging.getLogger(__name__)
ASIDE, RESULT = ".tmp-", "."


@dataclass
class Exporter:
    """Writes pipelines in the form that the options ask for, and compares what was written with the run's weights.

    Attributes:
        form: dtype, variant and shards of the folder.
        file_name: name of the single file in each pipeline's folder; None for none.
        facts: what the single file says about itself.
        is_checked: whether to read back what was written.
        faults: what is wrong in the last export of each kind, by the name of its folder; empty if all is right.
        checked: what was compared, in words, by the name of its folder; that of the result is ".".
        reference: an image by the exported weights, to compare with images by the files.
        sources: files and folders that the run reads, which no export removes.
        misread: the layers of the file for UIs that diffusers reads in another way; None before the first export.
    """

    form: FolderForm = FLOAT32
    file_name: str | None = None
    facts: FileFacts = field(default_factory=FileFacts)
    is_checked: bool = True
    faults: dict[str, list[str]] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)
    reference: Reference | None = None
    sources: list[Path] = field(default_factory=list)
    misread: list[str] | None = None

    @classmethod
    def of(cls, options: TrainingOptions, output_dir: Path, edge: int, clip_skip: int | None) -> "Exporter":
        """Returns the exporter of a run.

        Args:
            edge: edge of the training images in pixels.
            clip_skip: layers of the text encoder that are skipped.
        """
        base, export = options.model.pretrained_model_name_or_path, options.export
        name = file_name_of(output_dir) if export.export_single_file else None
        facts = base_facts(base, (edge, edge), clip_skip, result_name(output_dir))
        sources = [Path(each) for each in (base, options.adaptation.start_path) if each is not None]
        return cls(form_of(export), name, facts, export.export_check, sources=sources)

    def save(self, family: Family, folder: Path, modules: Mapping[str, nn.Module]) -> None:
        """Writes a pipeline with these modules, and its single file if that is asked for; then checks the weights.

        Raises:
            UserError: if it can't be written in the original layout.
            OSError: if it can't be written.
        """
        family.save_pipeline(folder, self.form, **modules)
        if self.file_name is not None:
            write_single_file(folder, folder / self.file_name, self.facts, None, self.form.variant)
        if self.is_checked:
            self._check(family, folder, modules)

    def _check(self, family: Family, folder: Path, modules: Mapping[str, nn.Module]) -> None:
        # The folder: what was trained, and the rest.
        in_folder, in_file = check_folder(folder, modules, self.form), Findings()
        frozen = check_frozen(folder, family, modules, self.form)
        in_folder.faults += frozen.findings.faults
        said = f"{in_folder.num_tensors} tensors of {' and '.join(modules)}"
        if rest := frozen.describe():
            said += f", {rest}"

        # The single file, and the outcome.
        if self.file_name is not None:
            in_file = check_single_file(folder / self.file_name, folder, None, self.form.variant)
            said += f" and {in_file.num_tensors} of {self.file_name}"
        if frozen.left_out:
            left_out = " and ".join(frozen.left_out)
            logger.warning(
                "the check of the export does not compare the weights of %s: their base is not a folder of safetensors "
                "files, and they are in memory in another precision than float32",
                left_out,
            )
            said += f"; not compared: {left_out}"
        place = _place(folder)
        self._note("pipeline", place, place, in_folder.faults + in_file.faults, said)

    def note_adapter(self, folder: Path, faults: list[str], said: str) -> None:
        """Notes what the check of an adapter's files has found, for the log and the end of the run.

        Args:
            folder: the folder of the files.
            faults: what is wrong with them; empty if all is right.
            said: what was compared, in words.
        """
        place = _place(folder)
        self._note("adapter", "adapter" if place == RESULT else f"{place}: adapter", place, faults, said)

    def _note(self, what: str, key: str, place: str, faults: list[str], said: str) -> None:
        self.faults[key], self.checked[key] = faults, said
        for fault in faults:
            logger.error("the exported %s is wrong: %s", what, one_line(fault, 500))
        if not faults:
            where = "" if place == RESULT else f" in {place}/"
            logger.info("checked the exported %s%s: %s are the run's weights, bit for bit", what, where, said)


def _place(folder: Path) -> str:
    """Returns the folder's name in the output folder, in place of its name while it is written."""
    if folder.parent.name.startswith(ASIDE):
        outer = _place(folder.parent)
        return folder.name if outer == RESULT else f"{outer}/{folder.name}"
    name = folder.name.removeprefix(ASIDE)
    return RESULT if name == "result" else name


def form_of(options: ExportOptions) -> FolderForm:
    """Returns the form of the exported folder."""
    return FolderForm(NAMES_OF_DTYPES[options.export_dtype], options.export_variant, options.max_shard_size)


def base_facts(base: str | None, resolution: tuple[int, int] | None, clip_skip: int | None, title: str) -> FileFacts:
    """Returns what a single file says about itself beside what its folder says.

    Args:
        base: the pipeline that training started from, by folder, file or Hub name.
        resolution: width and height of the training images.
        clip_skip: layers of the text encoder that are skipped.
        title: name of the result.
    """
    found = None if base is None else BaseModel.read(base)
    licence = None if found is None or found.licence is None else found.licence.text
    name = None if found is None else found.name
    return FileFacts(title, resolution, name, licence, None if clip_skip is None else clip_skip + 1)


def check_export(options: ExportOptions, family: Family) -> None:
    """Refuses a single file for a pipeline without an original layout; says what fp16 means for its VAE.

    Raises:
        UserError: saying what the layout lacks.
    """
    if options.export_single_file:
        check_has_original(family)
    coders = [getattr(family.pipeline, name) for name in family.coder_names]
    if options.export_dtype == "fp16" and any(getattr(each.config, "force_upcast", False) for each in coders):
        logger.info(
            "--export_dtype fp16: the VAE overflows when it draws in fp16 (force_upcast); diffusers and most tools "
            "therefore run it in float32 or bf16"
        )
    if options.export_variant is not None:
        logger.info('load the result with from_pretrained(..., variant="%s")', options.export_variant)
