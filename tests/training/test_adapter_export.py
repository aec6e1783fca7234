"""What a run of an adapter exports: diffusers' form and that of UIs, checked, and continued from in every format."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import message, mostly_slow

MORE = (
    "--export_check",
    "--learning_rate",
    1e-2,
    "--max_train_steps",
    2,
    "--no_final_checkpoint",
    "--rank",
    3,
    "--lora_alpha",
    5,
)
NOTHING = 1e-30  # a learning rate whose steps round to nothing
KINDS = {
    "lora": ("--adaptation", "lora", "--train_text_encoder"),
    "convolutions": ("--adaptation", "lora", "--use_rslora", "--lora_target_modules", "to_q", "conv1", "conv_shortcut"),
    "dora": ("--adaptation", "lora", "--use_dora", "--train_text_encoder"),
    "loha": ("--adaptation", "loha", "--train_text_encoder"),
    "lokr": ("--adaptation", "lokr", "--train_text_encoder"),
}


def adaptation_of(kind: str) -> tuple[str, ...]:
    """The flags with which a run continues from a file of a kind."""
    flags = KINDS[kind]
    return (*flags[:2], *(["--train_text_encoder"] if "--train_text_encoder" in flags else []))


@pytest.fixture
def checked(monkeypatch) -> list[list[str]]:
    """What the checks of the exports found, each run's result and best/."""
    from utils.training.exporting import Exporter

    found: list[list[str]] = []
    note = Exporter.note_adapter

    def both(self, folder, faults, said):
        found.append(faults)
        note(self, folder, faults, said)

    monkeypatch.setattr(Exporter, "note_adapter", both)
    return found


@pytest.mark.parametrize("base", mostly_slow(["sd", "sd2", "sdxl"], "sdxl"))
@pytest.mark.parametrize("kind", mostly_slow(KINDS, "lora"))
def test_a_run_continues_from_what_another_exported_for_uis(train, checked, base, kind):
    first = train(base, *KINDS[kind], *MORE, out="first")
    assert checked == [[]]
    file = first / "ui" / "first.safetensors"
    assert file.is_file()

    # The file holds the run's weights: a run of no learning exports the same ones.
    flags = (*adaptation_of(kind), "--lora_weights", file, "--learning_rate", NOTHING, "--max_train_steps", 1)
    second = train(base, *flags, "--no_final_checkpoint", "--export_check", out="second")
    assert checked == [[], []]
    one, other = load_file(file), load_file(second / "ui" / "second.safetensors")
    assert set(one) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert ("This adapter is a DoRA" in (second / "README.md").read_text(encoding="utf-8")) == (kind == "dora")


def test_the_file_says_what_it_was_trained_on(train, pipelines, tmp_path):
    flags = ("--adaptation", "loha", "--trigger_words", "sks dog", "in sks style", "--export_tag_frequency")
    out = train("sdxl", *flags, *MORE)
    with safe_open(out / "ui" / "out.safetensors", "pt") as opened:
        said = opened.metadata()
    assert said["ss_network_module"] == "lycoris.kohya"
    assert json.loads(said["ss_network_args"])["algo"] == "loha"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("3", "5")
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["ss_sd_model_name"] == pipelines["sdxl"].name
    assert (said["ss_v2"], said["ss_v_parameterization"]) == ("False", "False")
    assert said["ss_output_name"] == said["modelspec.title"] == "out"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.trigger_phrase"] == "sks dog, in sks style"
    assert (said["ss_steps"], said["ss_num_train_images"]) == ("2", "6")
    assert sum(json.loads(said["ss_tag_frequency"])[train.images.name].values()) >= 6
    assert "ss_sd_model_hash" not in said, "the base is a folder, which has no hash"


FORMATS = {
    "diffusers": ({"pytorch_lora_weights.safetensors"}, False),
    "kohya": (set(), True),
    "both": ({"pytorch_lora_weights.safetensors"}, True),
}


@pytest.mark.parametrize("name", mostly_slow(FORMATS, "kohya"))
def test_the_formats_asked_for_are_written(train, checked, name):
    files, has_ui = FORMATS[name]
    out = train("sd", "--adaptation", "lora", "--export_fused", "--lora_format", name, *MORE)
    assert {file.name for file in out.glob("*.safetensors")} == files
    assert (out / "ui" / "out.safetensors").is_file() == has_ui
    assert (out / "fused" / "model_index.json").is_file()
    assert checked == [[]]


def test_a_lora_in_the_names_of_uis_alone_is_drawn_from(train, caplog):
    train("sdxl", "--adaptation", "lora", "--train_text_encoder", "--lora_format", "kohya", *MORE)
    assert "load_lora_weights(out.safetensors) draws the same image within 1/255" in caplog.text


def test_a_dora_of_inputs_is_refused_and_of_outputs_merged(train, capsys):
    first = train("sd", "--adaptation", "lora", "--use_dora", *MORE, out="first")
    file = first / "ui" / "first.safetensors"
    by_input = {name: torch.ones(1, each.shape[1]) for name, each in load_file(file).items() if "lora_down" in name}
    scales = {name.replace("lora_down.weight", "dora_scale"): each for name, each in by_input.items()}
    save_file(load_file(file) | scales, first / "other.safetensors")
    flags = ("--adaptation", "lora", "--lora_weights", first / "other.safetensors", "--max_train_steps", 1)
    train("sd", *flags, out="second", expect=2)
    assert "its magnitudes are of the layers' inputs" in message(capsys)


def test_a_run_of_peft_folders_writes_those_of_the_formats_asked_for(train):
    out = train("sd", "--adaptation", "lokr", "--lora_format", "kohya", *MORE)
    assert not (out / "unet").exists()
    assert (out / "ui" / "out.safetensors").is_file()


