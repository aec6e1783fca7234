"""The name and licence of a base model: as its own card or file says, and none that it does not say."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utils.models.base_card import BaseModel, Licence

CARDS = {
    "plain": ("license: creativeml-openrail-m", Licence(("creativeml-openrail-m",))),
    "quoted": ('"license": "openrail++"', Licence(("openrail++",))),
    "one in a list": ("license:\n- mit", Licence(("mit",))),
    "several": ("license: [mit, apache-2.0]", Licence(("mit", "apache-2.0"))),
    "other": (
        "license: other\nlicense_name: own\nlicense_link: https://example.com/l",
        Licence(("other",), "own", "https://example.com/l"),
    ),
    "a link to a file that stays behind": (
        "license: other\nlicense_name: own\nlicense_link: LICENSE.md",
        Licence(("other",), "own"),
    ),
    "flaws elsewhere": (
        "language: no\nversion: 010\nwhat: [\nlicense: mit\ndate: 2020-01-01\na: 1\na: 2",
        Licence(("mit",)),
    ),
    "inside another key": ("widget:\n  license: mit", None),
    "empty": ("license:", None),
    "a mapping": ("license:\n  a: mit", None),
    "none": ("tags: [a]", None),
    "overlong": (f"license: {'a' * 300}", None),
    "a number": ("license_name: mit", None),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_licence_of_a_folder(tmp_path, case):
    lines, licence = CARDS[case]
    (tmp_path / "README.md").write_text(f"---\n{lines}\n---\n\nlicense: gpl\n")
    assert BaseModel.read(str(tmp_path)) == BaseModel(tmp_path.name, False, licence)


@pytest.mark.parametrize("text", ["", "license: mit\n", "---\nlicense: mit\n", "# a\n---\nlicense: mit\n---\n"])
def test_a_card_without_front_matter_names_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert BaseModel.read(str(tmp_path)).licence is None


def test_a_card_that_is_no_text_names_none(tmp_path):
    assert BaseModel.read(str(tmp_path)) == BaseModel(tmp_path.name, False, None, "")
    (tmp_path / "README.md").write_bytes(np.random.default_rng(0).bytes(500))
    assert BaseModel.read(str(tmp_path)).licence is None


def test_a_snapshot_of_the_hubs_cache_is_called_by_its_hub_name(tmp_path):
    folder = tmp_path / "models--owner--base" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_link: ./LICENSE.md\n---\n")
    link = "https://huggingface.co/owner/base/blob/main/LICENSE.md"
    assert BaseModel.read(str(folder)) == BaseModel("owner/base", True, Licence(("other",), "", link))


def test_a_hub_name_whose_card_is_cached(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(tmp_path / file))
    assert BaseModel.read("owner/base") == BaseModel("owner/base", True, Licence(("mit",)))


def test_a_hub_name_whose_card_can_not_be_had():
    assert BaseModel.read("owner/not-there") == BaseModel("owner/not-there", True, None, "")


@pytest.mark.parametrize("metadata", [{"modelspec.license": "CreativeML Open RAIL++-M"}, {"other": "x"}, None])
def test_the_licence_of_a_single_file(tmp_path, metadata):
    save_file({"a": torch.zeros(1)}, tmp_path / "base.safetensors", metadata)
    said = (metadata or {}).get("modelspec.license")
    licence = None if said is None else Licence((said,))
    assert BaseModel.read(str(tmp_path / "base.safetensors")) == BaseModel("base.safetensors", False, licence, "file")


def test_a_damaged_file_names_none(tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"no tensors")
    assert BaseModel.read(str(tmp_path / "base.safetensors")).licence is None
