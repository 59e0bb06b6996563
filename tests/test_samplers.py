"""Batch samplers: what they give, to which rank, and that an interrupted epoch goes on exactly."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from simsearch.data import samplers
from simsearch.data.samplers import MinedTriplets, PKBatches, ResumableLoader, ShuffledBatches

LABELS = torch.tensor([0] * 9 + [1] * 8 + [2] * 7 + [3] * 2 + [4] * 6 + [7] * 8)  # 40 rows, 6 classes


class Rows(Dataset):
    """Gives a batch of positions as a tensor."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitems__(self, positions: list[int]) -> torch.Tensor:
        return torch.tensor(positions)


def collate(batch: torch.Tensor) -> torch.Tensor:
    return batch


def triplets(count: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    rows = []
    while len(rows) < count:
        q, p, n = random.integers(len(LABELS), size=3)
        if LABELS[q] == LABELS[p] != LABELS[n] and q != p:
            rows.append((q, p, n))
    return torch.tensor(rows)


def make(kind: str, batch: int = 6):
    if kind == "shuffled":
        return ShuffledBatches(LABELS, batch_size=batch, seed=3)
    if kind == "pk":
        return PKBatches(LABELS, classes=batch // 3, images=3, seed=3)
    sampler = MinedTriplets(LABELS, triplets=batch // 3, batches=5)
    sampler.set_triplets(triplets(sampler.wanted))
    return sampler


KINDS = ("shuffled", "pk", "mined")


def pretend(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (rank, world))


# ------------------------------------------------------------------------------ what a batch is


def test_shuffled_gives_each_row_once_in_another_order_each_epoch():
    sampler = ShuffledBatches(LABELS, batch_size=6, seed=3)
    first = list(sampler)
    assert [len(batch) for batch in first] == [6] * 6 + [4]
    assert len(sampler) == 7
    assert sorted(chain(*first)) == list(range(40))
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(chain(*second)) == list(range(40))
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ShuffledBatches(LABELS, batch_size=6, seed=4)) != first


def test_shuffled_drops_the_last_batch_where_asked():
    assert [len(batch) for batch in ShuffledBatches(LABELS, 6, drop_last=True)] == [6] * 6
    assert len(ShuffledBatches(LABELS, 6, drop_last=True)) == 6


def test_pk_batches_hold_p_classes_of_k_rows_together():
    sampler = PKBatches(LABELS, classes=3, images=4, seed=0)
    assert len(sampler) == len(list(sampler)) == 40 // 12
    seen = set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        for batch in sampler:
            labels = LABELS[batch].reshape(3, 4)
            assert (labels == labels[:, :1]).all()
            assert len(set(labels[:, 0].tolist())) == 3
            seen |= set(batch)
            for rows, label in zip(np.reshape(batch, (3, 4)), labels[:, 0].tolist(), strict=True):
                often = Counter(rows.tolist()).values()
                assert sorted(often) == ([2, 2] if label == 3 else [1, 1, 1, 1])  # class 3 has two rows
    assert seen == set(range(40))


def test_pk_draws_classes_evenly():
    sampler = PKBatches(LABELS, classes=2, images=2, seed=0)
    drawn = Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        drawn.update(int(LABELS[row]) for batch in sampler for row in batch[::2])
    shares = np.array(list(drawn.values())) / sum(drawn.values())
    np.testing.assert_allclose(shares, 1 / 6, atol=0.02)  # 6,000 draws: 4 standard deviations


def test_mined_gives_the_triplets_in_order():
    sampler = MinedTriplets(LABELS, triplets=2, batches=5)
    assert sampler.wanted == 10
    with pytest.raises(RuntimeError, match="mining callback"):
        list(sampler)
    rows = triplets(10)
    sampler.set_triplets(rows)
    assert not sampler.needs_triplets
    assert list(sampler) == rows.reshape(5, 6).tolist()
    sampler.set_epoch(1)
    assert sampler.needs_triplets
    with pytest.raises(RuntimeError, match="epoch 1"):
        list(sampler)


# ------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_batch_of_one_process(kind, monkeypatch):
    whole = make(kind, batch=12) if kind != "pk" else PKBatches(LABELS, classes=4, images=3, seed=3)
    parts = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        parts.append(list(make(kind, batch=6)))
    pretend(monkeypatch, 0, 1)
    together = [first + second for first, second in zip(*parts, strict=True)]
    if kind == "mined":  # its epoch grows with the ranks
        expected = triplets(20).reshape(5, 12).tolist()
    else:
        expected = list(whole)
    assert together == expected


@pytest.mark.parametrize(("batch", "world", "expected"), [
    (4, 3, [4, 4, 4]),  # 40 rows: 12, 12, 12, and 4 that would be 2, 1 and 1
    (6, 1, [6, 6, 6, 6, 6, 6, 4]),  # alone it has them all
    (13, 1, [13, 13, 14]),  # but none by itself, which has no variance
    (13, 3, [13]),
    (14, 3, [14]),  # where there is no other batch it is kept, as even as can be
    (40, 1, [40]),
])  # fmt: skip
def test_several_processes_that_learn_leave_out_a_batch_that_is_not_full(batch, world, expected, monkeypatch):
    pretend(monkeypatch, 0, world)
    sampler = ShuffledBatches(LABELS, batch_size=batch)
    sampler.whole = True
    assert [len(one) for one in sampler] == expected
    assert len(sampler) == len(expected)
    seen = set()
    for epoch in range(20):  # what one epoch leaves out others have
        sampler.set_epoch(epoch)
        for rank in range(world):
            seen.update(chain(*sampler.batches(rank, world)))
    assert seen == set(range(40))


def test_an_incomplete_last_batch_is_shared_or_left_out(monkeypatch):
    parts = []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        parts.append(list(ShuffledBatches(LABELS, batch_size=4)))
    assert [[len(b) for b in part] for part in parts] == [[4, 4, 4, 2], [4, 4, 4, 1], [4, 4, 4, 1]]
    assert sorted(chain(*chain(*parts))) == list(range(40))
    parts = []
    for rank in range(3):  # one row is left, not enough for three: it joins the batch before
        pretend(monkeypatch, rank, 3)
        parts.append(list(ShuffledBatches(LABELS, batch_size=13)))
        assert [len(b) for b in ShuffledBatches(LABELS, batch_size=13, drop_last=True)] == [13]
    assert [[len(b) for b in part] for part in parts] == [[14], [13], [13]]
    assert sorted(chain(*chain(*parts))) == list(range(40))


def test_rank_and_world_come_from_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    there = list(make("shuffled"))
    monkeypatch.undo()
    assert there == list(make("shuffled").batches(1, 2))
    assert there != list(make("shuffled"))


# ------------------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_after_every_batch(kind, workers, tmp_path):
    length = len(make(kind))
    loader = ResumableLoader(Rows(), make(kind), collate, workers)
    batches, states = [], []
    for epoch in range(2):
        if kind == "mined":
            loader.sampler.set_triplets(triplets(10, seed=epoch))
        for batch in loader:
            batches.append(batch.tolist())
            torch.save(loader.state_dict(), tmp_path / "state")
            states.append(torch.load(tmp_path / "state", weights_only=True))
    assert len(batches) == 2 * length
    for place in range(2 * length - 1) if workers == 0 else [1, length - 1, length]:
        fresh = MinedTriplets(LABELS, triplets=2, batches=5) if kind == "mined" else make(kind)
        other = ResumableLoader(Rows(), fresh, collate, 0)
        other.load_state_dict(states[place])
        assert len(other) == length
        if kind == "mined" and fresh.needs_triplets:
            assert states[place]["position"] == 0
            fresh.set_triplets(triplets(10, seed=1))
        rest = [batch.tolist() for batch in other]
        left = (length - 1 - place) % length or length
        assert rest == batches[place + 1 : place + 1 + left]


def test_set_epoch_keeps_the_place_in_the_present_epoch_only():
    sampler = make("shuffled")
    sampler.set_epoch(4)
    sampler.advance()
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.position) == (4, 1)
    sampler.set_epoch(5)
    assert (sampler.epoch, sampler.position) == (5, 0)


def test_another_number_of_processes_resumes_between_epochs_only(monkeypatch):
    pretend(monkeypatch, 0, 2)
    sampler = make("shuffled")
    start = sampler.state_dict()
    sampler.advance()
    middle = sampler.state_dict()
    pretend(monkeypatch, 0, 1)
    with pytest.raises(ValueError, match="2 processes and cannot continue with 1"):
        make("shuffled").load_state_dict(middle)
    make("shuffled").load_state_dict(start)


@pytest.mark.parametrize("labels", [torch.cat([LABELS, LABELS[-1:]]), LABELS.flip(0)], ids=["more rows", "others"])
def test_other_training_rows_do_not_go_on(labels):
    state = make("shuffled").state_dict()
    with pytest.raises(ValueError, match=r"the data have changed since .* it had 40 training rows"):
        ShuffledBatches(labels, batch_size=6, seed=3).load_state_dict(state)
    del state["rows"]  # as an earlier version wrote it
    ShuffledBatches(labels, batch_size=6, seed=3).load_state_dict(state)


def test_the_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    list(ResumableLoader(Rows(), make("shuffled"), collate))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == after


def test_a_sampler_serves_a_plain_loader_too():
    loader = DataLoader(Rows(), batch_sampler=make("pk"), collate_fn=collate)
    assert [b.tolist() for b in loader] == list(make("pk"))


class Learner(pl.LightningModule):
    """Writes down which rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.layer(batch[:, None].float()).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", batch.float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Miner(Callback):
    """Hands over other triplets each epoch."""

    def on_train_start(self, trainer, module):
        sampler = trainer.train_dataloader.sampler
        if sampler.needs_triplets:
            sampler.set_triplets(triplets(sampler.wanted, seed=sampler.epoch))

    on_train_epoch_start = on_train_start


class Saver(Callback):
    """Saves a checkpoint at every place where the trainer's own checkpointing may."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, when):
        trainer.save_checkpoint(self.folder / f"{when}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "epoch")


def fit(kind, workers, folder, resume=None):
    learner = Learner()
    sampler = MinedTriplets(LABELS, triplets=2, batches=3) if kind == "mined" else make(kind, batch=15)
    loader = ResumableLoader(Rows(), sampler, collate, workers)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[*([Miner()] if kind == "mined" else []), *([] if resume else [Saver(folder)])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    trainer.fit(learner, loader, DataLoader(torch.arange(4), batch_size=2), ckpt_path=resume, weights_only=True)
    return learner.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "workers"), [("shuffled", 0), ("mined", 0), ("mined", 1)])
def test_a_lightning_run_goes_on_from_every_checkpoint(kind, workers, tmp_path):
    whole = fit(kind, workers, tmp_path)
    per_epoch = len(whole) // 3
    assert [(e, i) for e, i, _ in whole] == [(e, i) for e in range(3) for i in range(per_epoch)]
    assert len({str(rows) for _, _, rows in whole}) == len(whole)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == len(whole) + 2 * 3
    for file in saved if workers == 0 else saved[::4]:
        step = int(file.stem.rpartition("-")[2])
        assert fit(kind, 0, tmp_path, resume=str(file)) == whole[step:], file.name


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ShuffledBatches(LABELS, 0), "batch_size=0"),
        (lambda: ShuffledBatches(LABELS[:0], 4), "N > 0"),
        (lambda: len(ShuffledBatches(LABELS, 64, drop_last=True)), "do not fill a batch of 64"),
        (lambda: PKBatches(LABELS, 1, 4), "two classes"),
        (lambda: PKBatches(LABELS, 4, 1), "two rows"),
        (lambda: PKBatches(LABELS - 1, 2, 2), "unknown labels"),
        (lambda: len(PKBatches(LABELS, 7, 2)), "use classes=6"),
        (lambda: len(PKBatches(LABELS, 6, 7)), "use fewer images"),
        (lambda: MinedTriplets(LABELS, 0, 1), "triplets=0"),
        (lambda: MinedTriplets(LABELS - 1, 2, 5), "unknown labels"),
        (lambda: MinedTriplets(LABELS, 2, 5).set_triplets(triplets(9)), r"\(10, 3\), got \(9, 3\)"),
        (lambda: MinedTriplets(LABELS, 1, 1).set_triplets(torch.tensor([[0, 1, 40]])), "0..39, got 0..40"),
        (lambda: MinedTriplets(LABELS, 1, 1).set_triplets(torch.tensor([[0, 1, 2]])), r"got \[0, 1, 2\]"),
        (lambda: MinedTriplets(LABELS, 1, 1).set_triplets(torch.tensor([[0, 20, 30]])), r"got \[0, 20, 30\]"),
        (lambda: MinedTriplets(LABELS, 1, 1).set_triplets(torch.tensor([[5, 5, 30]])), "another row"),
    ],
)
def test_wrong_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


HELD = """
import sys, torch
from simsearch.data.samplers import ResumableLoader, ShuffledBatches
class Rows(torch.utils.data.Dataset):
    def __getitem__(self, row):
        return row
    def __len__(self):
        return 40
loader = ResumableLoader(Rows(), ShuffledBatches(torch.zeros(40, dtype=torch.int64), 4), list, num_workers=1)
held = iter(loader)  # as a traceback holds it
next(held)
sys.modules["held"] = held
sys.exit(3)
"""


@pytest.mark.slow
def test_a_process_ends_though_its_loader_s_workers_are_deaf():
    done = subprocess.run([sys.executable, "-c", HELD], timeout=300, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "killed" not in done.stderr
