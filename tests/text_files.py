"""Lists of images, tar shards and their headers, as people and programs write them."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from utils.data.options import BucketOptions, SelectionOptions
from utils.data.plan import PlannedImages, plan_images
from utils.data.sources import Records
from utils.data.survey import survey

CHINESE = "一只猫坐在草地上"


def make_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(folder / name)


def planned(records: Records, folder: Path) -> PlannedImages:
    known = survey(records, folder / "memory", show_progress=False)
    options = SelectionOptions(max_bad_fraction=1.0)
    return plan_images(records, known, 32, 1, BucketOptions(), options, lambda count, bad: None)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    return file.getvalue()


def write_tar(file: Path, members: dict[str, bytes], behind: bytes = b"") -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset
    if behind:
        file.write_bytes(file.read_bytes()[:end] + behind)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)
