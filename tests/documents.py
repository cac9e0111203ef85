"""What README and docs contain: code blocks, commands, links, paths and settings."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("bash", "python", "air", "pip", "mkdocs", "pytest", "ruff", "mypy", "pre-commit", "git")
STARTS = re.compile(
    rf"(\w+=(\"[^\"]*\"|\S*) )*(({'|'.join(PROGRAMS)}) |\.ci/run\b|pytest$|mypy$)|export \w+=|for \w+ in "
)
OPTIONAL = re.compile(r"(?<=\s)\[[^\[\]]*\](?=\s|$)")
PLACEHOLDERS = {
    "DATASET": "digits",
    "CONFIG": "mini",
    "CTP": "end",
    "NCTX": "16",
    "SHOTS": "4",
    "CSC": "False",
    "OUTPUT": "output",
    "IMAGES": "photos",
    "NAME": "digits",
}


@dataclass(frozen=True)
class Block:
    """An indented or fenced block of a page, without its indentation."""

    page: str
    text: str

    @property
    def is_shell(self) -> bool:
        return all(STARTS.match(line) for line in _whole_lines(self.text)[:1])

    @property
    def is_python(self) -> bool:
        return re.match(r"(from \S+ )?import \S|@\w|class \w+\(", self.text) is not None


@dataclass(frozen=True)
class Command:
    """A call of a program as the shell makes it: a line of a page with its placeholders filled."""

    page: str
    line: str
    words: tuple[str, ...]

    @property
    def is_excerpt(self) -> bool:
        """Whether "..." stands for arguments that are left out."""
        return "..." in re.sub(OPTIONAL, "", self.line)


def blocks(path: Path) -> Iterator[Block]:
    """The code blocks of a page: fenced, or indented by four spaces or more (three more within a list)."""
    lines: list[str] = []
    fenced = False
    for line in [*path.read_text(encoding="utf-8").splitlines(), "end"]:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    ") or (lines and not line.strip()):
            lines.append(line)
            continue
        if lines:
            yield Block(path.relative_to(ROOT).as_posix(), textwrap.dedent("\n".join(lines)).strip("\n"))
            lines = []


def _whole_lines(text: str) -> list[str]:
    """The lines of a shell block, continued ones joined."""
    return re.sub(r"\\\n\s*", "", text).splitlines()


def shell_lines(path: Path) -> list[str]:
    """Every command line of a page, as it stands there: of its blocks, and between backticks in its text."""
    lines = [line for block in blocks(path) if block.is_shell for line in _whole_blocks(block.text)]
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    quoted = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    names = re.compile(r"(air|python|git) \S+$")  # of a command, without its arguments
    return lines + [code for code in quoted if STARTS.match(code) and "<" not in code and not names.match(code)]


def quoted_names(path: Path) -> set[str]:
    """The names of `air` commands in a page's text, such as `air report`."""
    return set(re.findall(r"`air ([a-z]+)`", path.read_text(encoding="utf-8")))


def _whole_blocks(text: str) -> list[str]:
    """The lines of a shell block; a loop, and what is exported before a command, stay with it."""
    whole, exported, loop = [], "", ""
    for line in filter(str.strip, _whole_lines(text)):
        loop = f"{loop}\n{line}" if loop or line.startswith("for ") else ""
        if line.startswith("export "):
            exported = line.partition("#")[0].strip() + "\n"
        elif not loop:
            whole.append(exported + line)
        elif "done" in line:
            whole.append(exported + loop.strip())
            loop = ""
    return whole


def filled(line: str) -> str:
    """A line without its optional parts in brackets, its placeholders filled."""
    line = re.sub(OPTIONAL, "", line).replace("...", "")
    return re.sub(r"\b[A-Z]+\b(?![=.])", lambda found: PLACEHOLDERS.get(found[0], found[0]), line)


# Writes its name and arguments, each ended by a zero byte, and one byte more.
STUB = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" "" >> "$RECORD"
"""


def commands(line: str, page: str, folder: Path) -> list[Command]:
    """The programs that bash calls for a line, with their arguments. Scripts run; no other program does.

    Args:
        folder: an empty one, where the line is run.
    """
    stubs, record = folder / "stubs", folder / "record"
    stubs.mkdir()
    for program in PROGRAMS:
        if program != "bash":
            (stubs / program).write_text(STUB)
            (stubs / program).chmod(0o755)
    (folder / "docs").mkdir()
    (folder / "scripts").symlink_to(ROOT / "scripts")
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RECORD": str(record)}
    done = subprocess.run(["bash", "-ec", filled(line)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {line}\n{done.stderr}"
    calls = record.read_text().split("\0\0")[:-1] if record.exists() else []
    return [Command(page, line, tuple(call.split("\0"))) for call in calls]


def snippets() -> list[Block]:
    """Every block of Python of the pages."""
    return [block for page in PAGES for block in blocks(page) if block.is_python]


def links(path: Path) -> list[str]:
    """The targets of a page's links and pictures, but for other sites."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^()\s]+)\)", text) if not link.startswith(("http://", "https://"))]


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return frozenset(slug.replace(" ", "-") for slug in slugs)


def quoted_paths(path: Path) -> list[str]:
    """What a page's text names between backticks and looks like a path of ours."""
    text = path.read_text(encoding="utf-8")
    ours = "air_plugin|auxiliary|benchmarks|clip|compat|configs|datasets|diffusion|docs|functional|inference|mini"
    ours += "|report|scripts|tests|trainers|utils"
    return re.findall(rf"`((?:{ours})/[\w./*+-]*)`", text) + re.findall(r"`(\w+\.py)`", text)


def setting_keys(text: str) -> set[str]:
    """What looks like the full key of a setting of ours."""
    return set(re.findall(r"\b(?:AIR|TRAINER|DATASET|MODEL|OPTIM|TRAIN|TEST)(?:\.[A-Z][A-Z_0-9]*)+\b", text))


def imports(block: Block) -> list[tuple[str, str]]:
    """(module, name) of a snippet's imports; the name is empty for `import module`."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found
