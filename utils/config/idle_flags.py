"""Flags that act only beside another one: given without it they change nothing, which a warning says."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

PROMPTS = ("validation_prompts", "validation_prompt")
HELD_OUT = ("validation_split", "validation_data_dir")
DRAWING = ("pipeline", "checkpoints")
REFERENCE = ("reference", "training_images")
TAGS = ("shuffle_tags", "tag_dropout", "dataset_file")  # the file may say those of a source
WEIGHT_FILES = tuple(
    f"{flag}=*{ending}"
    for flag in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "pipeline", "baseline")
    for ending in (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
)
NETWORKS = (
    *("fid_mode", "inception_weights", "feature_module", "clip_model", "cmmd_model", "dino_model", "lpips_weights"),
    *("lpips_size", "pickscore_model", "hpsv2_model", "feature_batch_size"),
)
IDLE_WITHOUT: dict[str, tuple[str, ...]] = {
    "lora_scale": ("lora", "checkpoints"),
    "pipeline_config": (*WEIGHT_FILES, "checkpoints"),
    "pretrained_model_config": WEIGHT_FILES,
    **dict.fromkeys(
        (
            *("scheduler", "num_inference_steps", "guidance_scale", "guidance_rescale", "negative_prompt", "eta"),
            *("height", "width", "batch_size", "dynamic_thresholding", "clamp_start", "initial_noise_scale"),
            *("export_geneval", "num_images", "images_per_prompt"),
        ),
        DRAWING,
    ),
    "prompts_split": ("prompts_dataset", "captions_dir"),
    "prompts_column": ("prompts_file", "prompts_dataset", "captions_dir"),
    **dict.fromkeys(("reference_split", "reference_image_column", "reference_resolution"), REFERENCE),
    **dict.fromkeys(("reference_caption_column", "max_reference_images"), REFERENCE),
    **dict.fromkeys(("save_reference", "allow_stats_mismatch"), ("reference",)),
    **dict.fromkeys(
        (
            *("num_validation_images", "validation_num_inference_steps", "validation_guidance_scale"),
            "validation_negative_prompt",
        ),
        (*PROMPTS, "eval_metrics"),
    ),
    **dict.fromkeys(("validation_epochs", "validation_steps"), (*PROMPTS, *HELD_OUT)),
    **dict.fromkeys(("max_validation_samples", "num_validation_timesteps"), HELD_OUT),
    "early_stopping_threshold": ("early_stopping_patience",),
    **dict.fromkeys(("keep_tokens", "tag_separator"), TAGS),
    "label_dropout": ("class_conditional",),
    "shuffle_buffer_size": ("streaming",),
    "cache_batch_size": ("cache_latents", "cache_text_embeddings"),
    "dataset_config_name": ("dataset_name", "dataset_file"),
    "muon_momentum": ("optimizer=muon",),
    "lr_num_cycles": ("lr_scheduler=cosine_with_restarts",),
    "lr_power": ("lr_scheduler=polynomial",),
    "lr_t_mult": ("lr_scheduler=cosine_warm_restarts",),
    "lr_gamma": ("lr_scheduler=step", "lr_scheduler=reduce_on_plateau"),
    "lr_patience": ("lr_scheduler=reduce_on_plateau",),
    "lr_pct_start": ("lr_scheduler=one_cycle",),
    **dict.fromkeys(("huber_c", "huber_schedule"), ("loss=huber", "loss=smooth_l1")),
    **dict.fromkeys(("p2_gamma", "p2_k"), ("weighting=p2",)),
    **dict.fromkeys(("log_normal_mean", "log_normal_std"), ("timestep_distribution=log_normal",)),
    **dict.fromkeys(("logit_mean", "logit_std"), ("timestep_distribution=logit_normal", "flow_matching")),
    "timestep_bias_multiplier": ("timestep_bias_strategy",),
    **dict.fromkeys(("timestep_bias_begin", "timestep_bias_end"), ("timestep_bias_strategy=range",)),
    "timestep_bias_portion": ("timestep_bias_strategy=earlier", "timestep_bias_strategy=later"),
    "multires_noise_discount": ("multires_noise_iterations",),
    "dream_detail_preservation": ("dream_training",),
    **dict.fromkeys(("ema_decay", "use_ema_warmup", "ema_inv_gamma", "ema_power"), ("use_ema",)),
    "hub_private_repo": ("push_to_hub",),
    "allow_changed_options": ("resume_from_checkpoint",),
    **dict.fromkeys(("eval_num_images", "eval_num_inference_steps", "eval_guidance_scale"), ("eval_metrics",)),
    **dict.fromkeys(("eval_sampling_batch_size", *NETWORKS), ("eval_metrics",)),
}
"""What each flag acts beside: one of some flags, or of values of them (`flag=pattern`). Flags that a script does not
have are passed over, and so is a flag of which it has none to act beside."""


def idle_flags(values: Mapping[str, object], defaults: Mapping[str, object]) -> Iterator[str]:
    """Each flag that is given and changes nothing, with its value and what it would act beside, in words.

    Args:
        values: of all flags of a script.
        defaults: the same where they are not given.
    """
    for flag, partners in IDLE_WITHOUT.items():
        known = [partner for partner in partners if partner.partition("=")[0] in values]
        if flag not in values or not known or values[flag] == defaults[flag]:
            continue
        if not any(_is_given(partner, values, defaults) for partner in known):
            value = "" if isinstance(values[flag], bool) else f" {values[flag]!s:.60}"
            shown = dict.fromkeys(_shown(partner) for partner in known)
            yield f"--{flag}{value} (needs {' or '.join(shown)})"


def _is_given(partner: str, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
    name, has_pattern, pattern = partner.partition("=")
    if has_pattern:
        return fnmatch(str(values[name]), pattern)
    return values[name] != defaults[name]


def _shown(partner: str) -> str:
    """A partner as a user knows it: of a file's endings the first."""
    name, _, pattern = partner.partition("=")
    return f"a file as --{name}" if pattern.startswith("*") else f"--{name} {pattern}".strip()
