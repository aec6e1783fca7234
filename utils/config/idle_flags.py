"""Finds flags that have no effect because another flag that they need is missing."""

from collections.abc import Iterator, Mapping

from utils.config.flag_rules import SECRET_OPTIONS, FlagRules


def idle_flags(
    rules: Mapping[str, FlagRules], values: Mapping[str, object], defaults: Mapping[str, object]
) -> Iterator[str]:
    """Yields a description of each given flag that has no effect: the flag, its value, and what it needs.

    Conditions on flags that the script does not have are ignored; a flag left without conditions is skipped.

    Args:
        rules: rules of all flags of a script, by name.
        values: their values.
        defaults: their defaults.
    """
    for flag, rule in rules.items():
        partners = [partner for partner in rule.acts_with if partner.name in values]
        if not partners or values[flag] == defaults[flag]:
            continue
        if not any(partner.holds(values, defaults) for partner in partners):
            has_value = not isinstance(values[flag], bool) and flag not in SECRET_OPTIONS
            shown = dict.fromkeys(partner.words for partner in partners)
            yield f"--{flag}{f' {values[flag]!s:.60}' if has_value else ''} (needs {' or '.join(shown)})"
