"""Examines the data in a dry run: reports problems, and draws a contact sheet of what the model will see."""

import itertools
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.config.output_folder import check_writable
from utils.config.terminal import one_line, progress_bar
from utils.data.buckets import BucketPlan
from utils.data.crop_pixels import cut_out
from utils.data.images import read_rgb, reason_of
from utils.data.loader import pass_of, text_of
from utils.data.options import ImageOptions
from utils.data.order import Draw, GlobalBatches
from utils.data.plan import PlannedImages, upscaling
from utils.data.sources import Records
from utils.data.stream import StreamedBatches, StreamedImages, StreamedRecords
from utils.data.survey import add_digests, map_chunks
from utils.models.base import Family
from utils.runtime.processes import write_json
from utils.training.preparation import DataPreparation

MOST_DECODED = 20_000
TILE = 192
CAPTION_LINES = 4
DIMMED = 0.25  # brightness of masked-out areas
SHEET_TILES = 24
QUICK_SECONDS = 2.0  # of a training run's contact sheet
STREAMED_SAMPLES = 200  # samples of a stream to examine


@dataclass(frozen=True)
class Diagnosis:
    """What a dry run found in the data.

    Attributes:
        num_decoded: images that were fully decoded to find broken ones.
        broken: reason by image name, for images whose header can be read but that can't be decoded.
        duplicates: one list of names for each set of images with identical bytes.
        token_counts: [texts] number of tokens of each distinct caption.
        max_tokens: tokens that the model reads.
        cut_captions: some of the captions that are longer than that.
        cropped: [N] fraction of each image's area that is cropped away.
        enlarged: [N] factor by which each image is enlarged; below 1 it is reduced.
        steps_per_epoch: optimizer steps per epoch.
        cache_bytes: bytes that `--cache_latents` and `--cache_text_embeddings` would take, by kind.
    """

    images: PlannedImages = field(repr=False)
    num_decoded: int
    broken: dict[str, str]
    duplicates: list[list[str]]
    token_counts: np.ndarray
    max_tokens: int
    cut_captions: list[str]
    cropped: np.ndarray
    enlarged: np.ndarray
    steps_per_epoch: float
    cache_bytes: dict[str, int]

    def lines(self) -> list[str]:
        """Returns the findings as text, one per line."""
        images = self.images
        bad = images.bad | self.broken
        sizes = images.survey.sizes
        # A label of 15 columns, then the finding.
        shown = [
            f"images         {len(images.records):,} of {images.num_listed:,} listed",
            f"sizes          {_span(sizes[:, 0])} wide, {_span(sizes[:, 1])} high",
            *self._bucket_lines(),
            f"cropped away   {self.cropped.mean():.1%} of an image's area on average; over 20 % in "
            f"{int((self.cropped > 0.2).sum()):,} images; {self._worst(self.cropped, '{:.0%}')}",
            f"enlarged       {int((self.enlarged > 1).sum()):,} images; {self._worst(self.enlarged, '{:.2f} times')}",
            f"captions       {len(self.token_counts):,} distinct, {images.missing_captions:,} images without one; "
            f"{_span(self.token_counts)} tokens",
            *(
                f"encodings      {textwrap.shorten(finding, 150)}"
                for source in images.records.sources
                for finding in (source.table.texts.findings() if source.table.texts else ())
            ),
            f"cut captions   {int((self.token_counts > self.max_tokens).sum()):,} have over {self.max_tokens} tokens"
            + (", see --max_token_length" if len(self.cut_captions) else ""),
            *(f"               {textwrap.shorten(caption, 100)}" for caption in self.cut_captions[:3]),
            f"duplicates     {sum(len(names) - 1 for names in self.duplicates):,} images are byte-identical to another",
            *(f"               {' = '.join(names[:4])}" for names in self.duplicates[:5]),
            f"bad files      {len(bad):,} of {images.num_listed:,}; {self.num_decoded:,} decoded to find them",
            *(f"               {name}: {reason}" for name, reason in list(bad.items())[:20]),
            *(f"left out       {count:,}: {reason}" for reason, count in images.filtered.items()),
            *(f"converted      {count:,}: {name}" for name, count in images.survey.oddity_counts().items()),
            f"epoch          {self.steps_per_epoch:,.1f} optimizer steps",
            *(f"cache          {_bytes(count)} of {kind}" for kind, count in self.cache_bytes.items()),
        ]
        return [f"  {line}" for line in shown]

    def record(self) -> dict[str, object]:
        """Returns all findings as JSON-ready values."""
        return self.images.report() | {
            "unreadable": dict(sorted((self.images.bad | self.broken).items())),
            "decoded": self.num_decoded,
            "duplicates": self.duplicates,
            "distinct_captions": len(self.token_counts),
            "cut_captions": int((self.token_counts > self.max_tokens).sum()),
            "mean_cropped_away": float(self.cropped.mean()),
            "enlarged": int((self.enlarged > 1).sum()),
            "steps_per_epoch": self.steps_per_epoch,
            "cache_bytes": self.cache_bytes,
        }

    def _bucket_lines(self) -> list[str]:
        plan = self.images.plan
        counts = np.bincount(plan.bucket_of, minlength=len(plan.sizes))
        lines = []
        for number, (width, height) in enumerate(plan.sizes):
            head = "buckets        " if not lines else " " * 15
            cropped = self.cropped[plan.bucket_of == number].mean()
            lines.append(f"{head}{width:>5} x {height:<5}{counts[number]:>9,} images, {cropped:6.1%} cropped away")
        for (width, height), count, goals in plan.merged:
            others = ", ".join(f"{goal[0]}x{goal[1]}" for goal in goals)
            lines.append(f"{' ' * 15}{width:>5} x {height:<5}{count:>9,} images moved to {others}: fewer than a group")
        return lines

    def _worst(self, values: np.ndarray, form: str) -> str:
        worst = int(values.argmax())
        return f"at most {form.format(float(values[worst]))} ({self.images.records.key(worst)})"


