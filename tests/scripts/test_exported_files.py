"""Files of a result: the base's own, their names, dtypes and modes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import tiny
from tests.comparing import assert_same_bits, weights
from tests.conftest import mostly_slow
from tests.text_runs import SHORT, VALIDATION, draw, load


@pytest.fixture
def as_older(pipelines, tmp_path) -> Path:
    """A pipeline with what transformers 4 saved of a safety checker and an image processor, and files never copied."""
    folder = shutil.copytree(pipelines["sd"], tmp_path / "base")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"crop_size": 32}')
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text('{"torch_dtype": "float32", "a": {"torch_dtype": null}}')
    save_file({"vision_model.vision_model.bias": torch.ones(2)}, folder / "safety_checker" / "model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    index |= {"requires_safety_checker": True, "_name_or_path": str(folder), "../evil": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/evil.py"):
        (folder / name).write_bytes(b"never copied")
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("result", [".", "fused"])
def test_what_does_not_train_is_the_bases_own_files(train, as_older, result):
    flags = ("--adaptation", "lora", "--export_fused") if result == "fused" else ()
    out = train(str(as_older), *SHORT, *flags) / result
    frozen = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    for part in frozen:
        theirs = files_below(as_older / part)
        kept = {name: content for name, content in theirs.items() if not name.endswith((".bin", ".py"))}
        assert files_below(out / part) == kept
        assert not any(path.is_symlink() for path in (out / part).rglob("*"))
    index, given = (json.loads((folder / "model_index.json").read_text()) for folder in (out, as_older))
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert all(index[part] == given[part] for part in ("vae", "unet", "text_encoder", "tokenizer", "safety_checker"))
    assert index["requires_safety_checker"] is True
    assert not {"_name_or_path", "../evil"} & set(index)


def test_trained_text_encoders_have_the_names_that_older_libraries_read(train, pipelines):
    flags = (*SHORT, "--train_text_encoder", "--use_ema")
    for out in (train("sd", *flags, out="at once"), train("sd", *flags, "--async_checkpointing", out="copied")):
        for folder, part in ((out, ""), (out / "checkpoint-2", ""), (out / "checkpoint-2", "_ema")):
            assert weights(folder, f"text_encoder{part}").keys() == weights(pipelines["sd"], "text_encoder").keys()
    assert draw(load(out)) is not None


HALVES = {
    "all": (("unet", "vae", "text_encoder"), "", ()),
    "some": (("text_encoder",), "", ()),
    "a variant alone": (("vae", "text_encoder", "unet"), "fp16", ("--variant", "fp16")),
}


@pytest.mark.parametrize("case", HALVES)
def test_a_base_in_half_precision_gives_a_result_of_one_dtype(train, pipelines, tmp_path, case):
    parts, variant, flags = HALVES[case]
    base = tiny.in_half_precision(pipelines["sd"], tmp_path / "half", parts, variant)
    out = train(str(base), *SHORT, *VALIDATION, *flags)
    for part in ("unet", "vae", "text_encoder"):
        files = list((out / part).glob("*.safetensors"))
        assert [file.name for file in files] == [next((pipelines["sd"] / part).glob("*.safetensors")).name]
        assert all(each.dtype == torch.float32 for each in weights(out, part).values())
        assert "float16" not in (out / part / "config.json").read_text()
    sample = np.asarray(Image.open(out / "samples" / "final" / "00_0.png"))
    assert np.array_equal(draw(load(out)), sample)


@pytest.mark.parametrize("harm", ["dtype in its config", "newer names", "two heads", "header cut", "flat shards"])
def test_frozen_files_that_would_not_do_are_saved_anew(train, pipelines, tmp_path, harm):
    base = shutil.copytree(pipelines["sd"], tmp_path / "base")
    part = base / "text_encoder"
    file, tensors = part / "model.safetensors", weights(base, "text_encoder")
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if harm == "dtype in its config":
        config = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps(config | {"dtype": None, "torch_dtype": "bfloat16"}))
    elif harm == "newer names":
        save_file(flat, file, {"format": "pt"})
    elif harm == "two heads":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
    elif harm == "flat shards":
        file.unlink()
        save_file(flat, part / "model-00001-of-00001.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(flat, "model-00001-of-00001.safetensors")}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        part = base / "vae"
        (part / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"cut")  # which nobody asked for
    out = train(str(base), *SHORT)
    assert [path.name for path in (out / part.name).glob("*.safetensors*")] == [
        "diffusion_pytorch_model.safetensors" if part.name == "vae" else "model.safetensors"
    ]
    assert_same_bits(weights(pipelines["sd"], part.name), weights(out, part.name))
    assert {str(each.dtype) for each in load(out).text_encoder.parameters()} == {"torch.float32"}


def test_links_of_the_hubs_cache_become_files_and_links_to_elsewhere_are_not_followed(train, as_older, tmp_path):
    snapshot = tiny.make_snapshot(as_older, tmp_path / "hub")
    out = train(str(snapshot), *SHORT, out="snapshot")
    assert (out / "tokenizer" / "merges.txt").read_bytes() == (as_older / "tokenizer" / "merges.txt").read_bytes()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    (tmp_path / "secret.txt").write_text("a secret of this machine")
    (as_older / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    out = train(str(as_older), *SHORT, out="linked")
    assert not [name for name, content in files_below(out).items() if b"a secret of this machine" in content]
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(files_below(out / "tokenizer"))


def test_a_tokenizer_of_newer_libraries_is_completed(train, pipelines, tmp_path):
    from transformers import CLIPTokenizer

    base = shutil.copytree(pipelines["sd"], tmp_path / "base")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    shutil.rmtree(base / "tokenizer")
    tokenizer.save_pretrained(base / "tokenizer")
    given = files_below(base / "tokenizer")
    assert "vocab.json" not in given
    pipeline = load(base)
    pipeline.text_encoder.resize_token_embeddings(515)
    pipeline.text_encoder.save_pretrained(base / "text_encoder")
    out = train(str(base), *SHORT)
    made = files_below(out / "tokenizer")
    assert {name: made[name] for name in given} == given
    assert json.loads(made["vocab.json"]) == json.loads((pipelines["sd"] / "tokenizer" / "vocab.json").read_text())
    assert made["merges.txt"] == b"#version: 0.2\n"
    assert json.loads(made["added_tokens.json"]) == {"<my-cat>": 514}
    assert load(out).tokenizer("a <my-cat>").input_ids == tokenizer("a <my-cat>").input_ids


def test_a_result_over_its_own_base_and_one_over_another_kind(train, pipelines, tmp_path):
    base = shutil.copytree(pipelines["sd"], tmp_path / "out")
    before = weights(base, "vae"), weights(base)
    train(str(base), *SHORT, "--overwrite_output_dir")
    assert_same_bits(before[0], weights(base, "vae"))
    assert not torch.equal(before[1]["conv_in.weight"], weights(base)["conv_in.weight"])
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")  # of an earlier, sharded result
    train("sd2", *SHORT, "--overwrite_output_dir")
    assert set(files_below(base / "unet")) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not list(base.glob(".tmp-*"))
    load(base)


@pytest.mark.parametrize("umask", mostly_slow([0o022, 0o027, 0o002], 0o027))
def test_files_have_the_modes_that_the_umask_says(train, umask):
    before = os.umask(umask)
    try:
        flags = (
            "--ema_lengths",
            0.1,
            "--ema_snapshot_steps",
            1,
            "--report_to",
            "tensorboard",
            "--validation_split",
            0.4,
        )
        outs = [train("sd", *SHORT, *VALIDATION, *flags, out="full")]
        outs.append(train("sd", *SHORT, "--adaptation", "lora", "--export_fused", out="lora"))
        outs.append(train("pixels", *SHORT, out="pixels"))
    finally:
        os.umask(before)
    paths = [path for out in outs for path in (out, *out.rglob("*")) if path.name != ".lock"]
    usual = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    wrong = {
        str(path): oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o777 != usual[path.is_dir()]
    }
    assert not wrong


def test_usual_modes_only_add_and_touch_no_link(tmp_path):
    from utils.runtime.atomic_files import usual_modes

    (tmp_path / "outside").write_text("")
    (tmp_path / "outside").chmod(0o600)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "script").write_text("")
    (folder / "script").chmod(0o755)
    (folder / "link").symlink_to(tmp_path / "outside")
    usual_modes(folder)
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o600
    assert (folder / "script").stat().st_mode & 0o777 == 0o755
    assert {path.name for path in folder.iterdir()} == {"script", "link"}


def test_the_vae_of_an_unconditional_result_is_the_bases_own_file(train, pipelines):
    out = train("latents", *SHORT)
    assert files_below(out / "vqvae") == files_below(pipelines["vae"])
