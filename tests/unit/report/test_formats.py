"""From results to tables: what is in them, in every form, and what harmful files do to them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from made_up_results import auxiliary_rounds, stages
from result_files import HARMFUL, result, write, write_run

from air_plugin.cli import main
from air_plugin.report import collection, comparison, page
from air_plugin.report.collection import collect
from air_plugin.report.comparison import Comparison
from air_plugin.report.formats import as_csv, as_github, as_latex, report
from air_plugin.report.statistics import Difference, interval, paired_difference, scores
from air_plugin.report.tables import _change
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import csv_text


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of the Markdown tables, headers first."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def cells(text: str, method: str) -> list[str]:
    """The cells of a method's row in the first table, less its title."""
    return next(row for row in rows_of(text) if row[0] == method)[1:]


def github(output: Path, *, baseline: str | None = None, ci95: bool = False, details: bool = False) -> str:
    return as_github(view_of(output, baseline, ci95=ci95), details=details)


def view_of(output: Path, baseline: str | None = None, *, ci95: bool = False) -> Comparison:
    collection = collect(output)
    named = {method.title: method for method in collection.methods}
    return Comparison(collection, named[baseline] if baseline else None, ci95=ci95)


def three_seeds(output: Path, **changes: Any) -> list[float]:
    values = {1: 79.25, 2: 81.5, 3: 83.0}
    for seed, value in values.items():
        write(output, result(seed=seed, accuracy=value, **changes))
    return list(values.values())


# The main table


def test_mean_and_deviation_over_seeds(tmp_path: Path):
    values = three_seeds(tmp_path)
    spread = f"{mean(values):.1f} +- {stdev(values):.1f}"
    assert spread == "81.2 +- 1.9"
    text = github(tmp_path)
    assert rows_of(text) == [["method", "digits", "seeds"], ["AiR", spread, "3"]]
    assert text.startswith('digits: backbone mini, split family zhou, template "a photo of the digit {}."\n')
    assert "class names" not in text
    assert "standard deviation over seeds" in text


def test_half_of_the_interval_instead_of_the_deviation(tmp_path: Path):
    values = three_seeds(tmp_path)
    text = github(tmp_path, ci95=True)
    assert cells(text, "AiR") == [f"{mean(values):.1f} +- {interval(values):.1f}", "3"] == ["81.2 +- 4.7", "3"]
    assert "95 % interval over seeds" in text and "standard deviation" not in text


def test_one_seed_has_no_spread(tmp_path: Path):
    write(tmp_path, result("ZeroshotCLIP", heads={"text": {"accuracy": 68.25}}, pseudo_labels={"accuracy": None}))
    for ci95 in (False, True):
        assert cells(github(tmp_path, ci95=ci95), "ZeroshotCLIP") == ["68.2", "1"]


def test_accuracy_is_the_primary_classifiers(tmp_path: Path):
    write(tmp_path, result(primary="fused"))
    assert cells(github(tmp_path), "AiR") == ["81.0", "1"]


def test_several_data_sets_have_a_mean_and_seeds_of_each(tmp_path: Path):
    for seed in (1, 2, 3):
        write(tmp_path, result(seed=seed, accuracy=80.0 + seed))
        write(tmp_path, result("CPL", seed=seed))
    for seed in (1, 2):
        write(tmp_path, result(seed=seed, accuracy=60.0, dataset="letters", template="the letter {}."))
    text = github(tmp_path)
    assert rows_of(text) == [
        ["method", "digits", "letters", "mean", "seeds"],
        ["CPL", "80.0 +- 0.0", "", "", "3/0"],
        ["AiR", "82.0 +- 1.0", "60.0 +- 0.0", "71.0", "3/2"],
    ]
    assert text.splitlines()[1] == 'letters: backbone mini, split family zhou, template "the letter {}."'


