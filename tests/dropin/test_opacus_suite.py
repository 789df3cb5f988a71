"""Opacus' own tests: their fast part, on few of the examples that Hypothesis draws. ``make opacus-tests`` has all."""

import pytest

from tests.dropin import opacus_suite
from tests.dropin.opacus_suite import Known, judge, known, outcomes_of

FAST = {
    "samplers": (
        "grad_samples",
        "grad_sample_module_test.py",
        "grad_sample_module_fast_gradient_clipping_test.py",
        "grad_sample_hooks_test.py",
        "grad_sample_hooks_fast_gradient_clipping_test.py",
    ),
    "engine": (
        "privacy_engine_validation_test.py",
        "gradient_accumulation_test.py",
        "privacy_engine_test.py::PrivacyEngineTextTest",
        "privacy_engine_test.py::PrivacyEngineTiedWeightsTestFunctorch",
    ),
    "patched": ("privacy_engine_validation_test.py", "gradient_accumulation_test.py"),
}
PROBE = """
import opacus, pytest, torch, unittest
from opacus.grad_sample import GradSampleModule

def test_sampler(): assert GradSampleModule.GRAD_SAMPLERS[torch.nn.Linear].__module__.startswith("{sampler}")
def test_engine(): assert opacus.PrivacyEngine.__mro__[1].__module__.startswith("{engine}")
def test_failing(): assert 1 + 1 == 3
def test_skipped(): pytest.skip("no")
class Parts(unittest.TestCase):
    def test_one_fails(self):
        for part in range(3):
            with self.subTest(part=part): self.assertNotEqual(part, 1)
    def test_one_is_skipped(self):
        for part in range(3):
            with self.subTest(part=part):
                if part == 1: self.skipTest("no")
"""
PROBED = {
    "test_sampler": "passed",
    "test_engine": "passed",
    "test_failing": "failed",
    "test_skipped": "skipped",
    "Parts::test_one_fails": "failed",
    "Parts::test_one_is_skipped": "passed",
}


@pytest.fixture(scope="module", params=FAST)
def ran(request, tmp_path_factory):
    """The way, the outcomes of its fast part, and those of a file that says whether dpfast was in the way at all."""
    way = request.param
    probe = tmp_path_factory.mktemp("probe") / "probe_test.py"
    places = {"samplers": ("dpfast", "builtins"), "engine": ("opacus", "dpfast"), "patched": ("opacus", "dpfast")}[way]
    probe.write_text(PROBE.format(sampler=places[0], engine=places[1]))
    outcomes = outcomes_of(way, [*FAST[way], str(probe)], examples=2)
    ours = {name for name in outcomes if name.startswith("::")}  # of a file that is not below Opacus' tests
    probed = {name.removeprefix("::"): outcomes[name][0] for name in ours}
    return way, {name: outcome for name, outcome in outcomes.items() if name not in ours}, probed


def test_nothing_fails_that_is_not_listed(ran):
    way, outcomes, _ = ran
    assert not judge(way, outcomes, known(), whole=False)
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) > 10


def test_outcomes_are_what_happened(ran):
    _, _, probed = ran
    assert probed == PROBED


def test_a_listed_test_that_passes_is_wrong():
    rows = [Known("a_test.py::A::*", ("engine",), "why")]
    assert not judge("engine", {"a_test.py::A::test_x": ["failed", "boom"]}, rows)
    assert not judge("samplers", {"a_test.py::A::test_x": ["passed", ""]}, rows), "not listed for this way"
    for outcome in ("passed", "skipped"):
        assert "is listed as failing and has " + outcome in judge("engine", {"a_test.py::A::x": [outcome, ""]}, rows)[0]


def test_an_unlisted_failure_is_wrong():
    rows = [Known("a_test.py::A::*", ("engine",), "why")]
    failed = {"a_test.py::A::test_x": ["failed", "boom"]}
    assert judge("samplers", failed, rows) == ["samplers: a_test.py::A::test_x failed and is not listed: boom"]
    assert judge("engine", failed | {"b_test.py": ["failed", "no module"]}, rows)


def test_a_row_without_tests_is_wrong():
    rows = [Known("gone_test.py::A::*", ("engine",), "why")]
    assert "there is no such test" in judge("engine", {}, rows)[0]
    assert not judge("engine", {}, rows, whole=False)


@pytest.mark.parametrize("row", ["| `a_test.py::*` | engine | |", "| `a_test.py::*` | engines | why |"])
def test_rows_need_ways_and_reasons(row, tmp_path, monkeypatch):
    monkeypatch.setattr(opacus_suite, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(row)
    with pytest.raises(ValueError, match=r"a row of tests needs ways of .* and a reason"):
        known()


def test_a_run_that_does_not_end_says_so():
    with pytest.raises(RuntimeError, match=r"pytest ended with 4 on no_such_test.py: (.|\n)*not found"):
        outcomes_of("stock", ["no_such_test.py"])
