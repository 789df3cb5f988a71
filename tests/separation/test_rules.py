"""Each rule of the proof is held against trying its operator alone, on random numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpfast.separation import trial
from dpfast.separation.labels import Labels, Lost, Met, Rows
from dpfast.separation.proof import Proof

B, T, D = 4, 6, 8

# By name: a function of [B, T, D] numbers, and of [B, T] integers.
FUNCTIONS = {
    "add": lambda x, i: x + x.mean(1, keepdim=True),
    "softmax": lambda x, i: torch.softmax(x, 1),
    "softmax over samples": lambda x, i: torch.softmax(x, 0),
    "sum": lambda x, i: x.sum((0, 2)),
    "amax": lambda x, i: x.amax(1),
    "cumsum": lambda x, i: x.cumsum(1),
    "flip": lambda x, i: x.flip(0),
    "matmul": lambda x, i: x @ x.mT,
    "matmul over samples": lambda x, i: x.permute(1, 0, 2) @ x.permute(1, 2, 0),
    "mm": lambda x, i: x.reshape(B * T, D) @ torch.ones(D, 3),
    "einsum": lambda x, i: torch.einsum("btd,bsd->bts", x, x),
    "conv1d": lambda x, i: F.conv1d(x, torch.ones(3, T, 3)),
    "conv1d, samples as positions": lambda x, i: F.conv1d(x.permute(1, 2, 0), torch.ones(3, D, 2)),
    "layer norm": lambda x, i: F.layer_norm(x, (D,)),
    "layer norm over all": lambda x, i: F.layer_norm(x, (B, T, D)),
    "group norm": lambda x, i: F.group_norm(x, 2),
    "batch norm": lambda x, i: F.batch_norm(x, None, None, training=True),
    "instance norm": lambda x, i: F.instance_norm(x),
    "pool": lambda x, i: F.avg_pool1d(x, 2),
    "pool over samples": lambda x, i: F.max_pool1d(x.permute(1, 2, 0), 2),
    "transposed": lambda x, i: x.transpose(0, 1).reshape(B * T, D).tanh().view(T, B, D),
    "roll": lambda x, i: x.roll(1, 1),
    "roll over all": lambda x, i: x.roll(1),
    "repeat": lambda x, i: x.repeat(2, 1, 1),
    "repeat_interleave": lambda x, i: x.repeat_interleave(3, 0),
    "gather": lambda x, i: x.gather(2, (i % D)[..., None]),
    "gather over samples": lambda x, i: x.gather(0, (i % B)[..., None]),
    "index": lambda x, i: x[torch.arange(B), 2],
    "index over samples": lambda x, i: x[torch.arange(B).flip(0)],
    "cat": lambda x, i: torch.cat([x, x[:, :2]], 1),
    "stack": lambda x, i: torch.stack([x, 2 * x]),
    "unbind": lambda x, i: torch.stack([row.cumsum(0) for row in x.unbind(0)]),
    "shifted": lambda x, i: torch.cat([x[1:], x[:1]]),
    "pad": lambda x, i: F.pad(x, (1, 1)),
    "norm": lambda x, i: x / x.norm(),
    "norm of each": lambda x, i: x / x.flatten(1).norm(dim=1)[:, None, None],
    "sort": lambda x, i: x.sort(1).values,
    "sort over samples": lambda x, i: x.sort(0).values,
    "topk": lambda x, i: x.topk(2, -1).values,
    "cdist": lambda x, i: torch.cdist(x, x),
    "cdist over samples": lambda x, i: torch.cdist(x[:, 0], x[:, 0]),
    "scatter": lambda x, i: torch.zeros(B, T, D).scatter(2, (i % D)[..., None], x[..., :1]),
    "embedding": lambda x, i: F.embedding(i % 5, torch.arange(15.0).view(5, 3)) + x[..., :3],
    "attention": lambda x, i: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "attention over samples": lambda x, i: F.scaled_dot_product_attention(*[x.transpose(0, 1)[None]] * 3),
    "fft": lambda x, i: torch.fft.rfft(x, dim=1).abs(),
    "inverse": lambda x, i: torch.linalg.inv(x[:, :, :T] + 9 * torch.eye(T)),
    "unfold": lambda x, i: x.unfold(1, 2, 1).sum(-1),
    "written in place": lambda x, i: torch.zeros(B, T, D).index_copy(1, torch.arange(T), x).mul_(2),
    "masked": lambda x, i: x.masked_fill(x > 0, 0.0),
    "where": lambda x, i: torch.where(x > 0, x, x.sum()),
    "glu": lambda x, i: F.glu(x, -1),
    "variance": lambda x, i: x.var((0, 1)),
    "pixels": lambda x, i: F.pixel_shuffle(x.view(B, T, 2, 4).repeat(1, 2, 1, 1)[:, :8], 2),
    "interpolated": lambda x, i: F.interpolate(x, scale_factor=2, mode="linear"),
    "cross entropy": lambda x, i: F.cross_entropy(x.mT, i % D, reduction="none"),
    "bce": lambda x, i: F.binary_cross_entropy_with_logits(x, torch.sigmoid(x), reduction="none"),
}
REORDERED = {"flip", "roll over all", "gather over samples"}  # each place is of one sample, of another one than before


def owners_seen(function, x, ids):
    """``[elements, B]``: which samples an element of the result changes with."""
    whole = function(x, ids)
    seen = []
    for sample in range(B):
        changed = torch.zeros(whole.shape, dtype=torch.bool)
        for seed in range(3):
            other = x.clone()
            other[sample] = torch.randn(T, D, generator=torch.Generator().manual_seed(100 * sample + seed)) * 3
            changed |= (function(other, ids) - whole).abs() > 1e-6
        seen.append(changed.flatten())
    return torch.stack(seen, 1), whole


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_says_what_values_show(name):
    """No element depends on a sample that its label leaves out; where one depends on two, the label says so."""
    x, ids = torch.randn(B, T, D), torch.randint(0, 40, (B, T))
    proof = Proof(torch.nn.Identity(), B)
    for given in (x, ids):
        proof.labels[given] = proof.labels.in_order(0, B)
    with proof.following():
        result = FUNCTIONS[name](x, ids)
    label = proof.labels[result]
    seen, whole = owners_seen(FUNCTIONS[name], x, ids)
    if bool((seen.sum(1) > 1).any()):
        assert isinstance(label, Met), label
        return
    if name in REORDERED:
        assert not isinstance(label, Rows)
        return
    assert isinstance(label, Rows), f"{name}: {label}, though no two samples meet"
    shape = [-1 if d == label.dim else 1 for d in range(whole.dim())]
    owner = torch.from_numpy(np.broadcast_to(label.owners.each.reshape(shape), whole.shape).copy()).flatten()
    strangers = seen & (torch.arange(B)[None] != owner[:, None])
    assert not bool(strangers.any())


def test_an_operator_without_a_rule_is_tried_alone():
    """One that keeps rows apart, and one that does not."""
    labels = Labels(B)
    x = torch.randn(B, T)
    labels[x] = rows = labels.in_order(0, B)
    (label,) = trial.tried_alone(labels, rows, torch.ops.aten.special_bessel_j0.default, (x,), {})
    assert label == rows
    assert trial.tried_alone(labels, rows, torch.ops.aten.cumsum.default, (x, 0), {}) is None


def test_views_of_memory():
    labels = Labels(B)
    x = torch.randn(B, T, D)
    labels[x] = labels.in_order(0, B)
    assert labels[x.transpose(0, 1)].dim == 1
    assert labels[x.view(B * T, D)] == labels.in_order(0, B * T)
    assert labels[x[2]].owners.each.tolist() == [2]
    assert labels[x[:, 1]] == labels.in_order(0, B)
    assert labels[x[::2]].owners.each.tolist() == [0, 2]
    assert isinstance(labels[x.view(2, B // 2, T, D)], Lost)
    assert labels[torch.view_as_complex(x.view(B, T, D // 2, 2))] == labels.in_order(0, B)
    assert labels[x[:0]] is None
