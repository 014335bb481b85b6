"""Tiny random models of five architectures in vLLM's dimensions, saved as checkpoints, and artifacts for them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_fx

LAYERS, EXPERTS, TOP_K, HIDDEN = 2, 16, 4, 64

_LATENT = {
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 64,
    "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_hidden_layers": 1 + LAYERS, "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Arch:
    """How to build one architecture, and where transformers has its sites: behind the layers without experts."""

    prefix: str
    config: dict[str, Any] = field(default_factory=dict)
    site: str = "mlp"

    @property
    def sites(self) -> list[str]:
        dense = self.config.get("first_k_dense_replace", 0)
        return [f"model.layers.{dense + i}.{self.site}" for i in range(LAYERS)]


ARCHS = {
    "qwen3_moe": Arch("Qwen3Moe", {"num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    "qwen2_moe": Arch("Qwen2Moe", {"num_experts": EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 2}),
    "mixtral": Arch("Mixtral", {"num_local_experts": EXPERTS, "head_dim": 32, "intermediate_size": 32}),
    "deepseek_v3": Arch("DeepseekV3", _LATENT | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "olmoe": Arch("Olmoe", {"num_experts": EXPERTS, "norm_topk_prob": False, "num_attention_heads": 2,
        "num_key_value_heads": 2}),
    "qwen3": Arch("Qwen3", {"head_dim": 32}),  # has no experts
}  # fmt: skip


def save_model(name: str, folder: Path, **config: Any) -> Path:
    """A random checkpoint of the architecture, written to ``folder``; its path."""
    arch = ARCHS[name]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    sizes = {
        "vocab_size": 256, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 64,
        "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": False, "decoder_sparse_step": 1,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | arch.config | config  # fmt: skip
    torch.manual_seed(0)
    model = getattr(module, f"{arch.prefix}ForCausalLM")(getattr(module, f"{arch.prefix}Config")(**sizes))
    generator = torch.Generator().manual_seed(1)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # correction biases start at zero and stacked experts may start uninitialised
        if key.endswith("e_score_correction_bias") or tensor.dim() == 3:
            tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    model.to(torch.float32).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with a word for every token, ``t7`` for 7, which a server needs to answer in text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{token}": token for token in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0").save_pretrained(folder)


def random_artifact(name: str, seed: int = 0, experts: int = EXPERTS) -> moe_fx.Artifact:
    """Random similarities and mask routers that switch off about half of the picks, under transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    return moe_fx.Artifact({
        site: {
            "similarity": _symmetric(torch.rand(experts, experts, generator=generator)),
            "mask_router": 0.4 * torch.randn(experts, HIDDEN, generator=generator),
        }
        for site in ARCHS[name].sites
    })  # fmt: skip


def _symmetric(matrix: Tensor) -> Tensor:
    return ((matrix + matrix.T) / 2).fill_diagonal_(1)


if __name__ == "__main__":
    import sys

    for arch in sys.argv[2:] or ARCHS:
        folder = save_model(arch, Path(sys.argv[1]) / arch)
        random_artifact(arch).save(folder.with_suffix(".moe.safetensors"))
