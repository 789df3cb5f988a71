"""``dpfast.register_layer``: layers of somebody else's package, served by their own rules."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast
from dpfast.model.forwards import GenericForward
from dpfast.model.sampled_forward import SampledForward
from dpfast.refusals import LayoutError, RuleError
from tests.helpers import (
    BF16,
    F32,
    F64,
    assert_exact,
    assert_exact_or_refused,
    check_layer,
    make_private,
    mse,
    run_fused,
    sse,
    sums_of,
)


class Mine(nn.Module):
    """A linear layer of another package."""

    def __init__(self, d=4, p=3, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(p, d))
        self.bias = nn.Parameter(torch.randn(p)) if bias else None

    def forward(self, x):
        y = x @ self.weight.t()
        return y if self.bias is None else y + self.bias


def positions(G):
    return G.reshape(len(G), -1, G.shape[-1]).sum(1)


def mine(module, activations, G):
    out = {module.weight: dpfast.Product(activations[0], G)}
    return out if module.bias is None else out | {module.bias: positions(G)}


def written(module, activations, G):
    """The same, written out."""
    A = activations[0].reshape(len(G), -1, activations[0].shape[-1])
    return {module.weight: torch.einsum("btp,btd->bpd", G.flatten(1, -2) if G.dim() > 2 else G[:, None], A)} | (
        {} if module.bias is None else {module.bias: positions(G)}
    )


class Gate(nn.Module):
    """Its gradient depends on its parameters, on two inputs, and on what is in a list."""

    def __init__(self, d=3):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(d))
        self.rest = nn.ParameterList([torch.randn(d)])
        self.register_buffer("temperature", torch.tensor(0.7))

    def forward(self, x, other=None):
        gate = torch.tanh(self.scale * self.temperature * x) * self.rest[0]
        return gate if other is None else gate * other


def gate(module, activations, G):
    x, *other = activations
    G = G * other[0] if other else G
    inner = torch.tanh(module.scale * module.temperature * x)
    return {
        module.scale: positions(G * module.rest[0] * (1 - inner**2) * module.temperature * x),
        module.rest[0]: positions(G * inner),
    }


class Table(nn.Module):
    def __init__(self, rows=7, d=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, d))

    def forward(self, ids):
        return self.weight[ids]


def table(module, activations, G):
    return {module.weight: dpfast.Product(activations[0], G)}


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    handles = [dpfast.register_layer(*pair) for pair in ((Mine, mine), (Gate, gate), (Table, table))]
    yield
    for handle in handles:
        handle.remove()


def served(model):
    return {name for name, m in model.named_modules() if isinstance(vars(m).get("forward"), SampledForward)}


@pytest.mark.parametrize(
    ("rule", "shape", "dtype"),
    [
        (mine, (5, 4), F64),
        (mine, (3, 2, 3, 4), F64),
        (mine, (4, 5, 4), F32),
        (mine, (4, 5, 4), BF16),
        (written, (4, 5, 4), F64),
        (written, (5, 4), F32),
    ],
    ids=str,
)
def test_a_product(rule, shape, dtype):
    narrow = {} if dtype != BF16 else dict(loss=sse, loss_reduction="sum")
    with dpfast.register_layer(Mine, rule):
        check_layer(nn.Sequential(Mine(), nn.Tanh(), Mine(3, 2, bias=False)), (torch.randn(shape),), dtype, **narrow)


@pytest.mark.parametrize(("shape", "dtype"), [((4, 3), F32), ((4, 2, 3), F64)], ids=str)
def test_what_a_rule_reads_of_the_layer(shape, dtype):
    check_layer(nn.Sequential(Gate(), nn.Linear(3, 2)), (torch.randn(shape),), dtype)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.head = Gate(), nn.Linear(3, 2)

    def forward(self, x, y):
        return self.head(self.gate(x, other=y))


def test_keyword_arguments():
    check_layer(Two(), (torch.randn(5, 4, 3), torch.randn(5, 4, 3)), F64)


class Language(nn.Module):
    """A table that is tied to the head, one of them registered, and used twice."""

    def __init__(self, first, second):
        super().__init__()
        self.table, self.head = first, second
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids) + self.table(ids.flip(1)).tanh())


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Table(), nn.Linear(4, 7, bias=False)),
        lambda: (nn.Embedding(7, 4), Mine(4, 7, bias=False)),
        lambda: (Table(), Mine(4, 7, bias=False)),
    ],
    ids=["table", "head", "both"],
)
def test_tied_and_used_again(make):
    check_layer(Language(*make()), (torch.randint(7, (3, 5)),), F64)


class Flat(nn.Module):
    """Calls the layer on ``[B·T, d]``, and once on a row that all samples share."""

    def __init__(self):
        super().__init__()
        self.inner, self.places, self.head = Mine(4, 4), Table(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        B, T, d = x.shape
        places = self.places(torch.arange(T).unsqueeze(0))
        return self.head(self.inner((x + places).reshape(B * T, d)).reshape(B, T, d).tanh())


@pytest.mark.parametrize("rule", [mine, written], ids=lambda rule: rule.__name__)
def test_rows_of_several_positions_and_shared_ones(rule):
    with dpfast.register_layer(Mine, rule):
        check_layer(Flat(), (torch.randn(4, 5, 4),), F64)


class Second(nn.Module):
    """Ids and layers with the batch second, and a head that sees no positions any more."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = Table(), Mine(), Mine(3, 2)

    def forward(self, ids):
        return self.head(self.inner(self.table(ids)).tanh().mean(0)).unsqueeze(0)


