"""A person's list of class names."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from air_plugin.utils.checks import require_template
from air_plugin.utils.errors import UserError


def read_class_file(path: Path) -> tuple[list[str], str]:
    """Class names and template of a text file in UTF-8.

    A name a line; blank lines are skipped, spaces within a name are made single ones, and names are composed (NFC), as
    text encoders have seen them. One line may be `template: a photo of a {}.`.

    Returns:
        At least two names, each once; and the template, "" where there is none.

    Raises:
        UserError: the file is missing or no text, a name stands there twice, or the template is none.
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
    return names, "".join(templates)


def match_class(name: str, classnames: list[str]) -> int | None:
    """The index of the class that a folder is called after; None where there is none.

    Exactly, else ignoring case, underscores and spaces; composed and decomposed letters are the same.

    Raises:
        UserError: several classes fit.
    """
    exact = unicodedata.normalize("NFC", name)
    if exact in classnames:
        return classnames.index(exact)
    found = [index for index, known in enumerate(classnames) if _loose(known) == _loose(exact)]
    if len(found) > 1:
        raise UserError(
            f"folder {name} fits several classes: {', '.join(classnames[i] for i in found)}; "
            "call it exactly like one of them"
        )
    return found[0] if found else None


def _loose(name: str) -> str:
    return re.sub(r"[_\s]+", "", unicodedata.normalize("NFC", name)).casefold()


def fill(template: str, classname: str) -> str:
    """A template with one {} and a class name, whose underscores stand for spaces, to a prompt."""
    return template.format(classname.replace("_", " "))
