"""The model to train and its tokenizer: loaded, made from a config, or the small GPT-2 that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.data import BUNDLED

VOCABULARY = 1024  # of the bundled tokenizer
SMALL: dict[str, Any] = {"n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def bundled_tokenizer() -> Any:
    """A byte-level BPE tokenizer of the bundled text, which is public; it takes any text, and needs no download.

    A tokenizer trained on the private texts would tell which words are in them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, pad = "<|endoftext|>", "<|pad|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[end, pad],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(BUNDLED.read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad)


def load(config: FinetuneConfig, names: Sequence[Any] | None) -> tuple[nn.Module, Any, bool]:
    """Model and tokenizer; with class ``names`` a sequence classifier.

    Returns:
        The model on the CPU in training mode, the tokenizer, and whether the weights are random.

    Raises:
        FinetuneError: no model there, or none of the kind that is asked for.
    """
    import transformers

    made = config.model is None or config.random_weights or not _has_weights(config.model)
    settings: Any = _settings(config, made)
    tokenizer = _tokenizer(config, made)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise FinetuneError(f"--model {config.model}: its tokenizer has no token to pad with: give it a pad_token")
    settings.pad_token_id = tokenizer.pad_token_id
    auto: Any = transformers.AutoModelForCausalLM
    if names is not None:
        auto = transformers.AutoModelForSequenceClassification
        known = settings.label2id or {}
        if {str(name) for name in names} - set(known):  # else the model has this very head already
            settings.num_labels = len(names)
            settings.id2label = {k: str(name) for k, name in enumerate(names)}
            settings.label2id = {str(name): k for k, name in enumerate(names)}
    dtype = torch.bfloat16 if config.pure_bf16 else torch.float32
    try:
        if made:
            settings.vocab_size = max(settings.vocab_size or 0, len(tokenizer)) if config.model else len(tokenizer)
            model = auto.from_config(settings, dtype=dtype)
        else:
            model = auto.from_pretrained(config.model, config=settings, dtype=dtype, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FinetuneError(
            f"--model {config.model} cannot be loaded for {config.task}: {_first_line(error)}"
        ) from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise FinetuneError(f"--model {config.model}: its tokenizer has more tokens than the model's embedding")
    model.config.use_cache = False
    return model.train(), tokenizer, made


def _has_weights(name: str) -> bool:
    folder = Path(name)
    if not folder.exists():
        return True  # a name on the hub
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _settings(config: FinetuneConfig, made: bool) -> Any:
    """The Transformers config."""
    import transformers

    if config.model is None:
        ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2Config(vocab_size=VOCABULARY, **SMALL, **NO_DROPOUT, **ids)
    folder = Path(config.model)
    if folder.is_dir() and (folder / "adapter_config.json").exists():
        raise FinetuneError(f"--model {folder} is a LoRA adapter: merge it into its model first (merge_and_unload)")
    if folder.exists() and not (folder / "config.json").exists():
        raise FinetuneError(f"--model {folder} has no config.json: give a folder that save_pretrained wrote")
    if config.random_weights and not folder.exists() and config.model in transformers.CONFIG_MAPPING:
        found = transformers.AutoConfig.for_model(config.model)
        found.vocab_size = VOCABULARY  # the bundled tokenizer's
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(getattr(found, name, None), int):
                setattr(found, name, 0)
        return found
    try:
        return transformers.AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        remedy = "give a folder that save_pretrained wrote, or a name that can be downloaded or is in the cache"
        if config.model in transformers.CONFIG_MAPPING:
            remedy += f"; --random-weights starts a {config.model} that needs no download"
        raise FinetuneError(f"--model {config.model} cannot be found here: {remedy}") from error


def _tokenizer(config: FinetuneConfig, made: bool) -> Any:
    import transformers

    if config.model is None or (config.random_weights and not Path(config.model).exists()):
        return bundled_tokenizer()
    try:
        found = transformers.AutoTokenizer.from_pretrained(config.model)
        if len(found) > 0:
            return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError):
        pass
    if made:
        return bundled_tokenizer()
    raise FinetuneError(f"--model {config.model} has no tokenizer: save one there with tokenizer.save_pretrained")


def context_of(config: FinetuneConfig, settings: Any, tokenizer: Any) -> int:
    """Most tokens of a sample: what is asked for, within what model and tokenizer take."""
    limits = [getattr(settings, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits.append(tokenizer.model_max_length)
    most = min((x for x in limits if isinstance(x, int) and 0 < x < 1 << 24), default=None)
    if config.context is not None and most is not None and config.context > most:
        raise FinetuneError(f"--context {config.context}: the model takes at most {most} tokens")
    return config.context or most or 1024


def with_adapters(model: nn.Module, config: FinetuneConfig) -> nn.Module:
    """The model with LoRA adapters (and a classifier's head) to train, and everything else frozen."""
    import peft

    rank = config.lora_rank
    assert rank is not None
    targets: Any = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    task = "SEQ_CLS" if config.task == "classification" else "CAUSAL_LM"
    alpha: Any = config.lora_alpha if config.lora_alpha is not None else 2 * rank
    wanted = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type=task, **_conv1d(model)
    )
    try:
        adapted = peft.get_peft_model(model, wanted, autocast_adapter_dtype=not config.pure_bf16)
    except ValueError as error:
        raise FinetuneError(f"--lora-targets {config.lora_targets}: {_first_line(error)}") from error
    return adapted.train()


def _conv1d(model: nn.Module) -> dict[str, Any]:
    """GPT-2's Conv1D holds its weight transposed, which PEFT wants to be told."""
    kinds = {type(module).__name__ for module in model.modules()}
    return {"fan_in_fan_out": True} if "Conv1D" in kinds else {}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
