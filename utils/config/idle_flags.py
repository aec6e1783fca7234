"""Flags that act only beside another one: given without it they change nothing, which a warning says."""

from collections.abc import Iterator, Mapping

from utils.config.flag_rules import SECRET_OPTIONS, FlagRules


def idle_flags(
    rules: Mapping[str, FlagRules], values: Mapping[str, object], defaults: Mapping[str, object]
) -> Iterator[str]:
    """Each flag that is given and changes nothing, with its value and what it would act with, in words.

    Conditions on flags that the script does not have are passed over, and so is a flag of which none are left.

    Args:
        rules: of all flags of a script.
        values: of the same.
        defaults: the same where they are not given.
    """
    for flag, rule in rules.items():
        partners = [partner for partner in rule.acts_with if partner.name in values]
        if not partners or values[flag] == defaults[flag]:
            continue
        if not any(partner.holds(values, defaults) for partner in partners):
            has_value = not isinstance(values[flag], bool) and flag not in SECRET_OPTIONS
            shown = dict.fromkeys(partner.words for partner in partners)
            yield f"--{flag}{f' {values[flag]!s:.60}' if has_value else ''} (needs {' or '.join(shown)})"
