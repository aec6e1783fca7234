"""Flags that change nothing without another one are named; those that do are not."""

import dataclasses
import importlib
import typing

import pytest

from utils.config.idle_flags import IDLE_WITHOUT, idle_flags

SCRIPTS = ("train_text_to_image", "train_unconditional", "evaluate_pipeline")


def defaults_of(script: str) -> dict[str, object]:
    groups = typing.get_type_hints(importlib.import_module(script).Options).values()
    return {field.name: field.default for group in groups for field in dataclasses.fields(group)}


def idle(script: str, **given: object) -> list[str]:
    defaults = defaults_of(script)
    assert set(given) <= set(defaults)
    return list(idle_flags(defaults | given, defaults))


@pytest.mark.parametrize(
    ("script", "given", "said"),
    [
        ("evaluate_pipeline", {"pipeline": "x", "lora_scale": 0.3}, "--lora_scale 0.3 (needs --lora or --checkpoints)"),
        ("evaluate_pipeline", {"images": "x", "eta": 0.5}, "--eta 0.5 (needs --pipeline or --checkpoints)"),
        ("evaluate_pipeline", {"pipeline": "x", "max_reference_images": 9}, "needs --reference or --training_images"),
        ("evaluate_pipeline", {"pipeline": "x", "pipeline_config": "y"}, "needs a file as --pipeline"),
        ("train_text_to_image", {"validation_steps": 5}, "--validation_steps 5 (needs --validation_prompts or "),
        ("train_text_to_image", {"huber_c": 0.2}, "--huber_c 0.2 (needs --loss huber or --loss smooth_l1)"),
        ("train_text_to_image", {"use_ema_warmup": True}, "--use_ema_warmup (needs --use_ema)"),
        ("train_text_to_image", {"keep_tokens": 2}, "needs --shuffle_tags or --tag_dropout or --dataset_file"),
        ("train_text_to_image", {"muon_momentum": 0.9, "optimizer": "lion"}, "(needs --optimizer muon)"),
        ("train_unconditional", {"label_dropout": 0.2}, "--label_dropout 0.2 (needs --class_conditional)"),
        ("train_unconditional", {"use_ema_warmup": False}, "--use_ema_warmup (needs --use_ema)"),
        ("train_unconditional", {"timestep_bias_end": 9, "timestep_bias_strategy": "later"}, "strategy range"),
    ],
)
def test_flags_without_their_partner_are_named(script, given, said):
    (found,) = idle(script, **given)
    assert said in found


@pytest.mark.parametrize(
    ("script", "given"),
    [
        ("evaluate_pipeline", {"pipeline": "x", "lora": "y", "lora_scale": 0.3, "num_inference_steps": 4}),
        ("evaluate_pipeline", {"checkpoints": "x", "lora_scale": 0.3, "pipeline_config": "z"}),
        ("evaluate_pipeline", {"pipeline": "x.safetensors", "pipeline_config": "y", "fid_mode": "tensorflow"}),
        ("train_text_to_image", {"validation_steps": 5, "validation_split": "0.1"}),
        ("train_text_to_image", {"validation_guidance_scale": 5.0, "validation_prompt": "a"}),
        ("train_text_to_image", {"timestep_bias_multiplier": 2.0, "timestep_bias_strategy": "later"}),
        ("train_unconditional", {"logit_mean": 1.0, "flow_matching": True}),
        ("train_unconditional", {}),
    ],
)
def test_flags_beside_their_partner_are_not(script, given):
    assert idle(script, **given) == []


def test_the_table_names_flags_that_there_are():
    known = set().union(*map(defaults_of, SCRIPTS))
    named = {partner.partition("=")[0] for partners in IDLE_WITHOUT.values() for partner in partners}
    assert set(IDLE_WITHOUT) | named <= known


def test_a_run_says_so_in_one_line(train, caplog):
    train("sd", "--dry_run", "--huber_c", 0.2, "--lr_power", 2)
    said = [record.message for record in caplog.records if "no effect" in record.message]
    assert said == [
        "these flags have no effect: --lr_power 2.0 (needs --lr_scheduler polynomial), --huber_c 0.2 (needs --loss "
        "huber or --loss smooth_l1)"
    ]
