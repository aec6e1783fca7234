"""Interrupted after any step, under any two options: the bits that follow are those of the run left alone."""

import itertools
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.comparing import assert_same_bits, losses
from utils.data.oddities import CONVERTED, DECODING, SMALL_PALETTE, TURNED_ANEW, UNCOMMON, bits_of
from utils.data.survey import Survey
from utils.training.optimizer_table import OPTIMIZERS

# what a run may have, by kind: each value of one kind meets each of every other in some run
KINDS: dict[str, dict[str, tuple]] = {
    "adaptation": {
        "full": (),
        "with text encoder": ("--train_text_encoder",),
        "lora with dropout": ("--adaptation", "lora", "--lora_dropout", 0.2),
        "lora and text encoder": ("--adaptation", "lora", "--lora_dropout", 0.2, "--train_text_encoder"),
    },
    "accumulation": {"1": (), "3": ("--gradient_accumulation_steps", 3)},
    "loader": {"here": ("--dataloader_num_workers", 0), "workers": ("--dataloader_num_workers", 2)},
    "images": {
        "live": (),
        "cached": ("--cache_latents", "--cache_variants", 2, "--random_flip"),
        "buckets": ("--use_aspect_ratio_buckets", "--bucket_step", 8, "--min_bucket_size", 16),
    },
    "average": {"none": (), "ema": ("--use_ema",)},
    "captions": {"kept": (), "dropped": ("--caption_dropout", 0.4)},
    "precision": {"no": (), "bf16": ("--mixed_precision", "bf16")},
    "between": {
        "nothing": (),
        "validation": (
            *("--validation_split", 0.25, "--validation_steps", 1, "--validation_prompts", "red"),
            *("--validation_num_inference_steps", 1),
        ),
        "background": ("--async_checkpointing",),
    },
}


def covering() -> list[dict[str, str]]:
    """Runs in which every pair of values of two kinds meets at least once, by greedy choice."""
    open_pairs = {
        frozenset({(one, value), (other, another)})
        for one, other in itertools.combinations(KINDS, 2)
        for value in KINDS[one]
        for another in KINDS[other]
    }
    runs, drawn = [], random.Random(0)
    while open_pairs:
        candidates = [{kind: drawn.choice(list(values)) for kind, values in KINDS.items()} for _ in range(200)]
        best = max(candidates, key=lambda run: len(pairs_of(run) & open_pairs))
        if pairs_of(best) & open_pairs:
            runs.append(best)
            open_pairs -= pairs_of(best)
    return runs


def pairs_of(run: dict[str, str]) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(run.items(), 2)}


def everything(out: Path, steps: int) -> dict[str, object]:
    """All tensors of the last checkpoint: weights, averages, the optimizer's state."""
    folder = out / f"checkpoint-{steps}"
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_resumes(train: Callable[..., Path], data: Path, tmp_path: Path, flags: list[object], drawn: random.Random):
    """Interrupted twice, after steps that are drawn."""
    steps = 5
    first, second = sorted(drawn.sample(range(1, steps), 2))
    flags = ["--train_batch_size", 2, "--learning_rate", 1e-3, "--checkpointing_steps", 1, *flags]
    flags += ["--encoding_cache_dir", tmp_path / "cache"]
    whole = train("sd", *flags, "--max_train_steps", steps, data=data, out="whole")
    parts = train("sd", *flags, "--max_train_steps", first, data=data, out="parts")
    for until in (second, steps):
        train("sd", *flags, "--max_train_steps", until, "--resume_from_checkpoint", "latest", data=data, out="parts")
    assert losses(whole) == losses(parts)
    assert_same_bits(everything(whole, steps), everything(parts, steps))


RUNS = covering()


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny.make_images(tmp_path / "data", 12)


def test_every_pair_is_covered():
    met = set().union(*(pairs_of(run) for run in RUNS))
    for one, other in itertools.combinations(KINDS, 2):
        assert all(frozenset({(one, a), (other, b)}) in met for a in KINDS[one] for b in KINDS[other])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RUNS)))
