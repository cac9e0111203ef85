"""Folders named after classes whose names no folder can have."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from air_plugin.utils.class_names import match_class
from air_plugin.utils.errors import UserError

pytestmark = pytest.mark.public_reports
NAMES = ["road/track", "TCP/IP cable", ".env file", "road"]


@pytest.mark.parametrize(
    ("folder", "index"),
    [
        ("road_track", 0),
        ("Road track", 0),
        ("roadtrack", 0),
        ("tcp_ip_cable", 1),
        ("env file", 2),
        ("road", 3),
        ("track", None),
    ],
)
def test_a_class_with_a_slash_or_a_leading_dot_has_a_folder(folder: str, index: int | None) -> None:
    """24: the folder of road/track is road_track or road track."""
    assert match_class(folder, NAMES) == index


def test_two_classes_that_differ_in_the_slash_alone_are_told_apart_by_an_exact_name() -> None:
    """24: where one of them has the name of the folder, it is that one's."""
    assert match_class("on off", ["on/off", "on off"]) == 1
    with pytest.raises(UserError, match="fits several classes"):
        match_class("on_off", ["on/off", "on off"])


def test_a_folder_in_a_folder_is_told_how_a_slash_is_written(tmp_path: Path) -> None:
    """24: test/road/track would be read as class road."""
    from datasets.folder import labelled_images

    (tmp_path / "TCP" / "IP cable").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "TCP" / "IP cable" / "1.png")
    with pytest.raises(UserError, match="an underscore or a space stands for the /"):
        labelled_images(tmp_path, NAMES)
    (tmp_path / "TCP" / "IP cable").rename(tmp_path / "TCP_IP cable")
    (tmp_path / "TCP").rmdir()
    assert labelled_images(tmp_path, NAMES) == [(tmp_path / "TCP_IP cable" / "1.png", 1)]
