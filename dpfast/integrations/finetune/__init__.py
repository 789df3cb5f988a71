"""Private fine-tuning of Transformers models: ``python -m dpfast finetune``, and :func:`finetune` from Python.

    from dpfast.integrations.finetune import FinetuneConfig, finetune

    result = finetune(FinetuneConfig(
        model="models/gpt2",         # a folder or a hub name; a small random GPT-2 without it
        train="notes.jsonl",         # one sample a row; column "text"
        eval="public.jsonl",         # optional: perplexity on other texts
        lora_rank=16,                # leave out to train every weight
        target_epsilon=8, target_delta=1e-5,
        batch_size=1024, physical_batch_size=16, bf16=True, epochs=3,
        output="out",
    ))
    print(result.epsilon, result.figures)  # the model is in result.model and in out/

The guarantee is for rows: what one person wrote should be one row. With ``packing`` the samples of
a physical batch stand in one row of tokens, and each is drawn and clipped by itself. Rows are never split, which would
make several samples of one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError

if TYPE_CHECKING:
    from dpfast.integrations.finetune.result import FinetuneResult
    from dpfast.integrations.finetune.run import finetune

__all__ = ["FinetuneConfig", "FinetuneError", "FinetuneResult", "finetune"]

_HOMES = {
    "FinetuneResult": "result",
    "finetune": "run",
}  # loaded when they are used: help for the command needs neither


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
