"""FeatureBatches: what a training epoch sees."""

from __future__ import annotations

import torch

from air_plugin.clip.features import FeatureBatches, FeatureTable

TABLE = FeatureTable(torch.arange(10 * 4 * 2, dtype=torch.float32).reshape(10, 4, 2))


def batches(size: int, *, count: int = 10, seed: int = 1, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    index = torch.arange(count)
    made = FeatureBatches(TABLE, index, {"target": index.clone()}, batch_size=size, seed=seed, epoch=lambda: epoch)
    found = list(made)
    assert len(found) == len(made)
    return found


def test_the_last_smaller_batch_is_left_out_unless_it_is_the_only_one() -> None:
    assert [len(batch["img"]) for batch in batches(4)] == [4, 4]
    assert [len(batch["img"]) for batch in batches(32, count=3)] == [3]


def test_every_image_comes_once_with_its_own_target_and_two_augmented_views() -> None:
    seen = []
    for batch in batches(5):
        for first, second, target in zip(batch["img"], batch["img2"], batch["target"].tolist(), strict=True):
            views = TABLE.features[target]
            where = [int((views == row).all(dim=1).nonzero()) for row in (first, second)]
            assert 0 not in where and where[0] != where[1]
            seen.append(target)
    assert sorted(seen) == list(range(10))


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    def order(**which: int) -> list[int]:
        torch.randint(100, (1,))  # the global generator has no influence
        return torch.cat([batch["target"] for batch in batches(5, **which)]).tolist()

    assert order(seed=1, epoch=3) == order(seed=1, epoch=3)
    assert order(seed=1, epoch=3) != order(seed=1, epoch=4)
    assert order(seed=1, epoch=3) != order(seed=2, epoch=3)


def test_the_members_of_an_ensemble_have_orders_of_their_own_and_the_first_the_usual_one() -> None:
    index = torch.arange(10)
    targets = {"target": index.clone(), "weights": 2.0 * index}
    made = FeatureBatches(TABLE, index, targets, batch_size=5, seed=1, epoch=lambda: 0, members=3)
    found = list(made)
    assert len(found) == len(made) == 2 and len(found[0]["img"]) == 15
    assert all(torch.equal(batch["weights"], 2.0 * batch["target"]) for batch in found)
    orders = [torch.cat([batch["target"][5 * m : 5 * m + 5] for batch in found]).tolist() for m in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] == torch.cat([batch["target"] for batch in batches(5)]).tolist()
    assert orders[0] != orders[1] != orders[2] != orders[0]
