"""What is declared beside each flag: whether a resumed run may change it, engines, and what it acts with."""

import dataclasses
import importlib
import typing

import pytest

from utils.config.flag_rules import SECRET_OPTIONS, FlagRules, Resume
from utils.config.options import WRITTEN_PATHS, option, parse, rules_of
from utils.runtime.engines import Engine, ShardedEngine, ZeroEngine

TRAINING = ("train_text_to_image", "train_unconditional")
TOOLS = tuple(f"utils.tools.{name}" for name in ("convert", "merge", "extract", "resize", "report"))
SCRIPTS = (*TRAINING, "evaluate_pipeline", *TOOLS)


def options_of(script: str) -> type:
    """What its options are read into; each script has `read_options`, and not all import the class that it returns."""
    return typing.get_type_hints(importlib.import_module(script).read_options)["return"]


def groups_of(script: str) -> list[type]:
    return list(typing.get_type_hints(options_of(script)).values())


def flags_of(script: str) -> dict[str, dataclasses.Field]:
    return {field.name: field for group in groups_of(script) for field in dataclasses.fields(group)}


ALL_FLAGS = {name: field for script in SCRIPTS for name, field in flags_of(script).items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_is_declared_by_option_and_once(script):
    names = [field.name for group in groups_of(script) for field in dataclasses.fields(group)]
    assert len(set(names)) == len(names)
    assert all(isinstance(rules_of(field), FlagRules) for field in flags_of(script).values())


def test_rules_name_flags_that_there_are():
    named = {
        partner.name for script in SCRIPTS for each in flags_of(script).values() for partner in rules_of(each).acts_with
    }
    assert named | set(SECRET_OPTIONS) | set(WRITTEN_PATHS) <= set(ALL_FLAGS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_does_not_act_with_itself_and_has_what_it_acts_with(script):
    flags = flags_of(script)
    for name, field in flags.items():
        partners = [partner.name for partner in rules_of(field).acts_with]
        assert name not in partners


def test_rules_name_values_that_the_other_flag_takes():
    for script in SCRIPTS:
        flags = flags_of(script)
        for field in flags.values():
            for partner in rules_of(field).acts_with:
                choices = flags[partner.name].metadata.get("choices") if partner.name in flags else None
                said = [
                    getattr(partner, "pattern", None),
                    *getattr(partner, "values", ()),
                    *getattr(partner, "any_of", ()),
                ]
                for word in said if choices is not None else ():
                    assert word is None or word in (*choices, "all"), (field.name, partner)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_redeclares_a_flag_keeps_its_rules(script):
    """Another default or help must not lose what is known of the flag."""
    for group in groups_of(script):
        for parent in group.__mro__[1:]:
            if dataclasses.is_dataclass(parent):
                theirs = {field.name: field for field in dataclasses.fields(parent)}
                for field in dataclasses.fields(group):
                    if field.name in theirs:
                        assert rules_of(field) == rules_of(theirs[field.name]), (group, field.name)


def test_rules_name_engines_that_there_are():
    named = {engine for field in ALL_FLAGS.values() for engine in rules_of(field).engines}
    assert named == {ShardedEngine.name, ZeroEngine.name}
    assert Engine.name not in named


def test_a_flag_without_a_rule_is_fixed():
    """What is forgotten is compared and refused, never taken in silence."""
    assert rules_of(option(1, "new")).resume is Resume.FIXED
    assert not Resume.FIXED.is_free
    assert not Resume.STRUCTURE.is_free


@pytest.mark.parametrize(
    ("script", "runs"),
    [
        (
            "train_text_to_image",
            [
                ["--pretrained_model=a/b"],
                *(["--pretrained_model=a/b", f"--adaptation={name}"] for name in ("lora", "loha")),
            ],
        ),
        ("train_unconditional", [[]]),
    ],
)
def test_what_a_checkpoint_fits_alone_is_declared_so(script, runs, tmp_path):
    """`TrainingOptions.structure` and the declarations name the same flags."""
    options, flags = options_of(script), flags_of(script)
    found = set()
    for words in runs:
        found |= set(parse(options, [*words, f"--train_data_dir={tmp_path}"], "").structure) & set(flags)
    rules = {name: rules_of(flags[name]).resume for name in found}
    assert set(rules.values()) == {Resume.STRUCTURE, Resume.COMPARED}
    assert {name for name, rule in rules.items() if rule is Resume.COMPARED} == {"seed", "loss_module"}
    assert {name for name, field in flags.items() if rules_of(field).resume is Resume.STRUCTURE} <= found


def test_what_changes_the_training_is_never_free():
    for name in ("learning_rate", "lr_scheduler", "loss", "resolution", "noise_offset", "ema_decay", "caption_dropout"):
        assert rules_of(ALL_FLAGS[name]).resume is Resume.FIXED
