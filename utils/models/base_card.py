"""The name and the licence of a base model, as its own card or file says."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import SafetensorError

from utils.config.options import UserError, first_line
from utils.config.tensor_files import open_safetensors
from utils.config.terminal import one_line
from utils.config.user_files import FileError, read_text
from utils.config.yaml_files import parse_yaml

logger = logging.getLogger(__name__)
CARD = "README.md"
FILE = "file"  # what says the licence of a single file
CARD_LIMIT = 4 << 20  # bytes
KEYS = ("license", "license_name", "license_link")
KEY = re.compile(rf"""["']?({"|".join(KEYS)})["']?\s*:""")
LONGEST = 200  # characters of a licence, its name or its address
SNAPSHOTS, REPOSITORY = "snapshots", "models--"  # folders of the Hub's cache


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub's metadata name it.

    Attributes:
        identifiers: `license`, such as openrail++; `other` if only its name says which one it is; rarely several.
        name, link: `license_name` and `license_link`; empty if there is none.
    """

    identifiers: tuple[str, ...]
    name: str = ""
    link: str = ""

    @property
    def text(self) -> str | None:
        """Its identifiers, or the name of one that is `other`, for the metadata of a file; None if it has no name."""
        return (self.name or None) if self.identifiers == ("other",) else ", ".join(self.identifiers)

    @property
    def front_matter(self) -> dict[str, object]:
        """The entries of a card's front matter that name it."""
        names = [one_line(each) for each in self.identifiers]
        own = {"license_name": one_line(self.name), "license_link": one_line(self.link)}
        return {"license": names[0] if len(names) == 1 else names} | {key: text for key, text in own.items() if text}


@dataclass(frozen=True)
class BaseModel:
    """The model that a training started from.

    Attributes:
        name: its Hub name, or the name of its folder or file; never a path.
        is_on_hub: whether `name` is a Hub name.
        licence: its licence; None if its card or file names none.
        said_by: where the licence would be: card or file; empty if there is neither.
    """

    name: str
    is_on_hub: bool
    licence: Licence | None
    said_by: str = "card"

    @property
    def is_file(self) -> bool:
        """Whether it is a single file of weights."""
        return self.said_by == FILE

    @classmethod
    def read(cls, path: str, revision: str | None = None) -> "BaseModel":
        """Returns what is known of a folder, Hub name or single file; the card of a Hub name is small and fetched."""
        place = Path(path)
        if place.is_file():
            return cls(place.name, False, _licence_in_file(place), FILE)
        if place.is_dir():
            hub_name, card = _cached_name(place.resolve()), place / CARD
            said_by = "card" if card.is_file() else ""
            return cls(shown_name(path), bool(hub_name), _licence_in_card(card, hub_name), said_by)
        card = _hub_card(path, revision)
        return cls(path, True, None, "") if card is None else cls(path, True, _licence_in_card(card, path))


def shown_name(path: str) -> str:
    """Returns the Hub name of a folder in the Hub's cache, the name without its path of any other, or a Hub name."""
    place = Path(path)
    return (_cached_name(place.resolve()) or place.resolve().name) if place.is_dir() else path


def _cached_name(folder: Path) -> str:
    """The Hub name of a snapshot in the Hub's cache; "" for other folders."""
    repository = folder.parent.parent.name
    if folder.parent.name != SNAPSHOTS or not repository.startswith(REPOSITORY):
        return ""
    return repository.removeprefix(REPOSITORY).replace("--", "/")


def _hub_card(name: str, revision: str | None) -> Path | None:
    """The card of a Hub repository, from the cache or the Hub; None if neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(name, CARD, revision=revision))
    except (HTTPError, OSError, ValueError):
        return None


def _said_of_licence(text: str) -> Mapping[str, Any]:
    """The keys of a card's front matter that concern the licence; other people's cards may have flaws elsewhere."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return {}
    kept, is_kept = [], False
    for line in lines[1:end]:
        if line[:1] not in ("", " ", "\t", "-", "#"):  # a key at the top level
            is_kept = KEY.match(line) is not None
        if is_kept:
            kept.append(line)
    try:
        found = parse_yaml("\n".join(kept), f"the base model's {CARD}", texts=KEYS)
    except FileError as error:
        logger.warning("the licence of the base model is not in the model card: %s", error)
        return {}
    return found if isinstance(found, dict) else {}


def _licence_in_card(card: Path, hub_name: str) -> Licence | None:
    """The licence that a card's front matter names.

    Args:
        hub_name: the repository that a relative link starts from; "" if there is none.
    """
    try:
        said = _said_of_licence(read_text(card, CARD_LIMIT).text)
    except (OSError, FileError):
        return None
    found = said.get("license")
    identifiers = [each.strip() for each in (found if isinstance(found, list) else [found]) if _is_short_text(each)]
    if not identifiers:
        return None
    name, link = (said.get(key) if _is_short_text(said.get(key)) else "" for key in ("license_name", "license_link"))
    if link and urlsplit(link).scheme not in ("http", "https"):
        link = f"https://huggingface.co/{hub_name}/blob/main/{link.removeprefix('./')}" if hub_name else ""
    return Licence(tuple(identifiers), name.strip(), link.strip())


def _licence_in_file(file: Path) -> Licence | None:
    """The licence that a safetensors file names by `modelspec.license`."""
    try:
        with open_safetensors(file) as opened:
            found = (opened.metadata() or {}).get("modelspec.license")
    except (OSError, UserError, SafetensorError) as error:
        logger.debug("no licence read: %s", first_line(error))
        return None
    return Licence((found.strip(),)) if _is_short_text(found) else None


def _is_short_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= LONGEST
