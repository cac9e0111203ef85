"""Which type faces the models may see: printed type from named Debian packages, no handwriting.

Two gates stand between a font file and the corpus: its package must be named in fonts.txt (or it must come
with matplotlib), and no word of its family or style may be one of `EXCLUDED_WORDS`. Whole families are held out
for evaluation, together with their near-duplicates (Carlito is Lato by another name).
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Families that look written, brushed or drawn, and those without a plain alphabet. Matched as substrings of the
# lower-cased "family style" without spaces and hyphens.
EXCLUDED_WORDS = (
    "script",
    "hand",
    "brush",
    "chancery",
    "chorus",
    "z003",
    "comic",
    "cursive",
    "calligra",
    "kaushan",
    "dancing",
    "lobster",
    "purisa",
    "chilanka",
    "kristi",
    "humor",
    "xkcd",
    "ecolier",
    "breip",
    "femkeklaver",
    "klaudia",
    "berenika",
    "rufscript",
    "sketch",
    "fantasque",
    "solidemirage",
    "isabella",
    "leckerli",
    "delphine",
    "stevehand",
    "domestic",
    "staypuft",
    "tomson",
    "radisnoir",
    "marck",
    "caliban",
    "pacifico",
    "quill",
    "swash",
    "initials",
    "ornament",
    "symbol",
    "dingbat",
    "emoji",
    "math",
    "d050000l",
    "povlogo",
    "keyboard",
    "icons",
    "romancaps",
    "monocaps",
    "garamondsc",
    "titling",
    "nonuni",
    "cmex",
    "cmsy",
    "stixsiz",
    "lastresort",
    "braille",
    "outline",
    "dummy",
)

# Noto has a family for every script of the world; those repeat the Latin of these.
NOTO_KEPT = {"notosans", "notoserif", "notosansmono", "notosansdisplay", "notoserifdisplay", "notomono"}

# Held out whole, by how the family begins. Families with a look-alike elsewhere in the corpus (FreeSerif, TeX
# Gyre Termes and URW's Nimbus Roman are one design) are either all here or, as those, all in training.
HELD_OUT = (
    "lato",
    "carlito",
    "vollkorn",
    "gentium",
    "inter",
    "cabin",
    "karla",
    "karmilla",
    "b612",
    "dosis",
    "prociono",
    "jetbrains",
    "junicode",
    "quattrocento",
    "oldstandard",
    "leaguemono",
    "play",
    "tuffy",
    "ocra",
    "baskervaldadf",
    "gillius",
    "yanone",
    "national",
)

# Never trained on: handwriting as a stand-in for "another domain" while settings are chosen.
DEVELOPMENT_PACKAGES = (
    "fonts-dkg-handwriting",
    "fonts-dancingscript",
    "fonts-kristi",
    "fonts-humor-sans",
    "fonts-comic-neue",
    "fonts-sjfonts",
    "fonts-ecolier-court",
    "fonts-kaushanscript",
    "fonts-breip",
    "fonts-femkeklaver",
    "fonts-klaudia-berenika",
    "fonts-rufscript",
    "fonts-tlwg-purisa-otf",
)


@dataclass(frozen=True)
class Face:
    """One usable font file."""

    path: Path
    family: str
    style: str

    @property
    def bold(self) -> bool:
        style = self.style.lower()
        return any(word in style for word in ("bold", "black", "heavy", "ultra")) and "light" not in style

    @property
    def italic(self) -> bool:
        return any(word in self.style.lower() for word in ("italic", "oblique", "slanted"))


def squash(name: str) -> str:
    """'TeX Gyre-Heros' -> 'texgyreheros'."""
    return "".join(character for character in name.lower() if character.isalnum())


def is_excluded(family: str, style: str = "") -> bool:
    """True for handwriting, script, brush and fantasy families, and for fonts without a plain alphabet."""
    name = squash(family + style)
    if name.startswith("noto"):
        return squash(family) not in NOTO_KEPT
    return any(word in name for word in EXCLUDED_WORDS)


def is_held_out(family: str) -> bool:
    """True for the families kept for evaluation."""
    return squash(family).startswith(HELD_OUT)


def package_names() -> list[str]:
    """The Debian packages of fonts.txt."""
    lines = (Path(__file__).parent / "fonts.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def package_files(packages: Iterable[str]) -> list[Path]:
    """Font files that Debian's package manager lists for `packages`; a package not installed adds none."""
    files: set[Path] = set()
    for package in packages:
        listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False).stdout
        found = (Path(line) for line in listing.splitlines() if line.lower().endswith((".ttf", ".otf")))
        files.update(path.resolve() for path in found if path.exists())
    return sorted(files)


