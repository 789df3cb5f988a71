"""LoRA adapters of a causal language model, with privacy: ``python examples/lora_causal_lm.py``.

    pip install transformers peft

The base stays frozen, and only what trains gets noise. The model is small and random; take one by ``from_pretrained``.
A sample is one text. ``python -m dpfast finetune --lora-rank 16`` does all of this from files.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from dpfast import PrivacyEngine
from dpfast.losses import causal_lm_loss

DELTA, WORDS, LENGTH = 1e-4, 40, 24


def texts(size: int) -> TensorDataset:
    """Token ids that count up from a random start, so that there is something to learn."""
    start = torch.randint(WORDS, (size, 1), generator=torch.Generator().manual_seed(0))
    return TensorDataset((start + torch.arange(LENGTH)) % WORDS)


def main(size: int, epochs: int) -> None:
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    base = GPT2LMHeadModel(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).train()
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        data_loader=DataLoader(texts(size), batch_size=128),
        noise_multiplier=0.8,
        max_grad_norm=1.0,
    )
    for epoch in range(1, epochs + 1):
        for (ids,) in loader:
            # The mean over each text's own tokens, then over the texts. A mean over all tokens of the batch would let
            # a long text change what the others count.
            causal_lm_loss(private(input_ids=ids).logits, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained} of {sum(p.numel() for p in model.parameters())} parameters were trained")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few texts, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