def test_the_batch_second():
    check_layer(nn.Sequential(Mine(), nn.Tanh(), Mine(3, 2)), (torch.randn(6, 4, 4),), F64, batch_first=False)
    check_layer(Second(), (torch.randint(7, (5, 4)),), F64, batch_first=False, empty=False)


class Picked(nn.Module):
    """An expert sees the rows that values pick: as many as there happen to be, and in another order."""

    def __init__(self):
        super().__init__()
        self.first, self.expert, self.head = nn.Linear(4, 4), Mine(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        picked = (x[:, 0] > 0).nonzero().flatten()
        picked = picked[x[picked, 1].argsort()]
        return self.head(x.index_add(0, picked, self.expert(x[picked])))


def test_rows_that_are_picked():
    """Which row is whose is known of the output alone: refused by name, or exact; never another sample's."""
    assert_exact_or_refused(Picked(), (torch.randn(6, 4),), torch.randn(6, 2), mse, "expert")


def changed(**parts):
    """The right rule of ``Mine``, but for some parts."""

    def rule(module, activations, G):
        found = mine(module, activations, G)
        return found | {getattr(module, name): part(activations[0], G) for name, part in parts.items()}

    return rule


WRONG = {
    "doubled": changed(weight=lambda A, G: dpfast.Product(2 * A, G)),
    "a small term too many": changed(bias=lambda A, G: positions(G) * 1.01),
    "half of the positions": changed(bias=lambda A, G: positions(G[:, ::2])),
    "nothing": changed(weight=lambda A, G: dpfast.Product(0 * A, G)),
    "of the next sample": changed(bias=lambda A, G: positions(G).roll(1, 0)),
    "without samples": changed(bias=lambda A, G: positions(G).mean(0).expand(len(G), -1)),
    "nan": changed(bias=lambda A, G: positions(G) * float("nan")),
}


@pytest.mark.parametrize(
    ("wrong", "dtype"), [*((wrong, F64) for wrong in WRONG), ("a small term too many", F32), ("doubled", BF16)], ids=str
)
def test_a_wrong_rule_is_refused(wrong, dtype):
    model = nn.Sequential(nn.Linear(4, 4), Mine(), nn.Linear(3, 2)).to(dtype)
    with dpfast.register_layer(Mine, WRONG[wrong]):
        private, *_ = make_private(model, size=5, loss_reduction="sum", lr=1.0)
    before = copy.deepcopy(private.state_dict())
    with pytest.raises(
        RuleError, match=r"rule .*rule of layer '1' is wrong for '(weight|bias)': in row \d of the batch"
    ):
        sse(private(torch.randn(5, 6, 4).to(dtype)), torch.randn(5, 6, 2).to(dtype)).backward()
    assert all(torch.equal(x, before[name]) for name, x in private.state_dict().items())
    assert all(getattr(p, "summed_grad", None) is None for p in private.parameters())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda module, A, G: {}, r"shape \[5, 3, 4\] for a parameter, or a Product .* and returned none"),
        (lambda module, A, G: None, "returned NoneType, no dict"),
        (lambda module, A, G: {module.weight: G, module.bias: G.sum(1)}, r"returned one of shape \[5, 6, 3\]"),
        (lambda module, A, G: mine(module, A, G.mul_(1)), "writes to the activations or the backprops"),
        (changed(weight=lambda A, G: dpfast.Product(G, A)), r"a Product of shapes \[\[5, 6, 3\], \[5, 6, 4\]\]"),
        (changed(weight=lambda A, G: dpfast.Product(A[:, :1], G)), r"a Product of shapes"),
        (changed(weight=lambda A, G: "gradients"), r"a str"),
    ],
)
def test_what_is_no_gradient_is_refused(rule, words):
    with dpfast.register_layer(Mine, rule):
        private, *_ = make_private(nn.Sequential(nn.Linear(4, 4), Mine()), size=5)
    with pytest.raises(RuleError, match=words):
        mse(private(torch.randn(5, 6, 4)), torch.randn(5, 6, 3)).backward()


