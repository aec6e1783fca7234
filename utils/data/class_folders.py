"""Class names from the folders of images: which of nested folders names the class, and warnings of doubtful names."""

import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from utils.config.options import UserError
from utils.config.user_files import NOT_SHOWN, plain_spelling
from utils.data.folders import ALL_SPLIT_WORDS, class_folders_among
from utils.data.source_options import INNER, OUTER

logger = logging.getLogger(__name__)
NUM_SHOWN = 5


def same_text(name: str) -> str:
    """Returns a name in Unicode form NFC, without invisible characters, with single spaces.

    Names with the same result are one class.
    """
    return " ".join(NOT_SHOWN.sub("", unicodedata.normalize("NFC", name)).split()) or name


def warn_of_spellings(where: str, names: Iterable[str]) -> None:
    """Warns about classes with several spellings that look the same, or with invisible characters.

    Args:
        where: name of the data in the message.
        names: class names as written in the data.
    """
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        spellings[same_text(name)].add(name)
    odd = {
        name: found
        for name, found in spellings.items()
        if len(found) > 1 or any(same_text(each) != unicodedata.normalize("NFC", each) for each in found)
    }
    if odd:
        shown = "; ".join(
            f"{' and '.join(sorted(map(ascii, found)))} as {name!r}" for name, found in [*odd.items()][:NUM_SHOWN]
        )
        logger.warning(
            "%s: %d class names have unusual spaces, invisible characters or several Unicode normal forms; each is "
            "read as one class: %s",
            *(where, len(odd), shown),
        )


def names_of_folders(
    counts: Mapping[str, int], rule: str | None, where: str, source: str, in_shards: bool = True
) -> dict[str, str]:
    """Returns the class of each folder of images, by the folder's path.

    Folders of splits and tar shards are not part of a class's path. If no image is in a folder, all images are one
    class, named after their source.

    Args:
        counts: number of images in each folder; "" is the top folder.
        rule: for nested folders, `inner` takes the folder that holds the images and `outer` the first folder in which
            their paths differ. None takes the inner one, if its names are unambiguous.
        where: name of the data in messages.
        source: class name of images that are not in a folder.
        in_shards: whether a part of a path that ends with .tar is a tar shard, not a folder.

    Raises:
        UserError: if only some images are in folders, or folders of the same name are in several places and no rule is
            given.
    """
    own = class_folders_among(counts)
    paths = {folder: _class_path(folder, own, in_shards) for folder in counts}
    loose = [folder for folder, path in paths.items() if not path]
    if len(loose) == len(paths):
        return dict.fromkeys(paths, source)
    if loose:
        _refuse_loose(counts, loose, paths, where)
    distinct = sorted(set(map(tuple, paths.values())))
    outer = _outer_names(distinct)
    inner = {path: path[-1] for path in distinct}
    if rule is None:
        _check_inner(inner, outer, where)
    innermost = {folder: folder.rpartition("/")[2] for folder in counts}
    warn_of_spellings(where, (name for folder, name in innermost.items() if paths[folder][-1] == same_text(name)))
    chosen = outer if rule == OUTER else inner
    return {folder: chosen[path] for folder, path in paths.items()}


def recorded_folders(
    counts: Mapping[str, int], recorded: Sequence[str], where: str, source: str, in_shards: bool = True
) -> dict[str, str] | None:
    """Returns the class of each folder by the rule of earlier releases: its own name, or the source's for the top.

    Returns None if this rule does not lead to the recorded classes, or leads to the same names as the current rule,
    which takes precedence.

    Args:
        counts, where, source, in_shards: as in `names_of_folders`.
        recorded: the classes that the model was trained on.
    """
    names = {folder: PurePosixPath(folder).name or source for folder in counts}
    if not has_twins(recorded):
        names = {folder: same_text(name) for folder, name in names.items()}
    known = set(recorded) if has_twins(recorded) else set(map(same_text, recorded))
    found = set(names.values())
    if not known or not (found <= known or found >= known) or _are_plain(counts, names, in_shards):
        return None
    logger.info(
        "%s: the class of an image is the name of its folder, as for the %d classes of the checkpoint",
        *(where, len(recorded)),
    )
    return names


