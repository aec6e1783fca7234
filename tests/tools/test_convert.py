"""utils.tools.convert: pipelines and adapters from one form to the other and back, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import random_adapters, tiny
from tests.conftest import message
from utils.exports import adapter_file_check
from utils.formats.adapter_files import read_adapter
from utils.tools.convert import main


def convert(*words: object, expect: int = 0) -> None:
    assert main([str(word) for word in words]) == expect


def files_of(folder: Path) -> dict[str, bytes]:
    """The weights in a pipeline's folder."""
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in folder.glob("*/*.safetensors")}


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_a_folder_becomes_a_file_and_the_same_folder_again(name, pipelines, tmp_path):
    convert(pipelines[name], tmp_path / "file.safetensors", "--to", "single_file")
    given = ["--to", "folder", "--pipeline_config", pipelines[name]]
    convert(tmp_path / "file.safetensors", tmp_path / "again", *given)
    before, after = (
        {key: load_file(folder / key) for key in files_of(folder)} for folder in (pipelines[name], tmp_path / "again")
    )
    assert before.keys() == after.keys()
    for key, tensors in before.items():
        assert tensors.keys() == after[key].keys()
        assert all(torch.equal(tensor, after[key][own]) for own, tensor in tensors.items())
    drawn = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert drawn.scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")


def test_a_file_of_stable_diffusion_2_loses_what_the_pipeline_does_not_read(pipelines, tmp_path, caplog):
    file = tiny.write_single_file(pipelines["sd2"], tmp_path / "file.safetensors", has_open_clip=True)
    convert(file, tmp_path / "out", "--to", "folder", "--pipeline_config", pipelines["sd2"])
    own = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert own.keys() == load_file(pipelines["sd2"] / "text_encoder" / "model.safetensors").keys()


def test_a_dtype_is_that_of_all_weights_and_of_the_configs(pipelines, tmp_path):
    convert(pipelines["sdxl"], tmp_path / "half", "--to", "folder", "--dtype", "bf16")
    convert(tmp_path / "half", tmp_path / "half.safetensors", "--to", "single_file")
    convert(tmp_path / "half.safetensors", tmp_path / "again.safetensors", "--to", "single_file", "--dtype", "fp32")
    for file in (*files_of(tmp_path / "half"), tmp_path / "half.safetensors"):
        dtypes = {each.dtype for each in load_file(tmp_path / "half" / file).values() if each.is_floating_point()}
        assert dtypes == {torch.bfloat16}, file
    assert '"bfloat16"' in (tmp_path / "half" / "text_encoder" / "config.json").read_text()
    half, again = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(each.float(), again[name].float()) for name, each in half.items())


def test_values_that_fp16_can_not_hold_are_named_and_nothing_is_written(pipelines, tmp_path, capsys):
    folder = random_adapters.tuned(pipelines["sd"], tmp_path / "large")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][:2] = 1e6
    save_file(tensors, file, {"format": "pt"})
    convert(folder, tmp_path / "out.safetensors", "--to", "single_file", "--dtype", "fp16", expect=2)
    assert "2 values of 1 tensors" in (said := message(capsys))
    assert "input_blocks.0.0.bias" in said
    assert not list(tmp_path.glob("*out*"))


