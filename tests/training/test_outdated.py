"""An output folder holds no adapter of an earlier export beside that of the last one, and keeps what a user made."""

import pytest
import torch
from safetensors.torch import save_file

from utils.runtime.atomic_files import mark_as_own
from utils.training.outdated import remove_outdated

LORA, UI, FUSED = "pytorch_lora_weights.safetensors", "ui/out.safetensors", "fused/model_index.json"
PEFT = ("unet/adapter_model.safetensors", "unet/adapter_config.json")
MARKS = {LORA: "lora_adapter_metadata", UI: "modelspec.sai_model_spec"}
SHORT = ("--max_train_steps", 1, "--rank", 2, "--no_export_check")


@pytest.fixture
def out(tmp_path):
    """An output folder with every form of an adapter in it, and files of a user."""
    folder = tmp_path / "out"
    for name in (LORA, UI, FUSED, *PEFT, "unet/mine.txt", "ui/mine.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"a": torch.ones(1)}, folder / name, {MARKS[name]: "1"} if name in MARKS else None)
        else:
            (folder / name).write_text("{}")
    mark_as_own(folder)
    return folder


def left(folder) -> set[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in files if not name.startswith((".", "run", "checkpoint", "README"))}


@pytest.mark.parametrize(
    ("written", "stays"),
    [
        ((LORA,), {LORA}),
        (("ui",), {UI}),
        (("unet", "fused"), {*PEFT, FUSED}),
        ((LORA, "ui", "fused", "unet"), {LORA, UI, FUSED, *PEFT}),
    ],
)
def test_only_what_was_written_stays(out, caplog, written, stays):
    remove_outdated(out, written, ["unet", "text_encoder"], [])
    assert left(out) == {*stays, "unet/mine.txt", "ui/mine.safetensors"}
    assert len(caplog.records) == (len(stays) < 5)


def test_what_no_export_wrote_or_the_run_reads_stays(out):
    save_file({"a": torch.ones(1)}, out / LORA)
    remove_outdated(out, ["ui", "unet"], ["unet"], [out / "fused"])
    assert {LORA, FUSED} <= left(out)
    (out / ".not_training_data").unlink()
    before = left(out)
    remove_outdated(out, [], ["unet"], [])
    assert left(out) == before, "no run's folder"


@pytest.mark.parametrize(
    ("kind", "first", "second", "gone"),
    [
        ("lora", ("--export_fused",), ("--lora_format", "kohya"), {LORA, FUSED}),
        pytest.param("lora", (), ("--lora_format", "diffusers"), {UI}, marks=pytest.mark.slow),
        pytest.param("loha", (), ("--lora_format", "kohya"), set(PEFT), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_of_another_format_leaves_nothing_of_the_first(train, kind, first, second, gone):
    out = train("sd", "--adaptation", kind, *SHORT, *first)
    assert gone <= left(out)
    resumed = (*SHORT, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    train("sd", "--adaptation", kind, *resumed, *second)
    assert not gone & left(out)