def _are_plain(counts: Iterable[str], names: Mapping[str, str], in_shards: bool) -> bool:
    """Returns whether the current rule unambiguously leads to these names."""
    own = class_folders_among(counts)
    paths = {folder: _class_path(folder, own, in_shards) for folder in counts}
    places = {path: path[-1] for path in paths.values() if path}
    is_named = all(path and path[-1] == names[folder] for folder, path in paths.items())
    return is_named and len(set(places.values())) == len(places)


def has_twins(names: Sequence[str]) -> bool:
    """Returns whether some names are the same text; earlier releases treated them as different classes."""
    return len(set(map(same_text, names))) < len(set(names))


def describe_counts(names: Sequence[str], counts: Mapping[str, int]) -> str:
    """Describes classes for a log line: their number, and the first few with their numbers of images."""
    some = ", ".join(f"{name:.40}: {counts[name]:,}" for name in names[:NUM_SHOWN])
    more = f", and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return f"{len(names):,} classes ({some}{more})"


def warn_of_twins(names: Iterable[str]) -> None:
    """Warns about classes that differ only in capitals, spaces or leading zeros."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_plain(name)].append(name)
    twins = [same for same in alike.values() if len(same) > 1]
    if twins:
        shown = "; ".join(" and ".join(map(repr, same[:4])) for same in twins[:NUM_SHOWN])
        logger.warning(
            "%d groups of classes differ only in capitals, spaces or leading zeros, and are trained as different "
            "classes: %s; rename them if they are the same class",
            *(len(twins), shown),
        )


def _plain(name: str) -> str:
    """Returns a class name without case, spaces and leading zeros, to compare similar names."""
    text = plain_spelling(unicodedata.normalize("NFKC", name))
    return str(int(text)) if text.isdecimal() and len(text) < 300 else text or name


def _class_path(folder: str, own: frozenset[str], in_shards: bool) -> tuple[str, ...]:
    """Returns the folders of a path that may name a class."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    shards = [number for number, part in enumerate(parts) if in_shards and part.lower().endswith(".tar")]
    shard = max(shards, default=None)
    if shard is not None:  # folders within the shard name the class; if there are none, folders above it
        parts = parts[shard + 1 :] or parts[:shard]
        return tuple(map(same_text, parts))
    kept = [
        part
        for depth, part in enumerate(parts, start=1)
        if part.lower() not in ALL_SPLIT_WORDS or "/".join(parts[:depth]) in own
    ]
    return tuple(map(same_text, kept))


def _outer_names(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Returns the first folder of each path below the folders that all paths share."""
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return {path: path[shared] for path in paths}


def _refuse_loose(
    counts: Mapping[str, int], loose: Sequence[str], paths: Mapping[str, tuple[str, ...]], where: str
) -> None:
    """Refuses images that are not in a class folder if others are."""
    count = sum(counts[folder] for folder in loose)
    places = ", ".join(f"{folder}/" if folder else "the top folder" for folder in loose[:3])
    names = sorted({path[-1] for path in paths.values() if path})
    raise UserError(
        f"{where}: {count:,} images are in no class folder (in {places}), beside the class folders "
        f"{', '.join(names[:NUM_SHOWN])}; move them to the folder of their class, or remove them"
    )


def _check_inner(inner: Mapping[tuple[str, ...], str], outer: Mapping[tuple[str, ...], str], where: str) -> None:
    """Refuses folders of the same name in several places, and warns if the outer folders may be the classes."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, name in inner.items():
        places[name].append("/".join(path))
    merged = {name: found for name, found in places.items() if len(found) > 1}
    by_outer = sorted(set(outer.values()))
    if merged:
        name, found = next(iter(merged.items()))
        cure = f"--class_folders {INNER} treats each name as one class, such as {name}"
        if len(by_outer) > 1:
            cure += f"; --class_folders {OUTER} uses the outer folders, such as {', '.join(by_outer[:3])}"
        raise UserError(
            f"{where}: {len(merged):,} folder names occur in several places, such as {', '.join(found[:3])}, and it is "
            f"unclear whether each is one class; {cure}"
        )
    if outer != inner and len(by_outer) > 1:
        path = next(path for path in inner if outer[path] != inner[path])
        logger.warning(
            "%s: for nested folders the inner one names the class, such as %s for %s; --class_folders %s uses the "
            "outer one, such as %s",
            *(where, inner[path], "/".join(path), OUTER, outer[path]),
        )


def count_folders(keys: Iterable[str]) -> Counter[str]:
    """Returns the number of images in each folder, from the paths of the images."""
    return Counter(key.rpartition("/")[0] for key in keys)
