"""What a script prints at its end, and every setting on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_up_results import write_pictures, write_run
from result_files import result, write

from air_plugin.report.collection import collect
from air_plugin.report.sections.settings import all_settings
from air_plugin.report.sections.view import View
from air_plugin.report.statistics import summary
from air_plugin.report.summary import summarize_results
from air_plugin.utils.errors import UserError

CPL, AIR = ("CPL", "mini"), ("AiR", "mini")
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two methods of two seeds; AiR is right everywhere, CPL on six of eight images."""
    names = write_pictures(tmp_path / "data", "digits", len(LABELS))
    for trainer, config, predicted in (("CPL", "mini", [0, 1, 2, 0, 1, 2, 1, 0]), ("AiR", "mini", LABELS)):
        for seed in (1, 2):
            heads, settings = {"text": predicted}, {"AIR.M": 4, "OPTIM.LR": 0.1, "SEED": seed}
            write_run(
                tmp_path / "output",
                ["a", "b", "c"],
                LABELS,
                heads,
                images=names,
                trainer=trainer,
                config=config,
                seed=seed,
                settings=settings,
                gallery=trainer == "AiR",
            )
    return tmp_path / "output"


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_one_table_and_two_lines(output: Path):
    page = output / "digits" / "AiR.html"
    text = summarize_results(output, "digits", {CPL: "", AIR: ""}, page=page, baseline=CPL)
    found = rows_of(text)
    assert found[0] == ["method", "accuracy on digits, %", "difference to CPL [95 % interval]"]
    assert found[1] == ["CPL", "75.0 +- 0.0", ""]
    assert found[2][:2] == ["AiR", "100.0 +- 0.0"]
    assert re.fullmatch(r"\+25\.0 \[0\.0, \d+\.\d\]", found[2][2])
    assert text.splitlines()[4:] == [f"page: {page}", f"results: {output / 'digits'}"]
    assert "Settings" in page.read_text() and (output / "digits" / "gallery.png").is_file()


def test_without_a_baseline_there_is_no_difference(output: Path):
    page = output / "digits" / "AiR.html"
    for baseline in (None, ("UPL", "mini")):
        text = summarize_results(output, "digits", {AIR: ""}, page=page, baseline=baseline)
        assert rows_of(text) == [["method", "accuracy on digits, %"], ["AiR", "100.0 +- 0.0"]]


def test_results_of_earlier_commands_are_shown_where_they_are_no_rows_of_an_experiment(output: Path):
    for number in (6, 7):
        settings = {"AIR.M": number}
        write_run(output, ["a", "b", "c"], LABELS, {"text": LABELS}, config=f"mini+AIR.M={number}", settings=settings)
    named = [{"trainer": "AiR", "config": config, "title": "ours"} for config in ("mini", "mini+AIR.M=7")]
    (output / "digits" / "methods.json").write_text(json.dumps(named))
    page = output / "digits" / "AiR.html"
    text = summarize_results(output, "digits", {CPL: "", AIR: ""}, page=page, others=True)
    assert [row[0] for row in rows_of(text)[1:]] == ["CPL", "AiR", "AiR, M = 6"]
    text = summarize_results(output, "digits", {CPL: "", AIR: ""}, page=page)
    assert [row[0] for row in rows_of(text)[1:]] == ["CPL", "ours"]


def test_results_that_cannot_be_compared_are_not_shown(output: Path, caplog: pytest.LogCaptureFixture):
    write(output, result("AiR", config="vit_b32", backbone="ViT-B/32"))
    text = summarize_results(output, "digits", {CPL: "", AIR: ""}, page=output / "x.html", others=True)
    assert [row[0] for row in rows_of(text)[1:]] == ["CPL", "AiR"] and caplog.messages == []
    with pytest.raises(UserError, match="no results"):
        summarize_results(output, "letters", {CPL: ""}, page=output / "x.html")


def test_without_test_labels_a_note_says_where_the_predictions_are(tmp_path: Path):
    write(tmp_path, result(heads={"text": {"accuracy": None}}))
    text = summarize_results(tmp_path, "digits", {AIR: ""}, page=tmp_path / "x.html")
    assert text.startswith("digits: no test labels") and rows_of(text)[1] == ["AiR", "-"]


def test_a_page_that_cannot_be_written_costs_no_table(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("air_plugin.report.summary.write_page_of", fail)
    text = summarize_results(output, "digits", {AIR: ""}, page=output / "x.html")
    assert "| AiR" in text and "page:" not in text and "results:" in text and "no font" in caplog.text


def test_every_setting_is_on_the_page(output: Path):
    write_run(
        output,
        ["a", "b", "c"],
        LABELS,
        {"text": LABELS},
        config="mini+AIR.M=6",
        settings={"AIR.M": 6, "OPTIM.LR": 0.1, "AIR.LCM_LORA": "", "SEED": 1},
    )
    write_run(output, ["a", "b", "c"], LABELS, {"text": LABELS}, trainer="UPL")  # from before settings were recorded
    found = all_settings(View("digits", collect(output).methods, None, summary, []))
    assert found["methods"] == ["CPL", "AiR", "AiR, M = 6"]
    assert found["differing"] == [("AIR.LCM_LORA", ["", "", '""']), ("AIR.M", ["4", "4", "6"])]
    assert found["same"] == [("OPTIM.LR", "0.1")]


def test_a_page_without_settings_says_so(tmp_path: Path):
    write(tmp_path, result())
    summarize_results(tmp_path, "digits", {AIR: ""}, page=tmp_path / "x.html")
    assert "No result holds its settings." in (tmp_path / "x.html").read_text()
