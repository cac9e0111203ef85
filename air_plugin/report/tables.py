"""The contents of the tables, for every format: notes, headers and cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from air_plugin.report.collection import Method
from air_plugin.report.comparison import Comparison
from air_plugin.report.record import USUAL_PARADIGM
from air_plugin.report.stage_times import STAGES
from air_plugin.report.statistics import Difference, group_accuracies, is_unknown, scores

UNKNOWN = "-"  # there are runs, but no test labels
NOT_MEASURED = "-"  # there are runs, but for each the stage came from the store
FUSION_NOTES = (
    "Lambda: weight of the auxiliary classifier after the last round; beta: weight of the loss on synthetic images. "
    "Both are chosen without labels, or set by the config (fixed).",
    "Oracle: the fused head with the best lambda of those tried, each seed its own; regret: oracle less fused head, in "
    "points. Both are computed after training from test labels that the method never saw.",
    "Prior strength: how many real images a synthetic class mean counts for in EM. Rounds: of captions, "
    "LoRA and synthetic images. Correct labels: percent of all unlabelled training images after the last round, "
    "measured after training.",
)
TIME_NOTES = (
    "Seconds: mean over the seeds that ran the stage; a + b: the first round and the second. -: for every seed the "
    "stage came from the store, where another run had saved it, so the true sum is larger than the one shown (>). The "
    "time of an interrupted run counts from when it was resumed.",
)
GROUPS_NOTE = (
    "s, u: test accuracy of the primary classifier on the images of seen and of unseen classes, over all classes; H: "
    "their harmonic mean 2 s u / (s + u), which is computed for each seed and is what is compared, also by head, "
    "lambda and seed."
)
FUSION_HEADERS = [
    "method",
    "lambda",
    "fused head",
    "oracle",
    "regret",
    "beta",
    "prior strength",
    "rounds",
    "correct labels",
]


def unknown_note(view: Comparison, dataset: str) -> str:
    """What a reader needs to know where there are no test labels."""
    missing = "no test labels of both groups of classes" if view.has_groups else "no test labels"
    return (
        f'{dataset}: {missing}, so its accuracy is unknown ("-"); every predictions.json holds the predicted classes.'
    )


def notes(view: Comparison, *, details: bool) -> list[str]:
    """What a reader of the tables needs to know, a line each."""
    collection = view.collection
    spread = "half of the 95 % interval over seeds (Student's t)" if view.ci95 else "the standard deviation over seeds"
    paradigm = "" if collection.paradigm == USUAL_PARADIGM else f"paradigm {collection.paradigm}, "
    lines = [
        f"{name}: {paradigm}backbone {collection.backbone}, split family {collection.split_family}, "
        f'template "{template}"'
        + (f", class names {collection.class_names[name]}" if name in collection.class_names else "")
        for name, template in collection.templates.items()
    ]
    lines += [
        unknown_note(view, name)
        for name in collection.datasets
        if any(is_unknown(method, name) for method in collection.methods)
    ]
    lines += [GROUPS_NOTE] if view.has_groups else []
    lines += [
        f"Test accuracy of the primary classifier in percent; +- is {spread}, and is left out for a single seed.",
        "Primary classifier: the head that the config chooses before training (AIR.PRIMARY); text for methods without "
        "an auxiliary classifier.",
    ]
    if len(collection.datasets) > 1:
        lines.append("mean: of the data sets' means, for methods that have all; seeds: by data set where they differ.")
    if view.baseline:
        lines.append(
            f"Difference to {view.baseline.title}: in points over common seeds, with the 95 % bootstrap interval over "
            "test images (images are resampled, seeds are not)."
        )
    if details:
        lines.append(
            "Pseudo-labels: percent of the selected training images whose top-1 candidate is right, in the last round."
        )
        lines += [*(FUSION_NOTES if view.fusions else []), *(TIME_NOTES if any(view.stages.values()) else [])]
    return lines


Table = tuple[list[str], list[list[str]]]  # headers, rows


def shown_scores(view: Comparison, method: Method, dataset: str) -> list[tuple[str, list[float]]]:
    """What the main table has of a data set, by seed, with the label of the column; what is compared comes last."""
    compared = scores(method, dataset)
    if not view.has_groups:
        return [("", compared)]
    seen, unseen = group_accuracies(method, dataset, "seen"), group_accuracies(method, dataset, "unseen")
    return [(" s", seen), (" u", unseen), (" H", compared)]


def score_columns(view: Comparison) -> list[str]:
    """The names of the columns of `shown_scores`, of every data set."""
    labels = (" s", " u", " H") if view.has_groups else ("",)
    return [f"{dataset}{label}" for dataset in view.collection.datasets for label in labels]


def mean_column(view: Comparison) -> str:
    """The name of the column with the mean over data sets."""
    return "mean H" if view.has_groups else "mean"


def main_table(view: Comparison) -> Table:
    """A row a method: scores on every data set, their mean, number of seeds, differences to the baseline."""
    datasets = view.collection.datasets
    several = len(datasets) > 1
    headers = ["method", *score_columns(view), *([mean_column(view)] if several else []), "seeds"]
    if view.baseline:
        headers += [f"difference to {view.baseline.title}{f', {d}' if several else ''}" for d in datasets]
    rows = []
    for method in view.collection.methods:
        counts = [str(len(method.runs.get(dataset, {}))) for dataset in datasets]
        row = [method.title]
        for dataset in datasets:
            unknown = is_unknown(method, dataset)
            row += [UNKNOWN if unknown else _spread(view, v) for _, v in shown_scores(view, method, dataset)]
        row += [_number(view.mean(method))] if several else []
        row += [counts[0] if len(set(counts)) == 1 else "/".join(counts)]
        row += [_change(view.difference(method, dataset)) for dataset in datasets] if view.baseline else []
        rows.append(row)
    return headers, rows


def short_table(view: Comparison, dataset: str) -> Table:
    """What a script prints: a row a method, its accuracy, and its difference to the baseline with the interval."""
    labels = [label for label, _ in shown_scores(view, view.collection.methods[0], dataset)]
    headers = ["method", *(f"{dataset}{label}, %" if label else f"accuracy on {dataset}, %" for label in labels)]
    headers += [f"difference to {view.baseline.title} [95 % interval]"] if view.baseline else []
    rows = []
    for method in view.collection.methods:
        unknown = is_unknown(method, dataset)
        row = [method.title]
        row += [UNKNOWN if unknown else _spread(view, values) for _, values in shown_scores(view, method, dataset)]
        rows.append([*row, *([_change(view.difference(method, dataset))] if view.baseline else [])])
    return headers, rows


def details_table(view: Comparison, dataset: str) -> Table:
    """A row a method: the name of its primary classifier, every head, the pseudo-labels, and every seed."""
    rows = []
    for method in view.collection.methods:
        runs = method.on(dataset)
        if not runs:
            continue
        rows.append(
            [
                method.title,
                primary(method, dataset),
                *(_accuracy(view, method, dataset, head=head) for head in ("text", "fused")),
                _spread(view, label_accuracies(method, dataset)),
                ", ".join(f"{run.seed}: {_number(run.score()) or UNKNOWN}" for run in runs),
            ]
        )
    return ["method", "primary classifier", "text head", "fused head", "pseudo-labels", "every seed"], rows


def fusion_table(view: Comparison, dataset: str) -> Table:
    """A row a method with the auxiliary classifier: lambda, beta, their effect, and the rounds before them."""
    rows = []
    for method in view.collection.methods:
        found = view.fusion(method, dataset)
        if found is None:
            continue
        hidden = is_unknown(method, dataset, head="fused")
        rows.append(
            [
                method.title,
                _weight(view, found.weights, fixed=found.fixed),
                *(
                    UNKNOWN if hidden else _spread(view, values)
                    for values in (found.accuracy, found.oracle, found.regret)
                ),
                _weight(view, found.betas, fixed=found.beta_fixed),
                _spread(view, found.prior_strengths),
                _count(found.rounds),
                _spread(view, found.labels) or (UNKNOWN if found.rounds else ""),
            ]
        )
    return FUSION_HEADERS, rows


def _weight(view: Comparison, values: Sequence[float], *, fixed: bool) -> str:
    if fixed and len(set(values)) == 1:
        return f"{values[0]:g} (fixed)"
    return _spread(view, values, digits=2) + (" (fixed)" if fixed and values else "")


def _count(values: Sequence[float]) -> str:
    """A whole number where all are the same."""
    return _number(sum(values) / len(values)).removesuffix(".0") if values else ""


def time_table(view: Comparison, dataset: str) -> Table:
    """A row a method: seconds in all, and by stage."""
    found = [(method, view.seconds(method, dataset)) for method in view.collection.methods]
    names = stage_names(seconds for _, seconds in found)
    rows = []
    for method, seconds in found:
        if seconds:
            cells = [" + ".join(_number(value) or NOT_MEASURED for value in seconds.get(name, [])) for name in names]
            rows.append([method.title, _total(seconds), *cells])
    return ["method", "sum", *names], rows


def stage_names(found: Iterable[Mapping[str, object]]) -> list[str]:
    """All stages of several methods, in the order of a table."""
    names = dict.fromkeys(name for seconds in found for name in seconds)
    return [*(name for name in STAGES if name in names), *(name for name in names if name not in STAGES)]


def _total(seconds: Mapping[str, Sequence[float | None]]) -> str:
    values = [value for parts in seconds.values() for value in parts]
    measured = [value for value in values if value is not None]
    return f"{'> ' if len(measured) < len(values) else ''}{sum(measured):.1f}" if measured else NOT_MEASURED


def primary(method: Method, dataset: str) -> str:
    """The name of the primary classifier; all names where runs differ."""
    return "/".join(sorted({run.primary for run in method.on(dataset)}))


def label_accuracies(method: Method, dataset: str) -> list[float]:
    """Percent of correct pseudo-labels, for the seeds whose training labels are available."""
    values = [run.pseudo_labels.accuracy for run in method.on(dataset)]
    return [value for value in values if value is not None]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _spread(view: Comparison, values: Sequence[float], *, digits: int = 1) -> str:
    if not values:
        return ""
    average, spread = view.spread(values)
    return f"{average:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")


def _accuracy(view: Comparison, method: Method, dataset: str, *, head: str | None = None) -> str:
    return UNKNOWN if is_unknown(method, dataset, head=head) else _spread(view, scores(method, dataset, head=head))


def _change(difference: Difference | None) -> str:
    if difference is None:
        return ""
    # Plus 0.0: a value that rounds to zero has no minus.
    points, low, high = (round(value, 1) + 0.0 for value in (difference.points, difference.low, difference.high))
    return f"{points:+.1f} [{low:.1f}, {high:.1f}]"


def tables(view: Comparison, *, details: bool) -> list[tuple[str, Table]]:
    """The main table, and by data set the details, each with its heading."""
    found = [("", main_table(view))]
    for name in view.collection.datasets if details else []:
        found.append((f"{name}, every head and seed", details_table(view, name)))
        more = [(f"{name}, lambda and rounds", fusion_table(view, name)), (f"{name}, seconds", time_table(view, name))]
        found += [(heading, table) for heading, table in more if table[1]]
    return found
