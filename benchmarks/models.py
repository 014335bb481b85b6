"""The models that the demo and the benchmarks run, and one way to decode with them.  The text is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

import moe_fx
from moe_fx.evaluate import with_cache


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3-MoE, in the field's letters: H ``hidden``, I ``intermediate``, E ``experts``, K ``top_k``."""

    vocab: int
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    key_value_heads: int

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of one layer: gate, up and down projection."""
        return 3 * self.hidden * self.intermediate

    def describe(self) -> str:
        return f"{self.layers} layers, H={self.hidden}, I={self.intermediate}, E={self.experts}, K={self.top_k}"


DEMO = Shape(vocab=2048, layers=2, hidden=192, intermediate=64, experts=64, top_k=8, heads=4, key_value_heads=2)
TINY = Shape(vocab=512, layers=2, hidden=64, intermediate=64, experts=8, top_k=4, heads=2, key_value_heads=1)
DECODE_600M = Shape(vocab=4096, layers=6, hidden=1024, intermediate=512, experts=64, top_k=8, heads=16, key_value_heads=4)


def qwen3_moe(shape: Shape, *, dtype: torch.dtype, seed: int, aux_loss: float = 0.0) -> Qwen3MoeForCausalLM:
    """A randomly initialised Qwen3-MoE with ``grouped_mm`` experts, which Dynamo traces as one graph.

    Weights have the standard deviation 1/sqrt(H) that keeps the size of activations, not the 0.02 of large models:
    with H = 192 training starts much faster.
    """
    sizes: dict[str, Any] = {"head_dim": shape.hidden // shape.heads}  # which the config's signature does not list
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        router_aux_loss_coef=aux_loss,
        initializer_range=shape.hidden**-0.5,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_cache=False,
        **sizes,
    )
    torch.manual_seed(seed)
    model: Any = Qwen3MoeForCausalLM(config)
    model = model.to(dtype).eval()  # Any: transformers' decorator hides the dtype that `to` takes
    model.set_experts_implementation("grouped_mm")
    return model


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The router module of every MoE layer, by the site's name."""
    return {name.removesuffix(".gate"): m for name, m in model.named_modules() if name.endswith(".mlp.gate")}


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Plain smaller K: the same weights, fewer picks per token."""
    for router in routers(model).values():
        router.top_k = top_k  # type: ignore[assignment]


def compiled(
    model: Qwen3MoeForCausalLM, policy: moe_fx.Policy | None, **options: object
) -> Callable[..., Any]:
    """The model compiled as a user would, by Inductor alone where ``policy`` is None.

    ``isolate_recompiles``, because many of these share one forward function and its limit of recompilations.
    """
    settings: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True}
    if policy is not None:
        settings |= {"backend": "moe_sparse", "options": {"policy": policy, "strict": True, **options}}
    return torch.compile(model, **settings)


class Decoder:
    """Sequences advanced together, one token each a step, with a static key/value cache.

    Args:
        step: the model, compiled or not.
        model: the uncompiled model, for its shapes.
        batch: sequences.
        max_length: tokens the cache holds.
    """

    def __init__(self, step: Callable[..., Any], model: Qwen3MoeForCausalLM, batch: int, max_length: int) -> None:
        config = model.config
        self._step = step
        self._cache = StaticCache(config=config, max_cache_len=max_length)
        self._arguments = with_cache(model, self._cache)
        self._cache.early_initialization(
            batch, config.num_key_value_heads, config.head_dim, next(model.parameters()).dtype, torch.device("cpu")
        )

    def rewind(self) -> None:
        """Forget all tokens."""
        self._cache.reset()

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> tuple[Tensor, list[float]]:
        """Feed ``tokens`` [batch, steps] column by column.

        Returns:
            the logits after every token [batch, steps, vocab], and the seconds each step took.
        """
        logits, seconds = [], []
        for column in tokens.split(1, dim=1):
            start = time.perf_counter()
            output = self._step(input_ids=column.contiguous(), **self._arguments)
            seconds.append(time.perf_counter() - start)
            logits.append(output.logits)
        return torch.cat(logits, dim=1), seconds
