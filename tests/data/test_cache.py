"""The cache of encodings: what is in it, what it is keyed by, and what a run on it trains."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from tests.comparing import assert_same_bits, entries, files, losses, weights
from tests.conftest import message
from tests.launching import succeed
from tests.repository import ROOT
from utils.data.cache import KEY_SIZE, EntryStore, in_shards, make_key

BOTH = ("--cache_latents", "--cache_text_embeddings")


class TestStore:
    def filled(self, folder: Path, count: int = 10) -> tuple[EntryStore, np.ndarray]:
        store = EntryStore(folder)
        store.open()
        keys = [make_key(number) for number in range(count)]
        for numbers in in_shards(range(count), [0] * count):
            values = torch.arange(len(numbers), dtype=torch.float16)[:, None].expand(-1, 3)
            store.write([keys[number] for number in numbers], {"values": values, "half": values.bfloat16()})
        store.refresh()
        return store, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_SIZE)

    def test_what_was_written_is_read(self, tmp_path):
        store, keys = self.filled(tmp_path)
        places = store.find(keys)
        assert [float(store.read(place)["values"][0]) for place in places] == list(range(10))
        assert store.read(places[3])["half"].dtype == torch.bfloat16
        missing = np.frombuffer(make_key("other"), np.uint8)[None]
        assert store.find(missing)[0].tolist() == [-1, -1]

    @pytest.mark.parametrize("length", [0, 5, 100, -1])
    def test_a_damaged_shard_is_not_taken_for_whole(self, tmp_path, length):
        store, keys = self.filled(tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:length])
        store.open()
        assert (store.find(keys) == -1).all()

    def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(self, tmp_path):
        import socket

        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        left = tmp_path / f".tmp-{socket.gethostname()}-{dead.pid}-abc.safetensors"
        writing = tmp_path / f".tmp-{socket.gethostname()}-{os.getpid()}-abc.safetensors"
        for file in (left, writing):
            file.write_bytes(b"half")
        EntryStore(tmp_path).open()
        assert not left.exists()
        assert writing.exists()

    def test_no_file_stays_open(self, tmp_path):
        store, keys = self.filled(tmp_path)
        before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
        tensors = [store.read(store.find(keys)[number % 10]) for number in range(20)]
        after = len(list(Path("/proc/self/fd").iterdir())) if before else 0
        assert after == before
        assert len(tensors) == 20


LIVE_AND_CACHED = {
    "sd": ("sd", "--center_crop"),
    "sd2 buckets": ("sd2", "--center_crop", "--use_aspect_ratio_buckets", "--bucket_step", 8),
    "sdxl dropout": ("sdxl", "--center_crop", "--caption_dropout", 0.4, "--max_token_length", 150),
    "variants": ("sdxl", "--random_flip", "--cache_variants", 2, "--shuffle_tags", "--tag_dropout", 0.2),
    "bf16": ("sd", "--center_crop", "--mixed_precision", "bf16"),
}


@pytest.mark.parametrize("case", LIVE_AND_CACHED)
def test_a_cached_run_trains_what_a_live_one_does(train, tmp_path, case):
    pipeline, *flags = LIVE_AND_CACHED[case]
    data = tiny.make_images(tmp_path / "data", 9)
    flags += ["--max_train_steps", 8, "--train_batch_size", 3, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5]
    cache = ["--encoding_cache_dir", tmp_path / "cache", "--cache_batch_size", 3]
    live = train(pipeline, *flags, data=data, out="live")
    cached = train(pipeline, *flags, *BOTH, *cache, data=data, out="cached")
    rounding = 2e-2 if case == "bf16" else 1e-5
    np.testing.assert_allclose(losses(live), losses(cached), rtol=rounding)
    again = train(pipeline, *flags, *BOTH, *cache, "--dataloader_num_workers", 1, data=data, out="again")
    assert losses(cached) == losses(again)
    assert_same_bits(weights(cached), weights(again))


def test_only_what_changed_is_encoded_again(train, tmp_path):
    data = tiny.make_images(tmp_path / "data")
    cache = tmp_path / "cache"
    flags = ["--train_batch_size", 2, "--max_train_steps", 1, "--overwrite_output_dir", "--encoding_cache_dir", cache]

    def new_entries(*more: object, pipeline: str = "sd") -> tuple[int, int]:
        before = {kind: len(entries(cache / kind)) for kind in ("latents", "text")}
        train(pipeline, *flags, *BOTH, *more, data=data)
        return tuple(len(entries(cache / kind)) - before[kind] for kind in ("latents", "text"))

    assert new_entries() == (6, 5)  # four captions, and what stands for a dropped one
    assert new_entries("--learning_rate", 1e-2, "--loss", "l1", "--train_batch_size", 3) == (0, 0)
    picture = data / "002.png"
    content = bytearray(picture.read_bytes())
    pixels = np.asarray(Image.open(picture)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(picture)
    assert content != picture.read_bytes()
    assert new_entries() == (1, 0)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"file_name": "001.png", "text": "another caption"})
    (data / "metadata.jsonl").write_text("\n".join(lines))
    assert new_entries() == (0, 1)
    Image.new("RGB", (40, 40), "red").save(data / "new.png")
    (data / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "new.png", "text": "a red square"}']))
    assert new_entries() == (1, 0)
    assert new_entries("--resolution", 40) == (7, 0)
    assert new_entries("--clip_skip", 1) == (0, 6)
    assert new_entries(pipeline="sd2") == (0, 0)  # the same VAE and text encoder under another UNet and scheduler
    moved = shutil.move(data, tmp_path / "moved")
    data = Path(moved)
    assert new_entries() == (0, 0)


def test_one_byte_of_one_image(train, tmp_path):
    """A changed byte behind the header, with the file's times set back."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(data / f"{number}.bmp")
    cache = tmp_path / "cache"
    flags = ["--cache_latents", "--cache_only", "--encoding_cache_dir", cache, "--train_batch_size", 2]
    train("sd", *flags, data=data, out="a")
    picture = data / "2.bmp"
    facts = picture.stat()
    content = bytearray(picture.read_bytes())
    content[-1] ^= 0x40
    picture.write_bytes(content)
    os.utime(picture, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    before = entries(cache / "latents")
    train("sd", *flags, data=data, out="b")
    assert len(entries(cache / "latents")) == len(before) + 1


FLIPS = {
    "a moment": ("latents", -297, "its checksum differs"),
    "a text state": ("text", -100, "its checksum differs"),
    "a key": ("latents", None, "its keys have changed since it was written"),
}


@pytest.mark.parametrize("case", FLIPS)
def test_a_flipped_bit_is_found_and_its_shard_encoded_again(train, tmp_path, caplog, case):
    kind, place, reason = FLIPS[case]
    flags = ["--max_train_steps", 2, "--train_batch_size", 2, *BOTH, "--encoding_cache_dir", tmp_path / "cache"]
    whole = train("sd", *flags, out="whole")
    before = files(tmp_path / "cache")
    (shard,) = (tmp_path / "cache" / kind).glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    place = 8 + length + json.loads(content[8 : 8 + length])["keys"]["data_offsets"][0] if place is None else place
    content[place] ^= 0x04
    shard.write_bytes(content)
    again = train("sd", *flags, out="again")
    assert [record.message for record in caplog.records if reason in record.message]
    assert losses(whole) == losses(again)
    assert files(tmp_path / "cache") == before


def test_text_states_of_too_few_tokens_are_not_used(train, tmp_path, caplog):
    flags = ["--max_train_steps", 2, "--train_batch_size", 2, *BOTH, "--encoding_cache_dir", tmp_path / "cache"]
    whole = train("sd", *flags, out="whole")
    (shard,) = (tmp_path / "cache" / "text").glob("*.safetensors")
    tensors = load_file(shard)
    keys = [key.numpy().tobytes() for key in tensors.pop("keys")]
    states = tensors["encoder_hidden_states"][:, :10]
    EntryStore(shard.parent).write(keys, {"encoder_hidden_states": states})
    again = train("sd", *flags, out="again")
    assert "its entries have unexpected shapes" in caplog.text
    assert losses(whole) == losses(again)


def test_a_cache_of_an_earlier_version_is_encoded_again(train, tmp_path, caplog):
    from safetensors.torch import save_file

    flags = ["--cache_only", *BOTH, "--encoding_cache_dir", tmp_path / "cache"]
    train("sd", *flags, out="whole")
    before = files(tmp_path / "cache")
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        tensors = load_file(shard)
        del tensors["checksums"]
        save_file(tensors, shard)
    train("sd", *flags, out="again")
    assert caplog.text.count("it has no checksums because an earlier version wrote it") == 2
    assert files(tmp_path / "cache") == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_cut_off_in_use_ends_the_run_with_its_name(train, tmp_path, capsys, monkeypatch, num_workers):
    from utils.training.backward import Gradients

    rehearse = Gradients.rehearse

    def cut(*arguments):
        for shard in (tmp_path / "cache" / "latents").glob("*.safetensors"):
            os.truncate(shard, 500)
        return rehearse(*arguments)

    monkeypatch.setattr(Gradients, "rehearse", cut)
    flags = [*BOTH, "--encoding_cache_dir", tmp_path / "cache", "--dataloader_num_workers", num_workers]
    train("sd", *flags, "--max_train_steps", 2, "--train_batch_size", 2, expect=2)
    said = message(capsys)
    assert "was changed while in use: it is cut off" in said
    assert "--resume_from_checkpoint latest" in said


HEADERS = {
    "nested": b"[" * 200_000,
    "nested maps": b'{"a":' * 50_000,
    "no text": b"\xff" * 64,
    "a list": b"[1, 2]",
    "a number": b"1" * 5000,
    "an entry that is a list": b'{"keys": []}',
    "an entry without offsets": b'{"keys": {"dtype": "U8", "shape": [1, 16]}}',
    "an unknown dtype": b'{"keys": {"dtype": "I4", "shape": [1, 16], "data_offsets": [0, 16]}}',
    "a dtype that is a list": b'{"keys": {"dtype": ["U8"], "shape": [1, 16], "data_offsets": [0, 16]}}',
    "offsets beyond the file": b'{"keys": {"dtype": "U8", "shape": [1, 16], "data_offsets": [16, 32]}}',
    "negative offsets": b'{"keys": {"dtype": "U8", "shape": [1, 16], "data_offsets": [-16, 0]}}',
    "offsets of text": b'{"keys": {"dtype": "U8", "shape": [1, 16], "data_offsets": ["0", "16"]}}',
    "huge shapes": b'{"keys": {"dtype": "U8", "shape": [1, %s], "data_offsets": [0, 16]}}' % (b"9" * 18),
    "many dimensions": b'{"keys": {"dtype": "U8", "shape": [%s1], "data_offsets": [0, 16]}}' % (b"9999, " * 50_000),
    "an empty shape": b'{"keys": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}',
    "overlapping": b'{"keys": {"dtype": "U8", "shape": [1, 16], "data_offsets": [0, 16]},'
    b' "checksums": {"dtype": "U8", "shape": [1, 8], "data_offsets": [8, 16]}}',
    "bool shapes": b'{"keys": {"dtype": "U8", "shape": [true, 16], "data_offsets": [false, 16]}}',
    "no rows": b'{"keys": {"dtype": "U8", "shape": [0, 16], "data_offsets": [0, 0]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_say_what_is_not_so(tmp_path, name):
    header = HEADERS[name]
    for length in (len(header), len(header) + 8, 1 << 60, (1 << 64) - 1):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(16))
        store = EntryStore(tmp_path)
        store.open()
        assert len(store) == 0


def test_no_flipped_bit_of_a_shard_gives_another_entry(tmp_path):
    """Of the header all bits, of the rest every thirteenth: the entry is what was written, or it is not there."""
    keys = [make_key(number) for number in range(3)]
    values = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    store = EntryStore(tmp_path)
    store.open()
    store.write(keys, {"values": values, "half": values.bfloat16()})
    (shard,) = tmp_path.glob("*.safetensors")
    whole = shard.read_bytes()
    end = 8 * (8 + int.from_bytes(whole[:8], "little"))
    table = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_SIZE)
    form = {"values": ((2,), (torch.float32,)), "half": ((2,), (torch.bfloat16,))}
    found = 0
    for bit in [*range(end), *range(end, 8 * len(whole), 13)]:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(content)
        store.refresh()
        store.remove({name: reason for name, reason in store.damaged(store.places_by_shard(table), form) if reason})
        store.refresh()
        for row, place in enumerate(store.find(table)):
            if place[0] >= 0:
                found += 1
                assert torch.equal(store.read(place)["values"], values[row])
    assert found < 60  # spaces in the header may become others


