"""Every setting of every method: those that differ, and those that are the same."""

from __future__ import annotations

from typing import Any

from air_plugin.report.sections.view import View

OWN = {"SEED"}  # of a run, not of a method


def all_settings(view: View) -> dict[str, Any]:
    """Titles of the methods whose results hold settings; (key, a value a method) or, where all agree, (key, value).

    The settings of a method are those of its first seed. An empty text is shown as two quotes.
    """
    found = [(method.title, view.runs(method)[0].settings) for method in view.methods]
    known = [(title, settings) for title, settings in found if settings]
    keys = sorted({key for _, settings in known for key in settings} - OWN)
    rows = [(key, [_text(settings.get(key, None)) for _, settings in known]) for key in keys]
    return {
        "methods": [title for title, _ in known],
        "differing": [(key, values) for key, values in rows if len(set(values)) > 1],
        "same": [(key, values[0]) for key, values in rows if len(set(values)) == 1],
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if value != "" else '""'
