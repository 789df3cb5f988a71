"""Rows that are padded to the longest of their batch: found by comparing a few collated alone and together."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import dpfast
from dpfast.data.criterion import PerSampleCriterion
from tests.integrations.transformer_models import SMALL, model

D = 4


class OverTime(nn.Module):
    def __init__(self, masked):
        super().__init__()
        self.conv, self.head, self.masked = nn.Conv1d(D, 8, 3, padding=1), nn.Linear(8, 3), masked

    def forward(self, x, mask):
        h = self.conv(x.mT).tanh().mT
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if self.masked else h.mean(1))


ROWS = [(torch.randn(n, D, generator=torch.Generator().manual_seed(n)), n % 3) for n in (3, 7, 5, 9, 4)]


def padded(rows):
    x = pad_sequence([row for row, _ in rows], batch_first=True)
    mask = torch.stack([(torch.arange(x.shape[1]) < len(row)).float() for row, _ in rows])
    return {"x": x, "mask": mask, "labels": torch.tensor([label for _, label in rows])}


def loss(model, batch):
    return F.cross_entropy(model(batch["x"], batch["mask"]), batch["labels"])


def test_check_sensitivity_collates_anew():
    report = dpfast.check_sensitivity(OverTime(False), loss, ROWS, 0.1, collate_fn=padded)
    assert not report.ok
    assert "padding to the longest" in report.cause
    assert dpfast.check_sensitivity(OverTime(True), loss, ROWS, 0.1, collate_fn=padded).ok


def test_a_collate_function_that_draws_is_no_fault():
    def masking(rows):
        batch = padded(rows)
        return {**batch, "mask": batch["mask"] * torch.bernoulli(torch.full_like(batch["mask"], 0.8)).clamp_min(0.1)}

    report = dpfast.check_sensitivity(OverTime(True), loss, ROWS, 0.1, collate_fn=masking)
    assert "not tried" in report.proof


@pytest.mark.parametrize("masked", [True, False])
def test_lightning(masked):
    L = pytest.importorskip("lightning")
    from dpfast.integrations.lightning import DPCallback

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = OverTime(masked)

        def training_step(self, batch, batch_idx):
            value = loss(self.net, batch)
            self.log("loss", value)
            return value

        def forward(self, *args):
            return self.net(*args)

        def configure_optimizers(self):
            return self.privacy.make_private(self, torch.optim.SGD(self.parameters(), lr=0.1))

    class Called(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["x"], batch["mask"]), batch["labels"])

    net = Called()
    net.privacy = DPCallback(ROWS, batch_size=3, noise_multiplier=1.0, max_grad_norm=1.0, collate_fn=padded)
    trainer = L.Trainer(
        callbacks=[net.privacy], max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    if masked:
        trainer.fit(net, net.privacy.train_dataloader())
    else:
        with pytest.raises(ValueError, match="beside others than alone"):
            trainer.fit(net, net.privacy.train_dataloader())


@pytest.mark.parametrize("name", ["fnet", "bert"])
def test_trainer(name, tmp_path):
    """FNet transforms over all positions, padding included."""
    tr = pytest.importorskip("transformers")
    from dpfast.integrations.trainer import DPArguments, DPTrainer

    if name == "fnet":
        config = tr.FNetConfig(**{**SMALL, "num_labels": 3, "hidden_dropout_prob": 0.0})
        net = tr.FNetForSequenceClassification(config).train()
    else:
        net = model("bert")
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 50, (n,), generator=draw).tolist(), "labels": n % 3} for n in (3, 7, 5, 6)]

    def collate(rows):
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        mask = {} if name == "fnet" else {"attention_mask": (ids != 0).long()}
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows]), **mask}

    args = tr.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_steps=99
    )
    trainer = DPTrainer(net, args, train_dataset=rows, data_collator=collate, privacy=DPArguments(noise_multiplier=1.0))
    if name == "bert":
        trainer.train()
    else:
        with pytest.raises(ValueError, match="beside others than alone"):
            trainer.train()


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_class_weights():
    """A mean over the batch divides by the weights of all; without its reduction the criterion is exact."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))
    batch = torch.randn(12, D), torch.arange(12) % 3
    report = dpfast.check_sensitivity(Weighted(), criterion, batch, 0.1)
    assert not report.ok
    assert "criterion=" in report.cause and "nll_loss" in report.cause
    assert dpfast.check_sensitivity(Weighted(), PerSampleCriterion(criterion, "mean"), batch, 0.1).ok


class Rarely(Weighted):
    """In training only, and not under the seed that a check happens to have."""

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0) if self.training and torch.rand(1) < 0.3 else h)


def test_a_rare_branch_of_training_is_named():
    batch = torch.randn(6, D), torch.arange(6) % 3
    report = dpfast.check_sensitivity(Rarely().eval(), nn.CrossEntropyLoss(), batch, 0.1)
    assert not report.ok
    assert "aten.mean" in report.cause


class Drawing(Weighted):
    def forward(self, x):
        h = self.a(x)
        return self.b(F.dropout(h + 0.1 * torch.randn_like(h), 0.3, self.training))


def test_random_numbers_are_no_coupling():
    batch = torch.randn(6, D), torch.arange(6) % 3
    report = dpfast.check_sensitivity(Drawing(), nn.CrossEntropyLoss(), batch, 0.1)
    assert report.ok, str(report)
    assert "proved" in report.proof