def test_pairs_of_options(train, data, tmp_path, number):
    flags = [word for kind, value in RUNS[number].items() for word in KINDS[kind][value]]
    assert_resumes(train, data, tmp_path, flags, random.Random(number))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_every_optimizer(train, data, tmp_path, optimizer, adaptation):
    flags = ["--optimizer", optimizer, "--adaptation", adaptation, "--gradient_accumulation_steps", 2, "--use_ema"]
    if optimizer == "schedule_free_adamw":
        flags.remove("--use_ema")
    rate = ["--learning_rate", 1] if optimizer == "prodigy" else []
    assert_resumes(train, data, tmp_path, [*flags, *rate], random.Random(optimizer))


@pytest.mark.parametrize(
    ("recorded", "named"),
    [
        ({}, ["converted.png", "deep.png", "turned.png"]),  # of a release from before the records
        ({"data_record": "x"}, ["deep.png", "turned.png"]),
        ({"data_record": "x", "validation_split_rule": "by content"}, ["turned.png"]),
        ({"decoding": 2}, ["turned.png"]),
        ({"decoding": DECODING}, []),
        ({"decoding": DECODING + 1}, []),
    ],
)
def test_images_that_an_earlier_release_decoded_otherwise_are_named(monkeypatch, caplog, tmp_path, recorded, named):
    from utils.training import resume as resuming

    kinds = {"plain": "grey", "converted": CONVERTED, "deep": UNCOMMON, "turned": TURNED_ANEW}
    known = Survey.unknown(len(kinds))
    known.oddities[:] = [bits_of([kind]) for kind in kinds.values()]
    records = type("Named", (list,), {"key": lambda self, index: f"{self[index]}.png"})(kinds)
    images = SimpleNamespace(survey=known, records=records)
    monkeypatch.setattr(resuming, "read_state", lambda _: SimpleNamespace(facts=SimpleNamespace(training=recorded)))
    resuming._warn_of_decoding(tmp_path, images, "held-out ")
    resuming._warn_of_decoding(tmp_path, None, "")
    assert len(caplog.messages) == bool(named)
    if named:
        assert f"decoded {len(named)} of the 4 held-out images" in caplog.text
        assert f"such as {', '.join(named)};" in caplog.text


def test_a_resumed_run_warns_of_them_once(train, tmp_path, caplog, monkeypatch):
    """Its own checkpoints record the decoding of now."""
    data = tiny.make_images(tmp_path / "data", 4)
    content = (data / "002.png").read_bytes()
    text = b"iTXtXML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='3'/>"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (data / "002.png").write_bytes(content[:-12] + chunk + content[-12:])
    flags = ["--train_batch_size", 2, "--resume_from_checkpoint", "latest", "--max_train_steps"]
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.resume.DECODING", 2)
        train("sd", *flags, 1, data=data)
    said = "decoded 1 of the 4 images, or their masks, to other pixels, such as 002.png"
    assert said not in caplog.text
    for steps, count in ((2, 1), (3, 0)):
        caplog.clear()
        train("sd", *flags, steps, data=data)
        assert caplog.text.count(said) == count


def test_masks_that_an_earlier_release_decoded_otherwise_count_too():
    """But for their colours, which no profile changes."""
    known = Survey.unknown(3)
    known.mask_oddities[:] = [bits_of([kind]) for kind in (CONVERTED, UNCOMMON, SMALL_PALETTE)]
    assert known.decoded_otherwise(0).tolist() == [False, True, True]
    assert known.decoded_otherwise(DECODING).tolist() == [False] * 3


def test_a_stream_is_the_same_whether_its_length_is_known(monkeypatch, tmp_path):
    """As it is only where a cache of `datasets` says it; earlier releases recorded it."""
    from utils.training import resume as resuming

    begun = resuming.Resumption(None, tmp_path, None, tmp_path, 1, {}, {}, False, False)
    for recorded in (
        "a stream of None images in 3 shards",
        "a stream of 40 images in 3 shards",
        "a stream in 3 shards",
    ):
        state = SimpleNamespace(facts=SimpleNamespace(training={"data": recorded}))
        monkeypatch.setattr(resuming, "read_state", lambda _, state=state: state)
        assert begun._known_as("a stream in 3 shards") == recorded
        assert begun._known_as("a stream in 4 shards") == "a stream in 4 shards"
