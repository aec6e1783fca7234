"""The survey of images by their headers."""

from pathlib import Path

import numpy as np
import pytest

from tests.pictures import make_picture
from tests.records import plan, records_of
from utils.config.options import UserError
from utils.data import survey as headers
from utils.data.images import read_header
from utils.data.options import SelectionOptions
from utils.data.survey import add_digests, survey


class TestSurvey:
    def test_headers_are_read_once(self, tmp_path, monkeypatch):
        folder = tmp_path / "data"
        for number in range(4):
            make_picture(folder / f"{number}.png", (30 + number, 20))
        monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
        first = survey(records_of(folder), tmp_path / "memory")
        make_picture(folder / "2.png", (77, 55))
        make_picture(folder / "new.png", (11, 12))
        read = []
        original = read_header
        monkeypatch.setattr("utils.data.survey.read_header", lambda image: read.append(image) or original(image))
        second = survey(records_of(folder), tmp_path / "memory")
        assert sorted(Path(path).name for path in read) == ["2.png", "new.png"]
        assert first.sizes.tolist() == [[30, 20], [31, 20], [32, 20], [33, 20]]
        assert second.sizes.tolist() == [[30, 20], [31, 20], [77, 55], [33, 20], [11, 12]]

    @pytest.mark.parametrize("is_plain_first", [False, True])
    def test_digests_that_an_earlier_release_remembers_are_taken_over(self, tmp_path, monkeypatch, is_plain_first):
        """No file is read whole again for what only its header tells anew, but one that was changed."""
        monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
        for number in range(4):
            make_picture(tmp_path / "data" / f"{number}.png", (30 + number, 20))
        memory, wanted = tmp_path / "memory", np.ones(4, bool)
        with monkeypatch.context() as patch:
            patch.setattr("utils.data.survey.NOW", headers.BEFORE)
            patch.setattr("utils.data.survey.REMEMBERED", headers.REMEMBERED_BEFORE)
            first = survey(records_of(tmp_path / "data"), memory)
            add_digests(first, records_of(tmp_path / "data"), wanted, memory)
        make_picture(tmp_path / "data" / "2.png", (77, 55))
        records, read = records_of(tmp_path / "data"), []
        original = headers.image_bytes
        monkeypatch.setattr("utils.data.survey.image_bytes", lambda image: read.append(image) or original(image))
        second = survey(records, memory) if is_plain_first else headers.Survey.unknown(4)
        add_digests(second, records, wanted, memory)
        assert [Path(path).name for path in read] == ["2.png"]
        assert (second.digests == first.digests).tolist() == [True, True, False, True]
        assert second.digests.all()

    def test_a_file_that_was_just_changed_is_not_remembered(self, tmp_path):
        make_picture(tmp_path / "data" / "a.png", (30, 20))
        survey(records_of(tmp_path / "data"), tmp_path / "memory")
        make_picture(tmp_path / "data" / "a.png", (20, 30))
        assert survey(records_of(tmp_path / "data"), tmp_path / "memory").sizes.tolist() == [[20, 30]]

    def test_filters_and_their_counts(self, tmp_path):
        for number, size in enumerate([(100, 100), (20, 100), (400, 40), (30, 30), (900, 800)]):
            make_picture(tmp_path / f"{number}.png", size)
        chosen = {"min_image_size": 25, "max_aspect_ratio": 3.0, "max_upscale": 2.0, "max_image_size": 850}
        planned = plan(tmp_path, 64, selection=SelectionOptions(**chosen))
        assert [planned.records.key(index) for index in range(len(planned.records))] == ["0.png"]
        assert list(planned.filtered.values()) == [1, 1, 1, 1]
        with pytest.raises(UserError, match="no image is left to train on; shorter edge under 1000: 5 images"):
            plan(tmp_path, 64, selection=SelectionOptions(min_image_size=1000))


def test_an_edited_file_that_a_dataset_names_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
    import pyarrow as pa
    import pyarrow.parquet

    file = make_picture(tmp_path / "data" / "a.png", (40, 48))
    rows = pa.table({"image": [str(file)], "text": ["x"]})
    pyarrow.parquet.write_table(rows, tmp_path / "data" / "rows.parquet")
    source = {"train_data_dir": str(tmp_path / "data"), "data_format": "parquet"}
    first = survey(records_of(**source), tmp_path / "memory")
    make_picture(file, (64, 48))
    second = survey(records_of(**source), tmp_path / "memory")
    assert (first.sizes.tolist(), second.sizes.tolist()) == ([[40, 48]], [[64, 48]])


def test_the_facts_of_a_large_table_are_read_without_sending_it_to_each_process(tmp_path, monkeypatch):
    """Processes inherit the table: a chunk of rows is all that is pickled."""
    from utils.data import survey as headers

    for number in range(12):
        make_picture(tmp_path / f"{number}.png", (20 + number, 30))
    records = records_of(tmp_path)
    table = records.sources[0].table
    monkeypatch.setattr(type(table), "__reduce_ex__", lambda *_: pytest.fail("the table was pickled"))
    monkeypatch.setattr(headers, "MANY", 1)
    monkeypatch.setattr(headers, "CHUNK", 3)
    facts = list(headers.read_facts(table, [(row, True) for row in range(12)], False))
    assert sorted(fact.width for fact in facts) == [20 + number for number in range(12)]
    assert all(len(fact.digest) == headers.DIGEST_SIZE for fact in facts)