def test_differences_to_a_baseline(tmp_path: Path):
    for seed in (1, 2):
        write_run(tmp_path, [True] * 7 + [False], seed=seed)
        write_run(tmp_path, [True] * 4 + [False] * 4, seed=seed, trainer="CPL")
    write(tmp_path, result("UPL"))
    view = view_of(tmp_path, "CPL")
    upl, cpl, air = view.collection.methods
    found = paired_difference(air, cpl, "digits")
    assert found is not None and found.points == pytest.approx(37.5)
    text = as_github(view, details=False)
    assert rows_of(text)[0][-1] == "difference to CPL"
    assert cells(text, "AiR")[-1] == f"+37.5 [{found.low:.1f}, {found.high:.1f}]"
    assert cells(text, "CPL")[-1] == "" and cells(text, "UPL")[-1] == ""
    assert view.faults == [
        f"digits: no difference of UPL to CPL: {upl.runs['digits'][1].folder} has no predictions.json"
    ]
    assert "Difference to CPL: in points" in text


def test_a_worse_method_has_a_minus_and_data_sets_a_column_each(tmp_path: Path):
    for dataset in ("digits", "letters"):
        write_run(tmp_path, [True, False, False, False], dataset=dataset)
        write_run(tmp_path, [True, True, False, False], trainer="CPL", dataset=dataset)
    text = github(tmp_path, baseline="CPL")
    assert rows_of(text)[0][-2:] == [f"difference to CPL, {dataset}" for dataset in ("digits", "letters")]
    assert all(re.fullmatch(r"-25\.0 \[-\d+\.\d, 0\.0\]", cell) for cell in cells(text, "AiR")[-2:])


def test_what_rounds_to_nothing_has_no_minus():
    assert _change(Difference(-0.04, -0.049, -0.0, [1], 9)) == "+0.0 [0.0, 0.0]"
    assert _change(Difference(-0.06, -2.25, 0.06, [1], 9)) == "-0.1 [-2.2, 0.1]"


def test_details_have_every_head_the_pseudo_labels_and_every_seed(tmp_path: Path):
    values = three_seeds(tmp_path, primary="fused")
    write(tmp_path, result("CPL", heads={"text": {"accuracy": 75.0}}, pseudo_labels={"accuracy": None}))
    text = github(tmp_path, details=True)
    assert rows_of(text)[3:] == [
        ["method", "primary classifier", "text head", "fused head", "pseudo-labels", "every seed"],
        ["CPL", "text", "75.0", "", "", "1: 75.0"],
        ["AiR", "fused", "81.2 +- 1.9", f"{mean(values) + 1:.1f} +- 1.9", "90.0 +- 0.0", "1: 80.2, 2: 82.5, 3: 84.0"],
    ]
    assert "\ndigits, every head and seed\n" in text and "Pseudo-labels: " in text
    assert "every seed" not in github(tmp_path) and "Pseudo-labels" not in github(tmp_path)


def test_a_bar_in_a_title_stays_in_its_cell(tmp_path: Path):
    write(tmp_path, result(config="a|b"), "digits/AiR/a/seed1")
    write(tmp_path, result(config="c"))
    assert rows_of(github(tmp_path))[1] == ["AiR (a\\|b)", "80.0", "1"]


@pytest.mark.public_reports
@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("a`b`", "a\\`b\\`"),
        ("$5 and $6", "\\$5 and \\$6"),
        ("<b>bold</b>", "\\<b>bold\\</b>"),
        ("[x](http://y)", "[x\\](http://y)"),
        ("back\\slash *", "back\\\\slash \\*"),
    ],
)
def test_markdown_shows_titles_as_they_are(title: str, shown: str, tmp_path: Path):
    """15: no code, mathematics, HTML, link or second row is made of a name."""
    write_run(tmp_path, [True, False])
    (tmp_path / "digits" / "methods.json").write_text(
        json.dumps([{"trainer": "AiR", "config": "mini", "title": title}])
    )
    assert [row[0] for row in rows_of(github(tmp_path))][1:] == [shown]