def test_a_sharded_folder_and_a_variant_are_read(pipelines, tmp_path):
    whole = DiffusionPipeline.from_pretrained(pipelines["sd"])
    whole.save_pretrained(tmp_path / "shards", max_shard_size="100KB", variant="own")
    convert(pipelines["sd"], tmp_path / "a.safetensors", "--to", "single_file")
    convert(tmp_path / "shards", tmp_path / "b.safetensors", "--to", "single_file", "--variant", "own")
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_an_incomplete_folder_is_refused_before_anything_is_written(part, target, pipelines, tmp_path, capsys):
    folder = random_adapters.tuned(pipelines["sd"], tmp_path / "sd")
    (file,) = (folder / part).glob("*.safetensors")
    whole = load_file(file)
    name = sorted(each for each in whole if each.endswith(".0.weight") or each.endswith("layers.0.mlp.fc1.weight"))[0]
    cases = {
        f"lacks 1 weights of the {part}: {name}": {key: each for key, each in whole.items() if key != name},
        f"{name} has the shape [3]": {**whole, name: torch.zeros(3)},
        "weights of layers that its config lacks": {**whole, name.replace(".0.", ".7."): torch.zeros(3)},
    }
    for said, tensors in cases.items():
        save_file(tensors, file, {"format": "pt"})
        convert(folder, tmp_path / target, "--to", "folder" if target == "out" else "single_file", expect=2)
        assert said in message(capsys)
        assert not (tmp_path / target).exists()
    save_file({**whole, "embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64)}, file, {"format": "pt"})
    convert(folder, tmp_path / "ok", "--to", "folder")


def test_a_missing_shard_is_refused(pipelines, tmp_path, capsys):
    DiffusionPipeline.from_pretrained(pipelines["sd"]).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    last = sorted((tmp_path / "shards" / "unet").glob("*.safetensors"))[-1]
    last.unlink()
    convert(tmp_path / "shards", tmp_path / "out", "--to", "folder", expect=2)
    assert last.name in (said := message(capsys))
    assert "1 are missing" in said


def test_attention_of_older_folders_is_known(pipelines, tmp_path):
    folder = random_adapters.tuned(pipelines["sd"], tmp_path / "sd")
    (file,) = (folder / "vae").glob("*.safetensors")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): each for name, each in tensors.items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    convert(folder, tmp_path / "out.safetensors", "--to", "single_file")


def test_what_a_file_says_is_carried_over(pipelines, tmp_path):
    said = {"modelspec.license": "CreativeML", "modelspec.title": "mine", "own": "kept", "modelspec.hash_sha256": "0x1"}
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "file.safetensors", metadata=said)
    convert(file, tmp_path / "half.safetensors", "--to", "single_file", "--dtype", "fp16")
    with safe_open(tmp_path / "half.safetensors", "pt") as opened:
        found = opened.metadata()
    assert {key: found[key] for key in ("modelspec.license", "modelspec.title", "own")} == {
        key: said[key] for key in ("modelspec.license", "modelspec.title", "own")
    }
    assert len(found["modelspec.hash_sha256"]) == 66
    convert(file, tmp_path / "folder", "--to", "folder", "--pipeline_config", pipelines["sd"])
    assert "CreativeML" in (tmp_path / "folder" / "README.md").read_text()
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "--to", "single_file")
    with safe_open(tmp_path / "again.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.license"] == "CreativeML"


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lora_goes_to_the_uis_and_back(kind, name, pipelines, tmp_path):
    layers = random_adapters.write(pipelines[name], tmp_path / "a.safetensors", "diffusers", kind=kind)
    base = ["--pipeline", pipelines[name]]
    convert(tmp_path / "a.safetensors", tmp_path / "ui.safetensors", "--to", "kohya", *base)
    convert(tmp_path / "ui.safetensors", tmp_path / "again.safetensors", "--to", "diffusers", *base)
    components = random_adapters.components(pipelines[name])
    for file in ("ui", "again"):
        found = read_adapter(tmp_path / f"{file}.safetensors", components).layers
        assert [(each.component, each.name, each.scale) for each in found] == [
            (each.component, each.name, each.scale) for each in layers
        ]
        for one, other in zip(found, layers, strict=True):
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(one.tensors[role], tensor) for role, tensor in other.tensors.items())


def test_names_are_read_without_a_base(pipelines, tmp_path):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", "diffusers")
    convert(tmp_path / "a.safetensors", tmp_path / "alone.safetensors", "--to", "kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "based.safetensors", "--to", "kohya", "--pipeline", pipelines["sd"])
    one, other = load_file(tmp_path / "alone.safetensors"), load_file(tmp_path / "based.safetensors")
    assert one.keys() == other.keys()
    assert all(name.startswith(("lora_unet_", "lora_te_")) for name in one)
    convert(tmp_path / "alone.safetensors", tmp_path / "back.safetensors", "--to", "diffusers")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


def sdxl_file(path: Path, names: dict[str, tuple[int, int]]) -> Path:
    """A LoRA for the published SDXL, of single layers."""
    tensors = {}
    for name, (out, inner) in names.items():
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, inner), f"{name}.lora_up.weight": torch.randn(out, 2)}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", ["sd", "sd2"])
def test_an_adapter_says_its_bases_prediction_type(name, pipelines, tmp_path):
    random_adapters.write(pipelines[name], tmp_path / "a.safetensors", "diffusers")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "kohya", "--pipeline", pipelines[name])
    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        said = opened.metadata()
    assert said["ss_v_parameterization"] == str(name == "sd2")
    assert said["modelspec.prediction_type"] == ("v" if name == "sd2" else "epsilon")


