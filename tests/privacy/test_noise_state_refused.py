"""A state of the noise that is none is refused, by what is wrong with it, and nothing is changed."""

import copy
import io
import pickle

import pytest
import torch

from dpfast.accounting.runs import ACCOUNTANT, RUNS
from dpfast.checkpoints import OPTIMIZER, PLAN
from dpfast.noise.stream import NoiseStream
from tests.ops.noisy import same
from tests.privacy.test_noise_checkpoint import Run, batches

GOOD = {"secure": False, "step": 5, "rounding_key": (1, 2), "key": (1, 2, 0, 0, 0, 0, 0, 0)}
MALFORMED = {
    "empty": {},
    "nothing": None,
    "a list": [1, 2],
    "no step": {k: v for k, v in GOOD.items() if k != "step"},
    "a negative step": GOOD | {"step": -1},
    "a step too many": GOOD | {"step": (1 << 32) + 1},
    "a step in words": GOOD | {"step": "5"},
    "a broken step": GOOD | {"step": 5.0},
    "a short key": GOOD | {"key": (1, 2)},
    "a long key": GOOD | {"key": (1,) * 9},
    "a large word": GOOD | {"key": (1 << 32, *GOOD["key"][1:])},
    "a negative word": GOOD | {"key": (-1, *GOOD["key"][1:])},
    "a broken word": GOOD | {"key": (1.5, *GOOD["key"][1:])},
    "a key in words": GOOD | {"key": "12345678"},
    "a key that is a number": GOOD | {"key": 7},
    "a short rounding key": GOOD | {"rounding_key": (1,)},
    "no words to round": GOOD | {"rounding_key": ()},
    "a large rounding word": GOOD | {"rounding_key": (1, 1 << 32)},
    "a rounding key in words": GOOD | {"rounding_key": "ab"},
}


@pytest.mark.parametrize("bad", MALFORMED)
@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
def test_a_malformed_state_is_refused(bad, secure):
    """With a message that speaks of the noise, and the stream as it was."""
    stream = NoiseStream(secure=secure)
    stream.next(1.0, 1.0, 5, 1.0)
    stream.rounding_key()
    before, inside = stream.state_dict(), (stream.key, stream.step, stream._rounding_key)
    with pytest.raises(ValueError, match="noise state"):
        stream.load_state_dict(MALFORMED[bad])
    assert stream.state_dict() == before and (stream.key, stream.step, stream._rounding_key) == inside


@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
def test_a_good_state_is_taken(secure):
    """Lists, as JSON has them, too; a secure stream takes no key."""
    for good in (GOOD, {k: list(v) if isinstance(v, tuple) else v for k, v in GOOD.items()}):
        stream = NoiseStream(secure=secure)
        stream.load_state_dict(good)
        assert (stream.step, stream.rounding_key()) == (5, (1, 2))
        assert stream.key == (None if secure else GOOD["key"])
        assert (stream.next(1.0, 1.0, 5, 1.0).key == GOOD["key"]) != secure


BROKEN = {
    "no accountant": (ACCOUNTANT, None, "has no privacy_accountant_state_dict"),
    "another accountant": (ACCOUNTANT, {"mechanism": "prv", "history": []}, "accountant='prv'"),
    "no history": (ACCOUNTANT, {"mechanism": "rdp"}, "a history and a mechanism"),
    "steps in words": (ACCOUNTANT, {"mechanism": "rdp", "history": [(1.0, 0.1, "5")]}, "'5'"),
    "steps taken back": (ACCOUNTANT, {"mechanism": "rdp", "history": [(1.0, 0.1, -5)]}, "-5"),
    "no noise at all": (ACCOUNTANT, {"mechanism": "rdp", "history": [(float("nan"), 0.1, 5)]}, "nan"),
    "of nobody's": (RUNS, [["a", [(1.0, 1.0, 7)]]], "other steps than its history"),
    "nameless": (RUNS, [[(1.0, 1.0, 1)]], "a list of names"),
    "other groups": (OPTIMIZER, {"state": {}, "param_groups": [{"params": [0, 1]}]}, "groups have"),
    "half an entry": (ACCOUNTANT, {"mechanism": "rdp", "history": [(1.0, 5)]}, "is no"),
    "no plan": (PLAN, [1], "plan"),
    "no model": ("module_state_dict", None, "has no module_state_dict"),
}


@pytest.mark.parametrize("bad", BROKEN)
def test_a_malformed_checkpoint_changes_nothing(bad):
    """Not the model, the optimizer, the accountant nor the noise."""
    name, value, words = BROKEN[bad]
    checkpoint = torch.load(Run("adamw").train(batches(1)).save(), weights_only=True)
    checkpoint[name] = value
    if value is None:
        del checkpoint[name]
    broken = io.BytesIO()
    torch.save(checkpoint, broken)
    broken.seek(0)
    other = Run("adamw").train(batches(2))
    before = pickle.dumps(other.optimizer.state_dict()), other.values(), copy.deepcopy(other.engine.accountant.history)
    noise = other.optimizer.noise.state_dict()
    with pytest.raises(ValueError, match=words):
        other.load(broken)
    assert other.optimizer.noise.state_dict() == noise
    assert same(other.values(), before[1])
    assert pickle.dumps(other.optimizer.state_dict()) == before[0]
    assert other.engine.accountant.history == before[2]
