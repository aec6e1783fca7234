"""What is uploaded to the Hub, and what a failed upload says."""

import logging
import shlex

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from utils.config.options import UserError
from utils.runtime.processes import LOCK
from utils.training.card_facts import CardFacts
from utils.training.exported import ExportedFiles
from utils.training.hub_upload import create_repository, result_files, upload
from utils.training.model_card import write_card
from utils.training.options import HubOptions

RESULT = {
    "full": [
        *("model_index.json", "unet/config.json", "unet/model.fp16.safetensors", "scheduler/scheduler_config.json"),
        *("my [1] model.safetensors", "best/unet/config.json", "pipeline.py"),
    ],
    "lora": [
        *("pytorch_lora_weights.safetensors", "ui/my [1] model.safetensors", "fused/model_index.json"),
        *("fused/unet/config.json", "fused/my [1] model.safetensors", "best/pytorch_lora_weights.safetensors"),
    ],
    "loha": ["unet/adapter_config.json", "unet/adapter_model.safetensors", "fused/model_index.json"],
}
SAMPLES = ["gallery/0.png", "val_imgs_grid.png"]
OTHERS = [
    *("run.json", "metrics.jsonl", "logs/events", "checkpoint-2/unet/config.json", "samples/final/00_0.png"),
    *("other.safetensors", "my 1 model.safetensors", "ui/other.safetensors", "unet_ema/adapter_config.json"),
    *("data_report.json", ".cache/huggingface/x", "notes.md", "MODEL_CARD.md"),
]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "my [1] model"
    made.mkdir()
    (made / LOCK).touch()
    return made


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"_class_name": "X", "unet": [], "scheduler": [], "gone": []}')


def chosen(folder) -> set[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return set(filter_repo_objects(names, allow_patterns=result_files(folder, ExportedFiles.of_run(folder))))


@pytest.mark.parametrize("kind", RESULT)
def test_the_result_in_all_its_forms_is_uploaded_and_nothing_else(folder, kind):
    write_card(folder, None, CardFacts(None, "fox"), (), ExportedFiles())
    fill(folder, *RESULT[kind], *SAMPLES, *OTHERS)
    assert chosen(folder) == {*RESULT[kind], *SAMPLES, "README.md"}


def test_a_card_that_no_run_wrote_is_uploaded_with_ours_beside_it(folder):
    fill(folder, "README.md", "model_index.json")
    write_card(folder, None, CardFacts(None, "fox"), (), ExportedFiles())
    assert chosen(folder) == {"README.md", "MODEL_CARD.md", "model_index.json"}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of uploads, which succeed; `calls.error` lets them fail."""

    class Calls(list):
        error: Exception | None = None

    found = Calls()

    def upload_folder(**given):
        found.append(given)
        if found.error is not None:
            raise found.error

    monkeypatch.setattr("huggingface_hub.upload_folder", upload_folder)
    return found


def test_a_failed_upload_names_the_command_that_continues_it(folder, calls, caplog, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    write_card(folder, None, CardFacts(None, "fox"), (), ExportedFiles())
    fill(folder, *RESULT["full"])
    files = result_files(folder, ExportedFiles.of_run(folder))
    options = HubOptions(push_to_hub=True, hub_token="hf_flag")
    calls.error = ConnectionError("reset by hf_flag and hf_environment")
    upload(folder, "me/x", options, files)
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    said = record.getMessage()
    assert "upload to me/x failed: reset by *** and ***" in said
    words = shlex.split(said.splitlines()[-1])
    assert words[:5] == ["hf", "upload", "me/x", str(folder), "."]
    assert words[5:] == [word for each in files for word in ("--include", each)]
    assert "hf_" not in caplog.text.replace("hf_hub", "")
    # The same call continues it.
    calls.error = None
    upload(folder, "me/x", options, files)
    assert calls[0] == calls[1]
    assert calls[0]["allow_patterns"] == files


def test_a_card_on_the_hub_that_no_run_wrote_is_kept(folder, calls, caplog, tmp_path, monkeypatch):
    write_card(folder, None, CardFacts(None, "fox"), (), ExportedFiles())
    there = tmp_path / "there.md"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names, **given: str(there))
    for text, is_kept in ((" mine", True), ((folder / "README.md").read_text(), False)):
        there.write_text(text)
        upload(folder, "me/x", HubOptions(push_to_hub=True), ["README.md", "model_index.json"])
        assert ("README.md" not in calls[-1]["allow_patterns"]) == is_kept
    assert "me/x has a README.md that no run wrote" in caplog.text


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", None])
def test_what_keeps_an_upload_offline_is_named(folder, monkeypatch, variable):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")

    def refuse(*names, **given):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    said = (
        f"me/x can't be written to: {variable} is set; unset it" if variable else "can't be reached; check the network"
    )
    with pytest.raises(UserError, match=said):
        create_repository(folder, HubOptions(push_to_hub=True, hub_token="hf_x", hub_model_id="me/x"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=f"not logged in.*also unset {variable}" if variable else "set HF_TOKEN$"):
        create_repository(folder, HubOptions(push_to_hub=True))