@pytest.mark.public_reports
def test_a_page_that_fails_leaves_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """15: no picture costs a table; where the page is all that was asked for, its failure is an error."""

    def fail(*_: object) -> None:
        raise ValueError("no such glyph")

    write_run(tmp_path, [True, False])
    monkeypatch.setattr(page, "write_page", fail)
    text = report(tmp_path, page=tmp_path / "page.html")
    assert cells(text, "AiR") == ["50.0", "1"] and "page:" not in text
    assert "page.html was not made" in caplog.text and "no such glyph" in caplog.text
    with pytest.raises(ValueError, match="glyph"):
        report(tmp_path, form="html")


# Lambda, rounds and seconds

FUSION = ["method", "lambda", "fused head", "oracle", "regret", "beta", "prior strength", "rounds", "correct labels"]


def with_lambda(output: Path) -> None:
    """AiR with a fixed lambda in one round, and with one of its own in one or two; CPL without any."""
    write(output, result("CPL", stages=stages(("features of train", 5.0), ("prompt training", 9.0))))
    for seed, (fixed, chosen, best) in {1: (80.0, 84.0, 85.0), 2: (81.0, 85.0, 88.0)}.items():
        write(
            output,
            result(
                seed=seed,
                heads={"text": {"accuracy": 70.0}, "fused": {"accuracy": fixed}},
                primary="fused",
                by_lambda=[[0.0, 70.0], [2.0, fixed], [4.0, 82.0]],
                beta=1.5,
                provenance={"settings": {"AIR.LAMBDA": 2.0, "AIR.BETA": 1.5}},
                stages=stages(("generator", 3.0), ("lora", None), ("prompt training", 9.0)),
            ),
        )
        weights = (9.0, 2.0 + seed / 4) if seed == 2 else (2.0 + seed / 4,)
        again = [("lora, round 2", 27.0)] if seed == 2 else []
        write(
            output,
            result(
                seed=seed,
                heads={"text": {"accuracy": 70.0}, "fused": {"accuracy": chosen}},
                primary="fused",
                config="mini+plus",
                by_lambda=[[0.0, 70.0], [weights[-1], chosen], [16.0, best]],
                auxiliary=auxiliary_rounds(*weights, seed=seed),
                beta=0.5 + seed / 4,
                provenance={"settings": {"AIR.LAMBDA": "auto", "AIR.BETA": "auto"}},
                stages=stages(("generator", 3.0), ("lora", 25.0 + seed), *again, ("a new one", 1.25)),
            ),
        )


def test_lambda_regret_and_rounds_are_in_the_details(tmp_path: Path):
    with_lambda(tmp_path)
    text = github(tmp_path, details=True)
    found = rows_of(text)
    begin = found.index(FUSION)
    assert found[begin + 1 : begin + 3] == [
        ["AiR (mini)", "2 (fixed)", "80.5 +- 0.7", "82.0 +- 0.0", "1.5 +- 0.7", "1.5 (fixed)", "", "", ""],
        [
            "AiR (mini+plus)",
            "2.38 +- 0.18",
            "84.5 +- 0.7",
            "86.5 +- 2.1",
            "2.0 +- 1.4",
            "0.88 +- 0.18",
            "12.0 +- 1.4",
            "1.5",
            "88.5 +- 0.7",
        ],
    ]
    assert "\ndigits, lambda and rounds\n" in text
    assert "computed after training from test labels that the method never saw" in text
    assert "oracle" not in github(tmp_path).lower() and "Seconds" not in github(tmp_path)


def test_seconds_by_stage_are_in_the_details(tmp_path: Path):
    with_lambda(tmp_path)
    text = github(tmp_path, details=True)
    assert rows_of(text)[-4:] == [
        ["method", "sum", "features of train", "generator", "lora", "prompt training", "a new one"],
        ["CPL", "14.0", "5.0", "", "", "9.0", ""],
        ["AiR (mini)", "> 12.0", "", "3.0", "-", "9.0", ""],
        ["AiR (mini+plus)", "44.2", "", "3.0", "26.5 + 13.5", "", "1.2"],  # seed 1 spent nothing on a second round
    ]
    assert "\ndigits, seconds\n" in text and "Seconds: mean over the seeds that ran the stage" in text