def test_a_file_of_another_kind_names_the_adaptation_to_give(train, capsys):
    first = train("sd", "--adaptation", "loha", *MORE, out="first")
    file = first / "ui" / "first.safetensors"
    train("sd", "--adaptation", "lora", "--lora_weights", file, "--max_train_steps", 1, expect=2)
    assert "is a LoHa file" in (line := message(capsys))
    assert "--adaptation loha" in line


def test_a_run_continues_from_pefts_own_folders(train):
    first = train("sd", "--adaptation", "loha", "--train_text_encoder", *MORE, out="first")
    flags = ("--adaptation", "loha", "--train_text_encoder", "--lora_weights", first, "--learning_rate", NOTHING)
    second = train("sd", *flags, "--max_train_steps", 1, "--no_final_checkpoint", out="second")
    for part in ("unet", "text_encoder"):
        one, other = (load_file(out / part / "adapter_model.safetensors") for out in (first, second))
        assert set(one) == set(other)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


PARTS = {"te1 alone": ("unet", "text_encoder"), "no text encoder": ("unet",), "no UNet": ("text_encoder_2",)}


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("held", mostly_slow(PARTS, "te1 alone", "no UNet"))
def test_a_file_of_some_modules_gets_fresh_adapters_in_the_others(train, pipelines, tmp_path, caplog, held, kind):
    from tests.adapters import Adapted
    from utils.formats.adapter_files import read_adapter
    from utils.formats.adapter_writer import write_kohya

    adapted, file = Adapted(pipelines["sdxl"], kind), tmp_path / "a.safetensors"
    given = {(each.component, each.name): each for each in adapted.layers if each.component in PARTS[held]}
    write_kohya(list(given.values()), adapted.components, file, torch.float32, {})
    flags = ("--adaptation", kind, "--train_text_encoder", "--lora_weights", file, "--learning_rate", NOTHING)
    out = train("sdxl", *flags, "--max_train_steps", 1, "--no_final_checkpoint", "--no_export_check")
    found = {(each.component, each.name): each for each in read_adapter(out / "ui", adapted.components).layers}
    assert {component for component, _ in found} == {"unet", "text_encoder", "text_encoder_2"}
    for key, layer in found.items():
        assert (layer.rank, layer.alpha) == (3, 5)
        wanted = given[key].delta() if key in given else torch.zeros(layer.shape)
        torch.testing.assert_close(layer.delta(), wanted, rtol=0, atol=1e-20)
    assert "fresh adapters of rank 3 and alpha 5 train there" in caplog.text


def test_a_file_of_text_encoders_alone_names_the_flag_that_trains_them(train, pipelines, tmp_path, capsys):
    from tests.adapters import Adapted
    from utils.formats.adapter_writer import write_kohya

    adapted, file = Adapted(pipelines["sd"], "lora"), tmp_path / "a.safetensors"
    layers = [each for each in adapted.layers if each.component != "unet"]
    write_kohya(layers, adapted.components, file, torch.float32, {})
    train("sd", "--adaptation", "lora", "--lora_weights", file, "--max_train_steps", 1, expect=2)
    assert "adapt text_encoder; add --train_text_encoder" in message(capsys)


@pytest.mark.parametrize("kind", mostly_slow(["lora", "dora", "lokr"], "lokr"))
def test_a_run_that_continued_from_a_file_for_uis_resumes_bit_for_bit(train, kind):
    first = train("sd", *KINDS[kind], *MORE, out="first")
    flags = (*adaptation_of(kind), "--lora_weights", first / "ui" / "first.safetensors", "--learning_rate", 1e-2)
    whole = train("sd", *flags, "--max_train_steps", 4, out="whole")
    train("sd", *flags, "--max_train_steps", 2, out="parts")
    parts = train("sd", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", out="parts")
    one, other = load_file(whole / "ui" / "whole.safetensors"), load_file(parts / "ui" / "parts.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def change_one(tensors: dict, word: str) -> dict:
    name = next(name for name in tensors if word in name)
    return tensors | {name: tensors[name] + 1}


SPOILED = {
    "another number": (lambda tensors: change_one(tensors, "lora_up"), "are not the run's"),
    "another alpha": (lambda tensors: change_one(tensors, "alpha"), "are not the run's"),
    "a missing layer": (
        lambda tensors: {name: each for name, each in tensors.items() if "to_k" not in name},
        "missing",
    ),
    "an unknown layer": (lambda tensors: tensors | {"lora_unet_x.alpha": torch.ones(1)}, "are unknown to UIs"),
    "an unread tensor": (
        lambda tensors: tensors | {f"{next(iter(tensors)).partition('.')[0]}.lora_side": torch.ones(1)},
        "are read by no UI",
    ),
}


@pytest.mark.parametrize("change", SPOILED)
def test_a_spoiled_export_is_found(pipelines, tmp_path, change):
    from tests.adapters import Adapted
    from utils.exports.adapter_check import check_adapter_files
    from utils.formats.adapter_writer import write_kohya

    adapted = Adapted(pipelines["sd"], "lora")
    file = tmp_path / "a.safetensors"
    write_kohya(adapted.layers, adapted.components, file, torch.float32, {})
    assert check_adapter_files(adapted.layers, adapted.pipeline, {}, {file: torch.float32}) == []
    spoil, said = SPOILED[change]
    save_file(spoil(load_file(file)), file)
    faults = check_adapter_files(adapted.layers, adapted.pipeline, {}, {file: torch.float32})
    assert any(said in fault for fault in faults)
