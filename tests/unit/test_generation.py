import torch
from datasets import Dataset

from data.dataset import ROW
from models.generation import generate_batches


def rows(tiny, count):
    return Dataset.from_list(tiny.rows(count), features=ROW)


def replies(tiny, model, some, batch_size):
    batches = generate_batches(model, tiny.collator, some, batch_size, 0, torch.float32, 6)
    return [reply for batch, _ in batches for reply in batch]


def test_replies_do_not_depend_on_the_batch(tiny):
    model = tiny.model()
    some = rows(tiny, 7)
    assert replies(tiny, model, some, 1) == replies(tiny, model, some, 4)
    assert [reply.id for reply in replies(tiny, model, some, 3)] == some["id"]