def test_where_all_came_from_the_store_no_sum_is_known(tmp_path: Path):
    write(tmp_path, result(stages=stages(("lora", None), ("lora, round 2", None))))
    assert rows_of(github(tmp_path, details=True))[-1] == ["AiR", "-", "- + -"]


def test_without_test_labels_regret_is_unknown(tmp_path: Path):
    heads = {"text": {"accuracy": None}, "fused": {"accuracy": None}}
    write(tmp_path, result(heads=heads, auxiliary=auxiliary_rounds(2.5, 2.25, accuracy=None), by_lambda=None))
    found = rows_of(github(tmp_path, details=True))
    assert found[found.index(FUSION) + 1] == ["AiR", "2.25", "-", "-", "-", "", "12.0", "2", "-"]


def test_older_results_have_neither_table(tmp_path: Path):
    three_seeds(tmp_path)
    text = github(tmp_path, details=True)
    assert "oracle" not in text.lower() and "econds" not in text and len(rows_of(text)) == 4
    (row,) = read_csv(as_csv(view_of(tmp_path), details=True))
    assert not any("oracle" in column or "seconds" in column for column in row)


def test_latex_has_lambda_and_seconds(tmp_path: Path):
    with_lambda(tmp_path)
    text = as_latex(view_of(tmp_path), details=True)
    rows = [line for line in text.splitlines() if line.lstrip().startswith("AiR (mini+plus)")]
    assert len(rows) == 4 and "& $2.38 \\pm 0.18$ & $84.5" in rows[2] and "& $2.0 \\pm 1.4$ &" in rows[2]
    assert "& $26.5 + 13.5$ &" in rows[3]
    assert "% digits, lambda and rounds\n" in text and "% digits, seconds\n" in text
    assert "\\ensuremath{>} 12.0" in text


def test_csv_has_lambda_and_seconds(tmp_path: Path):
    with_lambda(tmp_path)
    text = as_csv(view_of(tmp_path), details=True)
    cpl, fixed, chosen = read_csv(text)
    assert [row["digits lambda is fixed"] for row in (cpl, fixed, chosen)] == ["", "yes", "no"]
    assert float(chosen["digits regret mean"]) == 2.0 and float(chosen["digits oracle mean"]) == 86.5
    assert float(chosen["digits regret std"]) == pytest.approx(2**0.5, abs=1e-4)
    assert float(chosen["digits beta mean"]) == 0.875 and float(fixed["digits beta mean"]) == 1.5
    assert float(chosen["digits rounds mean"]) == 1.5 and float(chosen["digits prior strength mean"]) == 12.0
    assert float(fixed["digits lambda mean"]) == 2.0 and fixed["digits correct labels mean"] == ""
    assert float(chosen["digits seconds lora"]) == 26.5 and float(chosen["digits seconds lora, round 2"]) == 13.5
    assert fixed["digits seconds lora"] == fixed["digits seconds lora, round 2"] == cpl["digits regret mean"] == ""
    assert float(cpl["digits seconds features of train"]) == 5.0
    assert "digits seconds generator, round 2" not in cpl
    assert "oracle" not in as_csv(view_of(tmp_path), details=False)


@pytest.mark.parametrize("form", ["github", "latex", "csv", "html"])
@pytest.mark.parametrize("change", [{"auxiliary": [{"lambda": 2.0, "accuracy": float("nan")}]}, {"stages": ["lora"]}])
def test_damaged_numbers_name_their_file(
    tmp_path: Path, form: str, change: dict[str, Any], capsys: pytest.CaptureFixture
):
    with_lambda(tmp_path)
    path = write(tmp_path, result(seed=3, config="mini+plus", **change))
    code, out, err = air(capsys, str(tmp_path), "--format", form, "--details")
    (fault,) = [line for line in err.splitlines() if str(path) in line]
    assert code == 0 and out and f"its {next(iter(change))}[0]" in fault


