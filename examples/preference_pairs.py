"""Preference pairs with TRL, each protected as one: ``python examples/preference_pairs.py``.

    pip install 'dpfast[trl]'

A pair has a prompt and two texts. ``DPDPOTrainer`` is TRL's ``DPOTrainer`` with both texts of a pair clipped as one, so
that epsilon is for one pair added or left out. With ``DPArguments(unit_column="annotator", rows_per_unit=4)`` it would
be for all pairs that one person has judged.
A sample is one pair.
"""

import argparse
import copy
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig

from dpfast.integrations.trl import DPArguments, DPDPOTrainer

WORDS = ["<pad>", "<eos>", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DELTA = 1e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; nothing is downloaded."""
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def pairs(size: int) -> Dataset:
    """After a number those that count up are chosen, and those that count down are rejected."""
    starts = torch.randint(4, 10, (size,), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list(
        [
            {
                "prompt": WORDS[k] + " ",
                "chosen": " ".join(WORDS[k + 1 : k + 3]),
                "rejected": " ".join([WORDS[k - 1], WORDS[k - 2]]),
            }
            for k in starts
        ]
    )


def main(size: int, epochs: int) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_positions=8, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=4,
            learning_rate=3e-3,
            max_length=8,
            beta=0.5,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = DPDPOTrainer(
            model,
            ref_model=copy.deepcopy(model),
            args=arguments,
            train_dataset=pairs(size),
            eval_dataset=pairs(32),  # of numbers, which are public
            processing_class=tokenizer(),
            privacy=DPArguments(target_epsilon=8.0, target_delta=DELTA, accountant="rdp"),
        )
        trainer.train()
        trainer.evaluate()
    right = next(
        log["eval_rewards/accuracies"] for log in trainer.state.log_history if "eval_rewards/accuracies" in log
    )
    epsilon, delta = trainer.privacy_spent()
    print(f"pairs the right way round: {100 * right:.0f} %")
    print(f"epsilon {epsilon:.2f} at delta {delta} for {trainer.engine.unit}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few pairs, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (2048, 5)))
