"""Class names: files of them, folders named after them, and prompts made of them."""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from air_plugin.utils.checks import require_template
from air_plugin.utils.errors import UserError

log = logging.getLogger(__name__)


def read_class_file(path: Path) -> tuple[list[str], str]:
    """Read class names and a template from a text file in UTF-8.

    One name a line; blank lines are skipped, repeated spaces become one, and names are composed (NFC), as in the texts
    that text encoders were trained on. One line may be `template: a photo of a {}.`.

    Returns:
        At least two different names; and the template, "" where there is none.

    Raises:
        UserError: the file cannot be read as text, a name occurs twice, or the template has not one {}.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text in UTF-8'}; "
            "it must hold class names, one a line"
        ) from error
    names: list[str] = []
    templates: list[str] = []
    for line in lines:
        text = " ".join(unicodedata.normalize("NFC", line).split())
        template = re.match(r"template\s*:\s*", text, re.IGNORECASE)
        if template:
            templates.append(text[template.end() :])
        elif text in names:
            raise UserError(f"{path} names '{text}' twice; each class must stand there once")
        elif text:
            names.append(text)
    if len(names) < 2:
        raise UserError(f"{path} names {len(names)} classes; it must name at least 2, one a line")
    if len(templates) > 1:
        raise UserError(f"{path} has {len(templates)} template lines; leave one")
    for text in templates:
        require_template(f"the template in {path}", text)
    warn_of_same_prompts(tuple(names))
    return names, "".join(templates)


def match_class(name: str, classnames: list[str]) -> int | None:
    """The index of the class that a folder is named after; None where there is none.

    An exact match, else one that ignores case, underscores and spaces; composed and decomposed letters are equal. What
    no folder's name may hold or begin with, a slash and a dot, is ignored, too: a_b is the folder of a/b, net of .net.

    Raises:
        UserError: several classes fit.
    """
    exact = unicodedata.normalize("NFC", name)
    if exact in classnames:
        return classnames.index(exact)
    found = [index for index, classname in enumerate(classnames) if _loose(classname) == _loose(exact)]
    if len(found) > 1:
        raise UserError(
            f"folder {name} fits several classes: {listed([classnames[i] for i in found])}; "
            "rename it to exactly one of them"
        )
    return found[0] if found else None


def _loose(name: str) -> str:
    return re.sub(r"[_\s/]+|^\.+", "", unicodedata.normalize("NFC", name)).casefold()


def fill(template: str, classname: str) -> str:
    """Fill the one {} of a template with a class name, whose underscores become spaces.

    Example:
        >>> fill("a satellite photo of {}.", "annual_crop")
        'a satellite photo of annual crop.'
    """
    return template.format(classname.replace("_", " "))


def same_prompts(names: Sequence[str]) -> list[list[str]]:
    """Groups of class names whose prompts are the same: text encoders of CLIP read neither case nor underscores.

    Example:
        >>> same_prompts(["Fern", "moss", "fern"])
        [['Fern', 'fern']]
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[" ".join(name.replace("_", " ").split()).casefold()].append(name)
    return [group for group in groups.values() if len(group) > 1]


@functools.cache
def warn_of_same_prompts(names: tuple[str, ...]) -> None:
    """Log, once for these class names, which of them no prompt tells apart."""
    groups = same_prompts(names)
    if groups:
        some = "; ".join(" = ".join(map(repr, group)) for group in groups[:3]) + ("; ..." if len(groups) > 3 else "")
        log.warning("%d of the classes have the prompt of another class: %s", sum(map(len, groups)), some)


def listed(names: Sequence[str], *, first: int = 5) -> str:
    """Some names for one line of a message: the first few, and how many more there are.

    Example:
        >>> listed(["ant", "bee", "cat", "dog"], first=2)
        'ant, bee and 2 more'
    """
    more = len(names) - first
    return f"{', '.join(names[:first])} and {more:,} more" if more > 1 else ", ".join(names)