def test_a_dora_with_magnitudes_of_inputs_has_no_names_of_diffusers(pipelines, tmp_path, capsys):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", kind="dora", parts=("unet",))
    tensors = load_file(tmp_path / "a.safetensors")
    for name in [name for name in tensors if name.endswith("dora_scale")]:
        down = tensors[name.replace("dora_scale", "lora_down.weight")]
        tensors[name] = torch.ones(1, *down.shape[1:2], *[1] * (down.dim() - 2))
    save_file(tensors, tmp_path / "a.safetensors")
    given = [tmp_path / "a.safetensors", tmp_path / "out", "--pipeline", pipelines["sd"]]
    convert(*given, "--to", "diffusers", expect=2)
    assert "magnitudes of inputs" in message(capsys)
    assert not (tmp_path / "out").exists()


def test_names_of_the_published_sdxl_are_known(tmp_path):
    names = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
        "lora_unet_middle_block_1_proj_in": (1280, 1280),
        "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_0_proj": (10240, 1280),
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (768, 768),
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": (5120, 1280),
    }
    file = sdxl_file(tmp_path / "xl.safetensors", names)
    convert(file, tmp_path / "out.safetensors", "--to", "diffusers")
    owners = {name.partition(".lora_")[0] for name in load_file(tmp_path / "out.safetensors")}
    assert owners == {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.mid_block.attentions.0.proj_in",
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    }
    convert(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "--to", "kohya")
    before, after = load_file(file), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "names",
    [
        {"lora_unet_middle_block_1_proj_in": (1280, 1280), "lora_unet_label_emb_0_0": (1280, 2816)},
        {
            "lora_unet_input_blocks_4_1_proj_in": (640, 640),
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (1280, 1280),
        },
    ],
)
def test_sdxl_is_known_without_layers_that_read_text(names, tmp_path):
    file = sdxl_file(tmp_path / "xl.safetensors", names)
    convert(file, tmp_path / "out.safetensors", "--to", "diffusers")
    convert(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "--to", "kohya")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(file).keys()


