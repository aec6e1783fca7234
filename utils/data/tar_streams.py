"""Tar shards as streams of the `datasets` library.

Shards on disk are read as without streaming. Shards on the Hub are read member by member, and this module groups the
members into samples without decoding them. The library's own builder only knows the image extensions of its first
samples, and stops reading a shard at text that is not UTF-8 or at an invalid number.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from datasets import Features, Image, List, SplitGenerator, Value
from datasets.builder import Key
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import xopen

from utils.config.options import UserError
from utils.config.user_files import CertainTexts
from utils.data.file_listing import Fates
from utils.data.folders import PAIR_SUFFIXES, caption_limit, is_caption_file, is_image
from utils.data.images import MOST_BYTES
from utils.data.tar_shards import (
    CAPTION_COLUMN,
    IMAGE_COLUMN,
    MASK_COLUMN,
    REASON_COLUMN,
    is_mask,
    members_of,
    read_tars,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

SAMPLES_LOOKED_AT = 100  # first samples of a shard, whose extensions become columns
Members = dict[str, tuple[str, bytes]]
"""The names and bytes of a sample's files by extension, such as jpg or mask.png, in lower case."""
APART = "its members are not consecutive in the shard, so that a stream can't group them; store them together"


@dataclass(frozen=True)
class RemoteShard:
    """A tar shard on the Hub or at a URL.

    Attributes:
        address: its URL.
        config: the library's download settings, with the token.
    """

    address: str
    config: Any = field(repr=False)

    @property
    def name(self) -> str:
        """The file name in its URL."""
        return PurePosixPath(self.address).name

    def samples(self, refused: list[tuple[str, str]]) -> Iterator[Members]:
        """Yields the members of each sample: consecutive files with the same name up to the first dot.

        Args:
            refused: receives (name, reason) of members that are skipped.
        """
        members: Members = {}
        current, before = "", set()
        with xopen(self.address, "rb", download_config=self.config) as file:
            found = members_of(file, self.name, f"{self.name}/", refused, Fates(Path()), _most_read)
            for sample, name, _, _, content in found:
                if sample != current:
                    if members:
                        yield members
                    before.add(current)
                    current, members = sample, {}
                if sample in before:
                    refused.append((f"{self.name}/{name}", APART))
                    continue
                ending = PurePosixPath(name).name.partition(".")[2].lower()
                members.setdefault(ending, (name, content))
        if members:
            yield members


def _most_read(name: str) -> int:
    return caption_limit(name) if is_caption_file(name) else MOST_BYTES


