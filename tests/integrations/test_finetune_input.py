"""What finetune is given: data, options, and the command's one-line errors."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from dpfast.__main__ import main
from dpfast.integrations.finetune import FinetuneConfig, FinetuneError, data, fit, model
from dpfast.integrations.finetune.data import Collate, read_rows, tokenised

SECRET = "Zanzibar"


@pytest.fixture(scope="module")
def tokenizer():
    return model.bundled_tokenizer()


def written(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    import datasets
    import pandas

    table = pandas.DataFrame({"text": ["one", "NA", "tree, ’x’"], "label": ["b", "a", "b"]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    rows = table.to_dict("records")
    written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    held = datasets.Dataset.from_list(rows)
    held.save_to_disk(tmp_path / "folder")
    sources = [*(tmp_path / name for name in ("a.csv", "a.parquet", "a.jsonl", "folder")), table, rows, held]
    for source in sources:
        found = read_rows(source, "text", "label")
        assert (found.texts, found.labels) == (["one", "NA", "tree, ’x’"], ["b", "a", "b"]), source
    plain = written(tmp_path / "a.txt", "one\n\n two \n")
    assert read_rows(plain, "text", None).texts == ["one", "two"]
    assert len(read_rows(None, "text", None).texts) > 100


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("gone.jsonl", None, [], "cannot be read: No such file"),
        ("gone.csv", None, [], "no such file"),
        ("a.jsonl", "", [], "is empty"),
        ("a.csv", "", [], "is empty"),
        ("a.txt", "\n\n", [], "is empty"),
        ("a.doc", "x", [], "unknown kind '.doc'"),
        ("a.jsonl", f'{{"text": "{SECRET}"}}\n{{"text":\n', [], "line 2 is no JSON"),
        ("a.jsonl", "[" * 100_000 + "]" * 100_000, [], "line 1 is no JSON"),
        ("a.jsonl", '{"text": "\\ud800 half a character"}\n', [], "row 1 has no text"),
        ("a.jsonl", f'["{SECRET}"]\n', [], "row 1 is no object"),
        ("a.jsonl", f'{{"{SECRET}": 3}}\n', [], "no column 'text' in row 1"),
        ("a.jsonl", '{"body": "x"}\n' * 2, [], "no column 'text' in row 1; there are body: choose with --text-column"),
        (
            "a.jsonl",
            f'{{"text": "x", "b": 1}}\n{{"{SECRET}": 3, "b": 1}}\n',
            [],
            "row 2; there are b:",
        ),
        ("a.csv", f"body\n{SECRET}\n", [], "no column 'text'; there are body: choose with --text-column"),
        ("a.csv", f'text,b\n"{SECRET}', [], "cannot be read as csv"),
        ("a.parquet", SECRET, [], "cannot be read as parquet"),
        ("a.jsonl", '{"text": "x"}\n{"text": 7}\n{"text": null}\n', [], "rows 2, 3 have no text"),
        ("a.csv", "text,label\nx,\ny,b\n", ["--task", "classification"], "row 1 has no class"),
        ("a.csv", "text,label\nx,b\ny,b\n", ["--task", "classification", "--batch-size", "1"], "only one class"),
        ("a.txt", f"short\n{SECRET * 99}\n", ["--batch-size", "1"], "1 of 2 rows are longer .*row 2.*--truncate"),
        ("a.txt", f"{SECRET}\n", ["--batch-size", "2"], "there are 1 samples: give at most that"),
        ("a.txt", "x\n", ["--batch-size", "1", "--target-delta", "1"], "--target-delta 1.0: give a number between"),
        (
            "a.txt",
            "x\ny\nz\n",
            ["--batch-size", "1", "--target-epsilon", "1e-4"],
            "no less than 0.01; give 0.02 or more",
        ),
        ("a.txt", "x\n", ["--context", "1000"], "the model takes at most 128 tokens"),
        ("a.txt", "x\n", ["--eval", "2"], "a fraction between 0 and 1"),
        ("a.txt", "x\n", ["--fsdp"], "torchrun"),
        ("a.txt", "x\n", ["--device", "meta"], "--device meta: give cpu or cuda"),
        ("a.txt", "x\n", ["--resume"], "no checkpoint in"),
        ("a.txt", "x\n", ["--model", "gpt2"], "--random-weights"),
        ("a.txt", "x\n", ["--model", "."], "no config.json"),
        ("a.txt", "x\n", ["--batch-size", "1", "--report-to", "nowhere"], "nowhere is not supported"),
        ("a.txt", "x\n", ["--lora-rank", "2", "--lora-targets", "nothing", "--batch-size", "1"], "--lora-targets"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, name, content, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if content is not None:
        written(tmp_path / name, content)
    noise = [] if "--target-epsilon" in options else ["--noise-multiplier", "1"]
    given = ["finetune", "--train", str(tmp_path / name), "--output", str(tmp_path / "out"), *noise, *options]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dpfast finetune: ")
    with pytest.raises(FinetuneError, match=message):
        raise FinetuneError(error)
    assert SECRET not in error
    assert not list((tmp_path / "out").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"epochs": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": 1e-300},
        {"physical_batch_size": "many"},
        {"task": "poetry"},
        {"clipping_fn": "soft"},
        {"seed": -1},
        {"report_to": "all"},
        {"target_epsilon": 1.0, "noise_multiplier": 1.0},
        {"seed": 1, "secure": True},
        {"target_epsilon": 1000.0},
    ],
)
def test_options_are_checked_before_anything_else(changes):
    with pytest.raises(FinetuneError, match=r"--"):
        FinetuneConfig(**changes).validate()


def test_padding(tokenizer):
    rows = data.Rows(["a bridge", "the long way round by the mill and the river"])
    samples = tokenised(rows, tokenizer, 128, False, None)
    batch = Collate(tokenizer.pad_token_id, 128, False)([samples[0], samples[1]])
    length = samples.longest
    assert batch["input_ids"].shape == (2, -(-length // 8) * 8)
    short = int(batch["attention_mask"][0].sum())
    assert batch["input_ids"][0, short - 1] == tokenizer.eos_token_id
    assert batch["labels"][0, :short].tolist() == batch["input_ids"][0, :short].tolist()
    assert (batch["labels"][0, short:] == -100).all()
    empty = Collate(0, 128, False)([])
    assert {x.shape for x in empty.values()} == {(0, 8)}
    cut = tokenised(rows, tokenizer, 5, True, None)
    assert len(cut) == 2 and cut.longest == 5  # cut, not split
    assert Collate(0, 5, False)([cut[1]])["input_ids"].shape == (1, 5)
    assert cut.digest != samples.digest


def test_the_size_that_fits(monkeypatch):
    def attempt(rows):
        held = np.ones(rows << 21)  # 16 MiB a sample
        held += 1

    class Memory:
        available = int(100 * (1 << 20) / fit.SHARE)

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    assert fit.fitting_size(attempt, 64, torch.device("cpu"), 0) == 4
    assert fit.fitting_size(attempt, 2, torch.device("cpu"), 0) == 2
    with pytest.raises(FinetuneError, match="not even one"):
        fit.fitting_size(attempt, 64, torch.device("cpu"), 90 << 20)
    assert fit.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not fit.is_out_of_memory(RuntimeError("shapes do not fit"))