def test_a_file_that_does_not_say_its_model_needs_the_base(tmp_path, capsys):
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    file = sdxl_file(tmp_path / "unet.safetensors", {"lora_unet_input_blocks_4_1_proj_in": (640, 640)})
    convert(file, out, "--to", "diffusers", expect=2)
    assert "does not say which model it is for; give the pipeline" in message(capsys)
    names = {"lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (768, 768)}
    file = sdxl_file(tmp_path / "encoder.safetensors", names)
    convert(file, out, "--to", "diffusers")
    convert(out, back, "--to", "kohya", expect=2)
    assert "--pipeline" in message(capsys)
    save_file(load_file(file), file, {"ss_base_model_version": "sdxl_base_v1-0"})
    convert(file, out, "--to", "diffusers", "--overwrite")
    convert(out, back, "--to", "kohya")
    assert load_file(back).keys() == load_file(file).keys()


def test_pairs_that_do_not_fit_are_one_line(pipelines, tmp_path, capsys):
    random_adapters.write(pipelines["sd"], tmp_path / "lora.safetensors")
    random_adapters.write(pipelines["sd"], tmp_path / "loha.safetensors", kind="loha")
    random_adapters.write(pipelines["sdxl"], tmp_path / "xl.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    out, sd = tmp_path / "out.safetensors", pipelines["sd"]
    for words, said in {
        (tmp_path / "lora.safetensors", out, "--to", "single_file"): "utils.tools.merge",
        (sd, out, "--to", "kohya"): "utils.tools.extract",
        (tmp_path / "loha.safetensors", out, "--to", "diffusers", "--pipeline", sd): "--to_lora",
        (tmp_path / "xl.safetensors", out, "--to", "diffusers"): "--pipeline",
        (tmp_path / "xl.safetensors", out, "--to", "diffusers", "--pipeline", sd): "another model",
        (sd, out): "--to is missing",
        (sd / "unet", tmp_path / "out", "--to", "folder"): f"one component, and no pipeline; give its pipeline, {sd}",
        (sd,): "OUT",
        (sd, tmp_path / "out", "--to", "single_file"): "OUT",
        (sd, out, "--to", "folder"): "named as a file",
        (sd, tmp_path / "there", "--to", "folder"): "exists",
        (sd, sd / "sub", "--to", "folder"): "inside",
        (sd, sd, "--to", "folder", "--overwrite"): "would replace",
        (sd, out, "--to", "single_file", "--ema"): "--ema",
        (tmp_path / "no.safetensors", out, "--to", "folder"): "does not exist",
        (tmp_path / "there" / "mine.txt", out, "--to", "single_file"): "IN",
    }.items():
        convert(*words, expect=2)
        assert said in message(capsys), words
        assert not out.exists()
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"


def test_overwriting_keeps_what_the_result_does_not_have(pipelines, tmp_path):
    convert(pipelines["sd"], tmp_path / "out", "--to", "folder")
    mine = ["mine.txt", "README.md", "unet/mine.txt", "unet/diffusion_pytorch_model.fp16.safetensors"]
    older = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "tokenizer/added_tokens.json"]
    for name in (*mine, *older):
        (tmp_path / "out" / name).write_text("mine")
    licensed = shutil.copytree(pipelines["sd"], tmp_path / "licensed")
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n")
    convert(licensed, tmp_path / "out", "--to", "folder", "--dtype", "bf16", "--overwrite")
    assert [(tmp_path / "out" / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert not any((tmp_path / "out" / name).exists() for name in older)
    file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert {each.dtype for each in load_file(file).values()} == {torch.bfloat16}


def test_a_card_of_a_tool_is_replaced(pipelines, tmp_path):
    licensed = shutil.copytree(pipelines["sd"], tmp_path / "licensed")
    named = "license: other\nlicense_name: my own\nlicense_link: https://example.org/a\n"
    for licence in ("license: mit\n", named, "license:\n- mit\n- apache-2.0\n"):
        (licensed / "README.md").write_text(f"---\n{licence}---\n")
        convert(licensed, tmp_path / "out", "--to", "folder", "--overwrite", "--no_check")
        assert (tmp_path / "out" / "README.md").read_text().startswith(f"---\n{licence}---\n")


def test_a_folder_at_the_place_of_a_file_stays(pipelines, tmp_path, capsys):
    convert(pipelines["sd"], tmp_path / "out", "--to", "folder")
    shutil.rmtree(tmp_path / "out" / "unet")
    (tmp_path / "out" / "unet").write_text("mine")
    convert(pipelines["sd"], tmp_path / "out", "--to", "folder", "--overwrite", expect=2)
    assert "out/unet by a folder" in message(capsys)
    assert (tmp_path / "out" / "unet").read_text() == "mine"


def test_a_fault_keeps_the_file_and_names_the_layer(pipelines, tmp_path, capsys, monkeypatch):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", "diffusers")
    monkeypatch.setattr(
        adapter_file_check, "_is_same", lambda layer, update, dtype: not layer.name.endswith("attn2.to_k")
    )
    out = tmp_path / "out.safetensors"
    convert(tmp_path / "a.safetensors", out, "--to", "kohya", expect=1)
    assert "attn2.to_k" in message(capsys)
    assert out.is_file()
    convert(tmp_path / "a.safetensors", out, "--to", "kohya", "--overwrite", "--no_check")


def test_checkpoints_become_pipelines_and_adapters(train, tmp_path, pipelines, caplog):
    vae = shutil.copytree(pipelines["vae"], tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text()) | {"sample_size": 77}
    (vae / "config.json").write_text(json.dumps(config))
    given = ["--use_ema", "--prediction_type", "v_prediction", "--pretrained_vae_model_name_or_path", vae]
    run = train("sd", "--max_train_steps", 1, "--checkpointing_steps", 1, *given)
    convert(run / "checkpoint-1", tmp_path / "trained", "--to", "folder")
    convert(run / "checkpoint-1", tmp_path / "ema.safetensors", "--to", "single_file", "--ema")
    own = load_file(tmp_path / "trained" / "unet" / "diffusion_pytorch_model.safetensors")
    there = load_file(run / "checkpoint-1" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in there.items())
    assert "v_prediction" in (tmp_path / "trained" / "scheduler" / "scheduler_config.json").read_text()
    assert json.loads((tmp_path / "trained" / "vae" / "config.json").read_text())["sample_size"] == 77
    average = load_file(run / "checkpoint-1" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    file = load_file(tmp_path / "ema.safetensors")
    assert torch.equal(file["model.diffusion_model.out.2.weight"], average["conv_out.weight"])
    assert "v_pred" in file
    with safe_open(tmp_path / "ema.safetensors", "pt") as opened:
        said = opened.metadata()
    assert said["modelspec.prediction_type"] == "v"
    assert said["modelspec.merged_from"] == pipelines["sd"].name
    assert "the marks v_pred in SDXL alone" in caplog.text


@pytest.mark.parametrize("adaptation", ["lora", "lokr"])
def test_checkpoints_of_adapters_are_read_with_their_runs_base(adaptation, train, tmp_path, capsys):
    run = train("sdxl", "--adaptation", adaptation, "--rank", 2, "--max_train_steps", 1, "--checkpointing_steps", 1)
    convert(run / "checkpoint-1", tmp_path / "ui.safetensors", "--to", "kohya")
    assert any("input_blocks" in name for name in load_file(tmp_path / "ui.safetensors"))
    if adaptation == "lora":
        convert(run, tmp_path / "folder", "--to", "diffusers", "--dtype", "fp16")
        found = load_file(tmp_path / "folder" / "pytorch_lora_weights.safetensors")
        assert {each.dtype for each in found.values()} == {torch.float16}
    record = json.loads((run / "run.json").read_text())
    record["options"]["pretrained_model_name_or_path"] = str(tmp_path)
    (run / "run.json").write_text(json.dumps(record))
    convert(run / "checkpoint-1", tmp_path / "ui2.safetensors", "--to", "kohya", expect=2)
    assert "checkpoint-1: its base" in (said := message(capsys))
    assert "--pipeline" not in said.partition("its base")[0]


def test_averages_of_several_components_are_taken(train, tmp_path):
    given = ["--adaptation", "lokr", "--rank", 2, "--train_text_encoder", "--use_ema", "--ema_decay", 0.5]
    run = train("sdxl", *given, "--max_train_steps", 2, "--checkpointing_steps", 2)
    for name, more in (("own", []), ("average", ["--ema"])):
        convert(run / "checkpoint-2", tmp_path / f"{name}.safetensors", "--to", "kohya", *more)
    own, average = (load_file(tmp_path / f"{name}.safetensors") for name in ("own", "average"))
    assert own.keys() == average.keys()
    prefixes = ("lora_unet_", "lora_te1_", "lora_te2_")
    assert all(any(not torch.equal(own[name], average[name]) for name in own if name.startswith(p)) for p in prefixes)


def test_files_that_are_damaged_or_of_another_kind_are_one_line(pipelines, tmp_path, capsys):
    whole = tiny.write_single_file(pipelines["sd"], tmp_path / "whole.safetensors")
    tensors = load_file(whole)
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    vae = {name: each for name, each in tensors.items() if name.startswith("first_stage")}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file({name: each for name, each in tensors.items() if name not in vae}, tmp_path / "rest.safetensors")
    lacking = {name: each for name, each in tensors.items() if not name.endswith("decoder.conv_in.weight")}
    save_file(lacking, tmp_path / "lacking.safetensors")
    for name, said in {
        "empty.safetensors": "is empty",
        "cut.safetensors": "can't be loaded",
        "vae.safetensors": "neither a whole pipeline",
        "rest.safetensors": "has no vae",
        "lacking.safetensors": "lacks 1 weights of the vae: decoder.conv_in.weight",
        "folder": "no file of an adapter",
    }.items():
        convert(tmp_path / name, tmp_path / "out", "--to", "folder", "--pipeline_config", pipelines["sd"], expect=2)
        assert said in message(capsys), name
    convert(whole, tmp_path / "out", "--to", "folder", "--pipeline_config", pipelines["sdxl"], expect=2)
    assert "different models" in message(capsys)
    assert not list(tmp_path.glob("*out*"))


def test_8_bit_floats_are_written_in_float32(pipelines, tmp_path):
    whole = load_file(tiny.write_single_file(pipelines["sd"], tmp_path / "whole.safetensors"))
    small = {name: each.to(torch.float8_e4m3fn) for name, each in whole.items()}
    save_file(small, tmp_path / "small.safetensors")
    convert(tmp_path / "small.safetensors", tmp_path / "out.safetensors", "--to", "single_file")
    convert(tmp_path / "small.safetensors", tmp_path / "out", "--to", "folder", "--pipeline_config", pipelines["sd"])
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(each.float(), written[name]) for name, each in small.items())
