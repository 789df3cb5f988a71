"""``python -m dpfast run``: scripts that know nothing of dpfast, as Opacus' users write them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import opacus.privacy_engine
import pytest
from opacus import PrivacyEngine  # noqa: F401 (a name that a patch has to find)
from opacus.utils import batch_memory_manager
from opacus.utils.batch_memory_manager import wrap_data_loader  # noqa: F401 (likewise)

import dpfast
from dpfast.dropin import run
from dpfast.dropin.script_needs import _need_of

ROOT = Path(dpfast.__file__).parent.parent
HEAD = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager

torch.manual_seed(0)
data = TensorDataset(torch.randn(24, 4), torch.randint(2, (24,)))
model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=8)
criterion = nn.CrossEntropyLoss()
engine = PrivacyEngine(accountant="rdp")
given = dict(module=model, optimizer=optimizer, data_loader=loader, max_grad_norm=1.0)
"""
LOOP = """
for x, y in loader:
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
print(len(loader), round(engine.get_epsilon(1e-5), 3))
"""
SCRIPTS = {
    "hooks.py": "model, optimizer, loader = engine.make_private(noise_multiplier=1.0, **given)" + LOOP,
    "ew.py": "model, optimizer, loader = engine.make_private(noise_multiplier=1.0, grad_sample_mode='ew', **given)"
    + LOOP,
    # As Opacus does, it gives three values whatever the criterion, but for its ghost modes.
    "criterion.py": "model, optimizer, loader = engine.make_private(noise_multiplier=1.0, criterion=criterion, **given)"
    + LOOP,
    "ghost.py": """
given |= dict(target_epsilon=3.0, target_delta=1e-5, epochs=1, grad_sample_mode="ghost")
model, optimizer, criterion, loader = engine.make_private_with_epsilon(**given)
"""
    + LOOP,
    "memory.py": """
model, optimizer, loader = engine.make_private(noise_multiplier=1.0, poisson_sampling=False, **given)
private, steps = optimizer, 0
with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as loader:
"""
    + textwrap.indent(LOOP, "    "),
    "reads.py": """
model, optimizer, loader = engine.make_private(noise_multiplier=1.0, poisson_sampling=False, **given)
criterion(model(data[:8][0]), data[:8][1]).backward()
print(list(model._module[0].weight.grad_sample.shape))
""",
    "reads_ghost.py": """
model, optimizer, criterion, loader = engine.make_private(noise_multiplier=1.0, grad_sample_mode="ghost", **given)
print(type(model).__name__, model._module[0].weight.grad_sample)
""",
    "replaces.py": """
model, optimizer, loader = engine.make_private(noise_multiplier=1.0, **given)
optimizer.add_noise = lambda: None
""",
    "sampler.py": """
from opacus.grad_sample import register_grad_sampler

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
    def forward(self, x):
        return x * self.scale

@register_grad_sampler(Scale)
def sampler(layer, activations, backprops):
    return {layer.scale: activations[0] * backprops}

model.append(Scale())
optimizer.add_param_group({"params": list(model[-1].parameters())})
model, optimizer, loader = engine.make_private(noise_multiplier=1.0, **given)
"""
    + LOOP,
    "subclass.py": """
class Mine(PrivacyEngine):
    def _prepare_optimizer(self, **kwargs):
        print("mine")
        return super()._prepare_optimizer(**kwargs)

engine = Mine(accountant="rdp")
model, optimizer, loader = engine.make_private(noise_multiplier=1.0, **given)
"""
    + LOOP,
    "no_op.py": "engine.make_private(noise_multiplier=1.0, grad_sample_mode='no_op', **given)",
    "refused.py": """
given["max_grad_norm"] = -1.0
engine.make_private(noise_multiplier=1.0, **given)
""",
    "exits.py": "print(sys.argv[1:], __name__); sys.exit(3)",
}
DRIVER = """
import contextlib, io, json, sys
from pathlib import Path
from dpfast.dropin import patch, run

found = {}
for script in sys.argv[1:]:
    out, err, ended = io.StringIO(), io.StringIO(), None
    before = len(patch.calls())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run.main(["--report", script, "--report", "-m"])
        except BaseException as error:
            ended = f"{type(error).__name__}: {error}"
    calls = patch.calls()[before:]
    found[Path(script).name] = dict(out=out.getvalue(), err=err.getvalue(), ended=ended, calls=calls)
print(json.dumps(found))
"""


def python(*arguments, folder):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in SCRIPTS.items():
        (folder / name).write_text(HEAD + text)
    ran = python("-c", DRIVER, *(folder / name for name in SCRIPTS), folder=folder)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", ["hooks.py", "ew.py", "criterion.py", "ghost.py", "memory.py", "sampler.py"])
def test_runs_fused(found, script):
    it = found[script]
    (call,) = it["calls"]
    assert (it["ended"], call[2:]) == (None, ["fused", ""])
    line = 1 + HEAD.count("\n") + SCRIPTS[script].partition("engine.make_private")[0].count("\n")
    assert call[0] == f"{script}:{line}"
    assert "1 of" not in it["out"] and f"{script}:{line}" in it["err"]


def test_epsilon_is_that_of_opacus(found):
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(3):
        accountant.step(noise_multiplier=1.0, sample_rate=1 / 3)
    assert found["hooks.py"]["out"].split() == ["3", str(round(accountant.get_epsilon(1e-5), 3))]
    assert float(found["ghost.py"]["out"].split()[1]) <= 3.0


