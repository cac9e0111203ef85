"""The HTML page: what stands in it, and what odd names, missing files and few results do to it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from made_up_results import auxiliary_rounds, guesses, write_pictures, write_run, write_several
from PIL import Image
from result_files import result

from air_plugin.report.charts import COLOURS, Line, Panel, bar_chart, line_chart
from air_plugin.report.collection import Collection, Method, collect
from air_plugin.report.comparison import Comparison
from air_plugin.report.page import write_page
from air_plugin.report.predictions import HeadPredictions, Predictions
from air_plugin.report.record import RunResult
from air_plugin.report.sections import sections, sweeps
from air_plugin.report.sections.confusion import PAIRS, confusion_matrix, most_confused
from air_plugin.report.sections.pictures import MISTAKES
from air_plugin.report.sections.view import View
from air_plugin.report.statistics import summary
from air_plugin.report.tables import fusion_table, notes, time_table

DIGITS = [str(number) for number in range(10)]
VOID = {"meta", "img", "wbr", "br"}


class Page(HTMLParser):
    """A page's elements in order, the rows of its tables, and whether all is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.words += data
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, method: str) -> list[str]:
        """The first row of this name (below which its config may stand), its spaces plain."""
        name = re.compile(re.escape(method) + r"(\w+ \(.*\))?")  # the second is trainer and config
        cells = next(row for row in self.rows if name.fullmatch(row[0]))
        return [cell.replace("\u00a0", " ").replace(" (highest)", "").strip() for cell in cells]


def page_of(output: Path, **options: Any) -> Page:
    collection = collect(output)
    if "baseline" in options:
        (options["baseline"],) = [m for m in collection.methods if m.title == options["baseline"]]
    target = write_page(Comparison(collection, **options), output / "report.html")
    assert target == output / "report.html"
    return Page(target.read_text(encoding="utf-8"))


def view_of(methods: list[Method], *, baseline: Method | None = None) -> View:
    return View("digits", methods, baseline, summary, [])


@pytest.fixture
def several(tmp_path: Path) -> Path:
    write_several(tmp_path / "output", DIGITS)
    return tmp_path / "output"


# The whole page


