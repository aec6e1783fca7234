"""Tar shards, whole and broken."""

import bz2
import gzip
import io
import lzma
import tarfile
import time

import pytest

from tests.records import found, records_of
from tests.text_files import CHINESE, header, png, write_tar
from utils.config.options import UserError
from utils.data.captions import MAX_CAPTION


class TestTars:
    def test_members_in_capitals_and_other_encodings(self, tmp_path):
        members = {"0.PNG": png(), "0.TXT": CHINESE.encode("gbk"), "1.png": png(), "1.txt": b"a dog"}
        write_tar(tmp_path / "a.tar", members)
        assert found(records_of(tmp_path)) == {"a.tar/0.PNG": (CHINESE,), "a.tar/1.png": ("a dog",)}
        assert dict(records_of(tmp_path / "a.tar", text_encoding="ascii").refused) == {
            "a.tar/0.PNG": "its caption file 0.TXT can't be read: is not ascii: byte 0 can't be decoded"
        }

    def test_text_members_are_bounded(self, tmp_path):
        members = {"0.png": png(), "0.txt": b"x" * (MAX_CAPTION + 1), "1.png": png(), "1.json": b"[" * 10**5}
        write_tar(tmp_path / "a.tar", members | {"2.png": png()})
        records = records_of(tmp_path)
        assert list(found(records)) == ["a.tar/2.png"]
        assert dict(records.refused) == {
            "a.tar/0.png": "its caption file 0.txt can't be read: has over 65.5 kB; no more are read",
            "a.tar/1.png": "its caption file 1.json can't be read: is nested more than 100 deep",
        }

    @pytest.mark.parametrize(
        ("behind", "reason"),
        [
            (header("1.txt", 10**13), "the shard ends in the middle of it; its header claims 10 TB"),
            (header("1.png", 10**13), "the shard ends in the middle of it; its header claims 10 TB"),
            (header("././@LongLink", 10**13, b"L") + b"x" * 512, "a header of 10 TB"),
            (header("x", 10**9, b"x") + b"x" * 512, "a header of 1 GB"),
            (header("x", 512, b"L") * 3000, "the shard is broken"),
            (header("1.txt", -1024), "a header claims -1024 bytes"),
            (header("1.bin", -1024, b"Z"), "a header claims -1024 bytes"),
            (header("x", -1024, b"x"), "the shard is broken"),
            (header("x", 10**4, b"x") + b"1" * 10_240, "the shard is broken"),
            (b"junk" * 200, "invalid header"),
            (bytes(10_240) + header("1.png", 512) + b"x" * 512, "data follows its end"),
        ],
    )
    def test_headers_that_lie_cost_what_follows(self, tmp_path, behind, reason):
        write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": b"a dog"}, behind)
        begin = time.monotonic()
        records = records_of(tmp_path)
        assert time.monotonic() - begin < 5
        assert found(records) == {"a.tar/0.png": ("a dog",)}
        assert any(reason in told for _, told in records.refused)
        assert all(name.startswith("a.tar") for name, _ in records.refused)

    def test_two_samples_of_one_name_are_named(self, tmp_path, caplog):
        members = [("0.png", png()), ("0.txt", b"one"), ("0.png", png()), ("0.txt", b"two"), ("1.left.png", png())]
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name, content in [*members, ("1.right.png", png())]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        records = records_of(tmp_path)
        assert found(records) == {"a.tar/0.png": ("one",), "a.tar/1.left.png": ("",)}
        assert "skipped 2 images because another image of their sample comes first, such as a.tar/0.png;" in caplog.text
        assert "such as a.tar/0.txt instead of a.tar/another 0.txt" in caplog.text
        assert "metadata file or split" not in caplog.text
        words = [fate.word for _, fate in records.sources[0].table.member_fates]
        assert sorted(words) == ["caption", "duplicate", "duplicate", "other"]

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (gzip.compress(b"x" * 100, mtime=0), "compressed with gzip; decompress it with gunzip"),
            (bz2.compress(b"x"), "compressed with bzip2"),
            (lzma.compress(b"x"), "compressed with xz"),
            (b"PK\x03\x04" + b"x" * 600, "a zip archive; unpack it"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; fetch the file itself"),
            (b"<!DOCTYPE html><html>", "a web page; fetch the file again"),
        ],
    )
    def test_what_is_only_called_tar_is_named(self, tmp_path, content, kind):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=f"a.tar: is not a tar file but {kind}"):
            records_of(tmp_path)
        write_tar(tmp_path / "b.tar", {"BZh.png": png()})
        assert len(records_of(tmp_path).refused) == 1
