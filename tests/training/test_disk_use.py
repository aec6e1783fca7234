"""What the plan says of the disk, against what a run leaves there."""

from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from utils.config.progress import Progress
from utils.data.order import GlobalBatches
from utils.training.disk_use import DiskUse, describe_disk, disk_use
from utils.training.options import CheckpointOptions, EmaOptions

FLAGS = ("--lr_scheduler", "constant", "--max_train_steps", 2, "--checkpointing_steps", 1)


def size_of(*paths: Path) -> int:
    """Bytes of tensors."""
    return sum(file.stat().st_size for path in paths for file in path.rglob("*.safetensors"))


@pytest.fixture
def uses(monkeypatch) -> list[DiskUse]:
    """What runs say in their plans."""
    said = []

    def remember(use, *_):
        said.append(use)
        return describe_disk(use, *_)

    monkeypatch.setattr("utils.training.description.describe_disk", remember)
    return said


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sd", []),
        ("sd", ["--use_ema", "--optimizer", "lion"]),
        ("sd", ["--ema_lengths", 0.1, "--train_text_encoder"]),
        ("sd", ["--export_steps", 1, "--export_single_file"]),
        ("sdxl", ["--adaptation", "lora", "--rank", 32]),
        ("pixels", ["--use_ema", "--optimizer", "prodigy", "--learning_rate", 1]),
    ],
    ids=str,
)
def test_the_plan_says_what_the_run_leaves(train, uses, kind, flags, capsys):
    out = train(kind, *FLAGS, *flags)
    use = uses[0]
    checkpoints = sorted(out.glob("checkpoint-*"))
    assert len(checkpoints) == use.num_kept == 2
    for folder in checkpoints:  # tiny weights: the names in the headers count
        assert use.checkpoint == pytest.approx(size_of(folder), rel=0.15)
    snapshots = size_of(out / "ema_snapshots")
    assert use.snapshots == pytest.approx(snapshots, rel=0.15)
    rest = size_of(out) - snapshots - size_of(*checkpoints) - size_of(out / "best")
    assert use.result == pytest.approx(rest, rel=0.15)


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, range(1200), 3),
        ({}, range(1000), 2),
        ({"final_checkpoint": False}, range(1200), 2),
        ({"checkpoints_total_limit": 1}, range(5000), 2),
        ({"checkpoints_total_limit": 9}, range(1000), 2),
        ({"checkpointing_steps": 7}, range(14, 30), 3),
        ({"checkpointing_steps": 10**6, "final_checkpoint": False}, range(30), 0),
        ({"checkpointing_epochs": 2}, range(30), 5),  # after steps 7, 14, 20, 27 (of 10 images, 3 a step) and 30
        ({"checkpointing_epochs": 2, "checkpointing_steps": 14}, range(14, 30), 4),
        ({"checkpointing_minutes": 0.5}, range(1200), 1),
        ({"checkpointing_minutes": 0.5, "checkpoints_total_limit": 3}, range(1200), 4),
    ],
)
def test_the_number_of_checkpoints(options, steps, expected):
    class Nothing:
        exports_pipeline = False
        trains_base = True
        modules = MappingProxyType({})
        family = type("Family", (), {"pipeline": type("Pipeline", (), {"components": {}})})

    batches = GlobalBatches(np.zeros(10, np.uint16), np.zeros(10, np.int64), [Fraction(1)], 3, 1, 0)
    asked = CheckpointOptions(**options)
    found = disk_use(Nothing, "adamw", EmaOptions(), asked, steps, batches=batches)
    assert found.num_kept == expected
    is_open = asked.checkpointing_minutes is not None and asked.checkpoints_total_limit is None
    assert ("another 0 bytes every 0.5 minutes" in str(found)) == is_open
    # the same steps as the run's
    ends = [batches.epochs_before(step) for step in range(steps.stop + 1)]
    due = [
        step
        for step in range(steps.start + 1, steps.stop + 1)
        if asked.is_due(Progress(step, steps.stop, ends[step - 1], ends[step]))
    ]
    assert asked.checkpoints_total_limit or len(due) == expected


def test_a_disk_that_is_too_small_is_warned_of(tmp_path, caplog):
    use = DiskUse(checkpoint=10**13, num_kept=100, snapshots=0, result=10**9)
    line = describe_disk(use, tmp_path / "not" / "there", CheckpointOptions())
    assert "100 checkpoints of 10 TB" in line
    assert "--checkpoints_total_limit 2" in caplog.text
    caplog.clear()
    describe_disk(DiskUse(10, 1, 0, 1), tmp_path, CheckpointOptions())
    assert not caplog.text
