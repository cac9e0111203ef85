"""UCF101 (Soomro, Zamir and Shah 2012): actions, 101 classes; the middle frame of each of 13,320 videos."""

from __future__ import annotations

import re

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import DRIVE, ByHand, File, Source, split_by_zhou
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class UCF101(PublishedDataset):
    """Its own lists are the first of its three published splits, in ucfTrainTestlist/."""

    dataset_dir = "ucf101"
    template = "a photo of a person doing {}."  # CoOp's
    image_dir = "UCF-101-midframes"
    classes = 101
    split_file = "split_zhou_UCF101.json"
    sizes = {"zhou": (7_639, 1_898, 3_783), "elevater": (9_537, 0, 3_783)}
    covered = True
    source = Source(
        licence="none stated",
        files=[
            File(
                "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
                {"ucfTrainTestlist": "ucfTrainTestlist"},
            )
        ],
        needed=[
            ByHand(
                "the middle frames, by CoOp's authors: UCF-101-midframes.zip",
                DRIVE.format("10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"),
                "UCF-101-midframes",
            )
        ],
        optional=[split_by_zhou("UCF101", "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y")],
    )

    def zhou_split(self) -> Split:
        return self.held_out()

    def own_lists(self) -> Split:
        return {"train": self._items("trainlist01.txt"), "val": [], "test": self._items("testlist01.txt")}

    def _items(self, name: str) -> list[Item]:
        """From lines such as `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1`; test lists have no number."""
        rows = self.lines("ucfTrainTestlist/classInd.txt", fields=2)
        self.one_a_class([action for _, action in rows])
        labels = {action: int(number) - 1 for number, action in rows}
        items = []
        for (line,) in self.lines(f"ucfTrainTestlist/{name}", fields=1):
            action, video = line.split(" ")[0].split("/")
            folder = "_".join(re.findall("[A-Z][^A-Z]*", action))
            items.append((f"{folder}/{video.removesuffix('.avi')}.jpg", labels[action], folder))
        return items
