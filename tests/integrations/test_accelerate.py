"""``accelerate launch``: two processes end where one does. As a program, this file is what the processes run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from safetensors.torch import load_file

from dpfast.__main__ import main
from tests.integrations.processes import SECONDS
from tests.integrations.test_trainer import assert_same, gpt2, only, texts, trainer_of, weights

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
# --multi_gpu starts processes without a GPU too; --cpu would start one alone, where there is no MPI.
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
FINETUNE = "finetune --lora-rank 2 --batch-size 8 --physical-batch-size 3 --max-steps 2 --noise-multiplier 1 --seed 5"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that two processes have written to, and what they have printed."""
    folder = tmp_path_factory.mktemp("two")
    found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HOME": str(folder), "ACCELERATE_USE_CPU": "1"}
    program = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), __file__, str(folder)]
    launcher = subprocess.Popen(program, env=os.environ | found, stdout=PIPE, stderr=PIPE, text=True)
    try:
        told, errors = launcher.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # it ends its processes; killed, it would leave them
        told, errors = launcher.communicate()
    assert launcher.returncode == 0, errors[-3000:]
    return folder, told


def command(output: Path, *more: str) -> list[str]:
    """Of a model and a text that need no download."""
    return [*FINETUNE.split(), "--accountant", "rdp", "--device", "cpu", "--output", str(output), *more]


def test_finetune_sharded_with_lora(two, tmp_path):
    folder, told = two
    assert "over 2 ranks" in told
    assert main(command(tmp_path)) == 0
    got, want = (load_file(where / "adapter_model.safetensors") for where in (folder / "finetuned", tmp_path))
    assert set(got) == set(want)
    for name, p in want.items():
        assert p.abs().max() > 0, "B is zero at first: nothing was trained"
        torch.testing.assert_close(got[name], p, rtol=1e-4, atol=1e-7)


def test_a_sharded_run_resumes(two):
    """Killed after its first step and resumed it is bit-equal, from shards that each rank has saved of its own."""
    folder, _ = two
    checkpoint = folder / "killed" / "checkpoints" / "checkpoint-2"
    assert sorted(path.name for path in (checkpoint / "shards").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    got, want = (load_file(folder / name / "adapter_model.safetensors") for name in ("killed", "finetuned"))
    assert set(got) == set(want) and all(torch.equal(got[name], p) for name, p in want.items())


def killed_and_resumed(output: Path) -> None:
    """A sharded run that ends before its second step, and goes on."""
    from dpfast.integrations.finetune.trainer import FinetuneTrainer

    whole = FinetuneTrainer.training_step

    def training_step(self: Any, *given: Any) -> Any:
        if self.state.global_step == 1:
            raise BlockingIOError
        return whole(self, *given)

    FinetuneTrainer.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(BlockingIOError):
        main(command(output, "--fsdp", "--save-every", "1"))
    FinetuneTrainer.training_step = whole  # type: ignore[method-assign]
    assert main(command(output, "--fsdp", "--resume")) == 0


def runs(folder: Path, world_size: int) -> dict[str, Any]:
    """A step without samples, which is noise alone, and runs whose batches are those of any number of processes."""
    privacy = {"noise_multiplier": 1.0, "log_training_loss": True}
    found = []
    users = dict(unit_column="user_id", rows_per_unit=2, expected_batch_size=2)
    for name, steps in (("users", 4), ("noise", 1), ("run", 4)):
        model = gpt2()
        if int(os.environ.get("RANK", 0)):  # the first rank's weights count
            model.lm_head.weight.data.zero_()
        args = dict(max_steps=steps, gradient_accumulation_steps=4 // world_size)
        data = [{**row, "user_id": k % 4} for k, row in enumerate(texts(9))]
        trainer = trainer_of(folder, model, data, privacy | (users if name == "users" else {}), **args)
        assert trainer.args.world_size == world_size
        (only(trainer, []) if name == "noise" else trainer).train()
        found.append(weights(model))
    logged = [(e["step"], round(e["loss"], 4), e["epsilon"]) for e in trainer.state.log_history if "loss" in e]
    return dict(users=found[0], noise=found[1], run=found[2], history=trainer.engine.accountant.history, logged=logged)


def test_dptrainer(two, tmp_path):
    want = runs(tmp_path, 1)
    assert want["history"] == [(1.0, 1 / 2, 4)]
    for rank in range(2):
        got = torch.load(two[0] / f"{rank}.pt", weights_only=False)
        assert all(torch.equal(got["noise"][name], p) for name, p in want["noise"].items())
        for name in ("run", "users"):
            assert_same(got[name], want[name], rtol=1e-5)
        assert got["history"] == want["history"]
        assert rank or got["logged"] == want["logged"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    assert main(command(where / "finetuned", "--fsdp")) == 0
    # A second group that met where the first one did would find the first one's addresses.
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=2)
    killed_and_resumed(where / "killed")
    torch.save(runs(where, 2), where / f"{rank}.pt")
    dist.destroy_process_group()
