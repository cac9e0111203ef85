"""Oxford-IIIT Pets (Parkhi et al. 2012): 37 breeds, 7,349 images."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import OXFORD, File, Source, split_by_zhou
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class OxfordPets(PublishedDataset):
    """Lists in annotations/, of which list.txt names what the two others must have between them."""

    dataset_dir = "oxford_pets"
    template = "a photo of a {}, a type of pet."  # CoOp's
    classes = 37
    split_file = "split_zhou_OxfordPets.json"
    sizes = {"zhou": (2_944, 736, 3_669), "elevater": (3_680, 0, 3_669)}
    source = Source(
        licence="CC BY-SA 4.0",
        files=[
            File(f"{OXFORD}/pets/data/images.tar.gz", {"images": "images"}, "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c"),
            File(
                f"{OXFORD}/pets/data/annotations.tar.gz",
                {"annotations": "annotations"},
                "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
            ),
        ],
        optional=[split_by_zhou("OxfordPets", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs")],
    )

    def zhou_split(self) -> Split:
        return self.held_out()

    def own_lists(self) -> Split:
        split: Split = {"train": self._items("trainval.txt"), "val": [], "test": self._items("test.txt")}
        if (self.folder / "annotations" / "list.txt").is_file():
            every = [row for row in self.lines("annotations/list.txt", fields=1) if not row[0].startswith("#")]
            if len(every) != len(split["train"]) + len(split["test"]):
                raise ValueError(
                    f"{len(every)} lines, trainval.txt and test.txt together {len(split['train'])} + "
                    f"{len(split['test'])}"
                )
        return split

    def _items(self, name: str) -> list[Item]:
        """From lines such as `yorkshire_terrier_96 37 2 25`: image, class from 1, cat or dog, breed."""
        return [
            (f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower())
            for image, label, *_ in self.lines(f"annotations/{name}", fields=4)
        ]
