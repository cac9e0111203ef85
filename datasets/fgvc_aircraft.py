"""FGVC-Aircraft (Maji et al. 2013): 100 variants, 10,000 images."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import OXFORD, File, Source
from datasets.splits import PARTS, Split


@DATASET_REGISTRY.register()
class FGVCAircraft(PublishedDataset):
    """CoOp uses its own three lists."""

    dataset_dir = "fgvc_aircraft"
    template = "a photo of a {}, a type of aircraft."  # CoOp's
    classes = 100
    sizes = {"zhou": (3_334, 3_333, 3_333), "elevater": (6_667, 0, 3_333)}
    covered = True
    own_is_zhou = True
    grip = {}
    source = Source(
        licence="non-commercial research",
        files=[
            File(
                f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                {
                    f"data/{name}": name
                    for name in (
                        "images",
                        "variants.txt",
                        "families.txt",
                        "manufacturers.txt",
                        "images_variant_train.txt",
                        "images_variant_val.txt",
                        "images_variant_trainval.txt",
                        "images_variant_test.txt",
                    )
                },
            )
        ],
    )

    def own_lists(self) -> Split:
        names = self.one_a_class([name for (name,) in self.lines("variants.txt", fields=1)])
        labels = {name: label for label, name in enumerate(names)}
        return {
            part: [
                (f"{image}.jpg", labels[name], name)
                for image, name in self.lines(f"images_variant_{part}.txt", fields=2)
            ]
            for part in PARTS
        }

    def renamed(self, names: list[str], version: str) -> list[str]:
        names = super().renamed(names, version)
        return [name.replace("/", "-") for name in names] if version == "grip" else names
