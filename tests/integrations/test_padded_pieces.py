"""Physical batches of one shape in ``DPTrainer`` and the finetune command: what is padded counts nothing."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from dpfast.data.sampling import PoissonBatches
from dpfast.distributed.ranks import Ranks
from dpfast.integrations.finetune import FinetuneConfig, finetune, model
from dpfast.integrations.finetune.trainer import FinetuneTrainer
from dpfast.integrations.trainer import DPTrainer
from tests.helpers import distance
from tests.integrations.test_trainer import collate, gpt2, only, texts, trainer_of, weights

LONGEST = 12
BATCHES = [[0, 1, 2], [], [1], [2, 0], []]


@pytest.fixture
def drawn(monkeypatch):
    """Logical batches of 0 to 3 samples."""
    monkeypatch.setattr(PoissonBatches, "logical_batch", lambda self, step: BATCHES[step])


def to_one_length(samples):
    """:func:`collate`, padded to :data:`LONGEST` tokens."""
    longer = {"input_ids": torch.zeros(LONGEST, dtype=torch.long)}
    return {name: x[:-1] for name, x in collate([*samples, longer]).items()}


class Watched(DPTrainer):
    """Keeps all shapes that the model sees in training."""

    def training_step(self, model, inputs, *rest):
        with model.register_forward_pre_hook(self.look, with_kwargs=True):
            return super().training_step(model, inputs, *rest)

    def look(self, model, args, kwargs):
        if model.training:  # else rows are compared that are collated alone and together
            self.shapes = getattr(self, "shapes", set()) | {tuple(kwargs["input_ids"].shape)}


def trained(folder, pad, **kw):
    private = dict(noise_multiplier=1.0, log_training_loss=True, pad=pad)
    args = dict(gradient_accumulation_steps=1, max_steps=len(BATCHES), data_collator=to_one_length) | kw
    trainer = trainer_of(folder, gpt2(), texts(3), private, Watched, **args)
    trainer.train()
    return trainer


@pytest.mark.parametrize("fp16", [False, True])
def test_a_padded_run_of_the_trainer_is_the_same(tmp_path, drawn, fp16):
    """Two rows at a time: the same losses, noise and weights, and one shape."""
    plain, got = (trained(tmp_path, pad, fp16=fp16) for pad in (False, True))
    assert got.shapes == {(2, LONGEST)} and (1, LONGEST) in plain.shapes
    tolerance = 1e-2 if fp16 else 1e-5
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, got)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert [loss == 0 for loss in losses[1]] == [not batch for batch in BATCHES]
    for name, p in weights(plain.model).items():
        torch.testing.assert_close(weights(got.model)[name], p, rtol=tolerance, atol=tolerance)
    assert got.optimizer.noise.step == plain.optimizer.noise.step == len(BATCHES)
    assert got.hooks.nonfinite_samples == 0


def test_an_empty_batch_moves_nothing_but_by_noise(tmp_path):
    """Nor is there anything of the sample whose shapes it has, though its gradient is no number."""
    data = [{"input_ids": torch.full((4,), 22)}, *texts(3)]
    moved = []
    for noise in (0.0, 1.0):
        broken = gpt2()
        with torch.no_grad():
            broken.transformer.wpe.weight.fill_(torch.nan)
        before = weights(broken)
        trainer = trainer_of(tmp_path, broken, data, {"noise_multiplier": noise, "pad": True}, Watched)
        only(trainer, []).train()
        assert trainer.shapes == {(2, 4)} and trainer.hooks.nonfinite_samples == 0
        after = weights(broken)
        moved.append(distance(*({n: p for n, p in w.items() if "wpe" not in n} for w in (before, after))))
    assert moved[0] == 0 and 0 < moved[1] < torch.inf


def test_the_trainer_compiles_nothing_twice(tmp_path, drawn):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(tmp_path, True, torch_compile=True, torch_compile_backend="eager")
    assert found.state.global_step == len(BATCHES) and found.model._compiled_call_impl is not None


TEXTS = ["one", "the number 2 comes after 1", "and after 2 comes 3, and then all the numbers that come after it"]


def finetuned(monkeypatch, folder, **changes):
    """The loss of each step, shapes that the model saw, and the weights."""
    monkeypatch.setattr(model, "SMALL", {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2})
    monkeypatch.setattr(model, "VOCABULARY", 300)
    losses, shapes = [], set()
    training_step, compute_loss = FinetuneTrainer.training_step, FinetuneTrainer.compute_loss

    def step(self, *given):
        losses.append(float(training_step(self, *given)))
        return torch.tensor(losses[-1])

    def loss(self, model, inputs, *given):
        if model.training:
            shapes.add(tuple(inputs["input_ids"].shape))
        return compute_loss(self, model, inputs, *given)

    rows = [{"text": text, "label": ["no", "yes"][k % 2]} for k, text in enumerate(TEXTS)]
    with monkeypatch.context() as watched:
        watched.setattr(FinetuneTrainer, "training_step", step)
        watched.setattr(FinetuneTrainer, "compute_loss", loss)
        given = dict(noise_multiplier=1.0, accountant="rdp", batch_size=2, physical_batch_size=2, seed=1)
        given |= dict(train=rows, max_steps=len(BATCHES), save_every=100, show_training_loss=True)
        found = finetune(FinetuneConfig(output=str(folder), **{**given, **changes}))
    return losses, shapes, {name: p.detach().clone() for name, p in found.model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"task": "classification"}], ids=["lm", "classes"])
def test_a_padded_run_of_the_command_is_the_same(tmp_path, drawn, monkeypatch, changes):
    (losses, shapes, plain), (same, one, got) = (
        finetuned(monkeypatch, tmp_path / str(pad), pad=pad, **changes) for pad in (False, True)
    )
    assert len(one) == 1 < len(shapes) and next(iter(one))[0] == 2
    assert losses == pytest.approx(same, rel=1e-4) and [loss == 0 for loss in same] == [not b for b in BATCHES]
    for name, p in plain.items():
        torch.testing.assert_close(got[name], p, rtol=1e-4, atol=1e-4)


def test_the_command_compiles_nothing_twice(tmp_path, drawn, monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compile_(self, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses, shapes, _ = finetuned(monkeypatch, tmp_path, compile=True, pad=True)
    assert len(losses) == len(BATCHES) and len(shapes) == 1


def test_samples_of_equal_values_are_several(tmp_path, monkeypatch):
    """In several physical batches of one step they are no sample that counts twice."""
    data = [{"input_ids": torch.tensor(ids)} for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4], [9, 6, 7, 8])]
    for pad in (False, True):
        only(trainer_of(tmp_path, data=data, privacy={"pad": pad}), range(4)).train()
    rows = [{"text": text} for text in TEXTS[:2] * 4]
    finetuned(monkeypatch, tmp_path / "out", train=rows, batch_size=8, max_steps=1)


def test_where_other_ranks_have_more_pieces_this_one_runs_padding(tmp_path, drawn, monkeypatch):
    plain = trained(tmp_path, True)
    monkeypatch.setattr(Ranks, "most", lambda self, count: count + 2)
    got = trained(tmp_path, True)
    assert [e.get("loss") for e in got.state.log_history] == [e.get("loss") for e in plain.state.log_history]
    for name, p in weights(plain.model).items():
        assert torch.equal(weights(got.model)[name], p)


def test_what_is_not_the_samples_is_no_shorter_on_a_rank_without_them(tmp_path, drawn, monkeypatch):
    """A number and a table beside the batch."""
    beside = {"scale": torch.tensor(1.0), "table": torch.ones(5)}

    class Beside(Watched):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = dict(inputs)
            assert [inputs.pop(name).shape for name in beside] == [x.shape for x in beside.values()]
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(Ranks, "most", lambda self, count: count + 1)
    private = dict(noise_multiplier=1.0, pad=True)
    args = dict(gradient_accumulation_steps=1, max_steps=2, data_collator=lambda x: to_one_length(x) | beside)
    trainer = trainer_of(tmp_path, gpt2(), texts(3), private, Beside, **args)
    trainer.train()
    assert trainer.steps_accounted() == 2


def test_a_second_forward_of_the_rows_in_another_order_is_refused(tmp_path, monkeypatch):
    """One backward of both would clip two samples as one."""
    monkeypatch.setattr("dpfast.integrations.trainer.check_collation", lambda *args: None)  # which may see it before

    class Twice(DPTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            other = {name: x.flip(0).clone() for name, x in inputs.items()}
            return super().compute_loss(model, inputs) + super().compute_loss(model, other)

    for pad in (False, True):
        trainer = only(trainer_of(tmp_path, privacy={"pad": pad}, cls=Twice, data_collator=to_one_length), [0, 1, 2])
        with pytest.raises(ValueError, match="one backward pass of two forwards"):
            trainer.train()
