"""Results of trzsl: accuracy on seen and unseen classes, and the harmonic mean as what is compared."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from statistics import mean, stdev

import pytest
from made_up_results import guesses, write_pictures, write_run
from test_page import page_of

from air_plugin.report.collection import Method, collect
from air_plugin.report.comparison import Comparison
from air_plugin.report.formats import as_csv, as_github, as_latex, as_short_github, report
from air_plugin.report.fusion import fusion_of
from air_plugin.report.predictions import Predictions
from air_plugin.report.statistics import paired_difference, scores
from air_plugin.utils.errors import UserError

NAMES = ["ant", "bee", "cat", "dog", "eel"]
SEEN = [3, 0, 1]


def write_methods(output: Path, *, dataset: str = "digits", images: int = 60, seeds: tuple[int, ...] = (1, 2)) -> None:
    """CPL, which knows the seen classes better, and AiR, which does not."""
    labels = [number % 5 for number in range(images)]
    names = write_pictures(output.parent / "data", dataset, images)
    for trainer, shares in (("CPL", (0.9, 0.4)), ("AiR", (0.8, 0.7))):
        for seed in seeds:
            heads = {}
            for number, head in enumerate(("text", "fused") if trainer == "AiR" else ("text",)):
                seen, unseen = (
                    guesses(labels, 5, right=share, seed=seed + 10 * number + len(trainer)) for share in shares
                )
                heads[head] = [seen[i] if label in SEEN else unseen[i] for i, label in enumerate(labels)]
            curve = {"by_lambda": [[0.0, 30.0], [1.0, 99.0]]} if trainer == "AiR" else {}
            write_run(
                output,
                NAMES,
                labels,
                heads,
                images=names,
                dataset=dataset,
                trainer=trainer,
                seed=seed,
                seen=SEEN,
                **curve,
            )


def method_of(output: Path, trainer: str) -> Method:
    (method,) = [method for method in collect(output).methods if method.trainer == trainer]
    return method


def groups(output: Path, trainer: str, dataset: str = "digits") -> list[list[float]]:
    """s, u and H of each seed, from the predictions, image by image."""
    found: list[list[float]] = [[], [], []]
    for path in sorted((output / dataset / trainer).glob("*/seed*/predictions.json")):
        made = json.loads(path.read_text())
        pairs = list(zip(made["labels"], made["heads"]["text"]["predicted"], strict=True))
        s, u = (
            100 * mean(label == other for label, other in pairs if (label in SEEN) == group) for group in (True, False)
        )
        for values, value in zip(found, (s, u, 2 * s * u / (s + u)), strict=True):
            values.append(value)
    return found


def cell(values: list[float]) -> str:
    return f"{mean(values):.1f} +- {stdev(values):.1f}"


def test_the_harmonic_mean_is_what_is_compared(tmp_path: Path):
    output = tmp_path / "out"
    write_methods(output)
    method = method_of(output, "AiR")
    assert scores(method, "digits") == pytest.approx(groups(output, "AiR")[2])
    (run, _) = method.on("digits")
    assert run.score() == run.heads["text"].harmonic != run.heads["text"].accuracy
    assert run.score("fused") == run.heads["fused"].harmonic
    fusion = fusion_of(method, "digits")
    assert fusion is not None and fusion.accuracy == scores(method, "digits", head="fused")


def test_tables_have_a_column_a_group_and_the_harmonic_mean(tmp_path: Path):
    output = tmp_path / "out"
    for dataset in ("digits", "letters"):
        write_methods(output, dataset=dataset)
    collection = collect(output)
    assert collection.paradigm == "trzsl"
    view = Comparison(collection, collection.methods[0])
    headers = ["method", *(f"{name} {label}" for name in ("digits", "letters") for label in "suH"), "mean H", "seeds"]
    parts = {name: groups(output, "AiR", name) for name in ("digits", "letters")}
    expected = [cell(values) for name in parts for values in parts[name]]
    expected += [f"{mean(mean(parts[name][2]) for name in parts):.1f}", "2"]
    row = _line(as_github(view, details=False), "| AiR").split("|")[1:10]
    assert [word.strip() for word in row] == ["AiR", *expected]
    short = _line(as_short_github(view), "| method").split("|")
    assert [word.strip() for word in short[2:5]] == ["digits s, %", "digits u, %", "digits H, %"]
    row = _line(as_short_github(view), "| AiR").split("|")
    assert [word.strip() for word in row[1:5]] == ["AiR", *expected[:3]]
    for text in (as_github(view, details=True), as_latex(view, details=True)):
        assert "paradigm trzsl" in text and "2 s u / (s + u)" in text
        assert all(header in text for header in headers)
    lines = [line for line in as_csv(view, details=True).splitlines(keepends=True) if line[0] != "#"]
    table = list(csv.DictReader(io.StringIO("".join(lines))))
    for name in parts:
        for label, values in zip("suH", parts[name], strict=True):
            assert float(table[1][f"{name} {label} mean"]) == pytest.approx(mean(values), abs=1e-4)
    assert float(table[1]["mean H"]) == pytest.approx(mean(mean(parts[name][2]) for name in parts), abs=1e-4)
    found = paired_difference(collection.methods[1], collection.methods[0], "digits")
    assert found is not None
    assert float(table[1]["digits difference points"]) == pytest.approx(found.points, abs=1e-4)


def _line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_page_has_them_too(tmp_path: Path):
    output = tmp_path / "out"
    for dataset in ("digits", "letters"):
        write_methods(output, dataset=dataset)
    page = page_of(output, baseline="CPL")
    assert page.rows[0] == [
        "method",
        *("digits s", "digits u", "digits H", "difference to CPL, digits"),
        *("letters s", "letters u", "letters H", "difference to CPL, letters"),
        *("mean H", "seeds"),
    ]
    row = page.row("AiR")
    for start, dataset in ((1, "digits"), (5, "letters")):
        assert row[start : start + 3] == [cell(v).replace("+-", "\u00b1") for v in groups(output, "AiR", dataset)]
    assert "2 s u / (s + u)" in page.words and "Paradigm" in page.words and "trzsl" in page.words


def test_the_interval_against_a_plain_bootstrap(tmp_path: Path):
    output = tmp_path / "out"
    write_methods(output, images=90, seeds=(1, 2, 3))
    method, baseline = method_of(output, "AiR"), method_of(output, "CPL")
    found = paired_difference(method, baseline, "digits", resamples=4000)
    assert found is not None and found.seeds == [1, 2, 3] and found.images == 90
    assert found.points == pytest.approx(mean(groups(output, "AiR")[2]) - mean(groups(output, "CPL")[2]))
    again = paired_difference(method, baseline, "digits", resamples=4000)
    turned = paired_difference(baseline, method, "digits", resamples=4000)
    assert found == again and turned is not None and turned.points == pytest.approx(-found.points)

    made = {
        (trainer, seed): json.loads((output / f"digits/{trainer}/mini/seed{seed}/predictions.json").read_text())
        for trainer in ("AiR", "CPL")
        for seed in (1, 2, 3)
    }
    labels = made["AiR", 1]["labels"]
    hits = {
        key: [p == t for p, t in zip(one["heads"]["text"]["predicted"], labels, strict=True)]
        for key, one in made.items()
    }
    rng, values = random.Random(1), []
    for _ in range(2000):
        images = [rng.randrange(90) for _ in range(90)]
        means = {"AiR": 0.0, "CPL": 0.0}
        for (trainer, _), hit in hits.items():
            right, total = {True: 0, False: 0}, {True: 0, False: 0}
            for image in images:
                total[labels[image] in SEEN] += 1
                right[labels[image] in SEEN] += hit[image]
            s, u = (100 * right[group] / total[group] for group in (True, False))
            means[trainer] += 2 * s * u / (s + u) / 3
        values.append(means["AiR"] - means["CPL"])
    values.sort()
    # A percentile of 2000 resamples has a standard error of about 0.25 here.
    assert found.low == pytest.approx(values[50], abs=1.2) and found.high == pytest.approx(values[1950], abs=1.2)


def test_resamples_without_a_group_do_not_count(tmp_path: Path):
    output = tmp_path / "out"
    names = write_pictures(tmp_path / "data", "digits", 3)
    for trainer, predicted in (("AiR", [0, 1, 4]), ("CPL", [0, 1, 2])):
        write_run(output, NAMES, [0, 1, 4], {"text": predicted}, images=names, trainer=trainer, seen=SEEN)
    found = paired_difference(method_of(output, "AiR"), method_of(output, "CPL"), "digits")
    assert found is not None and (found.points, found.low, found.high) == (100.0, 100.0, 100.0)


def test_other_seen_classes_are_not_compared(tmp_path: Path):
    output = tmp_path / "out"
    labels = [number % 5 for number in range(20)]
    names = write_pictures(tmp_path / "data", "digits", 20)
    for trainer, seen in (("CPL", [0, 1, 2]), ("AiR", [0, 1, 3])):
        write_run(output, NAMES, labels, {"text": labels}, images=names, trainer=trainer, seen=seen)
    reasons: list[str] = []
    assert paired_difference(method_of(output, "AiR"), method_of(output, "CPL"), "digits", reasons=reasons) is None
    assert reasons[0].endswith("do not have the same seen classes")


def test_predictions_of_another_paradigm_are_refused(tmp_path: Path):
    output = tmp_path / "out"
    write_methods(output)
    path = output / "digits/AiR/mini/seed1/predictions.json"
    content = json.loads(path.read_text())
    reasons: list[str] = []
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "seen"}))
    paired_difference(method_of(output, "AiR"), method_of(output, "CPL"), "digits", reasons=reasons)
    assert "only one of them has seen classes" in reasons[0]
    path.write_text(json.dumps({**content, "seen": [1, 5]}))
    with pytest.raises(UserError, match="its seen are not class numbers from 0 to 4"):
        Predictions.load(path)


def test_paradigms_do_not_stand_in_one_table(tmp_path: Path):
    output = tmp_path / "out"
    write_methods(output)
    write_run(output, NAMES, [0, 1], {"text": [0, 1]}, trainer="UPL")
    write_run(
        output, NAMES, [0, 1], {"text": [0, 1]}, trainer="UPL", config="mini+DATASET.PARADIGM=ssl", paradigm="ssl"
    )
    with pytest.raises(UserError, match=r"different paradigms cannot stand in one table.*--paradigm NAME"):
        report(output)
    assert "digits H" in report(output, paradigm="trzsl")
    for paradigm in ("ul", "ssl"):
        text = report(output, paradigm=paradigm)
        assert "| UPL" in text and "digits H" not in text and ("paradigm ssl" in text) == (paradigm == "ssl")


def test_a_test_set_without_a_group_is_unknown(tmp_path: Path):
    output = tmp_path / "out"
    folder = write_run(output, NAMES, [0, 1], {"text": [0, 1]}, paradigm="trzsl")
    content = json.loads((folder / "result.json").read_text())
    content["heads"]["text"] |= {"seen": 100.0, "unseen": None, "harmonic": None}
    (folder / "result.json").write_text(json.dumps(content))
    text = report(output)
    assert "no test labels of both groups of classes" in text
    assert [word.strip() for word in _line(text, "| AiR").split("|")[2:5]] == ["-", "-", "-"]
