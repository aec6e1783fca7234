"""The classes that the folders of images say: which of nested folders names one, and what is doubtful."""

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
    """A name as it is read: in one Unicode normal form, without characters that are not shown, each space one blank.

    What is the same text is one class.
    """
    return " ".join(NOT_SHOWN.sub("", unicodedata.normalize("NFC", name)).split()) or name


def warn_of_spellings(where: str, names: Iterable[str]) -> None:
    """Names classes that are written in several ways which look alike, or with characters that are not shown.

    Args:
        names: as they stand in the data.
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
            "%s: %d classes are written with other spaces, characters that are not shown, or in several Unicode normal "
            "forms, and taken for one each: %s",
            *(where, len(odd), shown),
        )


def names_of_folders(
    counts: Mapping[str, int], rule: str | None, where: str, source: str, in_shards: bool = True
) -> dict[str, str]:
    """The class of each folder of images, by its path.

    A split's folder and tar shards are no part of a class's path. Images that all lie in no folder are of one class,
    which is called as their source is.

    Args:
        counts: how many images lie in each folder; "" is the top.
        rule: of nested folders, `inner` takes the one that holds the images and `outer` the first in which their paths
            differ. None for the inner one where the two don't contradict each other.
        where: what is read, as it is named in messages.
        source: the name of a class without a folder.
        in_shards: whether a part of a path that ends with .tar is a shard; else it is a folder of that name.

    Raises:
        UserError: if some images lie in no folder while others do, or folders of one name lie in several places and no
            rule is given.
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
    """The class of each folder by the rule of earlier releases: a folder's own name, of images at the top the source's.

    None where this does not give the recorded classes, or no other ones than today's rule, which comes first then.

    Args:
        counts, where, source, in_shards: as of `names_of_folders`.
        recorded: the classes that a model was trained on.
    """
    names = {folder: PurePosixPath(folder).name or source for folder in counts}
    if not has_twins(recorded):
        names = {folder: same_text(name) for folder, name in names.items()}
    known = set(recorded) if has_twins(recorded) else set(map(same_text, recorded))
    found = set(names.values())
    if not known or not (found <= known or found >= known) or _are_plain(counts, names, in_shards):
        return None
    logger.info(
        "%s: each folder's own name is its class, as it was for the %d classes of the checkpoint",
        *(where, len(recorded)),
    )
    return names


def _are_plain(counts: Iterable[str], names: Mapping[str, str], in_shards: bool) -> bool:
    """Whether today's rule gives these names without a doubt."""
    own = class_folders_among(counts)
    paths = {folder: _class_path(folder, own, in_shards) for folder in counts}
    places = {path: path[-1] for path in paths.values() if path}
    is_named = all(path and path[-1] == names[folder] for folder, path in paths.items())
    return is_named and len(set(places.values())) == len(places)


def has_twins(names: Sequence[str]) -> bool:
    """Whether some names are the same text as others, which earlier releases took for classes of their own."""
    return len(set(map(same_text, names))) < len(set(names))


def describe_counts(names: Sequence[str], counts: Mapping[str, int]) -> str:
    """Classes in words: how many, and the first with how many images each has."""
    some = ", ".join(f"{name:.40}: {counts[name]:,}" for name in names[:NUM_SHOWN])
    more = f", and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return f"{len(names):,} classes ({some}{more})"


def warn_of_twins(names: Iterable[str]) -> None:
    """Names classes that differ only in what people write in several ways: capitals, spaces, zeros before a number."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_plain(name)].append(name)
    twins = [same for same in alike.values() if len(same) > 1]
    if twins:
        shown = "; ".join(" and ".join(map(repr, same[:4])) for same in twins[:NUM_SHOWN])
        logger.warning(
            "%d groups of classes differ only in capitals, spaces or leading zeros, and are trained as different "
            "classes: %s; if they are the same, give them one name",
            *(len(twins), shown),
        )


def _plain(name: str) -> str:
    """A class's name without what may be meant alike: 01 and 1 too."""
    text = plain_spelling(unicodedata.normalize("NFKC", name))
    return str(int(text)) if text.isdecimal() and len(text) < 300 else text or name


def _class_path(folder: str, own: frozenset[str], in_shards: bool) -> tuple[str, ...]:
    """The folders of a path that may say a class."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    shards = [number for number, part in enumerate(parts) if in_shards and part.lower().endswith(".tar")]
    shard = max(shards, default=None)
    if shard is not None:  # the folders within a shard say it, else those that it lies in
        parts = parts[shard + 1 :] or parts[:shard]
        return tuple(map(same_text, parts))
    kept = [
        part
        for depth, part in enumerate(parts, start=1)
        if part.lower() not in ALL_SPLIT_WORDS or "/".join(parts[:depth]) in own
    ]
    return tuple(map(same_text, kept))


def _outer_names(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The first folder of each path below those that all of them share."""
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return {path: path[shared] for path in paths}


def _refuse_loose(
    counts: Mapping[str, int], loose: Sequence[str], paths: Mapping[str, tuple[str, ...]], where: str
) -> None:
    """Refuses images beside the folders of classes, which would be a class of their own."""
    count = sum(counts[folder] for folder in loose)
    places = ", ".join(f"{folder}/" if folder else "its top" for folder in loose[:3])
    names = sorted({path[-1] for path in paths.values() if path})
    raise UserError(
        f"{where}: {count:,} images lie in no folder of a class (in {places}), beside the folders "
        f"{', '.join(names[:NUM_SHOWN])}; put them into the folder of their class, or take them out"
    )


def _check_inner(inner: Mapping[tuple[str, ...], str], outer: Mapping[tuple[str, ...], str], where: str) -> None:
    """Refuses folders of one name in several places, and names nested ones that may be meant otherwise."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, name in inner.items():
        places[name].append("/".join(path))
    merged = {name: found for name, found in places.items() if len(found) > 1}
    by_outer = sorted(set(outer.values()))
    if merged:
        name, found = next(iter(merged.items()))
        cure = f"--class_folders {INNER} makes each name one class, such as {name}"
        if len(by_outer) > 1:
            cure += f"; --class_folders {OUTER} takes the outer folders, such as {', '.join(by_outer[:3])}"
        raise UserError(
            f"{where}: {len(merged):,} names of folders stand in several places, such as {', '.join(found[:3])}, and "
            f"it is unclear whether each is one class; {cure}"
        )
    if outer != inner and len(by_outer) > 1:
        path = next(path for path in inner if outer[path] != inner[path])
        logger.warning(
            "%s: of nested folders the inner one names the class, such as %s of %s; --class_folders %s takes the outer "
            "one, such as %s",
            *(where, inner[path], "/".join(path), OUTER, outer[path]),
        )


def count_folders(keys: Iterable[str]) -> Counter[str]:
    """How many images lie in each folder, by their paths."""
    return Counter(key.rpartition("/")[0] for key in keys)
