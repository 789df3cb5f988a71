"""Opacus' own layers: DPMultiheadAttention, DPRNN, DPGRU and DPLSTM; nn.LSTM and its like are refused."""

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests import oracle
from tests.helpers import F32, F64, assert_exact, assert_exact_or_refused, assert_refused, check_layer, mse

D, HEADS = 6, 2


class Attend(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.before = nn.Linear(D, D)
        self.att = DPMultiheadAttention(D, HEADS, **kw)

    def forward(self, x, memory):
        q = self.before(x)
        out, weights = self.att(q, memory[..., : self.att.kdim], memory[..., : self.att.vdim])
        return torch.cat([out.flatten(1), weights.flatten(1)], 1) if self.att.batch_first else out


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(bias=False), dict(kdim=9, vdim=4), dict(add_bias_kv=True), dict(add_zero_attn=True)],
    ids=["plain", "no bias", "kdim, vdim", "bias_kv", "zero_attn"],
)
def test_attention(options, dtype):
    check_layer(Attend(batch_first=True, **options), (torch.randn(4, 5, D), torch.randn(4, 7, 9)), dtype)


@pytest.mark.parametrize("options", [dict(), dict(add_bias_kv=True)], ids=["plain", "bias_kv"])
def test_attention_sequence_first(options):
    """``make_private(batch_first=False)``, as in Opacus."""
    inputs = (torch.randn(5, 4, D), torch.randn(7, 4, D))
    check_layer(Attend(batch_first=False, **options), inputs, F64, batch_first=False)


def test_sequence_first_attention_in_a_batch_first_model():
    class Turned(Attend):
        def forward(self, x, memory):
            return super().forward(x.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1)

    inputs = (torch.randn(4, 5, D, dtype=F64), torch.randn(4, 7, D, dtype=F64))
    model = Turned(batch_first=False).double()
    assert_exact_or_refused(model, inputs, torch.randn(4, 5, D, dtype=F64), mse, "att")


class Net(nn.Module):
    """A recurrent layer between two others; packed by length where lengths are given, in no order."""

    def __init__(self, cell, packed=False, last=False, **kw):
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.rnn = cell(4, 5, batch_first=True, **kw)
        self.after = nn.Linear(5 * (2 if kw.get("bidirectional") else 1), 2)
        self.packed, self.last = packed, last

    def forward(self, x, lengths):
        x, x_length = torch.tanh(self.before(x)), x.shape[1]
        if self.packed:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, hidden = self.rnn(x)
        if self.last:
            return (hidden[0] if isinstance(hidden, tuple) else hidden).transpose(0, 1)
        if self.packed:
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=x_length)
        return self.after(out)


SHAPES = {
    "plain": dict(),
    "no bias": dict(bias=False),
    "two layers": dict(num_layers=2),
    "both ways": dict(bidirectional=True),
    "two layers, both ways": dict(num_layers=2, bidirectional=True),
}
CELLS = pytest.mark.parametrize("cell", [DPRNN, DPGRU, DPLSTM])


@CELLS
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_recurrent(options, cell):
    check_layer(Net(cell, **options), (torch.randn(4, 3, 3), torch.full((4,), 3)), F64)


@CELLS
def test_recurrent_float32(cell):
    check_layer(Net(cell, num_layers=2), (torch.randn(4, 6, 3), torch.full((4,), 6)), F32)


@CELLS
@pytest.mark.parametrize("T", [1, 5])
def test_recurrent_last_state(cell, T):
    model = Net(cell, last=True)
    model.after.requires_grad_(False)
    check_layer(model, (torch.randn(5, T, 3), torch.full((5,), T)), F64)


PACKED = {f"{name}, in no order": (shape, [3, 1, 2, 4]) for name, shape in SHAPES.items()}
PACKED |= {f"{lengths}": (SHAPES["two layers, both ways"], lengths) for lengths in ([4, 4, 4, 4], [1, 1, 1, 1])}
# Samples are sorted around the cells: whatever is packed with one of them, and the most that can be with the others.
SORTED = [(name, DPLSTM) for name in PACKED] + [("two layers, both ways, in no order", cell) for cell in (DPRNN, DPGRU)]


@pytest.mark.parametrize(("packed", "cell"), SORTED)
def test_packed_sequences_in_any_order(packed, cell):
    """Inside the layer the samples are sorted by length; outside they are as the user gave them.

    PyTorch packs no empty batch, so there is none here.
    """
    options, lengths = PACKED[packed]
    inputs = (torch.randn(4, 4, 3), torch.tensor(lengths))
    check_layer(Net(cell, packed=True, **options), inputs, F64, empty=False)


def test_packed_norms_are_in_the_users_order():
    """Samples of very different size, in an order that sorting by length changes."""
    model = Net(DPLSTM, packed=True).double()
    lengths = torch.tensor([1, 5, 3, 6])
    target = torch.randn(4, 6, 2, dtype=F64) * torch.tensor([1000.0, 1.0, 100.0, 10.0], dtype=F64)[:, None, None]
    run = assert_exact(model, (torch.randn(4, 6, 3, dtype=F64), lengths), target, mse)
    assert run.norms.argsort(descending=True).tolist() == [0, 2, 3, 1]


def test_recurrent_sequence_first():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.after = DPLSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.after(self.rnn(x)[0])

    check_layer(First(), (torch.randn(6, 4, 3),), F64, batch_first=False)


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_all_clipped_and_none(bound):
    model = Net(DPGRU).double()
    inputs = (torch.randn(4, 6, 3, dtype=F64), torch.full((4,), 6))
    target = torch.randn(4, 6, 2, dtype=F64)
    run = assert_exact(model, inputs, target, mse, bound)
    assert oracle.batch_size(inputs) == len(run.norms)
    assert ((run.norms > bound) == (bound < 1)).all()


@pytest.mark.parametrize(("cell", "advice"), [(nn.LSTM, "DPLSTM"), (nn.GRU, "DPGRU")])
def test_pytorch_cells_are_refused_by_name(cell, advice):
    model = nn.ModuleDict({"inner": nn.ModuleDict({"cell": cell(3, 4)})})
    assert_refused(model, "inner.cell", advice)
