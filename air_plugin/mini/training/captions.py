"""Captions of the corpus: what a picture shows, what a caption claims, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from air_plugin.mini.training.fonts import CHARACTERS

COLOURS = {
    "black": (12, 12, 12),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "red": (205, 35, 35),
    "green": (30, 145, 50),
    "blue": (35, 65, 200),
    "yellow": (240, 215, 45),
    "orange": (240, 140, 30),
    "purple": (125, 45, 160),
    "pink": (245, 150, 190),
    "brown": (115, 70, 35),
    "cyan": (70, 205, 220),
    "navy": (18, 25, 85),
    "beige": (228, 212, 178),
}
COLOUR_NAMES = tuple(COLOURS)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Look:
    """What a picture shows, or what a caption claims; None for what a caption does not name."""

    character: str | None = None  # one of CHARACTERS; captions may leave the case of a letter open
    any_case: bool = False
    kind: str | None = None  # "digit" or "letter"
    ink: str | None = None
    ground: str | None = None
    bold: bool | None = None
    italic: bool | None = None

    def satisfies(self, claim: Look) -> bool:
        """True where everything that `claim` names holds of this picture."""
        if claim.character is not None:
            shown = (self.character or "").lower() if claim.any_case else self.character
            if shown != claim.character:
                return False
        names = ("kind", "ink", "ground", "bold", "italic")
        return all(getattr(claim, name) in (None, getattr(self, name)) for name in names)


OPENINGS = (
    "a photo of",
    "a photo of",
    "a photo of",
    "a picture of",
    "an image of",
    "a scan of",
    "a print of",
    "a rendering of",
    "a close-up of",
    "a blurry photo of",
    "a small photo of",
    "this is",
    "",
)
DIGIT_NOUNS = (
    "the digit {}",
    "the digit {}",
    "a {}",
    "the {}",
    "the number {}",
    "a digit {}",
    "the numeral {}",
    "the figure {}",
    "number {}",
    "{}",
    "the character {}",
)
LETTER_NOUNS = (
    "the letter {}",
    "the letter {}",
    "a {}",
    "the {}",
    "letter {}",
    "a letter {}",
    "{}",
    "the character {}",
)
CASED_NOUNS = {
    "upper": ("the capital letter {}", "an uppercase {}", "a capital {}", "the uppercase letter {}"),
    "lower": ("the small letter {}", "a lowercase {}", "the lowercase letter {}"),
}
KIND_NOUNS = {"digit": ("a digit", "a number", "a numeral"), "letter": ("a letter", "a letter of the alphabet")}
COLOURINGS = {
    "both": ("{} in {ink} on a {ground} background", "{}, {ink} on {ground}", "{} in {ink} on {ground}"),
    "ink": ("{} in {ink}", "{} printed in {ink}", "{} in {ink} ink"),
    "ground": ("{} on a {ground} background", "{} on {ground}", "{} on a {ground} ground"),
}


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    """One of `options`."""
    return options[int(rng.integers(len(options)))]


def name_noun(look: Look, rng: np.random.Generator) -> tuple[str, Look]:
    """A noun phrase for what a picture shows, and the claim that it makes."""
    character = look.character or ""
    if rng.random() < 0.08:
        return pick((*KIND_NOUNS[look.kind or "letter"], "a character"), rng), Look(kind=look.kind)
    if character.isdigit():
        name = DIGIT_NAMES[int(character)] if rng.random() < 0.85 else character
        return pick(DIGIT_NOUNS, rng).format(name), Look(character=character)
    if rng.random() < 0.3:
        case = "upper" if character.isupper() else "lower"
        return pick(CASED_NOUNS[case], rng).format(character.lower()), Look(character=character)
    return pick(LETTER_NOUNS, rng).format(character.lower()), Look(character=character.lower(), any_case=True)


def describe(look: Look, rng: np.random.Generator) -> tuple[str, Look]:
    """A caption of a picture, and the claim that it makes; half of the captions name the character alone."""
    noun, claim = name_noun(look, rng)
    if noun == "a character":
        claim = Look()
    named: dict[str, str | bool | None] = {}
    bare = rng.random() < 0.5
    if not bare and rng.random() < 0.25 and (look.bold or look.italic):
        style = "bold" if look.bold and (not look.italic or rng.random() < 0.5) else "italic"
        noun, named[style] = add_adjective(noun, style), True
    if not bare and rng.random() < 0.85:
        kind = pick(("both", "both", "ink", "ground", "adjective"), rng)
        if kind == "adjective":
            noun, named["ink"] = add_adjective(noun, look.ink or ""), look.ink
        else:
            noun = pick(COLOURINGS[kind], rng).format(noun, ink=look.ink, ground=look.ground)
            named |= {"ink": look.ink} if kind != "ground" else {}
            named |= {"ground": look.ground} if kind != "ink" else {}
    text = f"{pick(OPENINGS, rng)} {noun}".strip() + ("." if rng.random() < 0.5 else "")
    return text, Look(claim.character, claim.any_case, claim.kind, **named)  # type: ignore[arg-type]


NAMES = "0123456789abcdefghijklmnopqrstuvwxyz"


def call_by_name(character: str, rng: np.random.Generator) -> str:
    """A caption that names one of NAMES and nothing else."""
    digit = character.isdigit()
    name = DIGIT_NAMES[int(character)] if digit and rng.random() < 0.85 else character
    text = f"{pick(OPENINGS, rng)} {pick(DIGIT_NOUNS if digit else LETTER_NOUNS, rng).format(name)}".strip()
    return text + ("." if rng.random() < 0.5 else "")


def add_adjective(noun: str, adjective: str) -> str:
    """'the digit seven', 'red' -> 'the red digit seven'; 'a seven', 'italic' -> 'an italic seven'."""
    first, _, rest = noun.partition(" ")
    if first in ("a", "an"):
        return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {rest}"
    return f"the {adjective} {rest}" if first == "the" and rest else f"{adjective} {noun}"


def match(looks: Sequence[Look], claims: Sequence[Look]) -> Tensor:
    """(looks, claims) in {0, 1}: 1 where the picture satisfies the caption."""
    return torch.tensor([[look.satisfies(claim) for claim in claims] for look in looks], dtype=torch.float32)


def all_captions_vocabulary() -> list[str]:
    """Texts that together contain every word of the captions."""
    names = [*DIGIT_NAMES, *CHARACTERS.lower(), *COLOUR_NAMES, "bold", "italic", "an", "a character."]
    cased = [noun for nouns in CASED_NOUNS.values() for noun in nouns]
    kinds = [noun for nouns in KIND_NOUNS.values() for noun in nouns]
    colourings = [text for texts in COLOURINGS.values() for text in texts]
    blanks = [*OPENINGS, *DIGIT_NOUNS, *LETTER_NOUNS, *cased, *kinds, *colourings]
    return names + [text.format("x", ink="red", ground="red") for text in blanks]
