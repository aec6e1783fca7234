"""The options of image sources, captions and class labels, and the sources of a `--dataset_file`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from utils.config.flag_rules import Resume
from utils.config.options import (
    UserError,
    as_number,
    first_line,
    nearest,
    option,
    require_fraction,
    require_positive,
    with_values,
)
from utils.config.user_files import TextReader, check_encoding, require_file, require_folder, short
from utils.config.yaml_files import YAML_LIMIT, parse_yaml
from utils.data.captions import CaptionOptions
from utils.data.source_kinds import SOURCES

if TYPE_CHECKING:
    from datasets.features.features import FeatureType

    from utils.data.file_listing import Fate, Listing
    from utils.data.masks import Masks

INNER, OUTER = "inner", "outer"
RULES = (INNER, OUTER)
CAPTION_FILE = "captions.json"
logger = logging.getLogger(__name__)
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.tsv", CAPTION_FILE)
MASK_FLAGS = ("alpha_mask", "mask_dir", "mask_column")


@dataclass(frozen=True)
class SourceOptions:
    """The options of one source of images; all can also be used in a `--dataset_file`.

    Attributes:
        holds_names: whether the caption column holds names, where NA or None may be a name.
    """

    holds_names: ClassVar[bool] = False

    dataset_name: str | None = option(
        None, "name of a dataset on the Hub, or a local path that `datasets` can load", resume=Resume.COMPARED
    )
    dataset_config_name: str | None = option(
        None,
        "configuration of --dataset_name; default: its default configuration",
        is_text=True,
        resume=Resume.COMPARED,
        acts_with=("dataset_name", "dataset_file"),
    )
    dataset_split: str = option("train", "split to train on, of a dataset or a folder with splits", is_text=True)
    train_data_dir: str | None = option(
        None,
        "folder of images with captions in metadata.jsonl, .csv or .parquet, in captions.json, or beside each image, "
        "or of Parquet files or tar shards; with --dataset_name, its data_dir",
        resume=Resume.COMPARED,
    )
    data_format: str | None = option(
        None,
        "format of --train_data_dir; default: detected from its files",
        choices=tuple(SOURCES),
    )
    image_column: str = option("image", "image column of the dataset", is_text=True)
    caption_column: str | None = option(
        "text",
        "caption column of the dataset: strings, or lists of strings, from which one is drawn at each step",
        is_text=True,
    )
    width_column: str = option(
        "width",
        "column of image widths in pixels, which aspect-ratio buckets need with --streaming",
        is_text=True,
        acts_with=("streaming",),
    )
    height_column: str = option(
        "height",
        "column of image heights in pixels, which aspect-ratio buckets need with --streaming",
        is_text=True,
        acts_with=("streaming",),
    )
    text_encoding: str | None = option(
        None,
        "encoding of captions and metadata in text files, such as gb18030, cp932 or cp1252; default: UTF-8, or for "
        "text that is not valid UTF-8 a guess, which is logged",
        is_text=True,
    )
    folder_repeats: bool = option(
        False, "repeat the images of a folder named 10_name ten times per epoch, as kohya's scripts do"
    )
    max_train_samples: int | None = option(
        None, "number of images per source to train on, drawn by the seed; default: all"
    )
    alpha_mask: bool = option(False, "weight the loss by the images' alpha channel: transparent parts do not count")
    mask_dir: str | None = option(
        None,
        "folder of masks with the names of the images: the loss counts where a mask is white",
        resume=Resume.COMPARED,
    )
    mask_column: str | None = option(
        None,
        "column of the masks: images in a dataset, file names in metadata, or file extensions in tar shards",
        is_text=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "max_train_samples")
        if self.text_encoding is not None:
            check_encoding(self.text_encoding, "text_encoding")
        given = self._mask_flags
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} both name masks; give one")
        if self.mask_dir is not None:
            require_folder(self.mask_dir, "mask_dir")
        if self.train_data_dir is not None and self.dataset_name is None:
            require_folder(self.train_data_dir, "train_data_dir", or_file=True)
        if self.data_format is not None and (self.dataset_name is not None or self.train_data_dir is None):
            raise UserError(f"--data_format {self.data_format} is the format of --train_data_dir; give that alone")

    @property
    def given_as(self) -> str:
        """The flag that names the data, and its value."""
        is_folder = self.dataset_name is None
        return f"--train_data_dir {self.train_data_dir}" if is_folder else f"--dataset_name {self.dataset_name}"

    @property
    def has_masks(self) -> bool:
        """Whether images have masks."""
        return self.mask_flag is not None

    @property
    def mask_flag(self) -> str | None:
        """The flag that names the masks; None without masks."""
        return next(iter(self._mask_flags), None)

    @property
    def masks_given(self) -> str:
        """The flag that names the masks, with its value."""
        given = "" if self.alpha_mask else f" {self.mask_dir or self.mask_column}"
        return f"--{self.mask_flag}{given}"

    @property
    def _mask_flags(self) -> list[str]:
        return [name for name in MASK_FLAGS if getattr(self, name) not in (None, False)]

    def reader(self, feature: "FeatureType | None" = None) -> Callable[[object, str], tuple[str, ...]]:
        """Returns the function that converts a value of the caption column to captions.

        Args:
            feature: type of the column, if a dataset declares it.

        Raises:
            UserError: if a column of this type can't hold captions.
        """
        from utils.data.sources import check_caption_feature
        from utils.data.tables import captions_of

        if feature is not None:
            check_caption_feature(feature, self.caption_column)
        return captions_of

    def listing(self, left_out: Mapping[Path, "Fate"]) -> "Listing":
        """Lists the files in the image folder, without masks.

        Args:
            left_out: see `list_folder`.
        """
        from utils.data.file_listing import MASK, Fate, Listing, list_folder
        from utils.data.folders import is_caption_file
        from utils.data.masks import without_masks

        folder = Path(self.train_data_dir)
        if folder.is_file():
            return Listing(folder.parent, [folder.name])
        listing = list_folder(folder, left_out)
        listing.warn()
        special = [name for name in listing.special if is_caption_file(name) or name.rpartition("/")[2] in LISTS]
        # special files with these names stay in the list, so that opening them raises an error
        listing.names = sorted([*listing.names, *special])
        names = without_masks(listing.names, folder, None if self.mask_dir is None else Path(self.mask_dir))
        for name in sorted(set(listing.names) - set(names)) if len(names) < len(listing.names) else ():
            listing.fates.add(name, Fate(MASK))
        listing.names = names
        return listing

    def masks(self) -> "Masks | None":
        """Returns the masks of the images; None without masks."""
        from utils.data.masks import AlphaMasks, ColumnMasks, FolderMasks

        if self.mask_dir is not None:
            return FolderMasks(Path(self.mask_dir), None if self.train_data_dir is None else Path(self.train_data_dir))
        return AlphaMasks() if self.alpha_mask else ColumnMasks(self.mask_column) if self.mask_column else None


@dataclass(frozen=True)
class LabelledSource(SourceOptions):
    """The options of one source of images with class labels."""

    holds_names: ClassVar[bool] = True

    caption_column: str | None = option(
        None,
        "column of class names or numbers for --class_conditional; default: the names of the folders are the classes",
        aliases=["--label_column"],
        is_text=True,
    )

    def reader(self, feature: "FeatureType | None" = None) -> Callable[[object, str], tuple[str, ...]]:
        """Returns the function that converts a value of the label column, a name or a number, to a class name."""
        from datasets import ClassLabel, Value

        from utils.data.class_labels import NamedLabels, labels_of

        if isinstance(feature, ClassLabel):
            return NamedLabels(tuple(feature.names))
        if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool")):
            return labels_of
        try:
            return super().reader(feature) if feature is not None else labels_of
        except UserError as error:
            must = "must hold names, whole numbers, booleans or a ClassLabel"
            raise UserError(f"--label_column {self.caption_column} {must}, got {feature}") from error


@dataclass(frozen=True)
class ColumnLabels(CaptionOptions):
    """Classes from a column.

    Attributes:
        are_twins_apart: whether names that differ only in Unicode form, spaces or invisible characters are separate
            classes, as in earlier releases.
    """

    word: ClassVar[str] = "label"
    refusal: ClassVar[str] = "--label_column: label them, or remove them from the data"
    are_classes: ClassVar[bool] = True
    takes_one: ClassVar[bool] = True

    are_twins_apart: bool = field(default=False, repr=False, compare=False)

    def of(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Returns each class once, normalized to one Unicode form."""
        from utils.data.class_folders import same_text

        return tuple(dict.fromkeys(captions if self.are_twins_apart else map(same_text, captions)))

    def recorded(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the classes as the data spells them."""
        return captions


@dataclass(frozen=True)
class NoLabels(CaptionOptions):
    """No classes: captions and labels are ignored."""

    are_expected: ClassVar[bool] = False

    def of(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Returns no captions."""
        return ()


@dataclass(frozen=True)
class FolderLabels(NoLabels):
    """Classes from the names of the images' folders.

    Attributes:
        rule: see `names_of_folders`.
        names: the class of each folder, by its path; None until the images are known.
        recorded_names: the classes in the checkpoint that the run resumes from; if only an earlier release's rule gives
            these classes, that rule is used.
    """

    folder_is_class: ClassVar[bool] = True
    are_classes: ClassVar[bool] = True

    rule: str | None = field(default=None, repr=False, compare=False)
    names: Mapping[str, str] | None = field(default=None, repr=False, compare=False)
    recorded_names: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def settled(self, keys: Iterable[str], where: str, source: str, in_shards: bool = False) -> CaptionOptions:
        """Returns a copy that knows the class of each folder.

        Args:
            keys: the images' paths within the source.
            where: the flag that names the data, with its value.
            source: the source's name.
            in_shards: whether the images are in tar shards, which are part of the keys.
        """
        from utils.data.class_folders import count_folders, names_of_folders, recorded_folders

        counts, known = count_folders(keys), (where, source, in_shards)
        names = recorded_folders(counts, self.recorded_names, *known) if self.rule in (None, INNER) else None
        return replace(self, names=names or names_of_folders(counts, self.rule, *known))

    def of_folder(self, key: str, source: str, in_shards: bool = True) -> str:
        """Returns the class of an image's folder, its full name: 5_1 and 6_1 are two classes."""
        return (self.names or {})[key.rpartition("/")[0]]


@dataclass(frozen=True)
class LabelOptions:
    help_title: ClassVar[str] = "labels"

    class_conditional: bool = option(
        False, "train a class-conditional model; the classes come from --label_column, or else from the folder names"
    )
    class_folders: str | None = option(
        None,
        "which of nested folders names the class: the inner one, which holds the images, or the outer one, the first "
        "in which their paths differ; default: inner, refused if inner folders in several places have the same name",
        choices=RULES,
    )
    label_dropout: float = option(
        0.1,
        "portion of the samples, from 0 to 1, that train without their class, for classifier-free guidance",
        acts_with=("class_conditional",),
    )

    def __post_init__(self) -> None:
        require_fraction(self, "label_dropout")

    def for_source(self, source: SourceOptions, recorded: Sequence[str] = ()) -> CaptionOptions:
        """Returns how the labels of a source are used in place of captions.

        Args:
            source: the options of the source.
            recorded: the classes in the checkpoint that the run resumes from.

        Raises:
            UserError: for options that contradict each other.
        """
        recorded = tuple(recorded)
        by_folder = self.class_conditional and source.caption_column is None
        if self.class_folders is not None and not by_folder:
            given = "--label_column names them" if self.class_conditional else "give --class_conditional too"
            raise UserError(
                f"--class_folders {self.class_folders} needs classes from folder names; {given}, or leave it out"
            )
        if not self.class_conditional:
            return NoLabels()
        if source.dataset_name is not None and source.caption_column is None:
            raise UserError("--class_conditional: a dataset has no folders; name its class column with --label_column")
        if by_folder:
            policy = {"caption_dropout": self.label_dropout, "on_missing_caption": "folder"}
            return FolderLabels(**policy, rule=self.class_folders, recorded_names=recorded)
        policy = {"caption_dropout": self.label_dropout, "on_missing_caption": "error"}
        if not recorded:
            return ColumnLabels(**policy)
        from utils.data.class_folders import has_twins

        return ColumnLabels(**policy, are_twins_apart=has_twins(recorded))


@dataclass(frozen=True)
class DataOptions:
    dataset_file: str | None = option(
        None,
        "YAML file that lists several sources, each with repeats or a weight and its own caption settings",
        resume=Resume.COMPARED,
    )
    streaming: bool = option(
        False, "stream the dataset instead of downloading it; no latent cache, and buckets need size columns"
    )
    shuffle_buffer_size: int = option(
        1000, "number of images in the shuffle buffer of a stream", acts_with=("streaming",)
    )
    cache_dir: str | None = option(
        None, "folder where `datasets` stores downloaded and converted data; default: its own", resume=Resume.SAVING
    )

    def __post_init__(self) -> None:
        require_positive(self, "shuffle_buffer_size")
        if self.streaming and self.dataset_file is not None:
            raise UserError("--streaming reads one source; give it as --dataset_name or --train_data_dir")
        if self.dataset_file is not None:
            require_file(self.dataset_file, "dataset_file", "be a YAML file that exists")


class SourceEntry(NamedTuple):
    """The settings of one source; with several sources, either `repeats` or `weight` decides how often it is used."""

    name: str
    source: SourceOptions
    captions: CaptionOptions
    repeats: Fraction
    weight: Fraction | None
    loss_weight: float


def source_entries(data: DataOptions, options: SourceOptions, captions: CaptionOptions) -> list[SourceEntry]:
    """Returns the sources that the command line or the dataset file names, without reading them.

    Raises:
        UserError: if there is none, or the dataset file is invalid.
    """
    if data.dataset_file is None:
        if options.dataset_name is None and options.train_data_dir is None:
            raise UserError("no data to train on; give --dataset_name, --train_data_dir or --dataset_file")
        name = options.dataset_name or Path(options.train_data_dir).name
        return [SourceEntry(name, options, captions, Fraction(1), None, 1.0)]
    if options.dataset_name is not None or options.train_data_dir is not None:
        raise UserError("--dataset_file names the sources; leave out --dataset_name and --train_data_dir")

    # read the sources of the dataset file
    found = []
    for entry, where in _entries(Path(data.dataset_file), options.text_encoding):
        source = with_values(options, entry, where)
        if source.dataset_name is None and source.train_data_dir is None:
            raise UserError(f"{where} has neither dataset_name nor train_data_dir")
        name = str(entry.get("name") or Path(source.dataset_name or source.train_data_dir).name)
        repeats = _fraction(entry, "repeats", where) or Fraction(1)
        weight = _fraction(entry, "weight", where)
        loss_weight = float(_fraction(entry, "loss_weight", where) or 1)
        found.append(SourceEntry(name, source, with_values(captions, entry, where), repeats, weight, loss_weight))
    if len({entry.weight is None for entry in found}) > 1:
        raise UserError(f"{data.dataset_file}: give all sources a weight, or none of them (then repeats apply)")

    # make their names distinct
    names = [entry.name for entry in found]
    if len(set(names)) < len(names):
        found = [entry._replace(name=f"{number}-{entry.name}") for number, entry in enumerate(found)]
    return found


def _entries(file: Path, encoding: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (options, file and number) of each source in a dataset file; its paths are relative to its folder."""
    # parse the file
    texts = TextReader(encoding)
    options = (*fields(SourceOptions), *fields(CaptionOptions))
    booleans = {each.name for each in options if each.type is bool}
    words = {each.name for each in options if each.type in (str, str | None)} | {"name"}
    try:
        content = parse_yaml(texts.read(file, YAML_LIMIT), f"--dataset_file {file}", booleans, words)
    except OSError as error:
        raise UserError(f"--dataset_file {file} can't be read: {first_line(error)}") from error
    for finding in texts.findings():
        logger.warning("--dataset_file %s: %s", file, finding)
    entries = content.get("sources") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"--dataset_file {file} must hold a list of sources, each a mapping of options")
    if isinstance(content, dict) and len(content) > 1:
        extra = _name_of(next(key for key in content if key != "sources"))
        raise UserError(f"--dataset_file {file}: {extra} is unknown beside sources")

    # check each source's options
    known = {
        "name",
        "repeats",
        "weight",
        "loss_weight",
        *SourceOptions.__dataclass_fields__,
        *CaptionOptions.__dataclass_fields__,
    }
    for number, entry in enumerate(entries, start=1):
        where = f"{file}, source {number}"
        for key, value in entry.items():
            if key not in known:
                hint = nearest(f"{key:.100}", known) if isinstance(key, str) else ""
                raise UserError(f"{where}: {_name_of(key)} is unknown" + (f"; did you mean {hint}?" if hint else ""))
            if isinstance(value, list | dict | set):
                raise UserError(f"{where}: {key} must be one value, got {short(value)}")
        if {"repeats", "weight"} <= entry.keys():
            raise UserError(f"{where}: repeats and weight both set how often it is used; give one")
        entry = dict(entry)
        for key in ("train_data_dir", "dataset_name", "mask_dir"):
            value = entry.get(key)
            if isinstance(value, str) and not value.startswith("~") and (file.parent / value).exists():
                entry[key] = str(file.parent / entry[key])
        yield entry, where


def _name_of(key: object) -> str:
    return f"{key:.60}" if isinstance(key, str) else short(key)


def _fraction(entry: dict[str, Any], key: str, where: str) -> Fraction | None:
    value = as_number(entry.get(key))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e6:
        raise UserError(f"{where}: {key} must be a number from 1e-6 to 1e6, got {short(value)}")
    return Fraction(str(value)).limit_denominator(10**6)
