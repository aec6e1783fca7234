"""Model cards: what they say, and that none replaces one that no run wrote."""

import ast
import os
import re
import time

import pytest
import yaml
from PIL import Image

from utils.runtime.processes import LOCK
from utils.sampling.samples import Sample
from utils.training.card_facts import CardFacts
from utils.training.card_files import is_own_card
from utils.training.export_options import ExportOptions
from utils.training.exported import ExportedFiles
from utils.training.exporting import form_of
from utils.training.model_card import publish, write_card
from utils.training.options import HubOptions

HOSTILE = ["a: b", "- x", "`code`", '"quoted"', "<b>|<i>", "line\nbreak", "---", "{{ x }}", "*a*", "Füchse 🦊", "#x"]


@pytest.fixture
def folder(tmp_path):
    """An output folder that a run holds."""
    made = tmp_path / "my-model"
    (made / "samples" / "final").mkdir(parents=True)
    (made / LOCK).touch()
    return made


def samples(folder, *captions) -> list[Sample]:
    found = []
    for number, caption in enumerate(captions):
        image = Image.new("RGB", (16, 16), (number, 0, 0))
        image.save(folder / "samples" / "final" / f"{number}.png")
        found.append(Sample(image, caption, f"samples/final/{number}.png"))
    return found


def card(folder, facts, drawn=(), repository=None) -> tuple[dict, str]:
    """(front matter, text) of a card that is written."""
    file = write_card(folder, repository, facts, drawn, ExportedFiles.of_run(folder))
    text = file.read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert "&id" not in front
    return yaml.safe_load(front), body


