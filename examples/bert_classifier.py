"""A BERT classifier in a loop of one's own, with privacy: ``python examples/bert_classifier.py``.

    pip install transformers

The model is small and random, and so are the texts. For real ones, load the model by ``from_pretrained`` and tokenise
with ``padding="max_length"``, or see ``transformers_trainer.py``. A sample is one text with its label.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from dpfast import BatchMemoryManager, PrivacyEngine

DELTA, WORDS, LENGTH, PAD = 1e-4, 50, 16, 0


def texts(size: int) -> TensorDataset:
    """Token ids, masks and labels: whether the text has one of the first five words. Their lengths differ."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (size, LENGTH), generator=draw)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (size, 1), generator=draw)
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = ids * mask + PAD * (1 - mask)
    return TensorDataset(ids, mask, ((ids > 0) & (ids <= 5)).any(1).long())


def main(size: int, epochs: int) -> None:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model, engine = BertForSequenceClassification(config).train(), PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        data_loader=DataLoader(texts(size), batch_size=128),
        noise_multiplier=0.6,
        max_grad_norm=1.0,
    )

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(private(input_ids=ids, attention_mask=mask).logits, labels)

    for epoch in range(1, epochs + 1):
        # 128 texts a step are expected, of which 32 at a time are in memory.
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=32, optimizer=optimizer) as batches:
            for batch in batches:
                loss(*batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch}: epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few texts, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