def examine(
    images: PlannedImages,
    batches: GlobalBatches,
    texts: Sequence[str],
    token_counts: Iterable[int],
    max_tokens: int,
    cache_bytes: dict[str, int],
    folder: Path,
) -> Diagnosis:
    """Decodes the images, finds duplicates, and measures how much the buckets crop and enlarge.

    Args:
        texts: the distinct captions.
        token_counts: tokens of each caption.
        max_tokens: tokens that the model reads.
        cache_bytes: bytes that the cache would take, by kind.
        folder: folder of remembered file facts (sizes, digests).
    """
    counts = np.fromiter(token_counts, np.int64, len(texts))
    long = [texts[index] for index in np.argsort(-counts, kind="stable")[:3] if counts[index] > max_tokens]
    num_decoded, broken = decode_all(images.records)
    return Diagnosis(
        images=images,
        num_decoded=num_decoded,
        broken=broken,
        duplicates=find_duplicates(images, folder),
        token_counts=counts,
        max_tokens=max_tokens,
        cut_captions=long,
        cropped=cropped_away(images.survey.sizes, images.plan),
        enlarged=upscaling(images.survey.sizes, images.plan),
        steps_per_epoch=float(batches.samples_per_epoch / batches.size),
        cache_bytes=cache_bytes,
    )


def decode_all(records: Records) -> tuple[int, dict[str, str]]:
    """Returns (number of images decoded, reason by name for those that failed); samples evenly if there are many."""
    chosen = np.unique(np.linspace(0, len(records) - 1, min(len(records), MOST_DECODED)).astype(int))
    broken: dict[str, str] = {}
    with progress_bar(total=len(chosen), desc="decoding images", leave=False) as progress:
        for found in map_chunks(_decode, records, chosen, many=50, size=20):
            broken |= found
            progress.update(min(20, len(chosen) - progress.n))
    return len(chosen), broken


def _decode(records: Records, indices: np.ndarray) -> dict[str, str]:
    broken = {}
    for index in indices:
        try:
            read_rgb(records.image(int(index)))
        except (OSError, ValueError) as error:
            broken[records.key(int(index))] = reason_of(error)
    return broken


def find_duplicates(images: PlannedImages, folder: Path) -> list[list[str]]:
    """Returns lists of names of byte-identical images; reads only files of equal length."""
    lengths = images.survey.num_bytes
    values, counts = np.unique(lengths[lengths >= 0], return_counts=True)
    add_digests(images.survey, images.records, np.isin(lengths, values[counts > 1]), folder, show_progress=True)
    names = defaultdict(list)
    for index in np.flatnonzero(images.survey.digests != b""):
        names[images.survey.digests[index]].append(images.records.key(int(index)))
    return [same for same in names.values() if len(same) > 1]


