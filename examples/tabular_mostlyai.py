"""Synthetic data by mostlyai-engine, trained with dpfast: ``python examples/tabular_mostlyai.py``.

    pip install mostlyai-engine

The engine calls Opacus itself, and not one of its lines changes: ``dpfast.patch_opacus()`` comes before it is imported.
A sample is a row of the table, and epsilon is what the synthetic rows can say of it: it counts the training and the
ranges of values that the engine has looked up before.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import dpfast

dpfast.patch_opacus()

from mostlyai import engine  # noqa: E402
from mostlyai.engine.domain import DifferentialPrivacyConfig  # noqa: E402

from dpfast.dropin.patch import calls  # noqa: E402


def people(size: int) -> pd.DataFrame:
    """A table of one's own: whoever is over 65 has retired."""
    draw = np.random.default_rng(0)
    age = draw.integers(18, 80, size)
    return pd.DataFrame({"age": age, "job": np.where(age > 65, "retired", draw.choice(["nurse", "cook"], size))})


def main(rows: int, epochs: float) -> None:
    privacy = DifferentialPrivacyConfig(max_epsilon=10.0, delta=1e-4, noise_multiplier=1.5, max_grad_norm=1.0)
    messages = []

    def note(message: dict | None = None, **_: object) -> None:
        if message is not None:
            messages.append(message)

    with tempfile.TemporaryDirectory() as folder:
        engine.split(workspace_dir=folder, tgt_data=people(rows), model_type="TABULAR")
        engine.analyze(workspace_dir=folder, differential_privacy=privacy)
        engine.encode(workspace_dir=folder)
        engine.train(
            workspace_dir=folder,
            model="MOSTLY_AI/Small",
            max_epochs=epochs,
            batch_size=16,
            differential_privacy=privacy,
            update_progress=note,
            device="cpu",
        )
        engine.generate(workspace_dir=folder, sample_size=rows, device="cpu")
        synthetic = pd.read_parquet(Path(folder) / "SyntheticData")
    print(synthetic.groupby("job")["age"].describe()[["count", "min", "50%", "max"]])
    for call in calls():
        print(f"make_private at {call.where}: {call.ran} {call.why}")
    print(f"epsilon {messages[-1]['dp_eps']} at delta {messages[-1]['dp_delta']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--smoke", action="store_true", help="300 rows, one epoch")
    asked = parser.parse_args()
    main(300 if asked.smoke else asked.rows, 1 if asked.smoke else asked.epochs)
