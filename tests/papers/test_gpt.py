"""GPT and GPT-2: the papers' networks to the parameter, what they compute, how they are trained, what they write."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paperscale.data.text import IGNORED
from paperscale.errors import UserError
from paperscale.nn.sampling import Sampling
from paperscale.papers.gpt import SIZES, Gpt, Gpt1, Gpt2, GptLanguageModel
from paperscale.training.speed import SpeedOptions, apply

TINY: dict[str, Any] = {"vocab_size": 40, "layers": 3, "hidden": 24, "heads": 4, "positions": 12, "dropout": 0.0}
BOTH = pytest.mark.parametrize("kind", [Gpt1, Gpt2])


def drawn(network: Any) -> Any:
    """Draw every parameter, so that none is the same as another, or zero, and logits are far apart."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return network.eval()


def blocks(count: int = 3, length: int = 12) -> dict[str, Any]:
    """A batch as TokenBlocks makes it."""
    torch.manual_seed(1)
    text = torch.randint(TINY["vocab_size"], (count, length + 1))
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def divided(lengths: list[int], batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with documents of these lengths in it, as TokenBlocks makes it with segments."""
    ends = torch.tensor(lengths).cumsum(0)
    targets = batch["targets"].flatten().clone()
    targets[ends - 1] = IGNORED
    position = torch.cat([torch.arange(length) for length in lengths]).view_as(batch["tokens"])
    offsets = torch.cat([torch.zeros(1), ends]).int()
    return {**batch, "targets": targets.view_as(position), "position": position, "lengths": lengths, "offsets": offsets}


# -- the networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (Gpt1, 116_534_784),
        (lambda: Gpt2("small"), 124_439_808),
        (lambda: Gpt2("medium"), 354_823_168),
        (lambda: Gpt2("large"), 774_030_080),
        (lambda: Gpt2("xl"), 1_557_611_200),
    ],
)
def test_parameters_of_the_released_weights(made, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in made().parameters()) == count


def test_a_size_that_table_2_has_not_is_refused():
    assert list(SIZES) == ["small", "medium", "large", "xl"]
    with pytest.raises(UserError, match=r"there are small, medium, large, xl; did you mean 'medium'\?"):
        Gpt2("medum")
    with pytest.raises(UserError, match="cannot be divided over 5 heads; use a multiple of 5"):
        Gpt2(layers=1, hidden=24, heads=5)


def plainly(network: Gpt, token_NL: Tensor) -> Tensor:
    """The logits as the papers write them: every head by itself, with a mask, over sequences of one length."""

    def norm(x: Tensor, layer: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def attend(x: Tensor, layer: Any) -> Tensor:
        q, k, v = (x @ part.weight.T + part.bias for part in (layer.query, layer.key, layer.value))
        heads = []
        width = q.shape[-1] // layer.heads
        for at in range(0, q.shape[-1], width):
            score = q[..., at : at + width] @ k[..., at : at + width].mT / width**0.5
            future = torch.ones(score.shape[-2:]).triu(1).bool()
            heads.append(score.masked_fill(future, float("-inf")).softmax(-1) @ v[..., at : at + width])
        return torch.cat(heads, -1) @ layer.output.weight.T + layer.output.bias

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def feed_forward(x: Tensor, block: Any) -> Tensor:
        return gelu(x @ block.inner.weight.T + block.inner.bias) @ block.outer.weight.T + block.outer.bias

    h = network.token.weight[token_NL] + network.position.weight[: token_NL.shape[1]]
    for block in network.blocks:
        if network.pre_norm:
            h = h + attend(norm(h, block.attention_norm), block.attention)
            h = h + feed_forward(norm(h, block.norm), block)
        else:
            h = norm(h + attend(h, block.attention), block.attention_norm)
            h = norm(h + feed_forward(h, block), block.norm)
    h = h if network.norm is None else norm(h, network.norm)
    return h @ network.token.weight.T


@BOTH
def test_it_computes_what_the_papers_write(kind):
    network, batch = drawn(kind(**TINY)).double(), blocks()
    expected = plainly(network, batch["tokens"])
    assert torch.allclose(network.logits(batch), expected.flatten(0, 1))
    found = network(batch)
    assert found.loss.item() == pytest.approx(
        F.cross_entropy(expected.flatten(0, 1), batch["targets"].flatten()).item()
    )


@BOTH
def test_documents_of_a_block_do_not_see_each_other(kind):
    network, batch = drawn(kind(**TINY)), divided([5, 7, 1, 11, 12], blocks())
    logits = network.logits(batch)
    tokens, at = batch["tokens"].flatten(), 0
    for length in batch["lengths"]:
        alone = {"tokens": tokens[None, at : at + length]}
        torch.testing.assert_close(logits[at : at + length], network.logits(alone), rtol=1e-5, atol=1e-5)
        at += length


def test_the_loss_is_the_mean_over_blocks_of_the_mean_over_their_targets():
    network, batch = drawn(Gpt2(**TINY)), divided([5, 7, 1, 11, 12], blocks())
    entropy = F.cross_entropy(network.logits(batch), batch["targets"].flatten(), reduction="none").view(3, 12)
    counts = (batch["targets"] != IGNORED).sum(1)
    assert counts.tolist() == [10, 10, 11]
    assert network(batch).loss.item() == pytest.approx((entropy.sum(1) / counts).mean().item(), rel=1e-5)


@BOTH
def test_at_the_beginning_every_token_is_as_likely(kind):
    torch.manual_seed(0)
    network = kind(vocab_size=1000, layers=4, hidden=64, heads=4, positions=32)
    text = torch.randint(1000, (8, 33))
    assert network({"tokens": text[:, :-1], "targets": text[:, 1:]}).loss.item() == pytest.approx(
        math.log(1000), abs=0.1
    )


def test_weights_are_drawn_as_the_papers_say():
    torch.manual_seed(0)
    made = {"vocab_size": 500, "layers": 8, "hidden": 64, "heads": 4, "positions": 500}
    for network, summed, positions in ((Gpt2(**made), 0.02 / 16**0.5, 0.01), (Gpt1(**made), 0.02, 0.02)):
        block: Any = network.blocks[5]
        for weight, std in (
            (network.token.weight, 0.02),
            (network.position.weight, positions),
            (block.attention.query.weight, 0.02),
            (block.inner.weight, 0.02),
            (block.attention.output.weight, summed),
            (block.outer.weight, summed),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert not block.inner.bias.any()
        assert network.vocabulary.weight is network.token.weight


def test_compiled_blocks_compute_the_same():
    plain, compiled = (GptLanguageModel(drawn(Gpt2(**TINY))) for _ in range(2))
    apply(SpeedOptions(compile="blocks", compile_backend="aot_eager"), compiled)
    for batch in (blocks(), divided([5, 7, 1, 11, 12], blocks()), divided([12, 1, 2, 9, 12], blocks())):
        assert torch.allclose(plain.network(batch).loss, compiled.network(batch).loss)


# -- training --------------------------------------------------------------------------------------------------


def trained(module: GptLanguageModel, steps: int = 10) -> dict[str, Any]:
    """What the module configures for a training of so many steps."""
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps)  # type: ignore[assignment]
    return module.configure_optimizers()  # type: ignore[return-value]


def test_matrices_decay_and_the_rate_rises_and_falls():
    module = GptLanguageModel(Gpt2(**TINY), lr=1.0, warmup=4, weight_decay=0.1, least=0.1)
    configured = trained(module)
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in module.parameters()
    )
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert trained(GptLanguageModel(Gpt2(**TINY), lr=1.0, warmup=0.5))["optimizer"].param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, r"warmup=-1: give a number of steps"),
        ({"least": 2.0}, r"least=2.0: give the last learning rate as a share"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        GptLanguageModel(Gpt2(**TINY), **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"next_token": False}, "data.next_token=false.*set it to true"),
        ({"length": 13}, "set data.length=12 or model.network.positions=13"),
        ({"has_tokenizer": True, "tokens": 41}, "data/set has 41 tokens.*set model.network.vocab_size=41"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, message):
    whole = {"next_token": True, "length": 12, "has_tokenizer": False, "tokens": 40, "paths": ["data/set"], **data}
    stream = SimpleNamespace(**whole, tokenizer=lambda: SimpleNamespace(vocab_size=whole["tokens"]))
    with pytest.raises(UserError, match=message):
        GptLanguageModel(Gpt2(**TINY)).check_data(stream)


def test_blocks_longer_than_the_networks_positions_are_refused():
    with pytest.raises(UserError, match=r"a block of 13 tokens, and model.network.positions=12: shorten data.length"):
        Gpt2(**TINY)(blocks(length=13))


def test_scores_are_over_all_targets_and_all_bytes():
    module = GptLanguageModel(drawn(Gpt2(**TINY)))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.bytes_V = torch.arange(TINY["vocab_size"]) % 5  # of the text of each token
    batches = [blocks(), divided([5, 7, 1, 11, 12], blocks())]
    nats, bytes_, count = 0.0, 0, 0
    for batch in batches:
        module.test_step(batch, 0)
        target = batch["targets"].flatten()
        nats += F.cross_entropy(module.network.logits(batch), target, reduction="sum").item()
        bytes_ += int((target[target != IGNORED] % 5).sum())
        count += int((target != IGNORED).sum())
    metrics: Any = module
    assert metrics.test_loss.compute().item() == pytest.approx(nats / count, rel=1e-5)
    assert metrics.test_perplexity.compute().item() == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert metrics.test_bits_per_token.compute().item() == pytest.approx(nats / count / math.log(2), rel=1e-5)
    assert metrics.test_bits_per_byte.compute().item() == pytest.approx(nats / bytes_ / math.log(2), rel=1e-5)


# -- generation ------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6] * 9, [7] * 12, [8] * 11]  # also longer than the network's positions


@BOTH
@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(), Sampling(0.7, top_k=10, seed=1), Sampling(1.3, top_p=0.8, seed=2)], ids=str
)
def test_keys_and_values_that_are_kept_change_no_token(kind, sampling):
    network = drawn(kind(**TINY))
    kept = network.generate(PROMPTS, 30, sampling)
    assert [len(text) for text in kept] == [30] * 5
    assert kept == network.generate(PROMPTS, 30, sampling, cached=False)


def test_each_token_is_read_once_until_the_positions_are_used_up():
    network, read = drawn(Gpt2(**TINY)), []
    network.token.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    network.generate([[1, 2, 3]], 20, Sampling(0))
    assert read == [3, *[1] * 9, 7, *[1] * 5, 7, *[1] * 3], "of 12 positions, 6 are given up at a time"


def test_the_most_likely_tokens_are_those_of_the_logits():
    network, prompt = drawn(Gpt2(**TINY)), [3, 1, 4]
    (found,) = network.generate([prompt], 6, Sampling(0))
    text = list(prompt)
    for token in found:
        assert token == plainly(network, torch.tensor([text]))[0, -1].argmax()
        text.append(token)


def test_what_follows_a_prompt_does_not_depend_on_the_prompts_behind_it():
    network = drawn(Gpt2(**TINY))
    whole = network.generate(PROMPTS, 8)
    assert network.generate(PROMPTS[:2], 8) == whole[:2]
    assert network.generate(PROMPTS[:2], 5) == [text[:5] for text in whole[:2]]
    assert network.generate([PROMPTS[0]] * 2, 8)[0] != network.generate([PROMPTS[0]] * 2, 8)[1]
    assert network.generate(PROMPTS[:1], 8, Sampling(seed=1)) != whole[:1]


def test_a_text_ends_with_its_end():
    network = drawn(Gpt2(**TINY))
    free = network.generate(PROMPTS, 20)
    end = free[0][4]
    stopped = network.generate(PROMPTS, 20, end=end)
    for text, whole in zip(stopped, free, strict=True):
        assert text == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert network.generate([], 5) == []


def test_dropout_is_off_while_it_writes_and_on_again_afterwards():
    network = drawn(Gpt2(**{**TINY, "dropout": 0.5}))
    expected = network.generate(PROMPTS, 8, Sampling(0))
    assert network.train().generate(PROMPTS, 8, Sampling(0)) == expected
    assert network.training
    assert network.blocks[0].dropout.training


@pytest.mark.parametrize(("prompt", "message"), [([], "a prompt of 0 tokens"), ([1, 40], "the largest 40")])
def test_prompts_that_cannot_be_read_are_refused(prompt, message):
    with pytest.raises(UserError, match=f"{message}.*vocabulary of 40: give at least one token"):
        Gpt2(**TINY).generate([[1], prompt])