class Dropping(Mine):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


def test_a_layer_that_draws_random_numbers_is_refused():
    with dpfast.register_layer(Dropping, mine):
        private, *_ = make_private(nn.Sequential(nn.Linear(4, 4), Dropping()), size=5)
    with pytest.raises(RuleError, match="draws random numbers"):
        mse(private(torch.randn(5, 6, 4)), torch.randn(5, 6, 3)).backward()


def test_a_rule_that_the_first_batch_says_nothing_of():
    """Inputs of zero: the weight's gradient is none, whatever the rule returns for it. The next batch shows it."""
    with dpfast.register_layer(Mine, WRONG["doubled"]):
        private, optimizer, _ = make_private(nn.Sequential(Mine(), nn.Linear(3, 2)), size=5)
    mse(private(torch.zeros(5, 4)), torch.randn(5, 2)).backward()
    optimizer.zero_grad()
    with pytest.raises(RuleError):
        for _ in range(8):
            mse(private(torch.randn(5, 4)), torch.randn(5, 2)).backward()
            optimizer.zero_grad()


def test_samples_that_meet_are_refused():
    class Mixing(Mine):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with dpfast.register_layer(Mixing, mine):
        private, *_ = make_private(nn.Sequential(nn.Linear(4, 4), Mixing()), size=5)
    with pytest.raises((LayoutError, RuleError)):
        mse(private(torch.randn(5, 4)), torch.randn(5, 3)).backward()


class Sampled(nn.Module):
    """Runs one sample at a time: nothing else knows what its bare parameter is used for."""

    def __init__(self, p=3):
        super().__init__()
        self.inner, self.own = Mine(4, p), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return torch.linalg.matrix_exp(self.own / 9) @ self.inner(x)


@pytest.mark.parametrize("frozen", [None, "own", "inner.weight"])
def test_within_what_runs_one_sample_at_a_time(frozen):
    model = nn.Sequential(nn.Linear(4, 4), Sampled(), Mine(3, 2))
    if frozen:
        model[1].get_parameter(frozen).requires_grad_(False)
    check_layer(model, (torch.randn(4, 6, 4),), F64, empty=False)


class Past(nn.Module):
    """Uses the layer's weight past the layer as well."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Mine(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x).tanh() @ self.inner.weight)


def test_a_weight_that_is_used_past_its_layer():
    check_layer(Past(), (torch.randn(4, 5, 4),), F64, empty=False)


def test_frozen_ones_and_checkpoints():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(4, 4), Mine(), nn.Linear(3, 2)
            self.inner.bias.requires_grad_(False)
            self.reentrant = reentrant

        def forward(self, x):
            return self.head(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant).tanh())

    for reentrant in (False, True):
        check_layer(Checkpointed(reentrant), (torch.randn(4, 5, 4),), F64)


def test_compiled():
    twin = nn.Sequential(nn.Linear(4, 4), Mine(), nn.Tanh(), nn.Linear(3, 2))
    model, *_ = make_private(copy.deepcopy(twin), size=5, max_grad_norm=0.1)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        x, y = torch.randn(5, 6, 4), torch.randn(5, 6, 2)
        mse(compiled(x), y).backward()
        want = run_fused(twin, ((x,), y), mse, 0.1).sums
        for name, found in sums_of(model._module).items():
            torch.testing.assert_close(found.float(), want[name], rtol=1e-4, atol=1e-6)
        model.set_grad_sample_to_none()


def test_graphed():
    twin = nn.Sequential(nn.Linear(4, 4), Mine(), nn.Tanh(), Gate(), nn.Linear(3, 2))
    model, optimizer, _ = make_private(copy.deepcopy(twin), size=5, max_grad_norm=0.1)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y))
    for _ in range(6):
        x, y = torch.randn(5, 6, 4), torch.randn(5, 6, 2)
        step(x, y)
        want = run_fused(twin, ((x,), y), mse, 0.1).sums
        for name, found in sums_of(model._module).items():
            torch.testing.assert_close(found.float(), want[name], rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    assert step.replays


def test_an_ascent_moves_what_the_rule_reads():
    """Gradients are taken at the shifted parameters: a rule that read the others would be refused."""
    model, optimizer, _ = make_private(
        nn.Sequential(nn.Linear(4, 3), Gate(), nn.Linear(3, 2)).double(),
        size=5, lr=0.1, ascent=dpfast.DPSAT(rho=2.0), noise_multiplier=0.1,
    )  # fmt: skip
    for _ in range(5):
        mse(model(torch.randn(5, 4).double()), torch.randn(5, 2).double()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_of_gradients_are_refused():
    private, *_ = make_private(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Mine(), nn.Tanh(), nn.Linear(3, 1)), size=5)
    x = torch.randn(5, 4, requires_grad=True)
    (g,) = torch.autograd.grad(private(x).sum(), x, create_graph=True)
    with pytest.raises(LayoutError, match="for gradients of first order"):
        g.square().sum().backward()


class Named:
    """As ``fully_shard`` puts before a module's class."""


