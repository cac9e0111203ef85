"""Where a data set is fetched from: what is fetched by itself, and what a person must fetch by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DRIVE = "https://drive.google.com/file/d/{}/view"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


@dataclass(frozen=True)
class File:
    """A file at a public address.

    takes: path in the archive -> path in the data set's folder; a file that is no archive has the one path "".
    inner: an archive in the archive that holds these.
    checksum: as published (torchvision, torchgeo or the data set's own site); empty: none is.
    """

    address: str
    takes: Mapping[str, str]
    checksum: str = ""
    inner: str = ""

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]


@dataclass(frozen=True)
class ByHand:
    """What has no public address that a program may use, or lies on Google Drive, from where gdown fetches it.

    what: in words. where: the address for people. puts: path in the data set's folder. checksum: as of `File`.
    """

    what: str
    where: str
    puts: str
    checksum: str = ""

    @property
    def drive(self) -> str:
        """The file's name on Google Drive; empty where it lies elsewhere."""
        before, after = DRIVE.split("{}")
        return self.where[len(before) : -len(after)] if self.where.startswith(before) and self.puts else ""


@dataclass(frozen=True)
class Source:
    """All that belongs to a data set; paths are below its folder.

    files: fetched from public addresses. needed: by hand, the data set cannot be used without it. optional: by hand,
    `what` says what for. generated: the data set's class writes the images itself, on first use. licence: in words, as
    far as the authors state one.
    """

    files: Sequence[File] = ()
    needed: Sequence[ByHand] = ()
    optional: Sequence[ByHand] = ()
    generated: bool = False
    licence: str = ""


def split_by_zhou(name: str, drive: str) -> ByHand:
    """CoOp's split of a data set, which lies on Google Drive."""
    file = f"split_zhou_{name}.json"
    what = f"CoOp's own split (without it one of the same kind is made, seed 0): {file}"
    return ByHand(what, DRIVE.format(drive), file)


def split_of_elevater(name: str, ending: str) -> ByHand:
    """ELEVATER's lists, for DATASET.SPLIT_FAMILY elevater."""
    files = f"train.{ending}, val.{ending}, test.{ending}"
    where = "https://github.com/Computer-Vision-in-the-Wild/DataDownload"
    return ByHand(f"ELEVATER's lists of {name} (for DATASET.SPLIT_FAMILY elevater only): {files}", where, "")
