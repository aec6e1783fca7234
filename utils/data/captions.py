"""Chooses and modifies captions: tag shuffling and dropout, trigger words, prefixes and suffixes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from utils.config.options import option, require, require_fraction, require_not_negative

if TYPE_CHECKING:
    from utils.config.batch import RecordPass
    from utils.data.source_options import SourceOptions

TAGS = ("shuffle_tags", "tag_dropout", "dataset_file")  # a dataset file may set them per source
FOLDER_REPEATS = re.compile(r"^(\d+)_")
MAX_CAPTION = 1 << 16  # characters per caption, and bytes per text file of captions


@dataclass(frozen=True)
class CaptionOptions:
    """How a source's captions are used.

    Attributes:
        word: noun for a caption in messages.
        refusal: the option that ends the run if an image has none.
        are_expected: whether to warn about images without one.
        folder_is_class: whether the folder of an image names its class, whatever files are beside it.
        are_classes: whether they are class names, of which a model knows only those it was trained on.
        takes_one: whether an image must not have more than one.
    """

    word: ClassVar[str] = "caption"
    refusal: ClassVar[str] = "--on_missing_caption error"
    are_expected: ClassVar[bool] = True
    folder_is_class: ClassVar[bool] = False
    are_classes: ClassVar[bool] = False
    takes_one: ClassVar[bool] = False

    trigger_word: str | None = option(None, "word prepended to each caption that does not contain it", is_text=True)
    caption_prefix: str | None = option(None, "text prepended to each caption", is_text=True)
    caption_suffix: str | None = option(None, "text appended to each caption", is_text=True)
    tag_separator: str = option(",", "separator of the tags in a caption", is_text=True, acts_with=TAGS)
    shuffle_tags: bool = option(False, "shuffle the tags of a caption each time it is used")
    keep_tokens: int = option(
        0, "number of tags at the start of a caption that are never shuffled or dropped", acts_with=TAGS
    )
    tag_dropout: float = option(0.0, "probability of dropping each tag of a caption")
    caption_dropout: float = option(
        0.0,
        "probability of training a sample without its caption, for classifier-free guidance",
        aliases=["--proportion_empty_prompts"],
    )
    on_missing_caption: str = option(
        "empty",
        "for images without a caption: use an empty caption, use the name of their folder, or end the run",
        choices=["empty", "folder", "error"],
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "keep_tokens")
        require_fraction(self, "tag_dropout", "caption_dropout")
        require(self.tag_separator != "", "tag_separator", "''", "not be empty", "use a comma, for example")

    def for_source(self, source: "SourceOptions", recorded: Sequence[str] = ()) -> "CaptionOptions":
        """Returns the options for a source. Here they are the same for every source."""
        return self

    def of(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the captions of an image that are used."""
        return captions

    def recorded(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the captions that a resumed run compares to detect edits."""
        return self.of(captions)

    def settled(self, keys: Iterable[str], where: str, source: str, in_shards: bool = False) -> "CaptionOptions":
        """Returns the options for a source once its images are listed.

        Args:
            keys: names of the images within the source.
            where: name of the source in messages.
            source: name of its folder.
            in_shards: whether the images are members of tar shards, whose names are part of the keys.

        Raises:
            UserError: if class names are required but the folders do not provide them.
        """
        return self

    def of_folder(self, key: str, source: str, in_shards: bool = True) -> str:
        """Returns the caption of an image taken from the name of its folder."""
        return folder_caption(key, source, in_shards)

    @property
    def joiner(self) -> str:
        """The text between tags: the separator, followed by a space if it is a single character."""
        separator = self.tag_separator
        return f"{separator} " if len(separator) == 1 and not separator.isspace() else separator

    @property
    def varies(self) -> bool:
        """Whether the text of a caption differs from pass to pass."""
        return self.shuffle_tags or self.tag_dropout > 0


def refusal_of(captions: Sequence[str]) -> str:
    """Returns why captions are too long to train on, or "". A tokenizer takes minutes for a few megabytes."""
    longest = max(map(len, captions), default=0)
    return f"its caption has {longest:,} characters; at most {MAX_CAPTION:,} are read" if longest > MAX_CAPTION else ""


def say_the_same(first: Iterable[str], second: Iterable[str]) -> bool:
    """Returns whether captions have the same lines, ignoring order and white space."""
    return _normalized_lines(first) == _normalized_lines(second)


def _normalized_lines(captions: Iterable[str]) -> set[str]:
    lines = (" ".join(line.split()) for caption in captions for line in caption.splitlines())
    return set(filter(None, lines))


def is_written_list(caption: str) -> bool:
    """Returns whether a caption is a list, tuple or mapping of strings written as Python or JSON source.

    Takes linear time in the length of the caption.
    """
    text = caption.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return False
    inner = text[1:-1].strip()
    quote = inner[:1]
    if quote not in ("'", '"') or len(inner) < 2:
        return False
    if text[0] == "[":
        return inner.removesuffix(",").rstrip().endswith(quote, 1)
    mark = "," if text[0] == "(" else ":"
    return re.compile(rf"{quote}\s*{mark}").search(inner, 1) is not None


def folder_caption(key: str, source: str, in_shards: bool = True) -> str:
    """Returns the name of an image's folder, or of its source for images at the top; `10_name` (kohya) gives `name`.

    Args:
        key: path of the image within the source.
        source: path of the source.
        in_shards: whether a part that ends with .tar is a tar shard, not a folder.
    """
    folders = [*PurePosixPath(source).parts[-1:], *PurePosixPath(key).parent.parts]
    names = [name for name in folders if name not in ("", "images") and not (in_shards and name.endswith(".tar"))]
    name = names[-1] if names else ""
    return FOLDER_REPEATS.sub("", name).strip() or name


def compose(caption: str, options: CaptionOptions, seed: int, passing: "RecordPass") -> str:
    """Returns the text to train on: tags shuffled and dropped, trigger word, prefix and suffix added.

    Args:
        passing: the record and variant that seed tag order and dropout, so that cached and live runs agree.
    """
    if options.varies:
        caption = _vary(caption, options, seed, passing)
    trigger = options.trigger_word
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        caption = f"{trigger}{options.joiner}{caption}" if caption else trigger
    return " ".join(filter(None, [options.caption_prefix, caption, options.caption_suffix]))


def _vary(caption: str, options: CaptionOptions, seed: int, passing: "RecordPass") -> str:
    """Returns the caption with its tags shuffled and dropped."""
    from utils.config.seeding import Stream, generator

    tags = [tag.strip() for tag in caption.split(options.tag_separator)]
    tags = [tag for tag in tags if tag]
    kept, free = tags[: options.keep_tokens], tags[options.keep_tokens :]
    if options.tag_dropout:
        dropped = generator(seed, passing.identity, passing.variant, Stream.TAG_DROPOUT).random(len(free))
        free = [tag for tag, drawn in zip(free, dropped, strict=True) if drawn >= options.tag_dropout]
    if options.shuffle_tags:
        order = generator(seed, passing.identity, passing.variant, Stream.TAG_ORDER).permutation(len(free))
        free = [free[place] for place in order]
    return options.joiner.join(kept + free)
