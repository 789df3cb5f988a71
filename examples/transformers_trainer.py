"""The Trainer of Transformers, with privacy: ``python examples/transformers_trainer.py``.

    pip install transformers accelerate

``DPTrainer`` stands in the place of ``transformers.Trainer`` and takes the same arguments, and ``privacy=``. It draws
Poisson batches, clips per text, and logs epsilon where the Trainer logs the learning rate. On several devices the same
script is started by ``torchrun`` or ``accelerate launch``. A sample is one row of the data set.
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from dpfast.integrations.trainer import DPArguments, DPTrainer  # was: from transformers import Trainer

WORDS, LENGTH = 40, 24


def texts(size: int) -> list[dict[str, torch.Tensor]]:
    """Token ids that count up from a random start."""
    start = torch.randint(WORDS, (size, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in (start + torch.arange(LENGTH)) % WORDS]


def main(size: int, epochs: int) -> None:
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,  # in memory at once
            gradient_accumulation_steps=4,  # so that 128 texts a step are expected
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",  # a checkpoint holds the noise's key: publish the model, never the checkpoint
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        privacy = DPArguments(target_epsilon=8.0, target_delta=1e-4, max_grad_norm=1.0)
        trainer = DPTrainer(model, arguments, train_dataset=texts(size), privacy=privacy)
        trainer.train()
    epsilon, delta = trainer.privacy_spent()
    print(f"epsilon {epsilon:.2f} at delta {delta}, after {trainer.state.global_step} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few texts, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
