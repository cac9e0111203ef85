"""Finished runs below a folder, and a line for everything that is wrong there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from air_plugin.report.record import RunResult
from air_plugin.utils.errors import UserError


def read_results(output: Path) -> tuple[list[RunResult], list[str]]:
    """Every valid result below a folder, and a line for each file that is damaged and each run that is unfinished.

    Links to folders are not followed.
    """
    results, faults = [], []

    def unreadable(error: OSError) -> None:
        faults.append(f"{error.filename} cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(output, onerror=unreadable):
        folders.sort()
        path = Path(folder) / "result.json"
        if path.name in files:
            try:
                results.append(RunResult.load(path))
            except UserError as error:
                faults.append(str(error))
            except FileNotFoundError:  # removed since the folder was listed
                continue
        elif "settings.json" in files and re.fullmatch(r"seed\d+", path.parent.name):
            faults.append(f"{path.parent} holds an unfinished run; run the same command again to finish it")
    return results, [" ".join(fault.split()) for fault in faults]
