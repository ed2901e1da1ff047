"""``paperscale generate`` on the checkpoint of a real run, whose set has a tokenizer of its own text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import attempts
from paperscale.cli import main
from paperscale.data.prepare.text import encode_article
from paperscale.data.tokenizer import FILE, TokenizerFile, train
from paperscale.data.tokens import write_tokens
from paperscale.data.writer import ShardWriter
from paperscale.errors import FINISHED
from paperscale.jobs.run import Run
from tiny import write_recipe

TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "A fox is quick; über 数 the dog is not.\n"] * 30
NETWORK = {"vocab_size": 320, "layers": 2, "hidden": 32, "heads": 2, "positions": 32, "dropout": 0.0}


def write_set(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / FILE).write_text(train(kind, TEXTS, 320).to_json())
    file = TokenizerFile.at(folder / FILE)
    with ShardWriter(folder, "foxes", num_processes=0) as writer:
        writer.attach(FILE, (folder / FILE).read_bytes())
        for split in ("train", "val", "test"):
            write_tokens(writer, split, TEXTS, lambda text: encode_article(text, file), 320)
    return folder


def recipe_of(data: Path, segments: bool) -> str:
    network = {"class_path": "paperscale.papers.gpt.Gpt2", "init_args": NETWORK}
    model = {"class_path": "paperscale.papers.gpt.GptLanguageModel"}
    blocks = {"path": str(data), "length": 32, "global_batch_size": 8, "next_token": True, "segments": segments}
    return yaml.safe_dump(
        {
            "model": {**model, "init_args": {"network": network, "lr": 0.01, "warmup": 0.1}},
            "data": {"class_path": "paperscale.data.TokenBlocks", "init_args": blocks},
            "trainer": {"max_steps": 40, "limit_val_batches": 0, "gradient_clip_val": 1.0},
            "checkpoint": {"every_n_steps": 40},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder of runs: of tokens, of bytes, and of images."""
    folder = tmp_path_factory.mktemp("generated")
    for kind in ("bpe", "bytes"):
        (folder / f"{kind}.yaml").write_text(recipe_of(write_set(folder / f"data-{kind}", kind), kind == "bytes"))
    write_recipe(folder / "images.yaml", tiny_shards)
    with pytest.MonkeyPatch.context() as patch, attempts.own_signals():
        patch.setenv("PAPERSCALE_RUNS", str(folder / "runs"))
        for name in ("bpe", "bytes"):
            assert attempts.attempt(attempts.begin(name, str(folder / f"{name}.yaml"))) == FINISHED
        short = ("trainer.max_epochs=1", "trainer.limit_val_batches=0", "test_after_fit=false")
        assert attempts.attempt(attempts.begin("images", str(folder / "images.yaml"), *short)) == FINISHED
    return folder


@pytest.fixture(autouse=True)
def _at(trained: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", runs)
    monkeypatch.chdir(tmp_path)


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["generate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_was_trained_on_is_written_again(capsys):
    found = asked(capsys, "bpe", "--prompt", "The quick", "--temperature", "0", "--tokens", "60")
    (text,) = found["texts"]
    assert (found["step"], found["checkpoint"], found["weights"]) == (40, "bpe/step-00000040", "trained")
    assert text["prompt"] == "The quick"
    assert text["text"].startswith(" brown fox")
    assert text["ended"]
    assert text["tokens"] < 60, "the end is learnt too"
    assert main(["generate", "bpe", "--prompt", "The quick", "--temperature", "0"]) == 0
    assert capsys.readouterr() == (f"The quick{text['text']}\n", "step 40 of bpe\n")


def test_prompts_of_different_lengths_are_gone_on_with_together(capsys):
    words = ["--prompt", "The", "--prompt", "A fox is quick; über", "--count", "2", "--tokens", "9", "--top-k", "40"]
    found = asked(capsys, "bytes", *words)["texts"]
    assert [text["prompt"] for text in found] == ["The", "The", "A fox is quick; über", "A fox is quick; über"]
    assert [text["tokens"] for text in found] == [9] * 4
    assert asked(capsys, "bytes", *words)["texts"] == found
    assert asked(capsys, "bytes", *words, "--seed", "1")["texts"] != found
    assert main(["generate", "bytes", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"--- 1\nThe{found[0]['text']}\n\n--- 2\n")


def test_without_a_prompt_a_document_begins(capsys):
    (text,) = asked(capsys, "bpe", "--tokens", "5")["texts"]
    assert text["prompt"] == ""
    assert text["text"]


def test_weights_and_tokenizers_from_elsewhere(trained, capsys, tmp_path):
    assert main(["checkpoint", "export", "bpe", "-o", str(tmp_path / "one.safetensors")]) == 0
    words = ["--prompt", "The", "--temperature", "0", "--tokens", "6"]
    expected = asked(capsys, "bpe", *words)["texts"]
    file = asked(capsys, str(trained / "bpe.yaml"), "--checkpoint", str(tmp_path / "one.safetensors"), *words)
    assert file["texts"] == expected
    tokenizer = ["--tokenizer", str(trained / "data-bpe" / FILE)]
    gone = f"data.path={tmp_path / 'gone'}"
    assert asked(capsys, "bpe", gone, *tokenizer, *words)["texts"] == expected


def test_transformers_takes_the_run_with_its_tokenizer(capsys, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not there; `make setup` installs it")
    assert main(["checkpoint", "export", "bpe", "--format", "huggingface", "-o", str(tmp_path / "hf")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer("The quick", return_tensors="pt", add_special_tokens=False)
    written = model.generate(**tokens, max_new_tokens=6, do_sample=False)
    ours = asked(capsys, "bpe", "--prompt", "The quick", "--temperature", "0", "--tokens", "6")["texts"][0]
    assert tokenizer.decode(written[0]) == "The quick" + ours["text"]
    assert main(["test", "bpe", "--checkpoint", str(tmp_path / "hf/model.safetensors"), "--json"]) == 0
    assert "named as huggingface names them" in json.loads(capsys.readouterr().out)["weights"]


def test_scores_of_tokens_are_of_bytes_too(runs):
    for name in ("bpe", "bytes"):
        results = Run(runs / name).read_json("results.json")
        ratio = results["test/bits_per_byte"] / results["test/bits_per_token"]
        assert ratio == pytest.approx(1.0, abs=1e-5) if name == "bytes" else ratio < 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images", "--prompt", "x"], "ResNetClassifier does not generate text; name a run of a language model"),
        (["bytes"], "has no token that a text begins with; give --prompt TEXT"),
        (["bytes", "--prompt", "x", "--top-p", "2"], "top-p 2.0: give a probability above 0"),
        (["bytes", "--prompt", "x", "--tokens", "0"], "'0' is not a whole number of at least 1"),
        (["bpe", "--prompt", "x", "--checkpoint", "7"], "has no checkpoint '7'; name best, last or a step"),
        (["bpe", "--prompt", "x", "data.path=gone"], "or name a tokenizer.json with --tokenizer"),
        (["bpee", "--prompt", "x"], "did you mean 'bpe'?"),
        (["bpe", "--promt", "x"], "did you mean '--prompt'?"),
        (["gpt-small-enwik8", "--prompt", "x"], "no checkpoint to generate from: name a run"),
    ],
)
def test_a_users_mistake_is_one_line_with_the_fix(words, message, capsys):
    assert main(["generate", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
