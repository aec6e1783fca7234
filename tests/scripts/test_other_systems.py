"""What Windows and macOS lack is used nowhere: POSIX names, forks, renaming open files, float64 on a device."""

import ast
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.launching import command, run, succeed
from tests.other_system import LACKING, MODULES
from tests.repository import ROOT
from utils.data.loader import TrainingDataset
from utils.runtime.atomic_files import sync_file, sync_folder

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")])
BASE_FLAGS = ("--train_batch_size", 2, "--learning_rate", 1e-3, "--use_ema")


def sources() -> list[tuple[Path, str, ast.Module]]:
    texts = [(path, path.read_text(encoding="utf-8")) for path in SOURCES]
    return [(path, text, ast.parse(text)) for path, text in texts]


def test_no_name_is_used_that_a_system_lacks():
    """Unless it is asked for first."""
    found = []
    for path, text, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.value.id, node.attr
                is_asked_for = f'hasattr({name[0]}, "{name[1]}")' in text
                if name[1] in LACKING.get(name[0], ()) and not is_asked_for:
                    found.append((path.name, *name))
            if isinstance(node, ast.Import):
                found += [(path.name, each.name) for each in node.names if each.name in MODULES]
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                found.append((path.name, node.module))
    assert not found


def calls_of(node: ast.AST) -> list[str]:
    """The names of the methods in a chain such as tensor.cpu().double()."""
    names = []
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        names.append(node.func.attr)
        node = node.func.value
    return names


def test_nothing_makes_float64_on_a_device():
    """MPS has none: what becomes float64 was moved to the CPU just before, or is made there; tools use no device."""
    found = []
    for path, _, tree in sources():
        if "tools" in path.parts:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double":
                if calls_of(node)[1:2] != ["cpu"]:
                    found.append((path.name, node.lineno, "double"))
            elif isinstance(node, ast.Call):
                named = {each.arg: ast.unparse(each.value) for each in node.keywords}
                is_made = named.get("dtype") == "torch.float64" and named.get("device") != "'cpu'"
                if is_made or "torch.float64" in [ast.unparse(each) for each in node.args]:
                    found.append((path.name, node.lineno, "float64"))
    assert not found


@pytest.mark.parametrize("kind", ["sd", "latents", "labels"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_worker_that_is_not_forked_gets_little_and_loads_the_same(train, monkeypatch, tmp_path, kind, cached):
    """No weights are sent to it."""
    if cached and kind == "labels":
        pytest.skip("there are no latents to cache")
    kept = []
    fetch = TrainingDataset.__getitem__

    def keep(self, piece):
        kept.append((self, piece))
        return fetch(self, piece)

    monkeypatch.setattr(TrainingDataset, "__getitem__", keep)
    flags = ["--cache_latents", "--encoding_cache_dir", tmp_path / "cache"] if cached else []
    train(kind, "--train_batch_size", 2, "--max_train_steps", 2, "--dataloader_num_workers", 0, *flags)
    monkeypatch.undo()
    dataset, piece = kept[-1]
    sent = pickle.dumps(dataset)
    assert len(sent) < 200_000
    ours, theirs = dataset[piece], pickle.loads(sent)[piece]
    for name in ("pixels", "moments", "noise", "input_ids", "crops", "timesteps"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_system_that_opens_no_folders(tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").write_bytes(b"kept")
    monkeypatch.setattr(os, "open", refuse)
    sync_folder(tmp_path)
    sync_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"kept"


def other_system(script: str, *words: object, expect: int = 0) -> str:
    return run([sys.executable, str(ROOT / "tests" / "other_system.py"), script, *map(str, words)], expect)


@pytest.mark.nightly
def test_a_system_without_signals_forks_and_open_files_that_are_renamed(pipelines, images, tmp_path):
    """Training with a cache, checkpoints that are pruned, an average, a sample; resuming; evaluating: as here."""
    flags = (*BASE_FLAGS, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--dataloader_num_workers", 1)
    flags += ("--cache_latents", "--cache_text_embeddings", "--encoding_cache_dir", tmp_path / "cache")
    flags += ("--validation_split", 0.2, "--validation_prompts", "red", "--validation_num_inference_steps", 1)
    flags += ("--report_to", "tensorboard", "--async_checkpointing")
    out, here = tmp_path / "out", tmp_path / "here"
    words = command(pipelines, images, out, *flags)[1:]
    other_system("train_text_to_image", *words, "--max_train_steps", 2)
    more = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    said = other_system("train_text_to_image", *words, *more)
    succeed([sys.executable, *command(pipelines, images, here, *flags, "--max_train_steps", 4)])
    assert losses(out) == losses(here)
    assert_same_bits(weights(out), weights(here))
    left = {path.name for path in out.glob("checkpoint-*")} - {"checkpoint-4"}
    assert left <= {"checkpoint-2"}  # resumed from on a CPU it stays mapped, and so in its place, which is said
    assert not left or "checkpoint-2 is no longer needed but can't be removed" in said
    drawn = ("--num_inference_steps", 1, "--metrics", "none", "--output_dir", tmp_path / "report", "--prompts", "red")
    other_system("evaluate_pipeline", "--pipeline", out, *drawn)
    assert (tmp_path / "report" / "report.md").exists()


@pytest.mark.nightly
def test_a_system_without_them_trains_pixels(images, tmp_path):
    words = ("--train_data_dir", images, *tiny.UNCONDITIONAL["pixels"], "--resolution", tiny.RESOLUTION, *BASE_FLAGS)
    words += ("--output_dir", tmp_path, "--report_to", "none", "--save_images_epochs", 1, "--save_model_epochs", 1)
    other_system("train_unconditional", *words, "--max_train_steps", 2)
    other_system("train_unconditional", *words, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert len(losses(tmp_path)) == 6
