"""ImageNet (Deng et al. 2009), ILSVRC 2012: 1,000 classes."""

from __future__ import annotations

from collections import Counter

from dassl.data.datasets import DATASET_REGISTRY

from air_plugin.utils.image_files import warn_of_left_out
from datasets.class_folders import check_folders, images_in
from datasets.published import PublishedDataset
from datasets.sources import DRIVE, ByHand, Source
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class ImageNet(PublishedDataset):
    """The official val folder is the test part. CoOp uses it as val, too; here there is none to choose models by."""

    dataset_dir = "imagenet"
    template = "a photo of a {}."  # CoOp's
    classes = 1000
    sizes = {"zhou": (1_281_167, 0, 50_000), "elevater": (1_281_167, 0, 50_000)}
    own_is_zhou = True
    source = Source(
        licence="non-commercial research",
        needed=[
            *(
                ByHand(
                    f"ILSVRC 2012, a folder of images for each of 1,000 classes (n01440764 ...): {file}",
                    "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (an account is needed)",
                    path,
                )
                for file, path in (
                    ("ILSVRC2012_img_train.tar", "images/train"),
                    ("ILSVRC2012_img_val.tar", "images/val"),
                )
            ),
            ByHand(
                "the class names: classnames.txt", DRIVE.format("1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"), "classnames.txt"
            ),
        ],
    )

    def own_lists(self) -> Split:
        return {"train": self._items("train"), "val": [], "test": self._items("val")}

    def _items(self, part: str) -> list[Item]:
        """Labels in the order of classnames.txt, which is that of the folders: lines such as `n01440764 tench`."""
        rows = sorted(self.lines("classnames.txt", fields=2))
        self.one_a_class([name for _, name in rows])
        folder = self.need(f"images/{part}")
        check_folders(folder, [wnid for wnid, _ in rows], command=self.command)
        left_out = Counter[str]()
        items = [
            (f"{part}/{wnid}/{file}", label, name)
            for label, (wnid, name) in enumerate(rows)
            for file in images_in(folder / wnid, left_out)
        ]
        warn_of_left_out(folder, left_out, used=len(items))
        return items
