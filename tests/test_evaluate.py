"""Decode-wise evaluation against a plain loop over the uncompiled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx
import tiny
from moe_fx.evaluate import (
    Decoder,
    Evaluation,
    EvaluationError,
    Evaluator,
    Stepwise,
    compiled_to_the_end,
    pareto,
    rows_of,
    windows,
    with_cache,
)
from moe_fx.policy import SmallerK, TopK
from moe_fx.testing import tolerance


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def documents(count: int = 5, length: int = 20) -> list[Tensor]:
    return [tiny.tokens(1, length + i, seed=i)["input_ids"][0] for i in range(count)]


def test_windows_put_different_documents_together_and_score_each_token_once() -> None:
    docs = [torch.arange(100 * i, 100 * i + length) for i, length in enumerate((21, 13, 5, 9))]
    texts = windows(docs, batch=2, context=8, stride=4)
    predicted: list[int] = []
    for group, skip in zip(texts.groups, texts.skips, strict=True):
        assert len({int(row[0]) // 100 for row in group}) == 2
        for row, first in zip(group, skip.tolist(), strict=True):
            predicted += row[1 + first :].tolist()
    assert len(predicted) == len(set(predicted)) == texts.scored
    assert {p // 100 for p in predicted} == {0, 1, 3}  # document 2 is shorter than a window


@pytest.mark.parametrize(
    ("batch", "context", "stride", "words"),
    [(2, 8, 9, "stride is 9"), (4, 8, 8, "2 of 3 documents have more than 8 tokens"), (1, 50, 9, "the longest has 20")],
)
def test_bad_windows(batch: int, context: int, stride: int, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        windows([torch.arange(20), torch.arange(12), torch.arange(3)], batch, context, stride)


def expected_losses(name: str, model: torch.nn.Module, group: Tensor, rule: tiny.Rule | None) -> Tensor:
    """Of every token [N, context].  A step is a batch of one token of each text, the routing patched step by step."""
    from transformers import DynamicCache

    cache, losses = DynamicCache(config=model.config), []
    for t in range(group.shape[1] - 1):
        logits = tiny.expected(model, name, rule, input_ids=group[:, t : t + 1], **with_cache(model, cache))
        losses.append(torch.nn.functional.cross_entropy(logits[:, -1], group[:, t + 1], reduction="none"))
    return torch.stack(losses, dim=1)


@pytest.mark.parametrize(("name", "context"), [("qwen3_moe", 7), ("gpt_oss", 13)])
def test_equals_a_loop_over_the_patched_model(name: str, context: int) -> None:
    """gpt_oss has layers with a sliding window of 8 tokens."""
    model, artifact = tiny.build(name), tiny.random_artifact(name)
    texts = windows(documents(), batch=4, context=context, stride=context, max_groups=1)
    evaluator = Evaluator(model, texts)
    sere = evaluator.evaluate("SERE", moe_fx.SERE(artifact, primary=1))
    rule = tiny.sere_rule(artifact, 1, 0.0)
    for result, patch in ((evaluator.full, None), (sere, rule)):
        want = expected_losses(name, model, texts.groups[0], patch).mean(dim=1)
        torch.testing.assert_close(torch.tensor(result.losses, dtype=want.dtype), want, **tolerance(torch.float32))
    assert evaluator.full.kl == pytest.approx(0, abs=1e-6)
    assert evaluator.full.agreement == 1
    assert sere.kl > 0.001
    assert sere.active_experts < evaluator.full.active_experts
    assert list(sere.active) == list(tiny.ARCHS[name].sites)
    assert sere.tokens == texts.scored == 4 * context
    fewer = evaluator.evaluate("top-1", SmallerK(1))
    assert fewer.off == 4 * (tiny.TOP_K - 1)
    assert max(fewer.active.values()) <= 4  # as many as texts


def test_every_scored_token_weighs_the_same() -> None:
    """The windows of a long document overlap, and later ones score fewer tokens than the first."""
    name = "qwen3_moe"
    model, artifact = tiny.build(name), tiny.random_artifact(name)
    texts = windows(documents(), batch=3, context=7, stride=3)
    evaluator = Evaluator(model, texts)
    sere = evaluator.evaluate("SERE", moe_fx.SERE(artifact, primary=1))
    means = []
    for rule in (None, tiny.sere_rule(artifact, 1, 0.0)):
        losses: list[float] = []
        for group, skip in zip(texts.groups, texts.skips, strict=True):
            by_token = expected_losses(name, model, group, rule)
            losses += [float(x) for row, first in zip(by_token, skip.tolist(), strict=True) for x in row[first:]]
        means.append(sum(losses) / len(losses))
    assert len(losses) == texts.scored == evaluator.full.tokens
    assert len(set(evaluator.full.scored)) == 2
    assert evaluator.full.loss == pytest.approx(means[0], rel=1e-5)
    assert sere.loss_increase(evaluator.full)[0] == pytest.approx(means[1] - means[0], abs=1e-5)


def test_stepwise_logits_equal_a_loop_over_the_patched_model() -> None:
    name = "qwen3_moe"
    model, artifact = tiny.build(name), tiny.random_artifact(name)
    stepwise = Stepwise(model, [moe_fx.SERE(artifact, primary=1)])
    for rows, length in ((4, 3), (4, 2), (4, 4), (2, 4)):  # a first batch, a shorter, a longer, and one of fewer texts
        tokens = tiny.tokens(rows, length + 1, seed=length)["input_ids"]
        logits = stepwise.logits(tokens[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)
        want = expected_losses(name, model, tokens, tiny.sere_rule(artifact, 1, 0.0)).mean(dim=1)
        torch.testing.assert_close(losses, want, **tolerance(torch.float32))
        whole = tiny.expected(model, name, None, input_ids=tokens[:, :-1])
        torch.testing.assert_close(Stepwise(model, [TopK()]).logits(tokens[:, :-1]), whole, **tolerance(torch.float32))
        assert not torch.allclose(logits, whole, **tolerance(torch.float32))


def test_a_model_generates_under_the_policy_and_afterwards_without_it() -> None:
    name = "qwen3_moe"
    model, artifact = tiny.build(name), tiny.random_artifact(name)
    stepwise = Stepwise(model, [moe_fx.SERE(artifact, primary=1)])

    def generated(tokens: Tensor) -> Tensor:
        return model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(tokens))

    for rows, length in ((3, 4), (2, 6)):
        tokens = tiny.tokens(rows, length, seed=length)["input_ids"]
        with tiny.patched(model, name, tiny.sere_rule(artifact, 1, 0.0)):
            want = generated(tokens)
        plain = generated(tokens)
        with stepwise.generating():
            got = generated(tokens)
        assert got.tolist() == want.tolist() != plain.tolist()
        assert generated(tokens).tolist() == plain.tolist()


def test_a_step_is_compiled_once_even_where_a_window_slides() -> None:
    """Without that Dynamo gives up after some steps, and decodes on without the policy."""
    compiled: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    tokens = tiny.tokens(2, 15)["input_ids"]
    assert len(list(Decoder(tiny.build("gpt_oss"), *tokens.shape, backend=count).decode(tokens))) == 14
    assert len(compiled) == 1


def test_a_model_that_takes_no_static_cache_is_told() -> None:
    model = tiny.build("qwen3_moe")

    def with_a_cache_of_its_own(**inputs: object) -> None:
        raise ValueError("this model brings\nits own cache")

    model.forward = with_a_cache_of_its_own
    words = "Qwen3MoeForCausalLM does not decode with a static key/value cache, which is what serves a batch: this model brings$"
    with pytest.raises(EvaluationError, match=words):
        Evaluator(model, windows(documents(), 2, 4, 4, 1))


def test_a_model_that_changes_with_every_step_is_told() -> None:
    class Counting(torch.nn.Module):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return x * self.steps

    program = torch.compile(Counting(), backend="eager", dynamic=False)

    def decode() -> None:
        with compiled_to_the_end():
            for _ in range(40):
                program(torch.ones(2))

    with pytest.raises(EvaluationError, match="something in this model changes with every step"):
        decode()


def test_a_model_whose_logits_are_not_finite_is_told() -> None:
    model = tiny.build("qwen3_moe")
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="the loss under 'full' is not finite.*torch.float32 is too narrow"):
        Evaluator(model, windows(documents(), 2, 6, 6))


def test_a_model_without_experts_is_told() -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(EvaluationError, match="no expert routing was found"):
        Evaluator(model, windows(documents(), 2, 4, 4, 1))


def test_pareto_and_rows() -> None:
    def made(name: str, active: float, kl: float) -> Evaluation:
        return Evaluation(name, (), 2, losses=[1.0 + kl, 3.0 + kl], kl=kl, active={"a": active}, agreement=0.5, step_ms=1.0)

    found = [made("a", 4, 0.0), made("b", 2, 0.5), made("c", 3, 0.6), made("d", 1, 0.7)]
    assert [e.name for e in pareto(found)] == ["d", "b", "a"]
    rows = rows_of(found, found[0])
    assert rows[1]["loss_above_full"] == pytest.approx(0.5)
    assert rows[1]["loss_above_full_standard_error"] == pytest.approx(0, abs=1e-6)