def test_nothing_is_fetched_and_nothing_runs(several: Path):
    page = page_of(several, baseline="CPL")
    text = (several / "report.html").read_text()
    assert not re.search(r"https?://|file:|@import|url\((?!#)", text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    assert len(page.named("img")) > 50
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_same_results_make_the_same_page(several: Path):
    page_of(several)
    first = (several / "report.html").read_bytes()
    page_of(several)
    assert (several / "report.html").read_bytes() == first
    assert not list(several.glob("*.tmp")) and not list(several.glob(".*.tmp"))


def test_the_page_can_be_read_by_machines_for_people(several: Path):
    page = page_of(several, baseline="CPL")
    (html,), (title,) = page.named("html"), page.named("title")
    assert html["lang"] == "en" and title == {}
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert all(image["alt"] for image in page.named("img"))
    assert all(head["scope"] in ("col", "row") for head in page.named("th"))
    assert all(box["aria-label"] for box in page.named("div") if box.get("role") == "region")
    charts = [svg for svg in page.named("svg") if svg["role"] == "img" and svg["aria-label"]]
    assert len(charts) == len(page.named("svg")) == 5  # classes, rounds, M, lambda twice
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    targets = [attributes["href"][1:] for _, attributes in page.elements if "href" in attributes]
    assert targets and set(targets) <= set(names)


# The table


def test_table_holds_mean_spread_seeds_and_difference(several: Path):
    collection = collect(several)
    page = page_of(several, baseline="CPL")
    row = page.row("AiR")
    (method,) = [m for m in collection.methods if m.title == "AiR"]
    values = [run.heads["text"].accuracy for run in method.runs["digits"].values()]
    assert row[1] == f"{mean(values):.1f} ± {stdev(values):.1f}" and row[3] == "2"
    assert re.fullmatch(r"[+-]\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]", row[2])
    (baseline,) = [m for m in collection.methods if m.title == "CPL"]
    below = [run.heads["text"].accuracy for run in baseline.runs["digits"].values()]
    assert row[2].startswith(f"{mean(values) - mean(below):+.1f} ")
    assert page.row("CPL")[2] == ""


def test_interval_instead_of_deviation(several: Path):
    deviation, interval = page_of(several).row("UPL"), page_of(several, ci95=True).row("UPL")
    assert deviation[1].split()[0] == interval[1].split()[0]
    # two seeds: t = 12.7062 for one degree of freedom, over the root of 2
    assert float(interval[1].split()[-1]) == pytest.approx(float(deviation[1].split()[-1]) * 12.7062 / 2**0.5, abs=0.5)
    assert "95 % interval" in (several / "report.html").read_text()


def test_the_best_of_each_column_is_marked_and_ties_share_it(tmp_path: Path):
    labels = [0, 1] * 1500
    for config, wrong in (("a", 599), ("b", 600), ("c", 603)):  # 80.03, 80.0 and 79.9 percent
        predicted = [1 - label if i < wrong else label for i, label in enumerate(labels)]
        write_run(tmp_path, ["x", "y"], labels, {"text": predicted}, config=config)
    page = page_of(tmp_path)
    best = [row[0][:8] for row in page.rows if any("(highest)" in value for value in row)]
    assert best == ["AiR (a)", "AiR (b)"]


def test_two_data_sets_have_a_mean_where_a_method_has_both(several: Path):
    write_several(several, ["cat", "dog", "eel"], dataset="pets", images=30)
    collection = collect(several)
    predicted = {"text": [0, 1, 2]}
    write_run(several, ["cat", "dog", "eel"], [0, 1, 2], predicted, dataset="pets", trainer="CPL", config="only")
    page = page_of(several, baseline="CPL (mini)")
    assert [page.rows[0][i] for i in (0, 1, 3, 5, 6)] == ["method", "digits", "pets", "mean", "seeds"]
    method = collection.methods[0]
    values = [mean(run.heads["text"].accuracy for run in runs.values()) for runs in method.runs.values()]
    assert page.row(method.title)[5] == f"{mean(values):.1f}"
    assert page.row("CPL (only)") == ["CPL (only)", "", "", "100.0", "", "", "0/1"]
    assert page.words.count("a photo of a {}.") == 2
    assert [tag for tag, _ in page.elements].count("h2") == 4  # faults, all methods, two data sets


def test_unusual_class_names_are_told(tmp_path: Path):
    for trainer in ("CPL", "AiR"):
        write_run(tmp_path, ["x", "y"], [0, 1], {"text": [0, 1]}, trainer=trainer, class_names="grip")
    assert "Class names\ngrip" in re.sub(r"\s*\n\s*|(?<=names)", "\n", page_of(tmp_path).words)
    assert notes(Comparison(collect(tmp_path)), details=False)[0].endswith(", class names grip")


def test_faults_stand_on_the_page(several: Path):
    damaged = several / "digits" / "CPL" / "mini" / "seed2" / "predictions.json"
    damaged.write_text("{")
    (several / "digits" / "AiR" / "mini" / "seed1" / "gallery.png").write_bytes(b"no picture")
    (several / "digits" / "UPL" / "mini" / "seed2" / "result.json").write_text("{")
    (several / "digits" / "UPL" / "mini" / "seed1" / "predictions.json").unlink()
    page = page_of(several, baseline="ZeroshotCLIP")
    assert page.row("UPL")[2] == "" and "no difference of UPL to ZeroshotCLIP" in page.words
    for name in ("CPL/mini/seed2/predictions.json", "AiR/mini/seed1/gallery.png", "UPL/mini/seed2/result.json"):
        assert any(name in line for line in page.words.splitlines())
    assert "Left out or incomplete" in page.words


# Untrusted text


def test_names_are_text_wherever_they_stand(tmp_path: Path):
    evil = ['<script>alert("1")</script>', "$\\frac{$", "&lt;b&gt;", "a'b\"c", "_hidden", "lone \ud800 half", "\u6f22"]
    output = tmp_path / "output"
    labels = list(range(7)) * 3
    predicted = {"text": [(label + 1) % 7 if i < 7 else label for i, label in enumerate(labels)]}
    images = [f"{name.encode('utf-8', 'replace').decode()}.png" for name in evil] * 3
    for config in ("mini", "<b>bold"):
        write_run(output, evil, labels, predicted, images=images, config=config, template="<i>{}</i>")
    (output / "digits" / "methods.json").write_text(
        json.dumps([{"trainer": "AiR", "config": "<b>bold", "title": '<img src="x" onerror="y">'}])
    )
    page = page_of(output, baseline='<img src="x" onerror="y">')
    assert not {"script", "b>bold", "i"} & {tag for tag, _ in page.elements}
    assert page.named("img") == []  # no picture exists, and none came from a title
    for name in (evil[0], evil[1], evil[2], evil[3], evil[4], "lone ? half", evil[6]):
        assert name in page.words, name
    assert "<i>{}</i>" in page.words and '<img src="x" onerror="y">' in page.words


# Classes


def test_per_class_table_is_the_mean_over_seeds(several: Path):
    collection = collect(several)
    values: dict[str, list[float]] = defaultdict(list)
    for run in collection.methods[0].runs["digits"].values():
        for name, value in run.heads["text"].per_class.items():
            values[name].append(value)
    page = page_of(several)
    begin = next(i for i, row in enumerate(page.rows) if row[0] == "class, %")
    for name, row in zip(DIGITS, page.rows[begin + 1 : begin + 11], strict=True):
        assert row[0] == name and row[1] == f"{mean(values[name]):.1f}"
    assert page.rows[begin][1:] == [method.title for method in collection.methods]


def test_many_classes_show_those_that_differ_most(tmp_path: Path):
    names = [f"class {number:03d}" for number in range(100)]
    labels = [number % 100 for number in range(200)]
    different = set(range(40, 60))  # right with one method, wrong with the other
    predicted = [(label + 1) % 100 if label in different else label for label in labels]
    write_run(tmp_path, names, labels, {"text": labels}, trainer="CPL", images=names * 2)
    write_run(tmp_path, names, labels, {"text": predicted}, images=names * 2)
    page = page_of(tmp_path)
    chart = (tmp_path / "report.html").read_text().split("<svg", 1)[1].split("</svg>", 1)[0]
    assert {f"class {number:03d}" for number in different} == set(re.findall(r"class \d{3}", chart))
    assert "Of 100 classes the chart shows the 20" in page.words
    pairs = [row for row in page.rows if len(row) == 3 and row[1].startswith("class ")]
    assert len(pairs) == PAIRS and all(row[2] == "100.0" for row in pairs)
    assert all(int(row[1][-3:]) == int(row[0][-3:]) + 1 for row in pairs)


def test_a_single_class(tmp_path: Path):
    output = tmp_path / "output"
    names = write_pictures(tmp_path / "data", "digits", 3)
    write_run(output, ["only"], [0, 0, 0], {"text": [0, 0, 0]}, images=names)
    page = page_of(output)
    assert "No mistakes." in page.words
    assert any(row[:2] == ["only", "100"] for row in page.rows)


def test_methods_with_no_class_accuracies_leave_a_sentence(tmp_path: Path):
    folder = write_run(tmp_path, ["x", "y"], [0, 1], {"text": [0, 1]})
    content = json.loads((folder / "result.json").read_text())
    del content["heads"]["text"]["per_class"]
    (folder / "result.json").write_text(json.dumps(content))
    page = page_of(tmp_path)
    for sentence in (
        "No result holds the accuracy of each class.",
        "No method has pseudo-labels.",
        "No two methods differ in AIR.M only",
        "No result holds accuracies by lambda",
        "No method has a gallery.",
        "No run has a predictions.json.",
    ):
        assert sentence in page.words
    assert page.named("svg") == page.named("img") == []


# Confusion


def predictions_of(labels: list[int], predicted: list[int], names: list[str]) -> Predictions:
    confidence = np.linspace(0, 1, len(labels))
    images = [str(number) for number in range(len(labels))]
    head = HeadPredictions(np.array(predicted), confidence)
    return Predictions(
        root=".", images=tuple(images), labels=np.array(labels), classnames=tuple(names), heads={"text": head}
    )


def test_confusion_matrix_against_a_loop():
    names = ["a", "b", "c", "never"]
    labels = [0, 1, 2, 2, 1, 0, 0, 2, 2]
    predicted = guesses(labels, 4, right=0.5, seed=3)
    slow = [[0.0] * 4 for _ in range(4)]
    for true, called in zip(labels, predicted, strict=True):
        slow[true][called] += 100.0 / labels.count(true)
    assert np.allclose(confusion_matrix(predictions_of(labels, predicted, names), "text"), slow)


def test_most_confused_pairs_against_a_loop():
    matrix = np.random.default_rng(0).random((9, 9)) * 100
    matrix[3] = 0
    names = [str(number) for number in range(9)]
    slow = sorted((-matrix[t, c], t, c) for t in range(9) for c in range(9) if t != c and matrix[t, c])[:PAIRS]
    assert most_confused(matrix, names) == [(str(t), str(c), -share) for share, t, c in slow]
    assert most_confused(np.eye(2) * 100, ["a", "b"]) == []


def test_confusion_is_of_the_primary_classifier_and_the_mean_over_seeds(tmp_path: Path):
    labels, names = [0, 0, 1, 1], ["x", "y"]
    for seed, fused in ((1, [0, 0, 1, 1]), (2, [0, 1, 1, 1])):
        predicted = {"text": [1, 1, 0, 0], "fused": fused}
        write_run(tmp_path, names, labels, predicted, images=list("abcd"), seed=seed, primary="fused")
    page = page_of(tmp_path)
    begin = page.rows.index(["true class", "x", "y"])
    assert page.rows[begin + 1 : begin + 3] == [["x", "75", "25"], ["y", "", "100"]]


# Colours


def methods_of(*names: str) -> list[Method]:
    return [Method(name.split()[0], name, name, {"digits": {1: RunResult.from_plain(result())}}) for name in names]


def test_charts_show_the_baseline_zero_shot_and_the_last():
    methods = methods_of("CPL", "UPL a", "ZeroshotCLIP", "A", "B", "C", "D", "E")
    view = view_of(methods, baseline=methods[0])
    assert [m.title for m in view.shown] == ["CPL", "ZeroshotCLIP", "B", "C", "D", "E"]
    assert [m.title for m in view_of(methods).shown] == ["ZeroshotCLIP", "A", "B", "C", "D", "E"]
    assert [m.title for m in view_of(methods[:2]).shown] == ["CPL", "UPL a"]


def test_each_method_of_a_chart_has_a_colour_of_its_own():
    methods = methods_of("ZeroshotCLIP", *"ABCDEFGHIJ")
    view = view_of(methods, baseline=methods[5])
    fixed = {method.title: colour for colour, method in view.coloured(view.shown)}
    assert fixed["E"] == 0 and sorted(fixed.values()) == list(range(COLOURS))
    for count in range(1, 10):
        chosen = methods[:count]
        coloured = view.coloured(chosen)
        colours = [colour for colour, _ in coloured]
        assert len(set(colours)) == len(colours) == min(count, COLOURS) and set(colours) <= set(range(COLOURS))
        assert all(fixed[method.title] == colour for colour, method in coloured if method.title in fixed)
        assert {m.title for m in chosen} & fixed.keys() <= {m.title for _, m in coloured}  # the shown ones come first


# Settings


def test_series_differ_in_one_setting_only(several: Path):
    collection = collect(several)
    view = View("digits", collection.methods, None, summary, [])
    parts = sections(view)
    assert [row[:3] for row in parts["generated"]["rows"]] == [("AiR, M = 20", 20, 8), ("AiR", 60, 16)]
    assert [(chart["trained"], chart["of"]) for chart in parts["weight"]] == [(False, 4), (True, 1)]
    assert parts["weight"][1]["legend"][0][2] == "AiR"
    (plain,) = [method for method in collection.methods if method.title == "AiR"]
    for run in plain.runs["digits"].values():  # now it differs in something else, too
        run.settings["OPTIM.LR"] = 0.1
    assert sections(view)["generated"] is None and len(sections(view)["weight"]) == 1


def with_curves(output: Path, chosen: dict[int, float], settings: dict[str, Any]) -> None:
    """Runs whose fused head is right on 5, 6, ... of ten images with lambda as chosen, by seed."""
    labels = [0, 1] * 5
    for number, (seed, weight) in enumerate(chosen.items(), start=5):
        predicted = [label if i < number else 1 - label for i, label in enumerate(labels)]
        curve = {0.0: 40.0, 1.0: 50.0 + seed, 2.0: 60.0, weight: 10.0 * number}
        write_run(
            output,
            ["x", "y"],
            labels,
            {"text": labels, "fused": predicted},
            seed=seed,
            settings=settings,
            by_lambda=sorted(map(list, curve.items())),
            auxiliary=auxiliary_rounds(weight),
        )


def generated(monkeypatch: pytest.MonkeyPatch, output: Path) -> Panel:
    """The only panel of the chart by lambda."""
    panels = []

    def keep(shown: list[Panel], *, alt: str) -> str:
        panels.extend(shown)
        return ""

    monkeypatch.setattr(sweeps, "line_chart", keep)
    sections(View("digits", collect(output).methods, None, summary, []))
    (panel,) = panels
    return panel


def test_a_lambda_of_one_seed_alone_is_no_point_of_the_mean_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_curves(tmp_path, {1: 1.4, 2: 1.6}, {"AIR.LAMBDA": "auto"})
    panel = generated(monkeypatch, tmp_path)
    (line,) = panel.lines
    assert (line.x, line.mean) == ([0.0, 1.0, 2.0], [40.0, 51.5, 60.0])
    (ring,) = panel.rings
    assert (ring.colour, ring.x, ring.mean) == (line.colour, [1.5], [55.0])


def test_a_ring_is_on_the_curve_where_lambda_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_curves(tmp_path, {1: 3.0, 2: 3.0}, {"AIR.LAMBDA": 3.0})
    panel = generated(monkeypatch, tmp_path)
    (line,), (ring,) = panel.lines, panel.rings
    assert (line.x[-1], line.mean[-1]) == (ring.x[0], ring.mean[0]) == (3.0, 55.0)


def test_rings_are_plotted_in_their_colour_and_are_no_ticks():
    line = Line(2, [1.0, 2.0], [3.0, 4.0], [0.0, 0.0])
    plain = line_chart([Panel("x", "y", [line])], alt="one")
    chart = line_chart([Panel("x", "y", [line], rings=[Line(4, [1.5], [3.5], [0.0])])], alt="one")
    assert "var(--c4)" in chart and "var(--c4)" not in plain
    assert re.findall(r"<text[^>]*>([^<]*)</text>", chart) == re.findall(r"<text[^>]*>([^<]*)</text>", plain)


def test_lambda_rounds_and_seconds_are_those_of_the_text_tables(several: Path):
    shown = Comparison(collect(several))
    page = page_of(several)
    for title, table in (("Lambda and rounds", fusion_table(shown, "digits")), ("Time", time_table(shown, "digits"))):
        headers, rows = table
        begin = page.rows.index(headers)
        found = [[cell.replace("\u00a0", " ") for cell in row] for row in page.rows[begin + 1 : begin + 1 + len(rows)]]
        assert len(rows) == 4 and found == [[cell.replace("+-", "\u00b1") for cell in row] for row in rows]
        assert title in page.words
    assert "A ring: the lambda that was used" in page.words
    assert "from test labels that the method never saw" in page.words


def test_lambda_is_on_a_page_without_test_labels(tmp_path: Path):
    folder = write_run(
        tmp_path, ["x", "y"], [0, 1], {"text": [0, 1], "fused": [0, 1]}, auxiliary=auxiliary_rounds(2.5, accuracy=None)
    )
    content = json.loads((folder / "result.json").read_text())
    content["heads"] = {head: {"accuracy": None} for head in ("text", "fused")}
    (folder / "result.json").write_text(json.dumps(content))
    page = page_of(tmp_path)
    assert ["AiR", "2.50", "-", "-", "-", "", "11.0", "1", "-"] in page.rows
    assert "Weight of the auxiliary classifier" not in page.words and "Seconds" not in page.words


def test_lines_are_means_with_spreads_by_rising_x():
    view = view_of([])
    line = view.line(3, {2.0: [1.0, 3.0], 0.5: [7.0], 1.0: []})
    assert line == Line(3, [0.5, 2.0], [7.0, 2.0], [0.0, stdev([1.0, 3.0])])


def test_rounds_are_plotted_and_the_last_one_is_in_the_table(several: Path):
    parts = sections(View("digits", collect(several).methods, None, summary, []))["labels"]
    assert [title for *_, title in parts["legend"]] == ["AiR, ROUNDS = 3"]
    rows = {title: (rounds, metrics) for title, rounds, metrics in parts["rows"]}
    assert "ZeroshotCLIP" not in rows and len(rows) == 6
    rounds, metrics = rows["AiR, ROUNDS = 3"]
    assert rounds == 3 and metrics[0] == (40.0, 0.0) and metrics[2] == (89.5, stdev([89.0, 90.0]))
    assert parts["chart"].count("images selected") == 1
    assert parts["chart"].count(">3</text>") == 2  # the last round, below either pair of axes


# Pictures


def test_mistakes_are_the_most_confident_wrong_ones(tmp_path: Path):
    output, rng = tmp_path / "output", np.random.default_rng(1)
    names = write_pictures(tmp_path / "data", "digits", 40)
    labels = [number % 10 for number in range(40)]
    predicted = guesses(labels, 10, right=0.4, seed=2)
    confidence = rng.permutation(40) / 40
    write_run(output, DIGITS, labels, {"text": predicted}, images=names, confidence=confidence.tolist())
    write_run(output, DIGITS, labels, {"text": labels}, images=names, seed=2)
    slow = sorted((i for i in range(40) if predicted[i] != labels[i]), key=lambda i: -confidence[i])[:MISTAKES]
    assert len(slow) == MISTAKES
    page = page_of(output)
    assert [image["alt"] for image in page.named("img")] == [f"test image {names[i]}" for i in slow]
    words = " ".join(page.words.replace("\u00a0", " ").split())
    for i in slow:
        assert f"predicted {predicted[i]} ({100 * confidence[i]:.0f} %), true class {labels[i]}" in words
    assert f"seed 1, text head: {sum(a != b for a, b in zip(predicted, labels, strict=True))} of 40 wrong" in words


def test_missing_and_damaged_pictures_are_named(tmp_path: Path):
    output, data = tmp_path / "output", tmp_path / "data"
    names = write_pictures(data, "digits", 4)
    (data / names[0]).unlink()
    (data / names[1]).write_bytes(b"no picture")
    names += ["digits", "x" * 5000, "nul\0byte", str(data / names[3])]  # a folder, no names, an absolute path
    write_run(output, ["x", "y"], [0] * 8, {"text": [1] * 8}, images=names)
    page = page_of(output)
    for index in (0, 1, 4, 5):
        assert f"{names[index]} is missing or unreadable" in page.words
    assert page.words.count("is missing or unreadable") == 5
    assert sorted(image["alt"] for image in page.named("img")) == sorted(f"test image {names[i]}" for i in (2, 3, 7))


def pixels(image: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1])))