def test_cache_only_and_verify(train, tmp_path, capsys):
    data = tiny.make_images(tmp_path / "data")
    cache = ["--encoding_cache_dir", tmp_path / "cache", *BOTH]
    out = train("sdxl", *cache, "--cache_only", data=data)
    assert not (out / "model_index.json").exists()
    assert len(entries(tmp_path / "cache" / "latents")) == 6
    train("sdxl", *cache, "--verify_cache", data=data, out="verified")
    (shard,) = (tmp_path / "cache" / "latents").glob("*.safetensors")
    tensors = load_file(shard)
    tensors["moments"][0, 0, 0, 0, 0] += 1  # and a checksum that is right
    keys = [key.numpy().tobytes() for key in tensors.pop("keys")]
    EntryStore(shard.parent).write(keys, {name: tensors[name] for name in ("moments", "crops")})
    train("sdxl", *cache, "--verify_cache", data=data, out="refused", expect=2)
    assert "of 6 images differ from their cached encodings" in capsys.readouterr().err


def test_half_precision_that_overflows_is_stored_wider():
    from utils.training.encoding import joined, stored

    values = torch.tensor([1.0, 70000.0])
    assert stored(values, torch.float16).dtype == torch.float32
    assert stored(values[:1], torch.float16).dtype == torch.float16
    assert joined([stored(values[:1], torch.float16), stored(values[1:], torch.float16)]).dtype == torch.float32


