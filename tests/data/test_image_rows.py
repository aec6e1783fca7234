"""Images in the rows of tables."""

import io
from functools import partial
from pathlib import Path

import pytest

from tests.pictures import encoded, picture
from utils.config.options import UserError
from utils.data import images
from utils.data.captions import CaptionOptions
from utils.data.images import read_rgb, reason_of
from utils.data.options import BucketOptions
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records
from utils.data.tables import data_folders, image_of


class TestRows:
    """Rows of datasets may name files of the data folder alone."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        folder = tmp_path / "data"
        (folder / "below").mkdir(parents=True)
        for path in (folder / "a.png", folder / "below" / "b.png", tmp_path / "outside.png"):
            path.write_bytes(encoded(picture()))
        (folder / "link.png").symlink_to(tmp_path / "outside.png")
        (folder / "way").symlink_to(tmp_path)
        (folder / "inner.png").symlink_to("a.png")
        return folder

    def paths(self, folder: Path) -> dict[str, bool]:
        return {
            "a.png": True,
            "below/b.png": True,
            "below/../a.png": True,
            "inner.png": True,
            str(folder / "a.png"): True,
            str(folder.parent / "outside.png"): False,
            "../outside.png": False,
            "below/../../outside.png": False,
            "link.png": False,
            "way/outside.png": False,
            "/proc/self/environ": False,
            "~/x.png": True,  # a name within the folder, which is not there
            "https://example.com/x.png": False,
            "file:///etc/passwd": True,
            "a\x00.png": False,
            "x" * 5000: True,
        }

    def test_only_paths_within_the_folder_are_images(self, folder):
        folders = data_folders([str(folder), "name/of-the-hub", None], "parquet")
        assert folders == (folder.resolve(),)
        for path, is_within in self.paths(folder).items():
            found = image_of({"bytes": None, "path": path}, folders)
            assert isinstance(found, images.Refused) != is_within, path
            is_there = is_within and (folder / path[:200]).exists()
            if not is_there:
                with pytest.raises(OSError):
                    read_rgb(found)
            else:
                assert read_rgb(found).size == (64, 48)
        assert image_of({"bytes": b"x", "path": "/etc/passwd"}, folders) == b"x"
        assert image_of({"bytes": None, "path": None}, folders) == image_of(None, folders) == b""
        for other in (5, "text", [1], {"bytes": None, "path": str(folder / "a.png")}):
            with pytest.raises(OSError):
                read_rgb(image_of(other, ()))

    def written(self, folder: Path, paths: list[str], masks: bool = False) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        rows = [{"bytes": None, "path": path} for path in paths]
        content = [{"bytes": encoded(picture()), "path": None}] * len(rows)
        table = {"image": content if masks else rows, "text": ["x"] * len(rows)} | ({"mask": rows} if masks else {})
        pyarrow.parquet.write_table(pa.table(table), folder / "rows.parquet")

    @pytest.mark.parametrize("form", ["parquet", "saved", "masks", "streamed", "streamed masks"])
    def test_of_every_kind_of_table(self, folder, tmp_path, form):
        import datasets

        paths = ["a.png", str(folder.parent / "outside.png"), "link.png", "../outside.png"]
        self.written(folder, paths, "masks" in form)
        column = "mask" if "masks" in form else None
        source = SourceOptions(train_data_dir=str(folder), data_format="parquet", mask_column=column)
        if form == "saved":
            saved = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
            saved.save_to_disk(str(tmp_path / "saved"))
            (tmp_path / "saved" / "a.png").write_bytes(encoded(picture()))
            (tmp_path / "saved" / "link.png").symlink_to(tmp_path / "outside.png")
            source = SourceOptions(dataset_name=str(tmp_path / "saved"))
        if form.startswith("streamed"):
            found = self.streamed(folder, column)
        else:
            records = read_records(DataOptions(), source, CaptionOptions(), 0)
            given = [records.mask(row).source if column else records.image(row) for row in range(4)]
            found = [self.reason(each) for each in given]
        assert [bool(reason) for reason in found] == [False, True, True, True]
        assert all("is outside the data folder" in reason for reason in found[1:])

    def reason(self, source: str | bytes) -> str:
        try:
            read_rgb(source)
        except OSError as error:
            return reason_of(error)
        return ""

    def streamed(self, folder: Path, column: str | None) -> list[str]:
        from utils.data.stream import Lane, open_stream

        source = SourceOptions(train_data_dir=str(folder / "rows.parquet"), mask_column=column)
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 64, BucketOptions())
        lane = Lane(stream, 0, 1, 1, 0)
        samples = [lane._sample(row, number, 0) for number, row in enumerate(stream.dataset)]
        if column is not None:
            return [self.reason(sample.record.mask.source) for sample in samples]
        reasons = iter([reason for _, reason in lane.bad])
        return ["" if sample else next(reasons) for sample in samples]

    @pytest.mark.parametrize("column", [[1, 2], [0.5, 1.0], [True, False], [{"a": 1}, {"a": 2}]])
    @pytest.mark.parametrize("is_streamed", [False, True])
    def test_a_column_of_something_else_is_one_line(self, tmp_path, column, is_streamed):
        import pyarrow as pa
        import pyarrow.parquet

        from utils.data.stream import open_stream

        pyarrow.parquet.write_table(pa.table({"image": column, "text": ["a", "b"]}), tmp_path / "rows.parquet")
        source = SourceOptions(train_data_dir=str(tmp_path))
        stream = partial(open_stream, resolution=64, buckets=BucketOptions())
        read = stream if is_streamed else partial(read_records, seed=0)
        with pytest.raises(UserError, match=r"--image_column image must hold images, .* got ") as raised:
            read(DataOptions(streaming=is_streamed), source, CaptionOptions())
        assert "\n" not in str(raised.value)

    def test_a_tar_that_claims_more_than_there_is_costs_nothing(self, tmp_path):
        import tarfile

        from utils.data.tar_shards import read_tars

        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in ("a.png", "b.png"):
                info = tarfile.TarInfo(name)
                info.size = len(encoded(picture()))
                archive.addfile(info, io.BytesIO(encoded(picture())))
        table = read_tars([tmp_path / "x.tar"])
        table._places[1, 2] = 10 * 1000**4
        assert read_rgb(table.image(0)).size == (64, 48)
        with pytest.raises(OSError, match="over 1024 MiB"):
            table.image(1)