# LaTeX

AWKWARD = [
    "100 % of A&B",
    "a_b #1 $x$ ^2 ~ {c} \\d",
    "[option]",
    "* star",
    "}",
    "a < b > c",
    "1.0 +- 2.0",
    "a & 1.0 +- 2.0",
    "\\\\",
]


def awkward(output: Path) -> None:
    entries = []
    for number, title in enumerate(AWKWARD):
        entries.append({"trainer": "AiR", "config": f"c{number}", "title": title})
        write_run(output, [True] * (number + 1) + [False], config=f"c{number}")
        write_run(output, [True] * (number + 1) + [False] * 2, config=f"c{number}", seed=2)
    (output / "digits" / "methods.json").write_text(json.dumps(entries))


def unescaped(text: str, character: str) -> int:
    """How often a character stands in LaTeX source without a backslash before it (that is none itself)."""
    return len(re.findall(rf"(?<!\\)(?:\\\\)*{re.escape(character)}", text))


def test_latex_is_well_formed_whatever_rows_are_called(tmp_path: Path):
    awkward(tmp_path)
    text = as_latex(view_of(tmp_path), details=True)
    assert text.isascii()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count("\\begin{tabular}") == body.count("\\end{tabular}") == 2
    assert unescaped(body, "{") == unescaped(body, "}") and unescaped(body, "#") == unescaped(body, "%") == 0
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", body.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    rows = [line for line in body.splitlines() if line.rstrip().endswith("\\\\")]
    main_rows, more = rows[: len(AWKWARD) + 1], rows[len(AWKWARD) + 1 :]
    assert len(more) == len(AWKWARD) + 1
    assert all(unescaped(row, "&") == 2 for row in main_rows) and all(unescaped(row, "&") == 5 for row in more)
    assert not any(re.match(r" *[\[*]", row) for row in rows)
    assert all(unescaped(row, "$") % 2 == 0 for row in rows)
    for title in (
        "100 \\% of A\\&B",
        "a\\_b \\#1 \\$x\\$ \\^{}2 \\textasciitilde{} \\{c\\} \\textbackslash{}d",
        "{}[option]",
        "{}* star",
        "a \\& 1.0 +- 2.0",
        "a \\ensuremath{<} b",
    ):
        assert sum(row.lstrip().startswith(title) for row in rows) == 2


def test_latex_numbers_are_mathematics(tmp_path: Path):
    for seed, right in ((1, 7), (2, 6)):
        write_run(tmp_path, [True] * right + [False] * (8 - right), seed=seed)
        write_run(tmp_path, [True] * 4 + [False] * 4, seed=seed, trainer="CPL")
    text = as_latex(view_of(tmp_path, "CPL"), details=False)
    (row,) = [line for line in text.splitlines() if line.lstrip().startswith("AiR")]
    assert re.fullmatch(
        r" *AiR +& \$81\.2 \\pm 8\.8\$ +& \$2\$ +"
        r"& \$\+31\.2 \[\d+\.\d, \d+\.\d\]\$ +\\\\",
        row,
    ), row
    assert text.startswith('% digits: backbone mini, split family zhou, template "a photo of the digit {}."\n')


# CSV


