"""Several texts in one row, with positions that start anew at each text, and no attention from one to another."""

from __future__ import annotations

import bisect

import torch

from .errors import InputError


def pack(examples: list[dict], length: int) -> list[dict]:
    """Rows of at most `length` tokens that hold all examples of causal LM (best fit, longest first)."""
    rows: dict[int, list[list[dict]]] = {}  # by the room that is left
    rooms: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        size = len(example["input_ids"])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = [], length
        else:
            room = rooms[at]
            row = rows[room].pop()
            if not rows[room]:
                del rows[room], rooms[at]
        row.append(example)
        if room - size not in rows:
            bisect.insort(rooms, room - size)
        rows.setdefault(room - size, []).append(row)
    return [_joined(row) for room in rooms for row in rows[room]]


def _joined(texts: list[dict]) -> dict:
    return {
        "input_ids": [token for text in texts for token in text["input_ids"]],
        "labels": [label for text in texts for label in text["labels"]],  # the first of each text is ignored
        "position_ids": [position for text in texts for position in range(len(text["input_ids"]))],
    }


@torch.no_grad()
def check(model: torch.nn.Module, name: str) -> None:
    """Try on `model` whether two texts in a row give what each of them gives alone.

    transformers builds a block-diagonal mask from the positions for the models that support it, and nothing says which
    do. Two things are asked: other tokens in one text change no bit of the other, and positions count from its start.

    Raises:
        InputError: the model cannot keep packed texts apart.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, other, second = (torch.randint(vocabulary, (1, size), generator=generator) for size in (5, 5, 4))
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    was_training = model.training
    model.eval()
    try:
        device = model.device
        packed, changed = (
            model(
                input_ids=torch.cat([before, second], 1).to(device), position_ids=positions.to(device), use_cache=False
            ).logits[:, 5:]
            for before in (first, other)
        )
        alone = model(input_ids=second.to(device), use_cache=False).logits
    except (TypeError, ValueError) as error:
        raise InputError(f"--packing: {name} takes no positions ({str(error).splitlines()[0][:200]})") from None
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    apart = torch.equal(packed, changed)
    if not apart or (packed - alone).abs().max() > tolerance * alone.abs().max():
        raise InputError(f"--packing: {name} ({type(model).__name__}) cannot keep the texts of one row apart")
