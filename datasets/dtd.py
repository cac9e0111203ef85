"""Describable Textures (Cimpoi et al. 2014): 47 classes of 120 images."""

from __future__ import annotations

from collections.abc import Sequence

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import OXFORD, File, Source, split_by_zhou
from datasets.splits import PARTS, Split


@DATASET_REGISTRY.register()
class DescribableTextures(PublishedDataset):
    """Its own lists are the first of its ten published splits, which ELEVATER takes, too."""

    dataset_dir = "dtd"
    template = "{} texture."  # CoOp's
    classes = 47
    split_file = "split_zhou_DescribableTextures.json"
    sizes = {"zhou": (2_820, 1_128, 1_692), "elevater": (3_760, 0, 1_880)}
    covered = True
    grip = {}
    source = Source(
        licence="for research",
        files=[
            File(
                f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",
                {name: name for name in ("images", "imdb", "labels")},
                "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
            )
        ],
        optional=[split_by_zhou("DescribableTextures", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x")],
    )

    def known_folders(self) -> Sequence[str]:
        """From lines such as `banded/banded_0002.jpg`."""
        rows = self.lines("labels/train1.txt", fields=1)  # it names images of every class
        return self.one_a_class(sorted({path.partition("/")[0] for (path,) in rows}))

    def own_lists(self) -> Split:
        labels = {folder: label for label, folder in enumerate(self.class_folders())}
        return {
            part: [
                (path, labels[folder], folder)
                for (path,) in self.lines(f"labels/{part}1.txt", fields=1)
                for folder in [path.partition("/")[0]]
            ]
            for part in PARTS
        }