def read_csv(text: str) -> list[dict[str, str]]:
    """Read as others do: lines that begin with # are comments."""
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def test_csv_reads_back_as_numbers(tmp_path: Path):
    for seed, right in ((1, 7), (2, 6)):
        write_run(tmp_path, [True] * right + [False] * (8 - right), seed=seed)
    write_run(tmp_path, [True] * 4 + [False] * 4, trainer="CPL")
    view = view_of(tmp_path, "CPL")
    cpl, air = read_csv(as_csv(view, details=True))
    values = scores(view.collection.methods[1], "digits")
    assert (air["method"], air["trainer"], air["config"]) == ("AiR", "AiR", "mini")
    assert float(air["digits mean"]) == pytest.approx(mean(values), abs=1e-4)
    assert float(air["digits std"]) == pytest.approx(stdev(values), abs=1e-4)
    assert float(air["digits seeds"]) == 2 and float(air["digits difference points"]) == 37.5
    assert float(air["digits difference low"]) < 37.5 < float(air["digits difference high"])
    assert (air["digits primary classifier"], air["digits seed 1"], air["digits seed 2"]) == ("text", "87.5", "75.0")
    assert cpl["digits std"] == cpl["digits difference points"] == cpl["digits seed 2"] == ""
    assert cpl["digits fused head mean"] == "" and float(cpl["digits pseudo-labels mean"]) == 90


def test_csv_keeps_awkward_titles_and_one_row_a_method(tmp_path: Path):
    awkward(tmp_path)
    text = as_csv(view_of(tmp_path, ci95=True), details=False)
    found = read_csv(text)
    assert [row["method"] for row in found] == [csv_text(title) for title in AWKWARD]
    assert list(found[0]) == ["method", "trainer", "config", "digits mean", "digits ci95", "digits seeds"]
    assert text.splitlines()[0].startswith("# digits: backbone mini")
    for line in text.splitlines():
        assert "#" not in re.sub(r'"[^"]*"', "", line) or line.startswith("# ")  # nothing is taken for a comment


def test_csv_of_several_data_sets_has_their_mean(tmp_path: Path):
    write(tmp_path, result(accuracy=80.0))
    write(tmp_path, result(accuracy=61.0, dataset="letters"))
    (row,) = read_csv(as_csv(view_of(tmp_path), details=False))
    assert float(row["mean"]) == 70.5


# The command


def air(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """`air report` with these arguments: exit code, output, errors."""
    code = main(["report", *arguments])
    return (code, *capsys.readouterr())


def test_what_is_left_out_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, result(seed=1))
    path = write(tmp_path, "{", "digits/AiR/mini/seed2")
    code, out, err = air(capsys, str(tmp_path))
    assert code == 0 and cells(out, "AiR") == ["80.0", "1"]
    assert err.startswith(f"warning: {path}") and err.count("\n") == 1


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert air(capsys, str(tmp_path)) == (2, "", f"error: no results in {tmp_path}\n")
    code, out, err = air(capsys, str(tmp_path / "nowhere"))
    assert (code, out) == (2, "") and err == f"error: no results in {tmp_path / 'nowhere'}; there is no such folder\n"


