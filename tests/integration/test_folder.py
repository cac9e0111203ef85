"""A person's own images, from the folder to labels and a report, with and without test labels."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_results import guesses, write_pictures, write_run
from PIL import Image, ImageDraw
from runs import ROOT, SHORT, script

import train
from air_plugin.utils.class_names import match_class, read_class_file
from air_plugin.utils.errors import UserError
from datasets.folder import Folder

NAMES = ["left half", "Stra\u00dfe", "top_half"]  # a space, a letter that is none of ASCII, an underscore
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Caf\u00e9") for form in ("NFC", "NFD"))


def draw(path: Path, kind: int, number: int) -> None:
    """A picture of one of three kinds in whatever format the name asks for; no two are the same."""
    rng = np.random.default_rng(100 * kind + number)
    image = Image.fromarray(rng.integers(0, 60, (32, 32, 3), dtype=np.uint8))
    box = [(0, 0, 15, 31), (10, 10, 22, 22), (0, 0, 31, 15)][kind]
    ImageDraw.Draw(image).rectangle(box, fill=(255, 255, int(rng.integers(256))))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make(root: Path, *, test: bool, names: list[str] = NAMES, lines: str = "") -> Path:
    """A folder with 36 training images, nested, in every format, and with `test` 4 test images a class."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join([*names, lines]), encoding="utf-8")
    endings = ["jpg", "JPEG", "png", "WebP", "bmp", "TIF", "tiff"]
    for number in range(36):
        folder = root / "train" / ["", "a b", "d\u00e9ep/er"][number % 3]
        draw(folder / f"{number}.{endings[number % 7]}", number % 3, number)
    for kind, name in enumerate(names if test else []):
        for number in range(4):
            draw(root / "test" / name / "x" / f"{number}.png", kind, 1000 + number)
    return root


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in root.rglob("*")}


def config(root: Path, *options: str) -> Any:
    line = ["--root", str(root), "--dataset-config-file", str(ROOT / "configs/datasets/folder.yaml"), *options]
    return train.set_up(train.parse(line))[0]


