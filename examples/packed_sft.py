"""Fine-tuning on packed rows: ``pip install transformers``, then ``python examples/packed_sft.py``.

A sample is one text of 16 to 256 tokens. Samples stand behind one another in one row, so that no token is padding. Each
is drawn, clipped and accounted for by itself: attention is run for each of them alone.
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import dpfast
from dpfast.data.packed import Packed
from dpfast.losses import segment_cross_entropy


def samples(count: int, longest: int, vocabulary: int) -> list[dict]:
    """Texts of very different length, in which each token follows from the one before."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 16, longest + 1, (count,), generator=draw).tolist()
    starts = torch.randint(vocabulary, (count,), generator=draw).tolist()
    pairs = zip(starts, lengths, strict=True)
    return [{"input_ids": [(start + 3 * k) % vocabulary for k in range(n)]} for start, n in pairs]


def main(count: int, longest: int, epochs: int, width: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=longest,
        use_cache=False,  # with a cache Transformers makes no mask by segments
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = samples(count, longest, config.vocab_size)
    engine = dpfast.PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=16, collate_fn=Packed(max_length=longest)),  # samples
        target_epsilon=8.0,
        target_delta=1e-4,
        epochs=epochs,
        max_grad_norm=1.0,
        units="packed",
    )
    for epoch in range(epochs):
        tokens, total = 0, 0
        for batch in loader:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            marks = {"position_ids": batch["position_ids"]}
            segment_cross_entropy(logits, batch["labels"], reduction="mean", **marks).backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens += batch["input_ids"].numel()
            total += int((batch["position_ids"] == 0).sum()) * longest
        padding = 100 * (1 - tokens / max(1, total))
        print(f"epoch {epoch + 1}: epsilon {engine.get_epsilon(1e-4):.2f} at delta 0.0001")
        print(f"{tokens} tokens; rows padded to {longest} would have been {padding:.0f} % padding")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--samples", type=int, default=512)
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--smoke", action="store_true", help="few samples and one epoch")
    given = arguments.parse_args()
    if given.smoke:
        main(32, 32, 1, 16)
    else:
        main(given.samples, 256, given.epochs, 64)