@pytest.mark.parametrize(
    "script, why, out",
    [
        ("reads.py", "reads .grad_sample", "[8, 3, 4]"),
        ("reads_ghost.py", "reads .grad_sample", "GradSampleModuleFastGradientClipping"),
        ("replaces.py", "replaces .add_noise", ""),
        ("subclass.py", "Mine has its own _prepare_optimizer", "mine"),
        ("no_op.py", "nothing for 'no_op'", ""),
    ],
)
def test_stays_opacus(found, script, why, out):
    it = found[script]
    (call,) = it["calls"]
    assert it["ended"] is None and call[2] == "Opacus" and why in call[3]
    assert why in it["err"] and it["out"].startswith(out)


def test_refusals_and_exits_are_the_scripts(found):
    assert found["refused.py"]["ended"].startswith("ValueError: max_grad_norm=-1.0")
    assert found["refused.py"]["calls"][0][2] == "refused"
    assert found["exits.py"]["ended"] == "SystemExit: 3"
    assert found["exits.py"]["out"].strip() == "['--report', '-m'] __main__"


SPAWNED = """
def work():
    private, *_ = engine.make_private(noise_multiplier=1.0, **given)
    return type(private).__name__

if __name__ == "__main__":
    raise SystemExit("the script was begun anew")
"""
CHILD = """
import sys
from multiprocessing import spawn
from dpfast.dropin import run

data = run.preparation_data("a child")
spawn.prepare({"name": "a child", "init_main_from_name": data["init_main_from_name"]})
assert spawn.get_preparation_data is run.preparation_data
print(sys.modules["__main__"].work())
"""


def test_spawned_processes(tmp_path, monkeypatch):
    """What a spawned process does first, in the words of ``multiprocessing``: it is patched, and says so at its end."""
    (tmp_path / "script.py").write_text(HEAD + SPAWNED)
    monkeypatch.setenv(run.CHILD, str(tmp_path / "script.py"))
    (tmp_path / "child.py").write_text(CHILD)
    ran = python("child.py", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["FusedModule"]
    assert ran.stderr.count("1 of 1 calls of make_private ran fused") == 1


def test_patch_and_unpatch():
    """Names that modules have imported before go along, and come back."""
    stock = opacus.PrivacyEngine, batch_memory_manager.BatchMemoryManager, batch_memory_manager.wrap_data_loader
    here = sys.modules[__name__]
    try:
        for _ in range(2):
            dpfast.patch_opacus()
        assert here.PrivacyEngine is opacus.PrivacyEngine is opacus.privacy_engine.PrivacyEngine is not stock[0]
        assert issubclass(opacus.PrivacyEngine, dpfast.PrivacyEngine) and issubclass(opacus.PrivacyEngine, stock[0])
        assert issubclass(batch_memory_manager.BatchMemoryManager, dpfast.BatchMemoryManager)
        assert here.wrap_data_loader is batch_memory_manager.wrap_data_loader is not stock[2]
        engine = opacus.PrivacyEngine()
    finally:
        for _ in range(2):
            dpfast.unpatch_opacus()
    assert here.PrivacyEngine is opacus.PrivacyEngine is opacus.privacy_engine.PrivacyEngine is stock[0]
    assert batch_memory_manager.BatchMemoryManager is stock[1]
    assert batch_memory_manager.wrap_data_loader is here.wrap_data_loader is stock[2]
    assert isinstance(engine, dpfast.PrivacyEngine) and dpfast.PrivacyEngine.__mro__[1] is stock[0]


@pytest.mark.parametrize("name", ["BatchMemoryManager", "PrivacyEngine", "wrap_data_loader"])
def test_names_of_dpfast_stay_when_the_patch_is_taken_off(name, monkeypatch):
    own = getattr(dpfast, name)
    monkeypatch.setattr(sys.modules[__name__], "own_name", own, raising=False)
    dpfast.patch_opacus()
    dpfast.unpatch_opacus()
    assert sys.modules[__name__].own_name is own is getattr(dpfast, name)


@pytest.mark.parametrize(
    "arguments, said",
    [([], "name a script"), (["none.py"], "no file 'none.py'"), (["--nope", "x.py"], "unrecognized arguments: --nope")],
)
def test_nothing_to_run(arguments, said, capsys):
    try:
        status = run.main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and said in capsys.readouterr().err


def test_what_source_needs():
    assert _need_of("cell 1", "p.grad_sample = g  # its own") is None
    assert _need_of("cell 2", "norms = [p.grad_sample.norm() for p in ps]") == ("reads .grad_sample", "cell 2:1")
    assert _need_of("cell 3", "x = 1\nif hasattr(p, 'grad_sample'): pass").where == "cell 3:2"
    assert _need_of("cell 4", "'a text on grad_sample'") is None
    assert _need_of("cell 5", "def add_noise(): pass") is None
    assert _need_of("cell 7", "patch.object(DPOptimizer, 'add_noise', mine)").what == "replaces .add_noise"
    assert _need_of("cell 8", "optimizer.pre_step = mine").what == "replaces .pre_step"
    assert _need_of("cell 9", "opacus.optimizers.optimizer._generate_noise = mine").what.endswith("_generate_noise")
    assert _need_of("cell 6", "setattr(optimizer, 'clip_and_accumulate', mine)").what.endswith("clip_and_accumulate")
