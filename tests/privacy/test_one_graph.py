"""One graph at a time: nodes are not samples. Refused in these words; a batch of one graph is exact."""

import pytest
import torch
from torch import nn

from tests.helpers import F64, make_private
from tests.privacy.judging import TIGHT, examine, refuse

N, D = 6, 3
RING = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
LAST_ALONE = RING[:, :4]
CHORDS = torch.cat([RING, RING[:, :3].flip(0)], 1)


class GraphNet(nn.Module):
    def __init__(self, pooled=False):
        super().__init__()
        self.pooled, self.a, self.b = pooled, nn.Linear(D, 5), nn.Linear(5, 2)

    def spread(self, h, edges):
        source, target = edges if len(edges) == 2 else edges.T
        return h + torch.zeros_like(h).index_add(-2, target, h.index_select(-2, source))

    def forward(self, x, edge_index):
        h = self.b(torch.relu(self.spread(self.a(x), edge_index)))
        return h.mean(-2, keepdim=True) if self.pooled else h


class Dense(GraphNet):
    def spread(self, h, adjacency):
        return adjacency @ h

    def forward(self, x, adjacency):
        return super().forward(x, adjacency)


def mean_square(output, target):
    return (output - target).square().mean()


def adjacency(edges):
    matrix = torch.eye(N, dtype=F64)
    matrix[edges[0], edges[1]] = 1
    return matrix


@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["batch", "alone"])
@pytest.mark.parametrize(
    "model, edges",
    [
        (GraphNet, RING),
        (GraphNet, LAST_ALONE),
        (GraphNet, CHORDS),
        (GraphNet, CHORDS.T.contiguous()),
        (lambda: GraphNet(pooled=True), CHORDS),
        (Dense, adjacency(CHORDS)),
    ],
    ids=["ring", "last alone", "chords", "pairs", "pooled", "adjacency"],
)
def test_nodes_are_no_samples(model, edges, kw):
    model = model().double()
    x, y = torch.randn(N, D, dtype=F64), torch.randn(1 if model.pooled else N, 2, dtype=F64)
    words = r"features of shape \[6, 3\] beside (edge|an adj).*not samples.*x\[None\]"
    if kw and edges.is_floating_point():
        words = "max_physical_batch_size=1"  # [6, 3] beside [6, 6] may be two inputs of six samples
    refuse(model, (x, edges), y, mean_square, words, **kw)


@pytest.mark.parametrize("graphs", [1, 3])
@pytest.mark.parametrize("pooled", [False, True], ids=["nodes", "pooled"])
def test_a_batch_of_one_graph_is_exact(graphs, pooled):
    """And of several with the same edges."""
    x = torch.randn(graphs, N, D, dtype=F64)
    y = torch.randn(graphs, 1 if pooled else N, 2, dtype=F64)
    examine(GraphNet(pooled), (x,), y, mean_square, lambda model, x: model(x, CHORDS))


def test_a_batch_of_one_graph_with_an_adjacency_matrix():
    x, y = torch.randn(1, N, D, dtype=F64), torch.randn(1, N, 2, dtype=F64)
    examine(Dense(), (x, adjacency(CHORDS)[None]), y, mean_square)


class Sensors(nn.Module):
    """A sample is a row of one number a node; all samples share the graph."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(N, 2)

    def forward(self, x, edge_index):
        return self.a(x + torch.zeros_like(x).index_add(1, edge_index[1], x[:, edge_index[0]]))


class Pairs(nn.Module):
    """Two samples, each a row of features and a row of ids: no graph."""

    def __init__(self):
        super().__init__()
        self.words, self.a = nn.Embedding(9, D), nn.Linear(D, 2)

    def forward(self, x, edges):
        return self.a(x + self.words(edges).mean(1))


@pytest.mark.parametrize("batch", [4, 16])
def test_samples_that_share_a_graph_train(batch):
    x, y = torch.randn(batch, N, dtype=F64), torch.randn(batch, 2, dtype=F64)
    examine(Sensors(), (x,), y, mean_square, lambda model, x: model(x, CHORDS))


def test_two_samples_with_ids_train():
    wrapped, _, _ = make_private(Pairs().double(), max_grad_norm=TIGHT)
    wrapped(torch.randn(2, D, dtype=F64), torch.randint(9, (2, 8))).sum().backward()
    assert wrapped.per_sample_gradient_norms.shape == (2,)
