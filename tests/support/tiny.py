"""Tiny random models of eight architectures, and the same models with their routing patched by hand.

The patched model is the specification of a rewrite: it runs eagerly, and between its router and its experts stands
``kernels/reference.py`` and nothing of ours.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import moe_fx
from moe_fx.kernels import reference

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
EXPERTS, TOP_K, HIDDEN, LAYERS = 10, 3, 32, 2


@dataclass(frozen=True)
class Arch:
    """How to build one architecture, and where its sites are."""

    prefix: str
    sites: tuple[str, ...] = tuple(f"model.layers.{i}.mlp" for i in range(LAYERS))
    config: dict[str, Any] = field(default_factory=dict)


_GROUPED = {"n_group": 5, "topk_group": 3, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5}
_LATENT = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
           "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "head_dim": 4}  # fmt: skip

ARCHS: dict[str, Arch] = {
    "qwen3_moe": Arch("Qwen3Moe", config={"num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 8}),
    "mixtral": Arch("Mixtral", config={"num_local_experts": EXPERTS}),
    "deepseek_v2": Arch("DeepseekV2", config=_LATENT | {"first_k_dense_replace": 0, "routed_scaling_factor": 1.5,
        "topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 3}),
    "deepseek_v3": Arch("DeepseekV3", config=_LATENT | _GROUPED),
    "olmoe": Arch("Olmoe", config={"num_experts": EXPERTS}),
    "gpt_oss": Arch("GptOss", config={"num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 8}),
    "glm4_moe": Arch("Glm4Moe", config=_GROUPED | {"n_routed_experts": EXPERTS, "head_dim": 8}),
    "granitemoe": Arch("GraniteMoe", tuple(f"model.layers.{i}.block_sparse_moe" for i in range(LAYERS)),
        {"num_local_experts": EXPERTS}),
}  # fmt: skip


def build(name: str, experts: str = "grouped_mm", dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A causal language model in eval mode, with random weights that route every token differently."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    arch = ARCHS[name]
    sizes = {
        "vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 24,
        "moe_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "attn_implementation": "eager",
    } | arch.config | config  # fmt: skip
    torch.manual_seed(0)
    model = getattr(module, f"{arch.prefix}ForCausalLM")(getattr(module, f"{arch.prefix}Config")(**sizes)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # correction biases start at zero and stacked experts may start uninitialised
        if key.endswith("e_score_correction_bias") or tensor.dim() == 3:
            tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    model.set_experts_implementation(experts)
    return model.requires_grad_(False)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Any]:
    """Keyword inputs of every model here."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 64, (batch, length), generator=generator), "use_cache": False}


def random_artifact(name: str, seed: int = 0) -> moe_fx.Artifact:
    """Random similarities, and mask routers that switch off about half of the picks."""
    generator = torch.Generator().manual_seed(seed)
    return moe_fx.Artifact({
        site: {
            "similarity": _symmetric(torch.rand(EXPERTS, EXPERTS, generator=generator)),
            "mask_router": 0.4 * torch.randn(EXPERTS, HIDDEN, generator=generator),
        }
        for site in ARCHS[name].sites
    })  # fmt: skip


def _symmetric(matrix: Tensor) -> Tensor:
    return ((matrix + matrix.T) / 2).fill_diagonal_(1)


Rule = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sere_rule(artifact: moe_fx.Artifact, primary: int, threshold: float) -> Rule:
    """SERE at a site: (site, hidden, ids, weights) -> (ids, weights)."""

    def rule(site: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return reference.sere_reroute(ids, artifact.sites[site]["similarity"], primary, threshold), weights

    return rule


def beam_rule(artifact: moe_fx.Artifact, tau: float) -> Rule:
    """BEAM at a site.  An off pick keeps its expert and gets weight 0, so that any experts code can run it."""

    def rule(site: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden.float() @ artifact.sites[site]["mask_router"].T
        masked, masked_ids = reference.beam_mask(weights, ids, logits, tau)
        return torch.where(masked_ids < 0, ids, masked_ids), masked

    return rule


def beam_then_sere_rule(artifact: moe_fx.Artifact, tau: float, primary: int, threshold: float) -> Rule:
    """BEAM, then SERE on what is left on."""

    def rule(site: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden.float() @ artifact.sites[site]["mask_router"].T
        masked, masked_ids = reference.beam_mask(weights, ids, logits, tau)
        moved = reference.sere_reroute(masked_ids, artifact.sites[site]["similarity"], primary, threshold)
        return torch.where(moved < 0, ids, moved), masked

    return rule


def artifact_with_share_off(model: nn.Module, name: str, share: float, tau: float, **inputs: Any) -> moe_fx.Artifact:
    """Mask routers that switch off, at every site and for these inputs, exactly this share of the picks, drawn at random.

    A token's mask logits are a linear function of its hidden state, and there are fewer tokens here than dimensions, so
    that mask routers exist for any logits.  What a layer masks changes what the next one sees: one after the other.
    """
    sites = {site: dict(tables) for site, tables in random_artifact(name).sites.items()}
    generator = torch.Generator().manual_seed(5)

    def rule(site: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        off = torch.randperm(ids.numel(), generator=generator)[: round(share * ids.numel())]
        token, expert = off // TOP_K, ids.flatten()[off]
        wanted = torch.full((ids.shape[0], EXPERTS), 4.0, dtype=torch.float64)
        wanted[token, expert] = -4.0
        mask_router = torch.linalg.lstsq(hidden.double(), wanted).solution.T.float().contiguous()
        sites[site]["mask_router"] = mask_router
        masked, masked_ids = reference.beam_mask(weights, ids, hidden.float() @ mask_router.T, tau)
        assert int((masked_ids < 0).sum()) == len(off), "the mask router must switch off as many picks as were drawn"
        return torch.where(masked_ids < 0, ids, masked_ids), masked

    expected(model, name, rule, **inputs)
    return moe_fx.Artifact(sites)


@contextlib.contextmanager
def patched(model: nn.Module, name: str, rule: Rule) -> Iterator[dict[str, list[Tensor]]]:
    """``model`` with ``rule`` between every router and its experts.  Yields the ids that the experts saw, by site."""
    seen: dict[str, list[Tensor]] = {site: [] for site in ARCHS[name].sites}

    def hook(site: str) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, ids, weights = args
            ids, weights = rule(site, hidden, ids, weights)
            seen[site].append(ids)
            return hidden, ids, weights

        return before

    handles = [model.get_submodule(site).experts.register_forward_pre_hook(hook(site)) for site in seen]
    try:
        with sorted_topk():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def sorted_topk() -> Iterator[None]:
    """SERE's first picks are the best ones, but some routers ask ``topk`` for no order."""
    topk = torch.topk

    def in_order(*args: Any, **kwargs: Any) -> Any:
        return topk(*args, **{**kwargs, "sorted": True})

    with mock.patch.object(torch, "topk", in_order):
        yield


def expected(model: nn.Module, name: str, rule: Rule | None, **inputs: Any) -> Tensor:
    """Logits of the eager model, its routing patched by ``rule``."""
    with torch.no_grad(), patched(model, name, rule) if rule else contextlib.nullcontext():
        return model(**inputs).logits
