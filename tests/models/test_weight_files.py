"""Numbers of weights: quantised, scaled, packed and damaged ones are refused on every way in, others are read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import message
from tests.pretrained import FILES, SHORT, changed, kohya_names, loaded, write_lora
from utils.config.options import UserError
from utils.config.user_files import FileError
from utils.models.loading import allowing_missing, load_module
from utils.models.options import LoadingOptions
from utils.models.weight_files import Stored, check_finite, check_stored, stored_in, weight_files

Tensors = dict[str, torch.Tensor]


def as_integers(tensors: Tensors) -> Tensors:
    return {name: (50 * each).to(torch.int8) if each.ndim > 1 else each for name, each in tensors.items()}


def with_scales(word: str) -> Callable[[Tensors], Tensors]:
    """fp8 weights with a scale beside each."""

    def change(tensors: Tensors) -> Tensors:
        chosen = [name for name, each in tensors.items() if name.endswith(".weight") and each.ndim > 1]
        eights = {name: tensors[name].to(torch.float8_e4m3fn) for name in chosen}
        scales = {name.removesuffix("weight") + word: torch.tensor([2.0]) for name in chosen}
        return tensors | eights | scales

    return change


def packed(tensors: Tensors) -> Tensors:
    """As bitsandbytes writes 4 bits."""
    name = max((name for name in tensors if name.endswith(".weight")), key=lambda name: tensors[name].numel())
    flat = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    state = {
        f"{name}.absmax": torch.ones(4),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    }
    return tensors | {name: flat} | state


QUANTIZED = {
    "int8": as_integers,
    "int32": lambda tensors: {name: each.to(torch.int32) for name, each in tensors.items()},
    "bool": lambda tensors: {name: each > 0 for name, each in tensors.items()},
    "scale_weight": with_scales("scale_weight"),
    "weight_scale": with_scales("weight_scale"),
    "another word": with_scales("multiplier"),
    "4 bits": packed,
}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("change", QUANTIZED)
def test_quantised_weights_of_a_folder_are_refused(pipelines, tmp_path, part, change):
    folder = changed(pipelines["sd"], tmp_path / "sd", part, QUANTIZED[change])
    with pytest.raises(
        UserError, match=rf"--pretrained_model {folder}: {part}: .*safetensors contains .*fp16"
    ) as raised:
        loaded(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
@pytest.mark.parametrize("change", QUANTIZED)
def test_quantised_weights_of_a_single_file_are_refused(pipelines, tmp_path, prefix, change):
    tensors = load_file(tiny.write_single_file(pipelines["sd"], tmp_path / "a.safetensors"))
    own = {name: each for name, each in tensors.items() if name.startswith(prefix)}
    whole = {name: each for name, each in tensors.items() if name not in own} | QUANTIZED[change](own)
    for file, save in (("b.safetensors", save_file), ("b.ckpt", torch.save)):
        save({name: each.contiguous() for name, each in whole.items()}, tmp_path / file)
        with pytest.raises(UserError, match=rf"{file}: \w+ contains {prefix}.*give the weights in fp32"):
            loaded(tmp_path / file, pretrained_model_config=str(pipelines["sd"]), allow_pickle=file.endswith("ckpt"))


def test_quantised_shards_and_another_vae_are_refused(train, capsys, pipelines, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    last = sorted((folder / "unet").glob("*-of-*.safetensors"))[-1]
    assert len(weight_files(folder / "unet", None, False)) > 1
    assert loaded(folder)
    save_file(as_integers(load_file(last)), last, metadata={"format": "pt"})
    with pytest.raises(UserError, match=last.name):
        loaded(folder)
    vae = shutil.copytree(pipelines["vae"], tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    save_file(as_integers(load_file(file)), file, metadata={"format": "pt"})
    flag = "--pretrained_vae_model_name_or_path"
    train("sd", *SHORT, flag, vae, expect=2)
    assert f"{flag} {vae}: {file.name} contains " in message(capsys)


def test_only_the_files_that_are_read_are_looked_at(pipelines, tmp_path):
    """A folder may hold other files, as of another tool or variant."""
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    file = folder / FILES["unet"]
    save_file(as_integers(load_file(file)), file.with_name("openvino.safetensors"))
    save_file(as_integers(load_file(file)), file.with_suffix(".int8.safetensors"))
    torch.save(as_integers(load_file(file)), file.with_suffix(".bin"))
    assert weight_files(file.parent, None, True) == [file]
    assert weight_files(file.parent, "int8", True) == [file.with_suffix(".int8.safetensors")]
    assert loaded(folder)


def test_floating_point_numbers_of_8_bits_are_read_as_they_are(pipelines, tmp_path, caplog):
    for part in ("unet", "text_encoder"):
        folder = changed(
            pipelines["sd"],
            tmp_path / part,
            part,
            lambda tensors: {name: each.to(torch.float8_e4m3fn) for name, each in tensors.items()},
        )
        state = getattr(loaded(folder), part).state_dict()
        for name, each in load_file(folder / FILES[part]).items():
            assert torch.equal(state[name.removeprefix("text_model.")], each.float())
        assert f"{part}: {Path(FILES[part]).name}: " in caplog.text
        assert "8-bit floats (F8_E4M3)" in caplog.text


def test_what_is_whole_numbers_by_nature_is_no_quantised_weight(pipelines, tmp_path):
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6)}
    assert loaded(changed(pipelines["sd"], tmp_path / "sd", "text_encoder", lambda tensors: tensors | more))
    check_stored("x", {"a.weight": Stored("F32", (2, 2)), "a.num_batches_tracked": Stored("I64", ())})
    check_stored("x", {"lora_unet_a.lora_up.weight": Stored("F16", (2, 2)), "lora_unet_a.alpha": Stored("I64", ())})


def test_a_tensor_that_nothing_reads_may_be_left_out(pipelines, tmp_path):
    def change(tensors: Tensors) -> Tensors:
        name = "conv_in.weight"
        return tensors | {name: tensors[name].to(torch.float8_e4m3fn), "conv_in.note": torch.ones(3)}

    folder = changed(pipelines["sd"], tmp_path / "sd", "unet", change)
    with pytest.raises(UserError, match=r"--allow_missing_weights conv_in\.note"):
        loaded(folder)
    with allowing_missing(LoadingOptions(["conv_in.note"])):
        assert loaded(folder)


def test_what_stands_beside_whole_weights_is_no_scale():
    """As in files of older releases, and in merges."""
    layer = {"a.weight": Stored("F32", (4,)), "a.W": Stored("F32", (4,)), "a.mask": Stored("BOOL", (4, 4))}
    check_stored("x", layer)
    check_stored("x", {"text_projection": Stored("F16", (4, 4)), "text_projection.weight": Stored("F16", (4, 4))})
    for few in ("F8_E4M3", "I8", "U8"):
        with pytest.raises(UserError, match="scaled or quantized"):
            check_stored("x", layer | {"a.weight": Stored(few, (4,))})


def test_pickles_of_old_releases_are_read(tmp_path):
    tensors = {"a.weight": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(tensors, tmp_path / "new.bin")
    for name in ("old.bin", "new.bin"):
        assert stored_in(tmp_path / name) == {"a.weight": Stored("float32", (2, 2))}


def test_a_quantised_pipeline_says_so_in_training(train, capsys, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    for part in ("unet", "text_encoder"):
        file = folder / part / "config.json"
        plain = file.read_text()
        file.write_text(json.dumps(json.loads(plain) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
        train(str(folder), *SHORT, "--dry_run", expect=2)
        assert f"{part}/config.json has quantization_config (bitsandbytes)" in message(capsys)
        file.write_text(plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named(pipelines, tmp_path, part, bad):
    def damage(tensors: Tensors) -> Tensors:
        name = next(name for name, each in tensors.items() if each.ndim > 1)
        tensors[name].view(-1)[1] = bad
        return tensors

    folder = changed(pipelines["sd"], tmp_path / "sd", part, damage)
    with pytest.raises(UserError, match=rf"{folder}: {part}: \S+ has 1 NaN or infinite values of [\d,]+"):
        loaded(folder)
    whole = load_file(tiny.write_single_file(folder, tmp_path / "a.safetensors"))
    save_file(whole, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: {part}: \S+ has 1 NaN or infinite values of"):
        loaded(tmp_path / "a.safetensors", pretrained_model_config=str(pipelines["sd"]))


def test_large_numbers_are_finite_and_too_large_ones_have_a_cure():
    check_finite([("a", torch.full((4,), 3e38))], "x")
    check_finite([("a", torch.full((4000,), 60000.0).half()), ("b", torch.ones(2, dtype=torch.int8))], "x")
    with pytest.raises(UserError, match=r"x: a has 4 NaN or infinite values of 4.*too large for fp16"):
        check_finite([("a", torch.full((4,), 1e6).half())], "x")


def test_a_checkpoint_that_diverged_is_drawn_all_the_same(pipelines, tmp_path, caplog):
    from diffusers import UNet2DConditionModel

    def damage(tensors: Tensors) -> Tensors:
        return {name: each * float("nan") for name, each in tensors.items()}

    folder = changed(pipelines["sd"], tmp_path / "sd", "unet", damage) / "unet"
    load_module(UNet2DConditionModel, str(folder), "x", "unet", torch.float32, must_be_finite=False)
    assert "as do 207 other tensors: samples will be NaN" in caplog.text


LORAS = {
    "int8": (lambda lora: {name: (9 * each).to(torch.int8) for name, each in lora.items()}, "as I8: it is quantized"),
    "a scale": (lambda lora: lora | {f"{min(lora)[:-6]}weight_scale": torch.ones(1)}, "scaled or quantized"),
    "NaN": (lambda lora: {name: each * float("nan") for name, each in lora.items()}, "NaN or infinite values"),
    "alpha of NaN": (lambda lora: with_alpha(lora, float("nan")), "NaN"),
    "alpha of 0": (lambda lora: with_alpha(lora, 0.0), "of all its 16 layers is 0, so it has no effect"),
    "biases": (lambda lora: lora | {"unet.conv_in.diff_b": torch.zeros(16)}, "whole-difference file .*merge it"),
    "differences": (lambda lora: lora | {"unet.conv_norm_out.diff": torch.zeros(16)}, "whole-difference file"),
    "norms": (lambda lora: lora | {"lora_unet_norm.w_norm": torch.zeros(16)}, "LoRA and norm file"),
    "middle": (lambda lora: lora | {"lora_unet_conv_in.lora_mid.weight": torch.zeros(2, 2, 1, 1)}, "LoCon file"),
}


def with_alpha(lora: Tensors, alpha: float) -> Tensors:
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else each for name, each in kohya_names(lora).items()}


@pytest.fixture(scope="module")
def lora(pipelines, tmp_path_factory) -> Tensors:
    return write_lora(tmp_path_factory.mktemp("lora"), pipelines["sd"])


def load_in(lora: Tensors, pipelines: dict[str, Path], folder: Path):
    """A pipeline with a LoRA file of these tensors."""
    from diffusers import StableDiffusionPipeline

    from utils.models.lora_files import load_lora

    save_file(lora, folder / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    load_lora(pipeline, str(folder / "lora.safetensors"), "default", "--lora_weights x")
    return pipeline


@pytest.mark.parametrize("change", LORAS)
def test_loras_that_would_be_read_wrong_are_refused(lora, pipelines, tmp_path, change):
    make, said = LORAS[change]
    with pytest.raises(UserError, match=said) as raised:
        load_in(make(lora), pipelines, tmp_path)
    assert str(raised.value).startswith("--lora_weights x")
    assert "\n" not in str(raised.value)


def test_each_layer_has_its_own_alpha(lora, pipelines, tmp_path, caplog):
    kohya = kohya_names(lora)
    first, second = [name for name in kohya if name.endswith("alpha")][:2]
    pipeline = load_in(kohya | {first: torch.tensor(0.0), second: torch.tensor(8.0)}, pipelines, tmp_path)
    layers = [each for _, each in pipeline.unet.named_modules() if hasattr(each, "lora_alpha")]
    assert sorted({each.scaling["default"] for each in layers}) == [0.0, 1.0, 4.0]
    assert sorted(pipeline.unet.peft_config["default"].alpha_pattern.values()) == [0, 8]
    assert "the alpha of 1 of its 16 layers is 0" in caplog.text


def test_a_layer_without_an_alpha_is_not_scaled(lora, pipelines, tmp_path):
    """Where others have one: then its rank counts, as in kohya's scripts."""
    kohya = kohya_names(lora)
    alphas = [name for name in kohya if name.endswith("alpha")]
    kept = {name: each for name, each in kohya.items() if name not in alphas[4:]}
    pipeline = load_in(kept | {name: torch.tensor(16.0) for name in alphas[:4]}, pipelines, tmp_path)
    layers = [each for _, each in pipeline.unet.named_modules() if hasattr(each, "lora_alpha")]
    scalings = sorted(each.scaling["default"] for each in layers)
    assert scalings == [1.0] * (len(layers) - 4) + [16 / layers[0].r["default"]] * 4