def test_options_choose_rows_columns_and_details(tmp_path: Path, capsys: pytest.CaptureFixture):
    for dataset in ("digits", "letters"):
        for trainer in ("ZeroshotCLIP", "CPL", "AiR"):
            write_run(tmp_path, [True, False], trainer=trainer, dataset=dataset)
            write_run(tmp_path, [True, True], trainer=trainer, dataset=dataset, seed=2)
    other = write(tmp_path, result(backbone="ViT-B/32", config="large"))
    code, out, err = air(capsys, str(tmp_path))
    assert (code, out) == (2, "") and "--backbone NAME" in err and str(other) in err and err.count("\n") == 1
    code, out, err = air(
        capsys,
        str(tmp_path),
        "--backbone",
        "mini",
        "--split-family",
        "zhou",
        "--dataset",
        "letters",
        "--method",
        "AiR",
        "--baseline",
        "CPL",
        "--ci95",
        "--details",
    )
    assert (code, err) == (0, "")
    assert rows_of(out) == [
        ["method", "letters", "seeds", "difference to CPL"],
        ["CPL", "75.0 +- 317.7", "2", ""],
        ["AiR", "75.0 +- 317.7", "2", "+0.0 [0.0, 0.0]"],
        ["method", "primary classifier", "text head", "fused head", "pseudo-labels", "every seed"],
        ["CPL", "text", "75.0 +- 317.7", "", "90.0 +- 0.0", "1: 50.0, 2: 100.0"],
        ["AiR", "text", "75.0 +- 317.7", "", "90.0 +- 0.0", "1: 50.0, 2: 100.0"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "CPL (mni)"], "unknown baseline 'CPL (mni)'; did you mean CPL"),
        (["--method", "AiR", "--baseline", "what"], "unknown method 'what'; known: AiR, CPL"),
        (["--method", "Air"], "unknown method 'Air'; did you mean AiR?"),
        (["--dataset", "digit"], "unknown data set 'digit'; did you mean digits?"),
        (["--backbone", "maxi"], "unknown backbone 'maxi'"),
        (["--split-family", "xhou"], "unknown split family 'xhou'; did you mean zhou?"),
        (["--out", "{folder}"], "cannot write {folder}: "),
        (["--format", "csv", "--out", "{file}/report.csv"], "cannot write {file}/report.csv: "),
        (["--format", "html", "--out", "{folder}"], "cannot write {folder}: "),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = write(tmp_path, result())
    write(tmp_path, result("CPL"))
    places = {"folder": tmp_path / "digits", "file": file}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = air(capsys, str(tmp_path), *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "") and err.startswith(f"error: {message.format(**places)}") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written is left


@pytest.mark.parametrize("form", ["github", "latex", "csv"])
def test_a_file_holds_what_the_terminal_shows(tmp_path: Path, form: str, capsys: pytest.CaptureFixture):
    three_seeds(tmp_path)
    _, shown, _ = air(capsys, str(tmp_path), "--format", form, "--details")
    path = tmp_path / "new" / "table.txt"
    assert air(capsys, str(tmp_path), "--format", form, "--details", "--out", str(path)) == (0, "", "")
    assert path.read_text() == shown and [p.name for p in path.parent.iterdir()] == ["table.txt"]


def test_the_page_gets_the_collection_and_the_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def write_page(shown: Comparison, target: Path) -> Path:
        baseline = shown.baseline and shown.baseline.title
        calls.append(([m.title for m in shown.collection.methods], target, baseline, shown.ci95))
        return target

    monkeypatch.setattr(page, "write_page", write_page)
    write(tmp_path, result())
    write(tmp_path, result("CPL"))
    names, default, other = ["CPL", "AiR"], tmp_path / "report.html", tmp_path / "other.html"
    assert air(capsys, str(tmp_path), "--format", "html") == (0, f"page: {default}\n", "")
    options = ["--baseline", "CPL", "--ci95", "--out", str(other)]
    code, out, err = air(capsys, str(tmp_path), "--format", "html", *options)
    assert (code, out) == (0, f"page: {other}\n") and "no difference of AiR to CPL" in err
    assert calls == [(names, default, None, False), (names, other, "CPL", True)]


def test_a_table_and_a_page_are_read_and_computed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for trainer, right in (("CPL", [True, False, False]), ("UPL", [True, True, False]), ("AiR", [True] * 3)):
        write_run(tmp_path, right, trainer=trainer)
    write(tmp_path, "{", "digits/AiR/mini/seed2")
    read, compared = [], []

    def read_results(output: Path) -> Any:
        read.append(output)
        return reading(output)

    def paired(method: Any, *args: Any, **options: Any) -> Any:
        compared.append(method.trainer)
        return pairing(method, *args, **options)

    reading, pairing = collection.read_results, comparison.paired_difference
    monkeypatch.setattr(collection, "read_results", read_results)
    monkeypatch.setattr(comparison, "paired_difference", paired)
    target = tmp_path / "experiment.html"
    out = report(tmp_path, baseline="CPL", page=target)
    assert read == [tmp_path] and compared == ["UPL", "AiR"]
    assert out.endswith(f"page: {target}\n") and len(caplog.messages) == 1  # the damaged result, once
    (difference,) = re.findall(r"\+66\.7 \[[^]]*\]", out)
    assert difference in target.read_text().replace("&nbsp;", " ").replace("\u00a0", " ")


