"""``paperscale generate``: text that a run's language model goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paperscale.data.tokenizer import Tokenizer
from paperscale.errors import UserError
from paperscale.jobs import snapshot
from paperscale.jobs.evaluate import Request, load, source_of
from paperscale.nn.sampling import Sampling
from paperscale.training.recipe import RecipeCLI


def generate(
    request: Request,
    prompts: Sequence[str],
    count: int,
    tokens: int,
    sampling: Sampling,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Return texts that begin with prompts, and what wrote them.

    Where a checkpoint holds averages of the weights, these write, unless its recipe's ``ema.evaluate`` is false.

    Args:
        request: whose weights.
        prompts: beginnings; none at all is the beginning of a document.
        count: texts for each.
        tokens: of each continuation at most.
        sampling: how tokens are drawn.
        tokenizer: file to use in place of the data set's.

    Returns:
        ``texts``, each with ``prompt``, ``text`` (what follows it), ``tokens`` (how many that are) and ``ended``
        (whether by a token for the end); and ``checkpoint``, ``step``, ``weights`` as :func:`evaluate` does.

    Raises:
        UserError: there is no checkpoint, its model does not generate, or a prompt has no token.
    """
    source = source_of(request)
    if request.run is not None:
        snapshot.use(request.run)
    cli, facts = load(RecipeCLI(request.recipe.to_cli()), source)
    model: Any = cli.model
    if not hasattr(model, "generate"):
        raise UserError(
            f"{type(model).__name__} does not generate text; name a run of a language model, such as gpt-small-enwik8's"
        )
    reader = _tokenizer(cli.datamodule, tokenizer)
    if (known := getattr(model.network, "vocab_size", None)) is not None and reader.vocab_size > known:
        raise UserError(
            f"{reader.name} has {reader.vocab_size} tokens, and the network knows {known}: name the tokenizer that it "
            "was trained with, or leave --tokenizer out"
        )
    end = _end(reader)
    begun = [_encoded(reader, prompt, end) for prompt in prompts or [""] for _ in range(count)]
    found = model.to(cli.device).generate(begun, tokens=tokens, sampling=sampling, end=end)
    texts = []
    for beginning, text in zip(begun, found, strict=True):
        before = reader.decode(beginning)
        follows = reader.decode([*beginning, *text]).removeprefix(before)  # a space may depend on what is before
        ended = bool(text) and text[-1] == end
        texts.append({"prompt": before, "text": follows, "tokens": len(text), "ended": ended})
    return {**facts, "texts": texts}


def _tokenizer(data: Any, file: Path | None) -> Tokenizer:
    """Return the tokenizer of a file, or of the recipe's data set."""
    if file is not None:
        return Tokenizer.load(file)
    if not hasattr(data, "tokenizer"):
        raise UserError(f"{type(data).__name__} has no tokenizer; name a tokenizer.json with --tokenizer")
    try:
        found: Tokenizer = data.tokenizer()
    except UserError as error:
        raise UserError(f"{error}; or name a tokenizer.json with --tokenizer") from error
    return found


def _end(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a text, ``None`` for none."""
    try:
        return tokenizer.number("end")
    except UserError:
        return None


def _encoded(tokenizer: Tokenizer, prompt: str, end: int | None) -> list[int]:
    """Return a prompt's tokens; of none the token that ends a document, after which the next begins.

    Raises:
        UserError: there is no such token.
    """
    if found := tokenizer.encode([prompt])[0]:
        return found
    if end is None:
        raise UserError(f"{tokenizer.name} has no token that a text begins with; give --prompt TEXT")
    return [end]