def test_broken_images_under_the_cache_are_replaced_as_in_a_live_run(train, tmp_path):
    data = tiny.make_images(tmp_path / "data", 8)
    whole = (data / "003.png").read_bytes()
    (data / "003.png").write_bytes(whole[: len(whole) // 2])
    flags = ["--center_crop", "--max_train_steps", 6, "--train_batch_size", 2, "--max_bad_fraction", 0.2]
    live = train("sd", *flags, data=data, out="live")
    cached = train("sd", *flags, *BOTH, "--encoding_cache_dir", tmp_path / "cache", data=data, out="cached")
    np.testing.assert_allclose(losses(live), losses(cached), rtol=1e-5)
    for out in (live, cached):
        assert json.loads((out / "data_report.json").read_text())["unreadable"].keys() == {"003.png"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--cache_only"], ["--cache_only", "--cache_latents"]),
        (["--cache_text_embeddings", "--train_text_encoder"], ["--cache_text_embeddings", "--train_text_encoder"]),
        (["--cache_latents", "--encoding_cache_dir", "/proc/nowhere"], ["--encoding_cache_dir", "can't be written"]),
        (["--cache_latents", "--cache_variants", 0], ["--cache_variants"]),
        (["--cache_latents", "--streaming"], ["--streaming", "cache"]),
    ],
)
def test_what_does_not_go(refused, flags, named):
    refused(flags, *named)


def fill_command(pipeline: Path, data: Path, cache: Path, out: Path) -> list[str]:
    flags = ["--pretrained_model", pipeline, "--train_data_dir", data, "--resolution", 64, "--cache_only", *BOTH]
    flags += ["--use_aspect_ratio_buckets", "--bucket_step", 8, "--train_batch_size", 2, "--report_to", "none"]
    flags += ["--encoding_cache_dir", cache, "--output_dir", out, "--overwrite_output_dir"]
    return [str(word) for word in flags]


FILLER = """
import sys
import utils.data.cache
utils.data.cache.SHARD_ENTRIES = 4
from train_text_to_image import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.nightly
def test_a_cache_killed_at_random_moments_is_byte_for_byte_one_filled_in_peace(pipelines, tmp_path):
    data = tiny.make_images(tmp_path / "data", 60)
    peace, war = tmp_path / "peace", tmp_path / "war"

    def start(cache: Path) -> subprocess.Popen:
        command = fill_command(pipelines["sd"], data, cache, tmp_path / f"out-{cache.name}")
        return subprocess.Popen([sys.executable, "-c", FILLER, *command], cwd=ROOT, stderr=subprocess.DEVNULL)

    assert start(peace).wait() == 0
    draws = random.Random(0)
    for _ in range(4):
        filling = start(war)
        began = time.monotonic()
        had = len(files(war))
        while len(files(war)) < had + 2 and filling.poll() is None and time.monotonic() < began + 60:
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.05))
        filling.send_signal(signal.SIGKILL)
        filling.wait()
    assert len(files(war)) > 0
    assert start(war).wait() == 0
    assert files(war) == files(peace)
    assert not list(war.rglob(".tmp-*"))


@pytest.mark.nightly
def test_two_processes_fill_what_one_does(pipelines, tmp_path):
    data = tiny.make_images(tmp_path / "data", 30)
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    script = str(tmp_path / "fill.py")
    Path(script).write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + FILLER)
    command = fill_command(pipelines["sdxl"], data, one, tmp_path / "a")
    succeed([sys.executable, script, *command])
    command = fill_command(pipelines["sdxl"], data, two, tmp_path / "b")
    succeed([*launch, script, *command])
    assert files(one) == files(two)


def test_foreign_and_broken_files_in_the_cache_folder(tmp_path):
    from safetensors.torch import save_file

    save_file({"numbers": torch.arange(3)}, tmp_path / "foreign.safetensors")
    save_file({"values": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    store = EntryStore(tmp_path)
    store.open()
    assert len(store) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # what is not ours stays


def test_verifying_finds_what_is_not_finite():
    from utils.training.encoding import relative_error

    assert relative_error(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")


def test_the_report_is_there_when_a_cache_fill_or_a_run_ends_early(train, tmp_path):
    data = tiny.make_images(tmp_path / "data", 24)
    for name in ("003.png", "011.png"):
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: len(whole) // 2])
    flags = ["--encoding_cache_dir", tmp_path / "cache", "--train_batch_size", 4]
    out = train("sd", *flags, "--cache_latents", "--cache_only", "--max_bad_fraction", 0.1, data=data, out="a")
    assert json.loads((out / "data_report.json").read_text())["unreadable"].keys() == {"003.png", "011.png"}
    for number, more in enumerate(
        ([], ["--cache_latents"], ["--dataloader_num_workers", 1], ["--on_bad_image", "error"])
    ):
        out = train("sd", *flags, *more, "--max_train_steps", 12, data=data, out=f"b{number}", expect=2)
        assert json.loads((out / "data_report.json").read_text())["unreadable"].keys() & {"003.png", "011.png"}


def test_a_frozen_crop_is_warned_of(train, caplog, tmp_path):
    flags = ["--cache_latents", "--encoding_cache_dir", tmp_path / "cache", "--cache_only"]
    train("sd", *flags, out="a")
    assert "the cache fixes one crop and flip per image" in caplog.text
    caplog.clear()
    train("sd", *flags, "--cache_variants", 2, out="b")
    train("sd", *flags, "--center_crop", out="c")
    assert "the cache fixes one" not in caplog.text
