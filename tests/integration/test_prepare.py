"""prepare.py against a server on this machine: fetching, laying out, verifying, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from layouts import EUROSAT
from PIL import Image
from rich.console import Console
from runs import script

import prepare
from air_plugin.utils.errors import UserError
from datasets.download import lay_out
from datasets.sources import ByHand, File, Source
from scripts.compose import ROOT, dataset_class
from scripts.data import require_data
from scripts.display import Display

# Name on the command line -> class.
SETS = {
    path.stem: dataset_class(yaml.safe_load(path.read_text())["DATASET"]["NAME"])
    for path in sorted((ROOT / "configs" / "datasets").glob("*.yaml"))
}
GENERATED = [name for name, kind in SETS.items() if kind.source.generated]
FETCHED = [name for name in SETS if name not in (*GENERATED, "folder")]
Served = Callable[[str, bytes], File]


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def asked() -> list[str]:
    """The paths that were asked for so far."""
    Quiet.asked.clear()
    return Quiet.asked


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Served]:
    """Puts a file on the server; takes and the rest are for the caller to replace."""
    folder = tmp_path / "server"
    folder.mkdir()

    def put(name: str, data: bytes) -> File:
        (folder / name).write_bytes(data)
        checksum = f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
        return File(f"http://127.0.0.1:{server.server_port}/{name}", {}, checksum)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield put
        server.shutdown()
        thread.join()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE", "PREPARE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "gdown", None)  # Google Drive is not asked
    return tmp_path / "data"


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, 7, 7)).save(buffer, format="JPEG")
    return buffer.getvalue()


def zipped(files: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files:
            archive.writestr(name, data)
    return buffer.getvalue()


def small_eurosat() -> list[tuple[str, bytes]]:
    return [(f"2750/{c}/{c}_{n}.jpg", picture(10 * i + n)) for i, c in enumerate(EUROSAT) for n in range(1, 11)]


def use(monkeypatch: pytest.MonkeyPatch, name: str, source: Source) -> None:
    monkeypatch.setattr(SETS[name], "source", source)


def prepared(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = prepare.main([*line])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_eurosat_from_address_to_counts(
    serve: Served, root: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    served = serve("EuroSAT.zip", zipped(small_eurosat()))
    file = File(served.address, {"2750": "2750"}, served.checksum)
    use(monkeypatch, "eurosat", Source([file], optional=SETS["eurosat"].source.optional))

    code, out, err = prepared(capsys, "eurosat", "--root", str(root), "--check")
    assert code == 2 and str(root / "eurosat") in err and f"python prepare.py eurosat --root {root}" in err

    code, out, err = prepared(capsys, "eurosat", "--root", str(root))
    assert code == 0, err
    assert out.endswith(f"run: DATA={root} bash scripts/air/main.sh eurosat\n")
    assert re.search(r"Annual Crop Land +5 +2 +3\n", out)  # CoOp's 50 %, 20 % and 30 %
    assert re.search(r"all +50 +20 +30\n", out)
    assert "split_zhou_EuroSAT.json" in out and "https://drive.google.com/file/d/" in out
    pictures = {path.relative_to(root / "eurosat").as_posix(): path.read_bytes() for path in root.rglob("*.jpg")}
    assert pictures == dict(small_eurosat())
    size = len(zipped(small_eurosat())) / 1e6
    assert out.splitlines()[0] == f"eurosat: EuroSAT.zip, {size:.1f} MB, from {served.address}, licence: see there"
    assert not list(root.glob(".eurosat*"))
    assert asked == ["/EuroSAT.zip"]

    assert prepared(capsys, "eurosat", "--root", str(root))[0] == 0
    assert asked == ["/EuroSAT.zip"]  # what is there is not fetched again

    (root / "eurosat/2750/River/River_4.jpg").unlink()
    code, out, err = prepared(capsys, "eurosat", "--root", str(root), "--check")
    assert code == 2 and "River_4.jpg" in err and err.count("\n") == 1


def test_a_wrong_checksum_lays_out_nothing(
    serve: Served, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    served = serve("EuroSAT.zip", zipped(small_eurosat()))
    use(monkeypatch, "eurosat", Source([File(served.address, {"2750": "2750"}, "md5:" + "0" * 32)]))
    code, _, err = prepared(capsys, "eurosat", "--root", str(root))
    assert code == 2 and served.checksum[4:] in err
    assert not (root / "eurosat").exists()


def test_a_file_that_is_gone(root: Path, serve: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    address = serve("other.zip", b"").address.replace("other", "gone")
    use(monkeypatch, "eurosat", Source([File(address, {"2750": "2750"})]))
    code, _, err = prepared(capsys, "eurosat", "--root", str(root))
    assert code == 2 and f"{address} answers 404" in err and str(root / ".downloads/eurosat/gone.zip") in err


def test_a_root_that_cannot_be_written_to(root: Path, capsys: pytest.CaptureFixture[str]):
    (root / ".downloads").write_text("a file where a folder should be")
    code, _, err = prepared(capsys, "dtd", "--root", str(root))
    assert code == 2 and err.startswith("error: cannot write to") and err.count("\n") == 1


def test_an_archive_that_was_fetched_by_hand_is_taken(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    use(monkeypatch, "eurosat", Source([File("https://nowhere.invalid/E.zip", {"2750": "2750"})]))
    (root / ".downloads/eurosat").mkdir(parents=True)
    (root / ".downloads/eurosat/E.zip").write_bytes(zipped(small_eurosat()))
    assert prepared(capsys, "eurosat", "--root", str(root))[0] == 0


def test_other_shapes_of_archives(tmp_path: Path):
    archive = tmp_path / "outer.zip"
    inner = zipped([("photos/a/1.jpg", b"1"), ("photos/lists/b.txt", b"2")])
    archive.write_bytes(zipped([("wrapped/inner.zip", inner), ("wrapped/readme.txt", b"3")]))
    file = File("http://x/outer.zip", {"photos/a": "images", "lists/b.txt": "b.txt"}, inner="inner.zip")
    lay_out(archive, file, tmp_path / "set")
    assert (tmp_path / "set/images/1.jpg").read_bytes() == b"1" and (tmp_path / "set/b.txt").read_bytes() == b"2"
    lay_out(archive, File("http://x/outer.zip", {"": "sub/plain.mat"}), tmp_path / "set")
    assert (tmp_path / "set/sub/plain.mat").read_bytes() == archive.read_bytes()
    (tmp_path / "set/b.txt").write_bytes(b"mine")
    lay_out(archive, file, tmp_path / "set")
    assert (tmp_path / "set/b.txt").read_bytes() == b"mine"  # what is there is left as it is
    with pytest.raises(UserError, match="holds no missing"):
        lay_out(archive, File("http://x/outer.zip", {"missing": "missing"}), tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outer.zip", "set"]


@pytest.mark.parametrize("name", ["imagenet", "stanford_cars"])
def test_what_has_no_address_is_told_and_where_it_goes(root: Path, name: str, capsys: pytest.CaptureFixture[str]):
    code, out, err = prepared(capsys, name, "--root", str(root))
    assert code == 2 and not err
    for item in SETS[name].source.needed:
        assert item.where in out and str(root / SETS[name].dataset_dir / item.puts) in out
    assert not list(root.iterdir())


def test_only_what_is_missing_is_told(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    items = [ByHand(f"part {name}", f"https://x/{name}", name) for name in ("one", "two")]
    use(monkeypatch, "ucf101", Source(needed=items))
    (root / "ucf101/one").mkdir(parents=True)
    code, out, _ = prepared(capsys, "ucf101", "--root", str(root))
    assert code == 2 and "part two" in out and "part one" not in out


def test_unknown_names_and_roots(root: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = prepared(capsys, "eurosatt", "--root", str(root))
    assert code == 2 and err == "error: unknown data set 'eurosatt'; did you mean eurosat?\n"
    code, _, err = prepared(capsys, "dtd", "--root", str(root / "gone away"))
    assert code == 2 and f"{root / 'gone away'} is missing" in err and f"mkdir -p '{root / 'gone away'}'" in err


def test_commands_can_be_pasted_whatever_the_root_is_called(root: Path, capsys: pytest.CaptureFixture[str]):
    spaced = root / "my data"
    spaced.mkdir()
    command = f"python prepare.py {{}} --root '{spaced}'"
    assert command.format("imagenet") in prepared(capsys, "imagenet", "--root", str(spaced))[1]
    for name in ("dtd", "digits"):
        assert command.format(name) in prepared(capsys, name, "--root", str(spaced), "--check")[2]


@pytest.mark.parametrize("name", GENERATED)
def test_digits(name: str, root: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = prepared(capsys, name, "--root", str(root), "--check")
    assert code == 2 and f"python prepare.py {name} " in err and not list(root.iterdir())
    code, out, _ = prepared(capsys, name, "--root", str(root))
    assert code == 0 and re.search(r"all +1000 +0 +797\n", out)
    assert [path.name for path in root.iterdir()] == [name]
    assert prepared(capsys, name, "--root", str(root), "--check")[0] == 0


def test_folder(root: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = prepared(capsys, "folder", "--root", str(root))
    assert code == 2 and "classes.txt is missing" in err
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "train").mkdir()
    (root / "train/1.jpg").write_bytes(picture(1))
    code, out, _ = prepared(capsys, "folder", "--root", str(root), "--check")
    assert code == 0 and "1 images in train/ have no label, and there is no test/" in out
    (root / "test/dog").mkdir(parents=True)
    (root / "test/dog/2.jpg").write_bytes(picture(2))
    code, out, _ = prepared(capsys, "folder", "--root", str(root), "--check")
    assert code == 0 and re.search(r"dog +0 +0 +1\n", out)


def test_what_a_paradigm_labels(root: Path, capsys: pytest.CaptureFixture[str]):
    prepared(capsys, "digits", "--root", str(root))
    code, out, _ = prepared(capsys, "digits", "--root", str(root), "--check", "--paradigm", "ssl")
    assert code == 0 and re.search(r"all +20 +0 +797\n980 unlabelled training images\n", out)
    assert out.endswith("bash scripts/air/main.sh digits DATASET.PARADIGM ssl\n")
    code, out, _ = prepared(capsys, "digits", "--root", str(root), "--check", "--paradigm", "trzsl")
    assert code == 0 and re.search(r"one +0 +0 +81\n", out) and re.search(r"all +601 +0 +797\n", out)
    assert "399 unlabelled training images of unseen classes: one, six, seven, eight\n" in out


# Data that a script fetches by itself


def zeroshot(name: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    places = {"DATA": str(root), "OUTPUT": str(root.parent / "out"), "SEEDS": "1", **environment}
    return script("scripts/zeroshot/main.sh", name, "mini", **places)


def test_a_script_fetches_what_is_missing_and_runs(
    serve: Served, root: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    served = serve("EuroSAT.zip", zipped(small_eurosat()))
    use(monkeypatch, "eurosat", Source([File(served.address, {"2750": "2750"}, served.checksum)], licence="MIT"))
    for name, environment in (("PREPARE", {"PREPARE": "0"}), ("AIR_OFFLINE", {"AIR_OFFLINE": "1"})):
        done = zeroshot("eurosat", root, **environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, name
        assert f"fetch it: python prepare.py eurosat --root {root}" in done.stderr
    assert asked == [] and not list(root.iterdir())

    done = zeroshot("eurosat", root)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert re.fullmatch(rf"eurosat: EuroSAT\.zip, \d\.\d MB, from {served.address}, licence: MIT", first)
    assert last == f"results: {root.parent / 'out' / 'eurosat'}" and "| ZeroshotCLIP" in done.stdout
    assert asked == ["/EuroSAT.zip"]

    again = zeroshot("eurosat", root, AIR_OFFLINE="1")
    assert again.returncode == 0 and again.stdout.startswith("1 of 1 runs was complete\n")
    assert asked == ["/EuroSAT.zip"]


def test_what_is_published_and_not_needed_is_not_fetched(
    serve: Served, root: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    files = [File("http://127.0.0.1:1/E.zip", {"2750": "2750", "more": "more"})]
    use(monkeypatch, "eurosat", Source(files, needed=[ByHand("a list", "https://x/list", "list.txt")]))
    for path, data in small_eurosat():
        (root / "eurosat" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "eurosat" / path).write_bytes(data)
    require_data("eurosat", [], root=root, display=Display())
    assert asked == []


def test_what_must_be_fetched_by_hand_is_said_before_anything_is_fetched(
    serve: Served, root: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    served = serve("EuroSAT.zip", zipped(small_eurosat()))
    items = [ByHand(f"the {part}", f"https://x/{part}", part) for part in ("lists", "frames")]
    use(monkeypatch, "eurosat", Source([File(served.address, {"2750": "2750"})], needed=items))
    done = zeroshot("eurosat", root)
    assert done.returncode == 2 and asked == []
    assert done.stderr == (
        "error: eurosat: the lists and 1 more must be fetched by hand; where from and where to: "
        f"python prepare.py eurosat --root {root}\n"
    )


def test_a_download_is_a_line_of_the_display(serve: Served, root: Path, monkeypatch: pytest.MonkeyPatch):
    served = serve("EuroSAT.zip", zipped(small_eurosat()))
    use(monkeypatch, "eurosat", Source([File(served.address, {"2750": "2750"}, served.checksum)]))
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(Display, "update", lambda self, name, event: events.append((name, event.stage)))
    with Display(console=console) as display:
        require_data("eurosat", [], root=root, display=display)
    assert [stage for name, stage in dict.fromkeys(events) if name == "eurosat"] == [
        "fetching EuroSAT.zip",
        "EuroSAT.zip",
        "unpacking EuroSAT.zip",
    ]
    assert f"eurosat: EuroSAT.zip, 0.1 MB, from {served.address}" in console.file.getvalue()


# What the data sets say of their sources


def test_the_names_of_generated_data_sets_are_their_folders():
    assert {name: SETS[name].dataset_dir for name in GENERATED} == {name: name for name in GENERATED}
    assert len(GENERATED) == 4 and len(FETCHED) == 13


@pytest.mark.parametrize("name", FETCHED)
def test_sources_are_whole(name: str):
    source = SETS[name].source
    assert source.files or source.needed
    for file in source.files:
        assert file.address.startswith(("https://", "http://")) and file.takes and "?" not in file.name
        assert re.fullmatch(r"(md5:[0-9a-f]{32})?", file.checksum)
        # An address that anybody on the way may change needs a checksum.
        assert file.checksum or file.address.startswith("https://")
    for item in (*source.needed, *source.optional):
        assert item.where.startswith("https://")
    targets = [target for file in source.files for target in file.takes.values()]
    targets += [item.puts for item in (*source.needed, *source.optional) if item.puts]
    assert len(set(targets)) == len(targets)


def test_checksums_and_addresses_are_torchvisions():
    from torchvision import datasets as tv

    known = {
        "food101": [(tv.Food101._URL, tv.Food101._MD5)],
        "dtd": [(tv.DTD._URL, tv.DTD._MD5)],
        "oxford_pets": list(tv.OxfordIIITPet._RESOURCES),
        "sun397": [(tv.SUN397._DATASET_URL, tv.SUN397._DATASET_MD5)],
        "fgvc_aircraft": [(tv.FGVCAircraft._URL, "")],
        "oxford_flowers": [
            (tv.Flowers102._download_url_prefix + file, md5) for file, md5 in tv.Flowers102._file_dict.values()
        ],
    }
    for name, files in known.items():
        ours = [(file.address, file.checksum.removeprefix("md5:")) for file in SETS[name].source.files]
        assert set(files) <= set(ours), name
