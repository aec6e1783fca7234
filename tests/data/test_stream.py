"""Streamed data: order, workers and resumption."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import make_picture
from utils.data.captions import CaptionOptions
from utils.data.options import BucketOptions
from utils.data.source_options import DataOptions, SourceOptions


class TestStream:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        """Four Parquet shards of ten images each in two shapes; one image is cut off, one empty."""
        import pyarrow as pa
        import pyarrow.parquet

        for shard in range(4):
            rows = {"image": [], "text": [], "width": [], "height": []}
            for number in range(10):
                size = (40, 64) if number % 2 else (64, 40)
                file = io.BytesIO()
                Image.new("RGB", size, (60 * shard, 20 * number, 0)).save(file, "PNG")
                content = file.getvalue()
                if (shard, number) in ((1, 3), (2, 4)):
                    content = content[:60] if shard == 1 else b""
                for column, value in zip(rows, (content, f"{shard} {number}", *size), strict=True):
                    rows[column].append(value)
            pyarrow.parquet.write_table(pa.table(rows), tmp_path / f"{shard}.parquet")
        return tmp_path

    def stream(self, shards: Path):
        from utils.data.stream import open_stream

        buckets = BucketOptions(use_aspect_ratio_buckets=True, bucket_step=8)
        data = DataOptions(streaming=True, shuffle_buffer_size=8)
        return open_stream(data, SourceOptions(train_data_dir=str(shards)), CaptionOptions(), 64, buckets)

    def pieces(self, shards: Path, rank: int = 0, num_processes: int = 1, first_step: int = 0, last_step: int = 10):
        stream = self.stream(shards)
        batches = stream.batches(8, 2, seed=3)
        return list(stream.pieces(batches, 2, rank, num_processes, first_step, last_step))

    def contents(self, pieces) -> dict[tuple[int, int], tuple[str, ...]]:
        return {
            (piece.step, slot): piece.streamed.captions(place)
            for piece in pieces
            for place, slot in enumerate(piece.slots)
        }

    def test_the_same_batches_on_any_number_of_processes_and_after_a_resume(self, shards):
        alone = self.pieces(shards)
        contents = self.contents(alone)
        assert len(contents) == 80
        for piece in alone:
            assert len({sample.bucket for sample in piece.streamed.samples}) == 1
        for num_processes in (2, 4):
            shared = [piece for rank in range(num_processes) for piece in self.pieces(shards, rank, num_processes)]
            assert self.contents(shared) == contents
        resumed = self.contents(self.pieces(shards, first_step=6))
        assert resumed == {place: captions for place, captions in contents.items() if place[0] >= 6}

    def test_each_image_comes_once_a_pass_in_another_order(self, shards):
        counts = Counter(self.contents(self.pieces(shards)).values())
        assert len(counts) == 38  # the empty one and the one that is cut off are passed over
        assert max(counts.values()) <= 3

    @pytest.mark.parametrize("micro_batch", [1, 2])
    def test_a_run(self, train, shards, micro_batch):
        flags = ["--streaming", "--max_train_steps", 12, "--train_batch_size", micro_batch, "--random_flip"]
        whole = train("sd", *flags, "--dataloader_num_workers", 1, data=shards, out="whole")
        assert json.loads((whole / "data_report.json").read_text())["streamed"]
        train("sd", *flags[:2], 5, *flags[3:], data=shards, out="parts")
        parts = train("sd", *flags, "--resume_from_checkpoint", "latest", data=shards, out="parts")
        lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, parts)]
        assert [json.loads(line)["train_loss"] for line in lines[0]] == [
            json.loads(line)["train_loss"] for line in lines[1]
        ]

    def test_a_dry_run_examines_the_first(self, train, shards, capsys):
        flags = ["--streaming", "--max_train_steps", 2, "--use_aspect_ratio_buckets", "--bucket_step", 8, "--dry_run"]
        out = train("sd", *flags, "--resolution", 64, "--train_batch_size", 4, data=shards)
        said = capsys.readouterr().out
        assert "38 distinct" in said
        assert "the file is empty" in said
        assert "the image is cut off" in said
        sheet = np.asarray(Image.open(out / "contact_sheet.png"))
        assert (sheet != 255).any(axis=2).mean() > 0.2

    def test_a_stream_without_samples_is_examined(self, shards):
        from utils.training.dry_run import examine_stream

        lines = examine_stream(self.stream(shards), [], lambda texts: np.zeros(len(texts), np.int64), 75)
        assert lines == ["  no samples came from a stream of unknown length in 4 shards"]

    def test_what_does_not_go(self, refused, shards, tmp_path):
        refused(["--streaming"], "--max_train_steps", data=shards)
        flags = ["--streaming", "--max_train_steps", 2, "--use_aspect_ratio_buckets", "--bucket_step", 8]
        refused([*flags, "--width_column", "w"], "needs the images' sizes in the columns", data=shards)
        make_picture(tmp_path / "pictures" / "a.png")
        refused(flags[:3], "leave --streaming out for a folder of images", data=tmp_path / "pictures")