def test_the_alphas_of_a_text_encoder_are_read(lora, pipelines, tmp_path):
    layers = [f"lora_te_text_model_encoder_layers_0_self_attn_{name}_proj" for name in ("q", "k", "v", "out")]
    more = {f"{layer}.{half}.weight": torch.ones(2, 32) for layer in layers for half in ("lora_down", "lora_up")}
    more = {name: each.T if "up" in name else each for name, each in more.items()}
    alphas = {f"{layer}.alpha": torch.tensor(float(number)) for number, layer in enumerate(layers, start=1)}
    tensors = kohya_names(lora) | more | alphas
    pipeline = load_in({name: each.contiguous() for name, each in tensors.items()}, pipelines, tmp_path)
    found = {
        name: each.scaling["default"] for name, each in pipeline.text_encoder.named_modules() if hasattr(each, "r")
    }
    assert {name.rpartition(".")[2]: scaling for name, scaling in found.items()} == {
        **{"q_proj": 0.5, "k_proj": 1.0, "v_proj": 1.5, "out_proj": 2.0}
    }


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n"


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "x.safetensors", "x.ckpt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "Git LFS pointer; fetch the file itself with git lfs pull"),
        (b"<!doctype html><html>", "is a web page; download the file again"),
        (b"\n <HTML>", "is a web page; download the file again"),
        (b"", "is empty; download the file again"),
        (b"GGUF" + b"\0" * 99, "GGUF"),
    ],
    ids=["lfs", "doctype", "html", "empty", "gguf"],
)
def test_what_was_saved_in_the_place_of_weights_is_named(pipelines, tmp_path, name, content, said):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    if name.endswith(".bin"):
        (folder / FILES["unet"]).unlink()
        (folder / "unet" / name).write_bytes(content)
        path = folder
    else:
        path = tmp_path / name
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        loaded(path, allow_pickle=True, pretrained_model_config=None if path == folder else str(pipelines["sd"]))
    assert "--pretrained_model" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([1, 2], "contains a list, not weights by name"),
        (torch.ones(2), "contains a Tensor, not weights by name"),
        ({"state_dict": {"a": torch.ones(2)}}, "contains its weights inside state_dict"),
        ({0: torch.ones(2)}, "has 1 weights named by int"),
        ({}, "contains no weights"),
        (torch.nn.Linear(2, 2), "contains objects other than tensors"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pickles_of_something_else_are_named(tmp_path, held, said):
    torch.save(held, tmp_path / "a.bin")
    with pytest.raises(FileError, match=said):
        stored_in(tmp_path / "a.bin")


def test_damaged_pickles_are_named(tmp_path):
    tensors = {"a.weight": torch.ones(200, 20)}
    torch.save(tensors, tmp_path / "new.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("new.bin", "old.bin"):
        content = (tmp_path / name).read_bytes()
        for size in (1, 20, len(content) // 2, len(content) - 30):
            (tmp_path / "cut.bin").write_bytes(content[:size])
            with pytest.raises(FileError, match=r"is damaged, truncated or not written by torch.save"):
                stored_in(tmp_path / "cut.bin")
    save_file(tensors, tmp_path / "s.bin")
    with pytest.raises(FileError, match=r"rename it to end in .safetensors"):
        stored_in(tmp_path / "s.bin")
