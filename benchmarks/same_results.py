"""Whether two OUTPUT folders hold the same results, for instance of two engines.

    ENGINE=local OUTPUT=/tmp/local SEEDS="1 2" bash scripts/air/main.sh digits
    ENGINE=ray OUTPUT=/tmp/ray SEEDS="1 2" bash scripts/air/main.sh digits
    python -m benchmarks.same_results /tmp/local /tmp/ray

Compared are every result.json, without times and provenance, and the weights of its bundle, bit by bit. Exit code 1
where anything differs; each difference is a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from air_plugin.utils.errors import UserError, exit_code

OTHERWISE = ("stages", "provenance")  # what a result has of its machine and its time


def differences(one: Path, other: Path) -> Iterator[str]:
    """What differs, in words.

    Raises:
        UserError: a folder has no results.
    """
    results = {root: {path.relative_to(root) for path in root.rglob("result.json")} for root in (one, other)}
    for root, found in results.items():
        if not found:
            raise UserError(f"{root} has no results")
    for path in sorted(results[one] ^ results[other]):
        yield f"{path} is in one of the folders only"
    for path in sorted(results[one] & results[other]):
        first, second = (json.loads((root / path).read_text("utf-8")) for root in (one, other))
        for key in sorted((first.keys() | second.keys()) - {*OTHERWISE}):
            if first.get(key) != second.get(key):
                yield f"{path}: {key} differs"
        yield from _weights(one / path.parent, other / path.parent)


def _weights(one: Path, other: Path) -> Iterator[str]:
    names = {path.relative_to(root) for root in (one, other) for path in root.glob("bundle/**/*.safetensors")}
    for name in sorted(names):
        files = [root / name for root in (one, other)]
        if not all(file.is_file() for file in files) or files[0].read_bytes() != files[1].read_bytes():
            yield f"{one / name}: the weights differ"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="OUTPUT")
    one, other = parser.parse_args(arguments).folders
    found = list(differences(one, other))
    print("\n".join(found) if found else f"{len(list(one.rglob('result.json')))} results are the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
