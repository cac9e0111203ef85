"""A data set's section of the page, as plain values for the template: one part a module."""

from __future__ import annotations

from typing import Any

from air_plugin.report.sections.classes import class_accuracies
from air_plugin.report.sections.confusion import confusion, predictions_of
from air_plugin.report.sections.pictures import galleries, mistakes
from air_plugin.report.sections.pseudo_labels import pseudo_labels
from air_plugin.report.sections.settings import all_settings
from air_plugin.report.sections.sweeps import by_generated, by_weight
from air_plugin.report.sections.view import View
from air_plugin.report.statistics import is_unknown


def sections(view: View) -> dict[str, Any]:
    """Everything below a data set's heading; a part is empty where there is nothing to show."""
    predictions = {method.cell: predictions_of(view, method) for method in view.methods}
    return {
        "name": view.dataset,
        "metric": view.metric,
        "unknown": all(is_unknown(method, view.dataset) for method in view.methods),
        "classes": class_accuracies(view),
        "confusion": confusion(view, predictions),
        "labels": pseudo_labels(view),
        "generated": by_generated(view),
        "weight": by_weight(view),
        "galleries": galleries(view),
        "mistakes": mistakes(view, predictions),
        "settings": all_settings(view),
    }