class Kept(Named, Mine):
    pass


class Other(Mine):
    def forward(self, x):
        return 2 * super().forward(x)


def test_which_modules_have_the_rule():
    model = nn.Sequential(Mine(4, 4), Kept(4, 4), Other(4, 4), torch.nn.utils.parametrizations.weight_norm(Mine(4, 4)))
    patched = Mine(4, 4)
    patched.forward = partial(Mine.forward, patched)
    model.append(patched)
    check_layer(model, (torch.randn(3, 5, 4),), F64, empty=False)
    model.append(torch.nn.utils.prune.identity(Mine(4, 4), "weight"))
    assert served(make_private(model, size=5)[0]._module) == {"0", "1"}


def test_a_rule_that_is_taken_back():
    handle = dpfast.register_layer(Other, WRONG["doubled"])
    private, *_ = make_private(nn.Sequential(Other()), size=5)
    handle.remove()
    assert served(private._module) == {"0"}, "a private model keeps the rule that it was made with"
    later, *_ = make_private(nn.Sequential(Other()), size=5)
    assert isinstance(vars(later._module[0])["forward"], GenericForward)


def test_a_later_rule_counts():
    with dpfast.register_layer(Mine, WRONG["doubled"]), dpfast.register_layer(Mine, written):
        assert_exact(nn.Sequential(Mine(), nn.Linear(3, 2)), (torch.randn(4, 4),), torch.randn(4, 2), mse)
    assert_exact(nn.Sequential(Mine(), nn.Linear(3, 2)), (torch.randn(4, 4),), torch.randn(4, 2), mse)


@pytest.mark.parametrize(
    ("layer", "rule", "words"),
    [
        (Mine(), mine, "layer=Mine"),
        ("Mine", mine, "layer='Mine'"),
        (nn.ParameterList, mine, "a forward of its own"),
        (nn.Linear, mine, "layer=Linear: dpfast has a rule for it already"),
        (Mine, None, "rule=None: give a function"),
    ],
)
def test_what_cannot_be_registered(layer, rule, words):
    with pytest.raises(ValueError, match=words):
        dpfast.register_layer(layer, rule)


def test_the_batch_second_without_positions_of_its_own():
    """A mask that happens to have as many rows as the batch is no reason to refuse a rule that is right."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x, mask):
            return (mask @ x) * self.scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Masked(), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.inner(x, torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()))

    rule = lambda module, A, G: {module.scale: ((A[1] @ A[0]) * G).sum(1)}  # noqa: E731
    with dpfast.register_layer(Masked, rule):
        check_layer(Model(), (torch.randn(4, 4, 3),), F64, empty=False)


def test_explain_shows_it(capsys):
    assert "0.weight" in dpfast.explain(nn.Sequential(Mine(), nn.Linear(3, 2)), torch.randn(5, 6, 4))


@pytest.mark.parametrize("rule", [mine, written], ids=lambda rule: rule.__name__)
def test_under_autocast(rule):
    """Activations of float32 and backprops of bfloat16 come alike, and a rule that is right is not refused."""
    with dpfast.register_layer(Mine, rule):
        model = nn.Sequential(nn.Linear(4, 4), Mine(), nn.Tanh(), Mine(3, 2))
        want = run_fused(model, ((x := torch.randn(5, 6, 4),), y := torch.randn(5, 6, 2)), sse, 1.0, "sum")
        private, *_ = make_private(model, size=5, loss_reduction="sum")
        with torch.autocast("cpu", torch.bfloat16):
            out = private(x)
        sse(out.float(), y).backward()
    torch.testing.assert_close(private.per_sample_gradient_norms, want.norms, rtol=0.05, atol=0)


PAGE = Path(__file__).parents[2] / "docs" / "adding-a-layer.md"


def test_the_page_runs(capsys):
    """Its blocks in their order, and what it says that a wrong rule is told."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 2
    shared: dict = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), shared)
    assert (
        "forgets_the_scale of layer '0' is wrong for 'U': in row 0 of the batch it is off by" in capsys.readouterr().out
    )
    check_layer(nn.Sequential(shared["LowRankLinear"](4, 3, rank=2)), (torch.randn(4, 5, 4),), F64)
    shared["handle"].remove()