def test_large_pictures_are_shrunk_and_tiny_ones_stay_exact(tmp_path: Path):
    output, data = tmp_path / "output", tmp_path / "data"
    (tiny,) = write_pictures(data, "tiny", 1, size=(9, 5))
    (large,) = write_pictures(data, "large", 1, size=(900, 300))
    write_run(output, ["x", "y"], [0, 0], {"text": [1, 1]}, images=[tiny, large], confidence=[0.9, 0.8])
    first, second = page_of(output).named("img")
    assert first["class"] == "tiny" and "class" not in second
    assert np.array_equal(np.asarray(pixels(first)), np.asarray(Image.open(data / tiny)))
    assert pixels(second).size == (160, 53)


def test_methods_with_the_same_gallery_share_it(several: Path):
    page = page_of(several)
    galleries = [image for image in page.named("img") if image["alt"].startswith("Gallery")]
    assert len(galleries) == 1 and galleries[0]["alt"].endswith(": AiR; AiR, LAMBDA = 1; AiR, M = 20; AiR, ROUNDS = 3")
    Image.new("RGB", (3000, 30)).save(several / "digits" / "AiR" / "mini" / "seed1" / "gallery.png")
    galleries = [image for image in page_of(several).named("img") if image["alt"].startswith("Gallery")]
    assert len(galleries) == 2 and galleries[0]["alt"].endswith(": AiR")
    assert pixels(galleries[0]).width == int(galleries[0]["width"]) == 1400