class TarSamples(WebDataset):
    """The `datasets` builder for tar shards.

    A row's image and captions are chosen as without streaming. In addition, each extension in the first samples, in
    lower case, is a column of bytes.

    Attributes:
        mask_ending: extension of masks, from the first dot of their names, such as mask.png; None without masks.
    """

    mask_ending: str | None = None

    def _split_generators(self, dl_manager: Any) -> list:
        shards = {
            split: [RemoteShard(address, dl_manager.download_config) for address in addresses]
            for split, addresses in dl_manager.download(self.config.data_files).items()
        }
        endings: dict[str, None] = {}
        for shard in itertools.chain.from_iterable(shards.values()):
            found = list(itertools.islice(shard.samples([]), SAMPLES_LOOKED_AT))
            endings |= dict.fromkeys(ending for members in found for ending in members)
            if found:
                break
        columns = {ending: Image() if is_image(f"x.{ending}") else Value("binary") for ending in endings}
        texts = {"path": Value("string"), "bytes": Value("binary")}
        own = {IMAGE_COLUMN: Image(), CAPTION_COLUMN: texts, MASK_COLUMN: Image(), REASON_COLUMN: Value("string")}
        self.info.features = Features(columns | own)
        return [SplitGenerator(split, {"shards": each}) for split, each in shards.items()]

    def _generate_examples(self, shards: Sequence[RemoteShard]) -> Iterator[tuple[Key, dict[str, Any]]]:
        for number, shard in enumerate(shards):
            rows = itertools.count()
            refused: list[tuple[str, str]] = []
            for members in shard.samples(refused):
                yield Key(number, next(rows)), self._row(members)
                yield from ((Key(number, next(rows)), self._left_out(*each)) for each in refused)
                refused.clear()
            yield from ((Key(number, next(rows)), self._left_out(*each)) for each in refused)

    def _left_out(self, name: str, reason: str) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(self.info.features)
        return row | {IMAGE_COLUMN: {"path": name, "bytes": b""}, REASON_COLUMN: reason}

    def _row(self, members: Members) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(self.info.features)
        for ending, (name, content) in members.items():
            if ending in row:
                is_file = isinstance(self.info.features[ending], Image)
                row[ending] = {"path": name, "bytes": content} if is_file else content
        images = [file for file in members.values() if is_image(file[0]) and not is_mask(file[0], self.mask_ending)]
        masks = [file for file in members.values() if is_mask(file[0], self.mask_ending)]
        texts = [file for file in members.values() if is_caption_file(file[0])]
        texts.sort(key=lambda file: PAIR_SUFFIXES.index(_suffix(file[0])))
        for column, files in ((IMAGE_COLUMN, images), (CAPTION_COLUMN, texts), (MASK_COLUMN, masks)):
            if files:
                name, content = files[0]
                row[column] = {"path": name, "bytes": content}
        return row


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def local_samples(
    shards: Mapping[str, Sequence[Path]], mask_ending: str | None, encoding: str | None
) -> dict[str, "IterableDataset"]:
    """Returns the streams of tar shards on disk, by split; their samples are the same as without streaming.

    A row has an image, a list of captions, a mask or None, and the reason why the sample is skipped, or "".
    """
    from datasets import IterableDataset

    texts = {
        IMAGE_COLUMN: Image(),
        CAPTION_COLUMN: List(Value("string")),
        MASK_COLUMN: Image(),
        REASON_COLUMN: Value("string"),
    }
    return {
        split: IterableDataset.from_generator(
            _rows_of_shards,
            features=Features(texts),
            gen_kwargs={"shards": [str(shard) for shard in files], "mask_ending": mask_ending, "encoding": encoding},
        )
        for split, files in shards.items()
    }


def _rows_of_shards(shards: Sequence[str], mask_ending: str | None, encoding: str | None) -> Iterator[dict[str, Any]]:
    for shard in map(Path, shards):
        try:
            table = read_tars([shard], mask_ending, encoding, CertainTexts)
        except UserError as error:
            yield _left_out(shard.name, str(error))
            continue
        for key, reason in table.refused:
            yield _left_out(f"{shard.name}/{key.removeprefix(f'{shard.name}/')}", reason)
        for row in range(len(table)):
            try:
                image, mask = table.image(row), table.mask(row)
            except OSError as error:
                yield _left_out(table.key(row), str(error))
                continue
            yield {
                IMAGE_COLUMN: {"path": table.key(row), "bytes": image},
                CAPTION_COLUMN: list(table.captions(row)),
                MASK_COLUMN: None if mask is None else {"path": None, "bytes": mask},
                REASON_COLUMN: "",
            }


def _left_out(name: str, reason: str) -> dict[str, Any]:
    return {IMAGE_COLUMN: {"path": name, "bytes": b""}, CAPTION_COLUMN: [], MASK_COLUMN: None, REASON_COLUMN: reason}


def tar_samples(
    data_files: Any, cache_dir: str | None, mask_ending: str | None, base_path: str | None = None
) -> dict[str, "IterableDataset"]:
    """Returns the streams of tar shards, by split.

    Args:
        data_files: the shards by split: patterns, or the data files of another builder of the library.
        cache_dir: --cache_dir.
        mask_ending: see `TarSamples`.
        base_path: folder or repository that relative patterns start from.
    """
    builder = TarSamples(cache_dir=cache_dir, data_files=data_files, base_path=base_path, dataset_name="tar_samples")
    builder.mask_ending = mask_ending
    return builder.as_streaming_dataset()