def fault(root: Path, *options: str) -> str:
    with pytest.raises(UserError) as caught:
        Folder(config(root, *options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read


def test_the_lists_hold_every_image_with_its_label(tmp_path: Path):
    data = Folder(config(make(tmp_path, test=True)))
    assert data.classnames == NAMES and data.num_classes == 3
    assert len(data.train_u) == len(data.train_x) == 36 and {item.label for item in data.train_x} == {-1}
    assert data.val is None and not data.hidden_labels
    expected = {str(tmp_path / "test" / name / "x" / f"{n}.png"): NAMES.index(name) for name in NAMES for n in range(4)}
    assert {item.impath: item.label for item in data.test} == expected


def test_without_test_the_training_images_are_predicted(tmp_path: Path):
    data = Folder(config(make(tmp_path, test=False)))
    assert [item.impath for item in data.test] == sorted(item.impath for item in data.train_u)
    assert {item.label for item in data.test} == {-1}


def test_hidden_files_are_left_out(tmp_path: Path):
    make(tmp_path, test=True)
    (tmp_path / "train/._1.jpg").write_bytes(b"left by another system")
    (tmp_path / "train/.thumbs").mkdir()
    draw(tmp_path / "train/.thumbs/1.png", 0, 1)
    (tmp_path / "test/.DS_Store").write_bytes(b"left by another system")
    data = Folder(config(tmp_path))
    assert len(data.train_u) == 36 and len(data.test) == 12


def test_the_template_line_wins_over_the_default_and_an_option_over_the_line(tmp_path: Path):
    assert config(make(tmp_path, test=False)).DATASET.TEMPLATE == "a photo of a {}."
    make(tmp_path, test=False, lines="Template:  a  drawing: the {} of it.")
    assert config(tmp_path).DATASET.TEMPLATE == "a drawing: the {} of it."
    for option in ("my {}.", "a photo of a {}."):  # even the default, where somebody asks for it
        cfg = config(tmp_path, "DATASET.TEMPLATE", option)
        assert option == cfg.DATASET.TEMPLATE
    assert read_class_file(tmp_path / "classes.txt")[0] == NAMES


@pytest.mark.parametrize("line", ["\ufeff{}", "  {}\t", "\n\n{}\n", "{}\r"])
def test_class_names_however_they_were_saved(tmp_path: Path, line: str):
    (tmp_path / "classes.txt").write_bytes((line.format(DECOMPOSED) + "\ndog   house\n").encode())
    assert read_class_file(tmp_path / "classes.txt") == ([COMPOSED, "dog house"], "")


@pytest.mark.parametrize(
    ("folder", "index"),
    [
        ("top_half", 2),
        ("Top Half", 2),
        ("TOPHALF", 2),
        ("left_half", 0),
        ("STRASSE", 1),
        ("stra\u00dfe", 1),
        ("top", None),
        (DECOMPOSED, 3),
        (COMPOSED.upper(), 3),
        ("", None),
    ],
)
def test_folders_match_classes(folder: str, index: int | None):
    assert match_class(folder, [*NAMES, COMPOSED]) == index


def test_an_exact_name_wins_and_a_loose_one_must_be_unambiguous():
    assert match_class("river", ["River", "river"]) == 1
    with pytest.raises(UserError, match="fits several classes: River, river"):
        match_class("RIVER", ["River", "river"])


# What is wrong


def test_what_is_missing_is_named(tmp_path: Path):
    assert f"{tmp_path / 'classes.txt'} is missing" in fault(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb")
    assert f"image folder {tmp_path / 'train'} is missing" in fault(tmp_path)
    (tmp_path / "train").mkdir()
    assert f"no images below {tmp_path / 'train'}" in fault(tmp_path)
    (tmp_path / "train/.hidden.png").write_bytes(b"")
    assert "no images below" in fault(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "names 0 classes"),
        (b"\n \n", "names 0 classes"),
        (b"one\n", "names 1 classes"),
        (b"cat\ndog\ncat", "names 'cat' twice"),
        (f"{COMPOSED}\n{DECOMPOSED}".encode(), "twice"),
        ("cat\ndog".encode("utf-16"), "no text in UTF-8"),
        (b"a\nb\ntemplate: x", "must be a template with one {}"),
        (b"a\nb\ntemplate: {} {}", "with one {}"),
        (b"a\nb\ntemplate:", "with one {}"),
        (b"a\nb\ntemplate: {}\ntemplate: {}.", "has 2 template lines"),
    ],
)
def test_class_names_that_are_none(tmp_path: Path, text: bytes, says: str):
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(UserError) as caught:
        config(tmp_path)
    assert says in str(caught.value) and str(tmp_path / "classes.txt") in str(caught.value)


def test_test_folders_that_are_no_class(tmp_path: Path):
    make(tmp_path, test=True)
    draw(tmp_path / "test/loose.png", 0, 0)
    assert f"{tmp_path / 'test/loose.png'} lies in no folder of a class" in fault(tmp_path)
    (tmp_path / "test/loose.png").unlink()
    (tmp_path / "test/top_hall").mkdir()
    says = fault(tmp_path)
    assert f"{tmp_path / 'test/top_hall'} is no class" in says and "did you mean top_half" in says
    (tmp_path / "test/top_hall").rename(tmp_path / "test/TOP HALF")
    assert f"no images below {tmp_path / 'test/TOP HALF'}" in fault(tmp_path)


def test_a_test_folder_without_anything(tmp_path: Path):
    make(tmp_path, test=False)
    (tmp_path / "test").mkdir()
    assert "Remove it if you have no labels" in fault(tmp_path)


def test_methods_that_need_labels_are_refused(tmp_path: Path):
    make(tmp_path, test=False)
    assert "CoOp learns from labels" in fault(tmp_path, "--trainer", "CoOp", "DATASET.NUM_SHOTS", "4")
    assert "must be all" in fault(tmp_path, "DATASET.SUBSAMPLE_CLASSES", "base")


def test_batches_of_few_classes_without_test_labels_are_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make(tmp_path / "data", test=False)
    line = ["--root", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run"), "--trainer", "CPL"]
    files = ["--dataset-config-file", str(ROOT / "configs/datasets/folder.yaml")]
    files += ["--config-file", str(ROOT / "configs/trainers/CPL/mini.yaml")]
    options = ["TRAINER.TRANSDUCTION.METHOD", "stata", "TRAINER.TRANSDUCTION.CLASSES_PER_BATCH", "2"]
    assert train.main([*line, *files, *options]) == 2
    said = capsys.readouterr().err
    assert "CLASSES_PER_BATCH makes batches by the labels of test images" in said and said.count("\n") == 1
    assert not (tmp_path / "run/prompt_learner").exists() and not list(tmp_path.rglob("entry.json"))


def test_coop_refuses_images_without_labels_whatever_the_shots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make(tmp_path / "data", test=False)
    line = ["--root", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run"), "--trainer", "CoOp"]
    files = ["--dataset-config-file", str(ROOT / "configs/datasets/folder.yaml")]
    files += ["--config-file", str(ROOT / "configs/trainers/CoOp/mini.yaml")]
    assert train.main([*line, *files, "DATASET.NUM_SHOTS", "-1"]) == 2
    said = capsys.readouterr().err
    assert "has no label, and CoOp learns from labels; use UPL, CPL or AiR" in said and said.count("\n") == 1


# Reports


def forget_labels(folder: Path) -> None:
    """Turn a made-up run into one without test labels."""
    result, said = (json.loads((folder / name).read_text()) for name in ("result.json", "predictions.json"))
    unknown = {"accuracy": None, "macro_f1": None, "per_class": {}}
    result |= {"heads": dict.fromkeys(result["heads"], unknown), "by_lambda": None}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "predictions.json").write_text(json.dumps({**said, "labels": None}))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Sweeps over M and lambda on two data sets, of which `folder` has no test labels."""
    output = tmp_path / "out"
    rows = [
        ("CPL", "mini", {}),
        *(
            ("AiR", f"M{m}L{w}", {"AIR.M": m, "AIR.K": 4, "AIR.LAMBDA": w})
            for m, w in ((20, 1.0), (60, 1.0), (60, 2.0))
        ),
    ]
    for dataset in ("digits", "folder"):
        images = write_pictures(tmp_path / "data", dataset, 30)
        labels = [number % 3 for number in range(30)]
        for number, (trainer, name, settings) in enumerate(rows):
            for seed in (1, 2):
                said = {"text": guesses(labels, 3, right=0.5 + 0.1 * number, seed=seed)}
                folder = write_run(
                    output,
                    NAMES,
                    labels,
                    said,
                    images=images,
                    dataset=dataset,
                    trainer=trainer,
                    config=name,
                    seed=seed,
                    settings=settings,
                )
                if dataset == "folder":
                    forget_labels(folder)
    return output


def reported(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[str, str]:
    from air_plugin.cli import main

    assert main(["report", *line]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_table_tells_unknown_from_missing(mixed: Path, capsys: pytest.CaptureFixture[str]):
    out, err = reported(capsys, str(mixed), "--baseline", "CPL", "--details")
    assert not err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| AiR")]
    assert len(rows) == 9  # a main table, and the details of two data sets
    for row in rows[:3]:
        # method, digits, folder, mean, seeds, differences on digits and folder
        assert "+-" in row[1] and row[2:5] == ["-", "", "2"] and row[5].endswith("]") and row[6] == ""
    for row in rows[6:]:  # method, primary, text, fused, pseudo-labels, seeds: there is no fused head
        assert row[1:] == ["text", "-", "", "", "1: -, 2: -"]


def test_the_page_of_a_data_set_without_labels(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, err = reported(capsys, str(mixed), "--format", "html", "--out", str(tmp_path / "page.html"), "--baseline", "CPL")
    assert not err
    page = (tmp_path / "page.html").read_text()
    assert "Left out or incomplete" not in page
    known, unknown = page.split('id="set2"')
    headings = ("Accuracy of each class", "Confusion", "Number of generated images", "Most confident mistakes")
    assert all(f"<h3>{heading}</h3>" in known and f"<h3>{heading}</h3>" not in unknown for heading in headings)
    assert "no test labels" in unknown and "no test labels" not in known
    assert known.count('<td class="n">-</td>') == 4  # a row a method in the table of all


def test_predictions_that_know_more_than_the_result(mixed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = mixed / "folder/CPL/mini/seed1/predictions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": [0] * 30}))
    reported(capsys, str(mixed), "--format", "html", "--out", str(tmp_path / "page.html"))
    assert "only one of them has test labels" in (tmp_path / "page.html").read_text()


# Whole runs


def results_of(output: Path) -> dict[str, dict[str, Any]]:
    """By trainer, with the content of its predictions.json."""
    found = {}
    for path in output.glob("folder/*/*/seed*/result.json"):
        said = json.loads(path.with_name("predictions.json").read_text())
        found[path.parts[-4]] = {**json.loads(path.read_text()), "predictions": said}
    return found


@pytest.mark.parametrize("test", [True, False], ids=["with labels", "without labels"])
def test_every_stage_runs_to_the_report(tmp_path: Path, test: bool):
    root = make(tmp_path / "my images \u00fc", test=test, lines="template: a picture of {}.")
    before = snapshot(root)
    places = {"DATA": str(root), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1", "JOBS": "1"}
    done = script("scripts/air/main.sh", "folder", "mini", *SHORT, **places)
    assert done.returncode == 0, done.stderr
    assert snapshot(root) == before
    results = results_of(tmp_path / "out")
    assert set(results) == {"ZeroshotCLIP", "CPL", "AiR"}
    for result in results.values():
        said = result["predictions"]
        assert result["template"] == "a picture of {}." and said["classnames"] == NAMES
        assert result["pseudo_labels"]["accuracy"] is None
        assert len(said["images"]) == (12 if test else 36)
        assert all((root / image).is_file() for image in said["images"])
        for head, figures in result["heads"].items():
            chosen = said["heads"][head]["predicted"]
            assert len(chosen) == len(said["images"]) and set(chosen) <= {0, 1, 2}
            if test:
                hits = [one == other for one, other in zip(chosen, said["labels"], strict=True)]
                assert figures["accuracy"] == pytest.approx(100 * sum(hits) / 12)
                assert set(figures["per_class"]) == set(NAMES)
            else:
                assert figures == {"accuracy": None, "macro_f1": None, "per_class": {}} and said["labels"] is None
    cells = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    shown = {row[1].split()[0]: row[2].strip() for row in cells if len(row) == 5}
    assert set(shown) == {"method", "ZeroshotCLIP", "CPL", "AiR"}
    if test:
        assert "unknown" not in done.stdout and shown["AiR"] == f"{results['AiR']['heads']['text']['accuracy']:.1f}"
    else:
        assert 'its accuracy is unknown ("-")' in done.stdout and shown["AiR"] == shown["ZeroshotCLIP"] == "-"
        assert results["AiR"]["by_lambda"] == []

    from air_plugin.cli import main

    for form in ("html", "latex", "csv"):
        target = tmp_path / f"report.{form}"
        assert main(["report", str(tmp_path / "out"), "--format", form, "--out", str(target), "--details"]) == 0
        assert ("accuracy is unknown" in target.read_text()) == (not test)
    page = (tmp_path / "report.html").read_text()
    assert ("Most confident mistakes" in page) == test and "Synthetic images" in page

    draw(root / "train/new.png", 1, 5000)
    again = script("scripts/air/main.sh", "folder", "mini", *SHORT, **places)
    assert again.returncode == 2 and "1 image is new, first train/new.png" in again.stderr
    assert again.stderr.count("\n") == 1


def test_an_unreadable_image_is_one_line(tmp_path: Path):
    root = make(tmp_path / "data", test=False)
    (root / "train/3.WebP").write_bytes((root / "train/3.WebP").read_bytes()[:60])
    done = script("scripts/zeroshot/main.sh", "folder", "mini", DATA=str(root), OUTPUT=str(tmp_path / "out"), SEEDS="1")
    assert done.returncode == 2 and "3.WebP" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_no_folder_is_one_line(tmp_path: Path):
    places = {"DATA": str(tmp_path), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    done = script("scripts/zeroshot/main.sh", "folder", "mini", **places)
    assert done.returncode == 2 and "classes.txt is missing" in done.stderr and done.stderr.count("\n") == 1
