"""Slots are used again, but never while anything still looks at them."""

import gc
import pickle

import pytest
import torch

from illume_lightning.data.loader import BatchLoader, ImageBatch, batch_shape
from illume_lightning.data.plan import PlanItem
from illume_lightning.data.slots import SharedSlots


class Numbered:
    """Pictures filled with their record's number."""

    writes_images = True

    def read(self, items, images=None):
        if images is None:
            images = torch.empty(batch_shape(items), dtype=torch.uint8)
        for image, item in zip(images, items, strict=True):
            image.fill_(item.index)
        numbers = torch.tensor([[item.dataset, item.index, item.sample_number] for item in items])
        return ImageBatch(images, ["a"] * len(items), ["{}"] * len(items), *numbers.unbind(dim=1))


def batches(count, side=16):
    return [
        [PlanItem(0, 2 * n + i, (side, side), 2 * n + i, stretch=False) for i in range(2)]
        for n in range(count)
    ]


BATCH_BYTES = 2 * 3 * 16 * 16


def test_a_slot_is_free_when_the_last_view_is_gone():
    slots = SharedSlots(1, 12)
    slot = slots.take(12)
    slots.tensor(slot, (3, 4))[:] = 7
    assert slots.take(1) is None
    arrived = pickle.loads(pickle.dumps(slots.hand_over(slot, (3, 4))))
    view = arrived[1:, 2].flatten()
    del arrived
    gc.collect()
    assert slots.take(1) is None
    assert view.tolist() == [7, 7]
    del view
    gc.collect()
    assert slots.take(1) == slot


def test_more_than_a_slot_holds_gets_none():
    assert SharedSlots(2, 12).take(13) is None


@pytest.mark.parametrize("max_bytes", [BATCH_BYTES, BATCH_BYTES - 1], ids=["slots", "too small"])
def test_a_reader_that_keeps_every_batch_sees_each_unchanged(max_bytes):
    loader = BatchLoader(Numbered(), batches(40), max_bytes, num_workers=2, prefetch=2)
    for kept in (list(loader), list(loader)):
        assert [batch.index.tolist() for batch in kept] == [[2 * n, 2 * n + 1] for n in range(40)]
        for batch in kept:
            assert torch.equal(
                batch.images, batch.index.to(torch.uint8)[:, None, None, None].expand(batch.images.shape)
            )


def test_memory_does_not_grow_with_the_number_of_batches():
    loader = BatchLoader(Numbered(), batches(60), BATCH_BYTES, num_workers=2, prefetch=2)
    places = {batch.images.data_ptr() for batch in loader}
    assert 2 <= len(places) <= 7


def test_an_abandoned_pass_takes_nothing_from_the_next():
    loader = BatchLoader(Numbered(), batches(60), BATCH_BYTES, num_workers=2, prefetch=2)
    for _ in range(3):
        next(iter(loader))
    assert len({batch.images.data_ptr() for batch in loader}) <= 7
