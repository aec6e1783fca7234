"""Files that sources are made of: images, tables and tar shards; and the fates of a folder's files."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from tests.records import records_of
from utils.data.file_ledger import Ledger
from utils.data.options import BucketOptions, SelectionOptions
from utils.data.plan import plan_images
from utils.data.survey import survey


def ledger_of(folder: Path, memory: Path, **options) -> Ledger:
    """The fates of a folder's files."""
    records = records_of(folder, **options)
    known = survey(records, memory)
    selection = SelectionOptions(max_bad_fraction=1.0, min_image_size=options.pop("min_image_size", None))
    ledger = Ledger()
    ledger.train_on(plan_images(records, known, 32, 1, BucketOptions(), selection, lambda count, bad: None))
    return ledger


def fates_of(ledger: Ledger, folder: Path) -> dict[str, str]:
    """The fate of each file, as it is written down."""
    ledger.write(folder, is_last=True)
    lines = [json.loads(line) for line in (folder / "data_report.jsonl").read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    return {line["file"]: line["fate"] for line in lines}


def picture(file: Path, size: tuple[int, int] = (40, 40)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(file)
    return file


def touch(file: Path, content: str = "x") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def png(size: tuple[int, int] = (40, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "blue").save(file, "PNG")
    return file.getvalue()


def parquet(file: Path, count: int = 2, **columns) -> Path:
    """A Parquet file of images with captions, or of other columns."""
    import pyarrow as pa
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    found = columns or {"image": [png()] * count, "text": [f"{file.stem} {number}" for number in range(count)]}
    pyarrow.parquet.write_table(pa.table(found), file)
    return file


def tar(file: Path, *names: str) -> Path:
    """A tar shard: images for the names of images, else texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name in names:
            content = png() if name.endswith((".png", ".jpg")) else b"text"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file