# Charts


def test_bars_are_as_high_as_their_values():
    chart = bar_chart(["a", "b"], [(0, [100.0, 50.0]), (1, [25.0, float("nan")])], y_label="accuracy (%)", alt="bars")
    bars = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--c(\d)\)"', chart)
    heights = []
    for path, colour in bars:
        rows = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
        heights.append((int(colour), max(rows) - min(rows)))
    full = heights[0][1]
    generated = [(colour, round(100 * height / full, 3)) for colour, height in heights]
    assert generated == [(0, 100.0), (0, 50.0), (1, 25.0), (1, 0.0)]


def test_charts_have_the_pages_colours_and_no_names_of_their_own():
    panel = Panel("x", "y", [Line(2, [1.0, 2.0], [3.0, 4.0], [0.5, 0.0])])
    charts = [line_chart([panel], alt="<one>"), line_chart([panel], alt="two"), line_chart([panel, panel], alt="three")]
    names = [name for chart in charts for name in set(re.findall(r'\bid="([^"]*)"', chart))]
    assert names and len(names) == len(set(names))
    for chart in charts:
        assert chart.startswith("<svg") and "var(--c2)" in chart and "currentColor" in chart
        assert not re.search(r"#[0-9a-f]{6}|http|<!--|<\?|<style|font-family", chart)
        assert set(re.findall(r'href="#([^"]*)"', chart)) <= set(names)
    assert 'aria-label="&lt;one&gt;"' in charts[0]


def test_the_page_defines_the_colours_that_charts_use(several: Path):
    page_of(several)
    text = (several / "report.html").read_text()
    light, dark = text.split("prefers-color-scheme: dark", 1)
    for scheme in (light, dark.split("</style>", 1)[0]):
        for name in set(re.findall(r"var\((--[\w-]+)", text)) - {"--v", "--tint"}:
            assert f"{name}:" in scheme, name


def test_a_collection_that_no_file_made(tmp_path: Path):
    run = RunResult.from_plain(result(heads={"text": {"accuracy": 50.0}}))
    method = Method("AiR", "mini", "AiR", {"digits": {1: run}})
    collection = Collection(["digits"], [method], "mini", "zhou", "ul", {}, [])
    target = write_page(Comparison(collection), tmp_path / "deep" / "page.html")
    assert Page(target.read_text()).row("AiR")[1:] == ["50.0", "1"]
