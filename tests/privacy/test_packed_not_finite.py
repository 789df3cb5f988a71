"""A NaN of one sample of a packed row stays with it; where it would not, the pass is refused as a whole."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers import F32, distance
from tests.privacy.packed import Segmented, packed, tokens
from tests.privacy.test_packed import Fused, decoder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Bad(Fused):
    """Logits with attention by ``sdpa`` or written out; token 3 is ``bad`` times what it was."""

    def __init__(self, bad, sdpa=True, backward=False):
        super().__init__(False, True)
        self.bad, self.sdpa, self.in_backward = bad, sdpa, backward

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.ids(input_ids)
        factor = torch.where(input_ids == 3, self.bad, 1.0).unsqueeze(-1)
        if not self.in_backward:
            x = x * factor
        numbers = (position_ids == 0).cumsum(1)
        mask = (numbers[:, :, None] == numbers[:, None, :]).tril()
        q = self.mix(x)
        if self.sdpa:
            x = x + F.scaled_dot_product_attention(q[:, None], q[:, None], x[:, None], mask[:, None])[:, 0]
        else:
            scores = (q @ q.transpose(1, 2)).masked_fill(~mask, -1e30)[:, None]
            x = x + (scores.softmax(-1) @ x[:, None])[:, 0]
        if self.in_backward and x.requires_grad:
            x.register_hook(lambda g: g * factor)
        return self.head(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backward", [False, True])
def test_only_the_sample_itself_is_lost(bad, backward):
    """``0 · NaN`` does not cross from one segment to another, forward or backward; nor does what overflows."""
    samples = tokens([4, 5, 3], least=4)
    samples[1][2] = 3
    model = Bad(bad, backward=backward)
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        private = Segmented(model, 0.5)
        sums = private.backward(packed(samples))
    rest = Segmented(model, 0.5).backward(packed([samples[0], samples[2]]))
    assert private.wrapped.nonfinite_samples == 1
    assert distance(sums, rest) < 1e-6 and all(s.isfinite().all() for s in sums.values())


def test_attention_that_is_written_out_carries_nan_and_is_refused():
    samples = tokens([4, 5, 3], least=4)
    samples[1][2] = 3
    model = Bad(float("nan"), sdpa=False)
    private = Segmented(model, 0.5)
    for _ in range(2):  # the next forward is no trial
        private.backward(packed([samples[0], samples[2]]))
    with pytest.raises(ValueError, match="not finite, and attention that is written out"):
        private.backward(packed(samples))
    assert private.nothing_summed()


def with_softmax_by_hand(q, x, mask):
    e = (q @ q.transpose(1, 2)).masked_fill(~mask, -1e30).clamp(max=30).exp()
    return (e / e.sum(-1, keepdim=True)) @ x


OTHER_WAYS = {
    "by hand": with_softmax_by_hand,
    "linear": lambda q, x, mask: ((q @ q.transpose(1, 2)) * mask) @ x,
    "sigmoid": lambda q, x, mask: ((q @ q.transpose(1, 2)).sigmoid() * mask) @ x,
    "special softmax": lambda q, x, mask: (
        torch.special.softmax((q @ q.transpose(1, 2)).masked_fill(~mask, -1e30), -1) @ x
    ),
    "computed again": lambda q, x, mask: checkpoint(
        lambda q, x: F.scaled_dot_product_attention(q[:, None], q[:, None], x[:, None], mask[:, None])[:, 0],
        q,
        x,
        use_reentrant=True,
    ),
    "an operator": lambda q, x, mask: torch.ops.aten.scaled_dot_product_attention(
        q[:, None], q[:, None], x[:, None], mask[:, None]
    )[:, 0],
}


class OtherWays(Bad):
    """Attention that nothing tells from other operators; where samples are not mixed by it, it is exact."""

    def __init__(self, how, backward):
        super().__init__(float("nan"), backward=backward)
        self.how = how

    def forward(self, input_ids, position_ids=None):
        x = self.ids(input_ids)
        factor = torch.where(input_ids == 3, self.bad, 1.0).unsqueeze(-1)
        x = x if self.in_backward else x * factor
        numbers = (position_ids == 0).cumsum(1)
        mask = (numbers[:, :, None] == numbers[:, None, :]).tril()
        x = x + OTHER_WAYS[self.how](self.mix(x) / 4, x, mask)
        if self.in_backward and x.requires_grad:
            x.register_hook(lambda g: g * factor)
        return self.head(x)


@pytest.mark.parametrize("how", OTHER_WAYS)
@pytest.mark.parametrize("backward", [False, True])
def test_attention_that_nothing_tells_from_other_operators(how, backward):
    """``0 · NaN`` takes the other samples of the row along there, so that the pass is refused."""
    samples = tokens([4, 5, 3], least=4)
    private = Segmented(OtherWays(how, backward), 0.5)
    for _ in range(2):  # the next forward is no trial
        private.backward(packed([samples[0], samples[2]]))
    samples[1][2] = 3
    with pytest.raises(ValueError, match="not finite"):
        private.backward(packed(samples))
    assert private.nothing_summed()


@pytest.mark.parametrize("name, checkpoints", [("llama", False), ("gpt2", True)])
def test_models_whose_attention_is_run_by_segments_train_on(name, checkpoints):
    model, samples = decoder(name, dtype=F32, tie_word_embeddings=False), tokens([4, 5, 3], least=4)
    samples[1][2] = 3
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    private = Segmented(model, 0.5)
    private.backward(packed(samples))
    with torch.no_grad():
        private.model.get_input_embeddings().weight[3] = torch.nan
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        sums = private.backward(packed(samples))
    assert private.wrapped.nonfinite_samples == 1
    assert distance(sums, private.backward(packed([samples[0], samples[2]]))) < 1e-6
