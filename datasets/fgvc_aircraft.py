"""FGVC-Aircraft (Maji et al. 2013): 100 variants, 10,000 images."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.base import PARTS, PublishedDataset, Split


@DATASET_REGISTRY.register()
class FGVCAircraft(PublishedDataset):
    """CoOp uses its own three lists."""

    dataset_dir = "fgvc_aircraft"
    classes = 100
    sizes = {"zhou": (3_334, 3_333, 3_333), "elevater": (6_667, 0, 3_333)}
    covered = True
    own_is_zhou = True
    grip = {}

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

    def worded(self, names: list[str], wording: str) -> list[str]:
        names = super().worded(names, wording)
        return [name.replace("/", "-") for name in names] if wording == "grip" else names