@pytest.mark.parametrize("form", ["github", "latex", "csv", "html"])
def test_no_harmful_file_ends_in_a_traceback(tmp_path: Path, form: str, capsys: pytest.CaptureFixture):
    for number, (_, text) in enumerate(HARMFUL):
        write(tmp_path, text, f"digits/AiR/bad{number}/seed1")
    code, out, err = air(capsys, str(tmp_path), "--format", form, "--details")
    assert (code, out) == (2, "") and err.startswith(f"error: no results in {tmp_path}; left out: {len(HARMFUL)}")
    for seed in (1, 2):
        path = write_run(tmp_path, [True, False, True], seed=seed)
        write_run(tmp_path, [True, False, True], seed=seed, trainer="CPL")
    path.with_name("predictions.json").write_text("[NaN")
    (path.parent / "loop").symlink_to(path.parent)
    (tmp_path / "digits" / "methods.json").write_text("[{]")
    code, out, err = air(capsys, str(tmp_path), "--format", form, "--details", "--baseline", "CPL")
    assert code == 0 and out and "Traceback" not in err
    assert err.count("\n") == err.count("warning: ") == len(HARMFUL) + 2


# As the scripts call it


def test_only_one_data_sets_folder_with_details(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, result())
    write(tmp_path, result(dataset="letters"))
    out = report(tmp_path, only="digits")
    assert capsys.readouterr() == ("", "")  # the library does not print
    assert "digits" in out and "letters" not in out and "every seed" in out


def test_rows_of_an_experiment_have_its_titles_order_and_baseline(tmp_path: Path):
    for trainer in ("ZeroshotCLIP", "CPL", "AiR"):
        write_run(tmp_path, [True, False], trainer=trainer)
    rows = {("AiR", "mini"): "ours", ("CPL", "mini"): "theirs"}
    found = rows_of(report(tmp_path, only="digits", baseline="theirs", rows=rows))
    assert found[:3] == [
        ["method", "digits", "seeds", "difference to theirs"],
        ["ours", "50.0", "1", "+0.0 [0.0, 0.0]"],
        ["theirs", "50.0", "1", ""],
    ]
    with pytest.raises(UserError, match="unknown baseline 'CPL'"):
        report(tmp_path, only="digits", baseline="CPL", rows=rows)


def test_galleries_are_placed_beside_the_results(tmp_path: Path):
    for seed in (1, 2):
        (write(tmp_path, result(seed=seed)).parent / "gallery.png").write_bytes(b"picture of seed %d" % seed)
    (write(tmp_path, result("CPL"), "too/shallow").parent / "gallery.png").write_bytes(b"not this one")
    out = report(tmp_path)
    assert (tmp_path / "digits" / "gallery.png").read_bytes() == b"picture of seed 1"
    assert f"gallery: {tmp_path / 'digits' / 'gallery.png'}\n" in out
    assert not (tmp_path / "too" / "gallery.png").exists()


def test_a_gallery_that_cannot_be_copied_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (write(tmp_path, result()).parent / "gallery.png").write_bytes(b"picture")
    (tmp_path / "digits" / "gallery.png").mkdir()
    assert "gallery: " not in report(tmp_path)
    (message,) = caplog.messages
    assert message.startswith("cannot copy ")


def test_other_forms_place_no_gallery(tmp_path: Path, capsys: pytest.CaptureFixture):
    (write(tmp_path, result()).parent / "gallery.png").write_bytes(b"picture")
    for form in ("latex", "csv"):
        assert "gallery" not in air(capsys, str(tmp_path), "--format", form)[1]
    assert not (tmp_path / "digits" / "gallery.png").exists()
