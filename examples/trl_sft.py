"""Supervised fine-tuning with TRL, with privacy: ``python examples/trl_sft.py``.

    pip install 'dpfast[trl]'

``DPSFTTrainer`` is TRL's ``SFTTrainer`` with a loss that is a mean over each text's own tokens, for TRL's own is one
over all tokens of a batch. TRL's metrics of the training batches, which are not private, are not computed. A sample is
one row of the data set: ``packing`` and ``padding_free`` put several into one, and are refused.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig

from dpfast.integrations.trl import DPArguments, DPSFTTrainer

WORDS = ["<pad>", "<eos>", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; nothing is downloaded."""
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def texts(size: int) -> Dataset:
    """Numbers that count up, from three of them to eight."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(k, (), generator=draw).item() for _ in range(size) for k in (5, 6)]
    return Dataset.from_dict(
        {"text": [" ".join(WORDS[2 + a : 5 + a + b]) for a, b in zip(rows[::2], rows[1::2], strict=True)]}
    )


def main(size: int, epochs: int) -> None:
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=4,
            learning_rate=1e-2,
            max_length=16,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        privacy = DPArguments(target_epsilon=8.0, target_delta=1e-4)
        trainer = DPSFTTrainer(
            model, arguments, train_dataset=texts(size), processing_class=tokenizer(), privacy=privacy
        )
        trainer.train()
    epsilon, delta = trainer.privacy_spent()
    print(f"epsilon {epsilon:.2f} at delta {delta}, after {trainer.state.global_step} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few texts, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
