"""The order of examples, their share among processes, and how they become tensors."""

import itertools

import pytest
import torch
from peftops.cli import batches
from peftops.cli.batches import BLANK, IGNORED


@pytest.mark.parametrize("count", [1, 15, 16, 500, 503])
def test_batches_visit_every_example_once_and_waste_little(count):
    lengths = torch.randint(4, 65, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = batches.LengthGroupedSampler(lengths, 16, seed=5)
    order = list(sampler)
    assert sorted(order) == list(range(count)) and len(sampler) == count
    assert list(sampler) == order  # the global generators have no say
    sampler.set_epoch(1)
    assert count <= 16 or list(sampler) != order

    def padded(indices):
        return sum(max(lengths[i] for i in indices[s : s + 16]) * len(indices[s : s + 16]) for s in range(0, count, 16))

    if count >= 500:
        assert padded(order) / sum(lengths) < 1.2 < 1.7 < padded(list(range(count))) / sum(lengths)


@pytest.mark.parametrize("count", [1, 3, 8, 13, 17])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_every_batch_and_make_the_same_steps(count, processes):
    lengths = list(range(5, 5 + count))
    order = batches.LengthGroupedSampler(lengths, 2 * processes, seed=0)
    shares = [list(batches.RankBatches(order, 2, rank, processes)) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(batches.RankBatches(order, 2, 0, processes))}
    whole = list(batches.RankBatches(batches.LengthGroupedSampler(lengths, 2 * processes, seed=0), 2 * processes, 0, 1))
    for together, *parts in zip(whole, *shares, strict=True):
        assert sorted(i for i in itertools.chain(*parts) if i != BLANK) == sorted(together)
        assert all(len(part) <= 2 for part in parts)


def test_a_blank_row_teaches_nothing():
    causal = batches.TrainingSet([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    assert causal[BLANK] == {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3} and len(causal) == 1
    assert batches.TrainingSet([{"input_ids": [1], "label": 1}])[BLANK] == {"input_ids": [1], "label": IGNORED}


def test_collator_pads_to_the_longest_and_masks_by_length():
    # The end-of-text token doubles as padding here: where it ends a text it is learned.
    examples = [{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}, {"input_ids": [7], "labels": [-100]}]
    collator = batches.Collator(pad_id=0)
    batch = collator(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 0], [-100, -100, -100]]
    assert collator.counted(examples)["tokens"] == 4
    labelled = [{"input_ids": example["input_ids"], "label": i} for i, example in enumerate(examples)]
    assert collator(labelled)["labels"].tolist() == [0, 1]


def test_packed_rows_have_positions_and_no_mask():
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]},
    ]
    batch = batches.Collator(pad_id=9)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert batch["labels"].tolist()[1] == [-100, 6, -100, -100]