def code(body: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", body, flags=re.S)
    ast.parse(found)
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_names_change_nothing_in_a_card(folder, tmp_path, name):
    base = tmp_path / name
    base.mkdir()
    facts = CardFacts(str(base), name, settings=[("a", name)], trigger_words=[name], negative_prompt=name)
    front, body = card(folder, facts, samples(folder, name))
    assert front["widget"][0]["output"] == {"url": "gallery/0.png"}
    assert front["instance_prompt"] == front["widget"][0]["text"] == name.replace("\n", " ")
    assert "base_model" not in front
    assert str(tmp_path) not in body
    headings = re.findall(r"^#+ .*$", body, flags=re.M)
    assert [line.lstrip("# ") for line in headings if line.startswith("## ")] == [
        "Samples",
        "Use it with diffusers",
        "Use it in other tools",
        "Training",
    ]
    assert len(headings) == 5
    assert "<b>" not in body
    code(body)
    assert is_own_card(folder / "README.md")


def test_a_full_model_of_the_hub(folder):
    facts = CardFacts("owner/base", "fox", load_arguments='torch_dtype=torch.float16, variant="fp16"')
    front, body = card(folder, facts, repository="me/my-model")
    assert (front["base_model"], front["base_model_relation"]) == ("owner/base", "finetune")
    assert front["pipeline_tag"] == "text-to-image"
    assert "lora" not in front["tags"]
    assert "license" not in front
    assert "has no card here that names a licence" in body
    assert "None were drawn." in body
    assert 'from_pretrained("me/my-model", torch_dtype=torch.float16, variant="fp16")' in code(body)
    assert code(body).startswith("import torch\n")


def test_the_licence_is_that_of_the_base(folder, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n")
    front, body = card(folder, CardFacts(str(tmp_path / "base"), "fox"))
    assert (front["license"], front["license_name"]) == ("other", "own")
    assert "**other** (own)" in body


def test_a_lora_of_a_base_with_another_schedule(folder):
    facts = CardFacts(
        "owner/base",
        "fox",
        "lora",
        base_arguments={"revision": None, "variant": "fp16"},
        scheduler_changes={"prediction_type": "v_prediction", "trained_betas": None},
    )
    front, body = card(folder, facts)
    assert front["base_model_relation"] == "adapter"
    assert "lora" in front["tags"]
    lines = code(body).splitlines()
    assert lines[0] == "from diffusers import DDIMScheduler, DiffusionPipeline"
    assert 'pipeline = DiffusionPipeline.from_pretrained("owner/base", variant="fp16")' in lines
    assert "from_config(pipeline.scheduler.config, prediction_type='v_prediction', trained_betas=None)" in code(body)
    assert 'pipeline.load_lora_weights("my-model")' in lines


def test_a_lora_in_the_names_of_uis_alone(folder):
    exports(folder, "ui/my-model.safetensors")
    lines = code(card(folder, CardFacts("owner/base", "fox", "lora"))[1])
    assert 'load_lora_weights("my-model", subfolder="ui", weight_name="my-model.safetensors")' in lines
    _, body = card(folder, CardFacts("owner/base", "fox", "lora", is_dora=True))  # diffusers would leave the norms out
    assert "load_lora_weights" not in body
    assert "`--export_fused` does" in body
    exports(folder, "pytorch_lora_weights.safetensors")
    assert 'load_lora_weights("my-model")' in code(
        card(folder, CardFacts("owner/base", "fox", "lora", is_dora=True))[1]
    )


@pytest.mark.parametrize(
    ("dtype", "variant", "arguments"),
    [
        ("fp32", None, ""),
        ("fp16", "fp16", 'torch_dtype=torch.float16, variant="fp16"'),
        ("bf16", None, "torch_dtype=torch.bfloat16"),
        ("fp32", "x", 'variant="x"'),
    ],
)
def test_what_to_pass_when_loading(dtype, variant, arguments):
    options = ExportOptions(export_dtype=dtype, export_variant=variant)
    assert form_of(options).load_arguments == arguments


@pytest.mark.parametrize(
    ("name", "kind", "given", "wanted"),
    [
        ("base.safetensors", "file", {}, 'StableDiffusionPipeline.from_single_file("base.safetensors")'),
        ("base model.ckpt", "file", {}, 'StableDiffusionPipeline.from_single_file("base model.ckpt")'),
        (
            *("base.ckpt", "file", {"config": "configs", "variant": "fp16"}),
            'StableDiffusionPipeline.from_single_file("base.ckpt", config="configs")',
        ),
        ("b.safetensors", "file", {"config": "me/x"}, '.from_single_file("b.safetensors", config="me/x")'),
        ("base", "folder", {"variant": "fp16"}, 'DiffusionPipeline.from_pretrained("base", variant="fp16")'),
        ("b.safetensors", "folder", {"revision": "main"}, 'DiffusionPipeline.from_pretrained("b.safetensors")'),
        ("me/b.safetensors", "name", {"revision": "x"}, 'from_pretrained("me/b.safetensors", revision="x")'),
    ],
)
def test_a_base_is_loaded_as_the_run_loaded_it(folder, tmp_path, monkeypatch, name, kind, given, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    if kind != "name":
        (tmp_path / name).touch() if kind == "file" else (tmp_path / name).mkdir()
        name = str(tmp_path / name)
    if given.get("config") == "configs":
        given = given | {"config": str(tmp_path / "configs")}
    facts = CardFacts(name, "fox", "lora", pipeline_class="StableDiffusionPipeline", base_arguments=given)
    assert f"{wanted}" in code(card(folder, facts)[1])


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("repository", [None, "me/x"])
def test_an_adapter_that_diffusers_does_not_read_is_loaded_fused(folder, kind, repository):
    front, body = card(folder, CardFacts("owner/base", "fox", kind), repository=repository)
    assert "load_lora_weights" not in body
    assert ("snapshot_download" in code(body)) == (repository is not None)
    assert "/fused" in code(body)
    assert "lora" not in front["tags"]


def exports(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


def test_files_for_uis_are_named_only_if_this_run_wrote_them(folder):
    facts = CardFacts("owner/base", "fox", "lora", is_dora=True, trigger_words=["foxy"], ui_notes=["A note."])
    _, body = card(folder, facts)
    assert "models/loras" not in body
    assert "utils.tools.convert my-model OUT.safetensors --to kohya" in body
    exports(folder, "ui/my-model.safetensors", "fused/model_index.json", "fused/my-model.safetensors")
    _, body = card(folder, facts)
    assert "| `ui/my-model.safetensors` | `models/loras` | `models/Lora` |" in body
    assert "`fused/my-model.safetensors` (model hash 44136fa355) | `models/checkpoints`" in body
    assert "`<lora:my-model:1>, foxy`" in body
    assert "The single file in `fused/` is right in all tools" in body
    assert "A note." in body
    time.sleep(0.02)
    os.utime(folder / LOCK)  # the next run begins, and exports none of them
    _, body = card(folder, facts)
    assert "`ui/" not in body
    assert "A merged model (`--export_fused`) is right" in body


def test_a_full_models_single_file(folder):
    exports(folder, "my-model.safetensors")
    _, body = card(folder, CardFacts("owner/base", "fox"))
    assert (
        "| `my-model.safetensors` (model hash 44136fa355) | `models/checkpoints` | `models/Stable-diffusion` |" in body
    )
    assert "InvokeAI" in body


def test_an_unconditional_model(folder):
    facts = CardFacts(None, "fox", call="pipeline()", tag="unconditional-image-generation")
    front, body = card(folder, facts, samples(folder, "sample 0"))
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "ComfyUI" not in body
    assert "licence" not in body
    assert "image = pipeline().images[0]" in code(body)


def test_a_grid_of_an_earlier_run_is_gone(folder):
    card(folder, CardFacts(None, "fox"), samples(folder, *"abcde"))
    assert Image.open(folder / "val_imgs_grid.png").size[1] > 16
    assert "row by row" in (folder / "README.md").read_text()
    card(folder, CardFacts(None, "fox"))
    assert not (folder / "val_imgs_grid.png").exists()


def test_a_run_replaces_its_own_card(folder):
    card(folder, CardFacts(None, "one"))
    card(folder, CardFacts(None, "two"))
    assert "**two**" in (folder / "README.md").read_text()
    assert not (folder / "MODEL_CARD.md").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "more\n",
        lambda text: text.replace("one", "three"),
        lambda text: "# mine\n",
        lambda text: "",
    ],
)
def test_a_card_that_no_run_wrote_is_kept(folder, change, caplog):
    card(folder, CardFacts(None, "one"))
    file = folder / "README.md"
    kept = change(file.read_text())
    file.write_text(kept)
    card(folder, CardFacts(None, "two"))
    assert file.read_text() == kept
    assert "**two**" in (folder / "MODEL_CARD.md").read_text()
    assert "README.md was not written by a run" in caplog.text
    assert "MODEL_CARD.md" in caplog.text
    (folder / "MODEL_CARD.md").write_text("mine too")
    assert write_card(folder, None, CardFacts(None, "three"), (), ExportedFiles.of_run(folder)) is None
    assert (file.read_text(), (folder / "MODEL_CARD.md").read_text()) == (kept, "mine too")


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_kept(folder, kind):
    file = folder / "README.md"
    {"folder": file.mkdir, "link": lambda: file.symlink_to("gone"), "pipe": lambda: os.mkfifo(file)}[kind]()
    card(folder, CardFacts(None, "one"))
    assert not file.is_file()
    assert file.is_dir() or file.is_symlink() or file.exists()


def test_line_endings_are_no_edit(folder):
    card(folder, CardFacts(None, "one"))
    file = folder / "README.md"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert is_own_card(file)


def test_an_export_that_failed_its_check_is_not_uploaded_in_silence(folder, monkeypatch, caplog):
    uploads = []
    monkeypatch.setattr("utils.training.model_card.upload", lambda *given: uploads.append(given))
    facts = CardFacts(None, "fox", failures=["conv_in.weight differs"])
    publish(folder, "me/x", HubOptions(push_to_hub=True), facts, ())
    assert "- conv\\_in.weight differs" in (folder / "README.md").read_text().replace("conv_in", "conv\\_in")
    assert not uploads
    assert "nothing is uploaded to me/x" in caplog.text
    assert "hf upload me/x" in caplog.text
    publish(folder, "me/x", HubOptions(push_to_hub=True), CardFacts(None, "fox"), ())
    assert len(uploads) == 1