def matplotlib_files() -> list[Path]:
    """The font files that come with matplotlib: everyone has them, so tests train on them."""
    import matplotlib

    return sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))


def find_faces(source: str = "debian", *, check_excluded: bool = True) -> list[Face]:
    """Usable faces, in a fixed order.

    Args:
        source: "debian" (fonts.txt and matplotlib's own), "matplotlib", or "development" (handwriting).
        check_excluded: False only for the development target, which is handwriting by design.
    """
    if source == "matplotlib":
        files = matplotlib_files()
    elif source == "debian":
        files = package_files(package_names()) + matplotlib_files()
    elif source == "development":
        files = package_files(DEVELOPMENT_PACKAGES)
    else:
        raise ValueError(f"fonts: unknown source {source!r}; choose debian, matplotlib or development")
    faces: dict[tuple[str, str], Face] = {}
    for path in files:
        face = read_face(path)
        if face is None or (check_excluded and is_excluded(face.family, face.style)):
            continue
        # The same face as .ttf and .otf, or in two packages, counts once.
        faces.setdefault((squash(face.family), squash(face.style)), face)
    return [face for face in faces.values() if is_usable(face.path)]


def read_face(path: Path) -> Face | None:
    """Family and style as FreeType reads them; None for a file that FreeType can't open."""
    try:
        family, style = ImageFont.truetype(str(path), 16).getname()
    except (OSError, ValueError):
        return None
    return Face(path, family or path.stem, style or "")


def is_usable(path: Path) -> bool:
    """True where all 62 characters have glyphs of their own and lower case is not small capitals."""
    font = ImageFont.truetype(str(path), 24)
    missing = glyph_bytes(font, "\uffff")
    glyphs = {character: glyph_bytes(font, character) for character in CHARACTERS}
    if any(glyph == missing or not any(glyph) for glyph in glyphs.values()):
        return False
    if len(set(glyphs.values())) < len(CHARACTERS) - 3:  # I, l and 1, or O and 0, may coincide
        return False
    return not has_small_capitals(font)


def glyph_bytes(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """The glyph rendered at a fixed place, as bytes to compare."""
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 2), character, font=font, fill=255)
    return image.tobytes()


def has_small_capitals(font: ImageFont.FreeTypeFont) -> bool:
    """True where a, e, g, r look like A, E, G, R once brought to one size."""
    overlaps = []
    for character in "aegr":
        lower, upper = (boxed(font, shape) > 100 for shape in (character, character.upper()))
        overlaps.append((lower & upper).sum() / max((lower | upper).sum(), 1))
    return float(np.mean(overlaps)) > 0.75


def boxed(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """The glyph's bounding box stretched to (24, 24), 0..255."""
    mask = font.getmask(character, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask)) if min(mask.size) else Image.new("L", (1, 1))
    return np.asarray(image.resize((24, 24)))


def face_weights(faces: list[Face]) -> np.ndarray:
    """Sampling probability of each face, summing to 1: a family of 72 widths must not dominate a family of one."""
    sizes = Counter(face.family for face in faces)
    weights = np.array([sizes[face.family] ** -0.5 for face in faces])
    return weights / weights.sum()
