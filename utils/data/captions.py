"""From an image's captions to the one that a step trains on."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from utils.config.options import option, require, require_fraction, require_not_negative

if TYPE_CHECKING:
    from utils.config.batch import RecordPass
    from utils.data.source_options import SourceOptions

TAGS = ("shuffle_tags", "tag_dropout", "dataset_file")  # the file may say those of a source
FOLDER_REPEATS = re.compile(r"^(\d+)_")
MAX_CAPTION = 1 << 16  # characters of a caption, and bytes of a text file of them


@dataclass(frozen=True)
class CaptionOptions:
    """How a source's captions are used.

    Attributes:
        word: what one is called.
        refusal: the option by which an image without one may end the run.
        are_expected: whether an image without one is worth a word.
        folder_is_class: whether an image's folder says what it is of, whatever stands beside it.
        are_classes: whether they are names of classes, of which a model knows only those it is trained on.
        takes_one: whether an image with two of them is a contradiction.
    """

    word: ClassVar[str] = "caption"
    refusal: ClassVar[str] = "--on_missing_caption error"
    are_expected: ClassVar[bool] = True
    folder_is_class: ClassVar[bool] = False
    are_classes: ClassVar[bool] = False
    takes_one: ClassVar[bool] = False

    trigger_word: str | None = option(None, "word put in front of each caption that does not hold it", is_text=True)
    caption_prefix: str | None = option(None, "words before each caption", is_text=True)
    caption_suffix: str | None = option(None, "words behind each caption", is_text=True)
    tag_separator: str = option(",", "what stands between the tags of a caption", is_text=True, acts_with=TAGS)
    shuffle_tags: bool = option(False, "put the tags of a caption in another order each time")
    keep_tokens: int = option(0, "first tags of a caption that are neither shuffled nor dropped", acts_with=TAGS)
    tag_dropout: float = option(0.0, "portion of the tags that are left out each time")
    caption_dropout: float = option(
        0.0,
        "portion of the samples that train without a caption, for classifier-free guidance",
        aliases=["--proportion_empty_prompts"],
    )
    on_missing_caption: str = option(
        "empty",
        "images without a caption: train on an empty one, on the name of their folder, or end the run",
        choices=["empty", "folder", "error"],
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "keep_tokens")
        require_fraction(self, "tag_dropout", "caption_dropout")
        require(self.tag_separator != "", "tag_separator", "''", "not be empty", "the usual one is a comma")

    def for_source(self, source: "SourceOptions", recorded: Sequence[str] = ()) -> "CaptionOptions":
        """How the captions of a source are used: as asked, whatever the source is."""
        return self

    def of(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Those of an image's captions that are used."""
        return captions

    def recorded(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Those by which a resumed run sees that they were edited."""
        return self.of(captions)

    def settled(self, keys: Iterable[str], where: str, source: str, in_shards: bool = False) -> "CaptionOptions":
        """The same, of a source whose images are known.

        Args:
            keys: their names within the source.
            where: the source as it is named in messages.
            source: the name of its folder.
            in_shards: whether the images are members of tar shards, which are parts of their names.

        Raises:
            UserError: if the images' folders don't say what they should.
        """
        return self

    def of_folder(self, key: str, source: str, in_shards: bool = True) -> str:
        """What stands for the caption of an image where its folder's name does."""
        return folder_caption(key, source, in_shards)

    @property
    def joiner(self) -> str:
        """What tags are joined by: a single mark is followed by a space."""
        separator = self.tag_separator
        return f"{separator} " if len(separator) == 1 and not separator.isspace() else separator

    @property
    def varies(self) -> bool:
        """Whether the same caption is another text each time."""
        return self.shuffle_tags or self.tag_dropout > 0


def refusal_of(captions: Sequence[str]) -> str:
    """Why an image can't be trained on with these captions, or ""; a tokenizer takes minutes for some megabytes."""
    longest = max(map(len, captions), default=0)
    return f"its caption has {longest:,} characters; at most {MAX_CAPTION:,} are read" if longest > MAX_CAPTION else ""


def say_the_same(first: Iterable[str], second: Iterable[str]) -> bool:
    """Whether captions are the same texts, in whatever order and with whatever white space between their words."""
    return _words(first) == _words(second)


def _words(captions: Iterable[str]) -> set[str]:
    lines = (" ".join(line.split()) for caption in captions for line in caption.splitlines())
    return set(filter(None, lines))


def is_written_list(caption: str) -> bool:
    """Whether a caption is the text of a list, tuple or mapping of texts, as Python or JSON write one.

    Its time grows with the caption's length alone.
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
    """The name of an image's folder, or of its source if it lies at its top; kohya's `10_name` is `name`.

    Args:
        in_shards: whether what ends with .tar is a shard; else it is a folder of that name.
    """
    folders = [*PurePosixPath(source).parts[-1:], *PurePosixPath(key).parent.parts]
    names = [name for name in folders if name not in ("", "images") and not (in_shards and name.endswith(".tar"))]
    name = names[-1] if names else ""
    return FOLDER_REPEATS.sub("", name).strip() or name


def compose(caption: str, options: CaptionOptions, seed: int, passing: "RecordPass") -> str:
    """The text that trains: tags shuffled and dropped, the trigger word in front, between prefix and suffix.

    Args:
        passing: whose number over the record decides on order and dropout, so that a cached variant is the live one.
    """
    if options.varies:
        caption = _vary(caption, options, seed, passing)
    trigger = options.trigger_word
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        caption = f"{trigger}{options.joiner}{caption}" if caption else trigger
    return " ".join(filter(None, [options.caption_prefix, caption, options.caption_suffix]))


def _vary(caption: str, options: CaptionOptions, seed: int, passing: "RecordPass") -> str:
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