def cropped_away(sizes: np.ndarray, plan: BucketPlan) -> np.ndarray:
    """Returns the fraction of each image's area that its bucket crops away, [N]."""
    targets = np.array(plan.sizes)[plan.bucket_of]
    scale = (targets / sizes).max(1)
    return 1 - targets.prod(1) / (sizes.astype(np.float64).prod(1) * scale**2)


class Seen(NamedTuple):
    """A sample of the first steps: its records, its draw from them, and its step and slot in the batch."""

    records: Records | StreamedRecords
    draw: Draw
    step: int
    slot: int


def first_seen(images: PlannedImages, batches: GlobalBatches, count: int) -> Iterator[Seen]:
    """Yields the samples of the first steps."""
    for number in range(min(count, 4 * len(images.records))):
        step, slot = divmod(number, batches.size)
        yield Seen(images.records, batches.draw(step, slot), step, slot)


def first_streamed(images: StreamedImages, batches: StreamedBatches, count: int) -> Iterator[Seen]:
    """Reads and yields the samples of a stream's first steps."""
    pieces = images.pieces(batches, batches.group_size, 0, 1, 0, -(-count // batches.size))
    for piece in pieces:
        for place, slot in enumerate(piece.slots):
            yield Seen(piece.streamed, piece.streamed.draw(place), piece.step, slot)


def examine_stream(
    images: StreamedImages, samples: Sequence[Seen], count_tokens: Callable[[list[str]], np.ndarray], max_tokens: int
) -> list[str]:
    """Returns the findings on the first samples of a stream, one per line."""
    if not samples:
        return [f"  no samples came from {images.describe()}"]
    texts = sorted({caption for seen in samples for caption in seen.records.captions(seen.draw.record)})
    tokens, broken = count_tokens(texts), {}
    buckets: Counter[tuple[int, int]] = Counter()
    for records, draw, _, _ in samples:
        buckets[images.plan.sizes[draw.bucket]] += 1
        try:
            read_rgb(records.image(draw.record))
        except (OSError, ValueError) as error:
            broken[records.key(draw.record)] = reason_of(error)
    bad = dict(bad for seen in samples for bad in seen.records.bad) | broken
    return [
        f"  the first {len(samples)} samples of {images.describe()}, in stream order",
        *(f"  buckets        {width:>5} x {height:<5}{count:>6}" for (width, height), count in sorted(buckets.items())),
        f"  captions       {len(texts):,} distinct; {_span(tokens)} tokens; {int((tokens > max_tokens).sum())} are cut",
        f"  no caption     {images.counts['missing_captions']:,} of {images.counts['read']:,} read",
        f"  bad files      {len(bad):,}",
        *(f"                 {name}: {reason}" for name, reason in list(bad.items())[:20]),
        *(f"  masks          {line}" for line in images.census.warnings()),
    ]


def examine_data(
    preparation: DataPreparation,
    family: Family,
    images: PlannedImages | StreamedImages,
    batches: GlobalBatches | StreamedBatches,
    folder: Path,
) -> str:
    """Returns the findings on the data, one per line; writes the contact sheet and `dry_run_report.json`."""
    check_writable("output_dir", folder, is_folder=True)
    sheet, report = folder / "contact_sheet.png", folder / "dry_run_report.json"
    cache, tokenize = preparation.cache, family.tokenizer()
    variants = cache.cut_variants, cache.text_variants
    # A stream: its first samples.
    if isinstance(images, StreamedImages):
        samples = list(first_streamed(images, batches, STREAMED_SAMPLES))
        images.census.check()
        draw_sheet(samples, images.plan.sizes, preparation.image, batches.seed, variants, sheet)
        lines = examine_stream(images, samples, tokenize.num_tokens, tokenize.max_tokens)
        lines = [*(f"  {line}" for line in preparation.ledger.lines()), *lines]
        return "\n".join(["data", *map(one_line, lines), f"  seen by the model: {sheet}"])
    # Listed images: all of them.
    texts = preparation.texts(images)
    cache_bytes = preparation.cache_bytes(family, images, len(texts))
    counts = tokenize.num_tokens(texts)
    found = examine(images, batches, texts, counts, tokenize.max_tokens, cache_bytes, cache.folder)
    samples = first_seen(images, batches, SHEET_TILES)
    draw_sheet(samples, images.plan.sizes, preparation.image, batches.seed, variants, sheet)
    write_json(report, found.record() | preparation.ledger.report())
    lines = [*(f"  {line}" for line in preparation.ledger.lines()), *found.lines()]
    return "\n".join(["data", *map(one_line, lines), f"  seen by the model: {sheet}; all of this: {report}"])


def draw_quickly(preparation: DataPreparation, images: PlannedImages, batches: GlobalBatches, file: Path) -> None:
    """Draws the contact sheet in about QUICK_SECONDS: with fewer images if they are slow to read."""
    ends, cache = time.perf_counter() + QUICK_SECONDS, preparation.cache
    seen = itertools.takewhile(lambda _: time.perf_counter() < ends, first_seen(images, batches, SHEET_TILES))
    variants = cache.cut_variants, cache.text_variants
    draw_sheet(seen, images.plan.sizes, preparation.image, batches.seed, variants, file)


def draw_sheet(
    samples: Iterable[Seen],
    sizes: Sequence[tuple[int, int]],
    options: ImageOptions,
    seed: int,
    variants: tuple[int | None, int | None],
    file: Path,
) -> None:
    """Draws a PNG contact sheet of what the model will see in its first steps: cropped, flipped, captions below.

    Masked-out areas are dimmed.

    Args:
        samples: the samples of the first steps, in order.
        sizes: (width, height) of the buckets in pixels.
        options: how images are cropped and flipped.
        seed: seed of the run.
        variants: number of passes after which crops and tag orders repeat; None where they do not.
        file: the PNG to write.
    """
    # One tile per sample; unreadable images are skipped.
    tiles = []
    for records, draw, step, slot in itertools.islice(samples, SHEET_TILES):
        text, dropped = text_of(records, draw, seed, step, slot, variants[1])
        width, height = size = sizes[draw.bucket]
        image, mask, passing = (
            records.image(draw.record),
            records.mask(draw.record),
            pass_of(records, draw, variants[0]),
        )
        try:
            found = cut_out(image, mask, size, options, seed, passing, (height, width) if records.has_masks else None)
        except (OSError, ValueError):
            continue
        counted = 1.0
        if found.mask is not None:  # dim areas where the loss does not count
            counted = found.mask / 255 * (1 - DIMMED) + DIMMED
        shown = (found.pixels * counted).astype(np.uint8).transpose(1, 2, 0)
        pixels = Image.fromarray(shown[:, :, 0] if shown.shape[2] == 1 else shown).convert("RGB")
        caption = "(caption dropped)" if dropped else text or "(no caption)"
        tiles.append(_tile(pixels, f"{width}x{height}", caption))
    # Arrange the tiles in a grid.
    columns = min(6, max(1, len(tiles)))
    rows = -(-len(tiles) // columns)
    width, height = TILE + 16, TILE + 16 + 14 * (CAPTION_LINES + 1)
    sheet = Image.new("RGB", (columns * width, max(1, rows) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def _tile(image: Image.Image, size: str, text: str) -> Image.Image:
    tile = Image.new("RGB", (TILE + 16, TILE + 16 + 14 * (CAPTION_LINES + 1)), "white")
    scale = TILE / max(image.size)
    small = image.resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.LANCZOS)
    tile.paste(small, (8 + (TILE - small.width) // 2, 8 + (TILE - small.height) // 2))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default()
    draw.text((8, TILE + 10), size, fill="grey", font=font)
    lines = textwrap.wrap(text, 34, max_lines=CAPTION_LINES, placeholder=" ...")
    for number, line in enumerate(lines, start=1):
        try:
            draw.text((8, TILE + 10 + 14 * number), line, fill="black", font=font)
        except UnicodeError:  # without FreeType, PIL's built-in font has Latin letters only
            draw.text((8, TILE + 10 + 14 * number), line.encode("ascii", "replace").decode(), fill="black", font=font)
    return tile


def _span(values: np.ndarray) -> str:
    """Formats the smallest, largest and median value."""
    return f"{int(values.min()):,} to {int(values.max()):,} (median {int(np.median(values)):,})"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
