"""Flags that change nothing without another one are named; those that do are not."""

import dataclasses
import importlib
import typing
from pathlib import Path

import pytest

from utils.config.idle_flags import idle_flags
from utils.config.options import rules_of


def idle(script: str, **given: object) -> list[str]:
    groups = typing.get_type_hints(importlib.import_module(script).Options).values()
    fields = [field for group in groups for field in dataclasses.fields(group)]
    defaults, rules = {each.name: each.default for each in fields}, {each.name: rules_of(each) for each in fields}
    assert set(given) <= set(defaults)
    return list(idle_flags(rules, defaults | given, defaults))


LOCAL = str(Path(__file__).parent)


@pytest.mark.parametrize(
    ("script", "given", "said"),
    [
        ("evaluate_pipeline", {"pipeline": "x", "lora_scale": 0.3}, "--lora_scale 0.3 (needs --lora or --checkpoints)"),
        (
            "evaluate_pipeline",
            {"pipeline": "x", "baseline": "y", "baseline_config": "z"},
            "--baseline_config z (needs a file as --baseline)",
        ),
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
        ("train_unconditional", {"timestep_bias_end": 9, "timestep_bias_strategy": "later"}, "bias_strategy range)"),
        ("train_text_to_image", {"hub_token": "hf_x"}, "--hub_token (needs --push_to_hub)"),
        ("train_text_to_image", {"revision": "v2", "pretrained_model_name_or_path": LOCAL}, "needs a Hub name as"),
        ("train_text_to_image", {"non_ema_revision": "v2", "pretrained_model_name_or_path": LOCAL}, "a Hub name as"),
        (
            "train_text_to_image",
            {"sampling_cpu_offload": True},
            "(needs --validation_prompts or --validation_prompt or --validation_prompts_file)",
        ),
        (
            "train_text_to_image",
            {"tracker_project_name": "x", "report_to": "none"},
            "(needs --report_to other than none)",
        ),
        ("train_text_to_image", {"logging_dir": "x", "report_to": "none"}, "needs --report_to"),
        ("train_text_to_image", {"dynamic_thresholding": 99.5}, "needs --validation_prompts or"),
        ("train_text_to_image", {"fused_lora": False}, "(needs --adaptation lora)"),
        (
            "train_text_to_image",
            {"adam_epsilon": 1e-6, "optimizer": "lion"},
            "--optimizer other than adafactor and lion",
        ),
        (
            "train_text_to_image",
            {"clip_model": "a/b", "eval_metrics": ["fid"]},
            "--eval_metrics with clip_score, clip_i",
        ),
        ("train_text_to_image", {"width_column": "w"}, "(needs --streaming)"),
        ("train_unconditional", {"allow_missing_weights": ["unet."]}, "--pretrained_model_name_or_path or --vae or"),
        ("train_unconditional", {"revision": "v2"}, "needs a Hub name as"),
        (
            "train_unconditional",
            {"dropout": 0.1, "pretrained_model_name_or_path": "a/b"},
            "needs no --pretrained_model",
        ),
        ("train_unconditional", {"eval_batch_size": 4, "num_samples": 0}, "--num_samples other than 0"),
        ("evaluate_pipeline", {"images": "x", "revision": "v2"}, "needs a Hub name as --pipeline or --checkpoints"),
        (
            "evaluate_pipeline",
            {"pipeline": "x", "metrics": ["none"], "kid_subsets": 9},
            "needs --metrics with kid, all",
        ),
        (
            "evaluate_pipeline",
            {"pipeline": "x", "metrics": ["none"], "reference": "y"},
            "needs --metrics with kid, fid",
        ),
        ("evaluate_pipeline", {"pipeline": "x", "metrics": ["none"], "feature_batch_size": 9}, "needs --metrics with"),
        (
            "evaluate_pipeline",
            {"pipeline": "x", "metrics": ["clip_score"], "fid_mode": "tf"},
            "--metrics with kid, fid",
        ),
        ("evaluate_pipeline", {"pipeline": "x", "pickscore_model": "a/b"}, "needs --metrics with pickscore, all"),
        ("evaluate_pipeline", {"pipeline": "x", "max_prompts": 3}, "needs --prompts or"),
    ],
)
def test_flags_without_their_partner_are_named(script, given, said):
    (found,) = idle(script, **given)
    assert said in found


@pytest.mark.parametrize(
    ("script", "given"),
    [
        ("evaluate_pipeline", {"pipeline": "x", "lora": ["y"], "lora_scale": 0.3, "num_inference_steps": 4}),
        ("evaluate_pipeline", {"checkpoints": "x", "lora_scale": 0.3, "pipeline_config": "z"}),
        ("evaluate_pipeline", {"pipeline": "x.safetensors", "pipeline_config": "y", "fid_mode": "tensorflow"}),
        ("train_text_to_image", {"validation_steps": 5, "validation_split": "0.1"}),
        ("train_text_to_image", {"validation_guidance_scale": 5.0, "validation_prompt": "a"}),
        ("train_text_to_image", {"timestep_bias_multiplier": 2.0, "timestep_bias_strategy": "later"}),
        ("train_unconditional", {"logit_mean": 1.0, "flow_matching": True}),
        ("train_unconditional", {}),
        ("train_text_to_image", {"hub_token": "hf_x", "push_to_hub": True}),
        ("train_text_to_image", {"revision": "v2", "pretrained_model_name_or_path": "a/b"}),
        ("train_text_to_image", {"sampling_cpu_offload": True, "validation_prompt": "a"}),
        ("train_text_to_image", {"tracker_project_name": "x"}),
        ("train_text_to_image", {"clip_model": "a/b", "eval_metrics": ["clip_i"]}),
        ("train_text_to_image", {"allow_missing_weights": ["x"], "pretrained_model_name_or_path": "a/b"}),
        ("train_text_to_image", {"cache_variants": 4, "adam_beta1": 0.8, "fused_adamw": False}),
        ("train_text_to_image", {"fused_adamw": False, "optimizer": "muon"}),
        ("train_unconditional", {"dynamic_thresholding": 99.5, "eval_batch_size": 4, "dropout": 0.1}),
        ("train_unconditional", {"allow_missing_weights": ["x"], "vae": "a/b"}),
        ("evaluate_pipeline", {"pipeline": "a/b", "revision": "v2", "kid_subsets": 9, "clip_model": "c/d"}),
        ("evaluate_pipeline", {"pipeline": "x", "metrics": ["all"], "pickscore_model": "a/b", "fid_groups": 3}),
        ("evaluate_pipeline", {"pipeline": "x", "metrics": ["none"], "reference": "y", "save_reference": "z.npz"}),
    ],
)
def test_flags_beside_their_partner_are_not(script, given):
    assert idle(script, **given) == []


def test_a_run_says_so_in_one_line(train, caplog):
    train("sd", "--dry_run", "--huber_c", 0.2, "--lr_power", 2)
    said = [record.message for record in caplog.records if "no effect" in record.message]
    assert said == [
        "these flags have no effect: --lr_power 2.0 (needs --lr_scheduler polynomial), --huber_c 0.2 (needs --loss "
        "huber or --loss smooth_l1)"
    ]


def test_a_folder_for_datasets_that_none_fills_is_named(train, tmp_path, caplog):
    train("sd", "--dry_run", "--cache_dir", tmp_path / "datasets")
    assert "--cache_dir" in caplog.text
    assert "has no effect" in caplog.text
