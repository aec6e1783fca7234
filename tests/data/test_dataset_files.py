"""Lists of sources, whole and broken."""

import time

import pytest

from tests.text_files import make_pictures
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.source_options import DataOptions, SourceOptions, source_entries
from utils.data.sources import read_records


def bomb() -> str:
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)])


class TestDatasetFile:
    @pytest.mark.parametrize(
        ("content", "named"),
        [
            (bomb(), "more than 100000 values at line 5, counting expanded aliases"),
            ("- &a {train_data_dir: x, name: *a}", "refers to a value that contains it"),
            ("[" * 200_000, "is nested more than 100 deep"),
            ("- train_data_dir: [a, [b]]", r"source 1: train_data_dir must be one value, got \['a', \['b'\]\]"),
            ("- {train_data_dir: x, repeats: " + "9" * 1000 + "}", "a number of 1000 digits"),
            ("- {train_data_dir: x, repeats: 2020-01-01}", "'repeats': YAML reads '2020-01-01' as a date"),
            ("- {train_data_dir: x, shuffle_tags: 7}", "shuffle_tags must be bool, got 7"),
            ("- train_data_dir: x\n  trigger_word: #sks\n", "'trigger_word': '#sks' is a comment in YAML; quote it"),
            ("- {train_data_dir: x, caption_prefix: Null}", "'caption_prefix': YAML reads 'Null' as nothing"),
            ("- {train_data_dir: x, 0x1F: 1}", "source 1: 0x1F is unknown"),
            ("- {train_data_dir: x, =: 1}", "source 1: = is unknown"),
            ("- {train_data_dir: x, <<: 1}", "expected a mapping or list of mappings for merging"),
            ("- {train_data_dir: x, keep_tokens: 010}", "'keep_tokens': YAML reads '010' as the number 8"),
            ("- {train_data_dir: x, ? [a] : b}", "unhashable key"),
            ("- {? {a: b} : b}", "unhashable key"),
            ("- {1: 2}", "source 1: 1 is unknown"),
            ("- {train_data_dir: x, train_data_dir: y}", "'train_data_dir' appears twice in a mapping"),
            ("null", "must hold a list of sources"),
            ("5", "must hold a list of sources"),
            ("{sources: 5}", "must hold a list of sources"),
            ("{sources: [{}], more: [1]}", "more is unknown beside sources"),
            ("- {train_data_dir: x, text_encoding: klingon}", "source 1: --text_encoding must be an encoding"),
            ("# " + "x" * 50_000_000, "has 50 MB; at most 1.05 MB are read"),
            ("\x00\x01\x02\x03", "is not text"),
        ],
    )
    def test_whatever_it_holds_is_one_line(self, tmp_path, content, named):
        make_pictures(tmp_path / "x", "0.png")
        (tmp_path / "sources.yaml").write_text(content)
        begin = time.monotonic()
        with pytest.raises(UserError, match=named) as raised:
            source_entries(DataOptions(dataset_file=str(tmp_path / "sources.yaml")), SourceOptions(), CaptionOptions())
        assert time.monotonic() - begin < 5
        assert "sources.yaml" in str(raised.value)
        assert len(str(raised.value)) < 500

    def test_yes_and_no_are_true_and_false_where_nothing_else_can_be_meant(self, tmp_path):
        make_pictures(tmp_path / "x", "0.png")
        text = "- {train_data_dir: x, shuffle_tags: yes, folder_repeats: off}\n"
        (tmp_path / "sources.yaml").write_text(text)
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        (entry,) = source_entries(data, SourceOptions(), CaptionOptions())
        assert entry.captions.shuffle_tags
        assert not entry.source.folder_repeats

    def test_texts_are_texts_as_they_stand(self, tmp_path):
        make_pictures(tmp_path / "2024", "0.png")
        text = "- {train_data_dir: 2024, trigger_word: 0x1F, name: no, caption_prefix: 1.50, caption_suffix: null}\n"
        (tmp_path / "sources.yaml").write_text(text)
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        (entry,) = source_entries(data, SourceOptions(), CaptionOptions())
        assert (entry.name, entry.captions.trigger_word, entry.captions.caption_prefix) == ("no", "0x1F", "1.50")
        assert entry.captions.caption_suffix is None

    def test_each_source_has_its_encoding_and_the_file_its_own(self, tmp_path, caplog):
        for name in ("红色", "b"):
            make_pictures(tmp_path / name, "0.png")
            (tmp_path / name / "0.txt").write_bytes("кот".encode("cp866"))
        text = "- {train_data_dir: 红色, text_encoding: cp866, name: 红色的苹果}\n"
        text += "- {train_data_dir: b, text_encoding: cp437}\n"
        (tmp_path / "sources.yaml").write_bytes(text.encode("gb18030"))
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        records = read_records(data, SourceOptions(), CaptionOptions(), 0)
        assert records.captions(0) == ("кот",)
        assert records.captions(1) != ("кот",)
        assert "--dataset_file" in caplog.text
        assert "read as gb18030 (a guess" in caplog.text
