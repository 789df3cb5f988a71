"""NeMo Safe-Synthesizer's private trainer on dpfast: ``python examples/finetune_nemo.py``.

    pip install nemo-safe-synthesizer prv-accountant opt-einsum, with torch, opacus, transformers, peft and datasets

Its ``OpacusDPTrainer`` makes Opacus' own ``GradSampleModule`` and ``DPOptimizer``, in subclasses. ``dpfast.register()``
puts dpfast's samplers and its clipping under these: with ``override=True``, as the package registers a sampler for
linear layers when it is imported. A sample is a record, and the model is a small random one, with LoRA.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from nemo_safe_synthesizer.privacy.dp_transformers.dp_utils import OpacusDPTrainer
from nemo_safe_synthesizer.privacy.dp_transformers.privacy_args import PrivacyArguments
from opacus.grad_sample import GradSampleHooks
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import dpfast

LENGTH, WORDS = 12, 50


def records(size: int) -> Dataset:
    """Texts in which each word is the one after the last."""
    first = torch.randint(WORDS, (size, 1), generator=torch.Generator().manual_seed(0))
    ids = (first + torch.arange(LENGTH)) % WORDS
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """With position ids, as the package's own collators give them to Opacus."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"position_ids": torch.arange(LENGTH).repeat(len(rows), 1)}


def main(size: int, epochs: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    dpfast.register(override=True)
    print(f"per-sample gradients of linear layers by {GradSampleHooks.GRAD_SAMPLERS[torch.nn.Linear].__module__}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = OpacusDPTrainer(
                train_dataset=records(size),
                model=model,
                args=TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=16,
                    num_train_epochs=epochs,
                    learning_rate=1e-2,
                    max_grad_norm=0.0,  # the optimizer clips each record
                    use_cpu=True,
                    report_to=[],
                    save_strategy="no",
                    remove_unused_columns=False,
                ),
                privacy_args=PrivacyArguments(
                    target_epsilon=8.0, target_delta=1e-3, per_sample_max_grad_norm=1.0, poisson_sampling=True
                ),
                data_collator=collate,
                secure_mode=False,  # Opacus' secure mode needs torchcsprng
            )
            result = trainer.train()
            print(f"loss {result.training_loss:.3f}, epsilon {trainer.get_epsilon():.3f} at delta 0.001")
    finally:
        dpfast.unregister()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="64 records, one epoch")
    asked = parser.parse_args()
    main(64 if asked.smoke else asked.records, 1 if asked.smoke else asked.epochs)
