"""A decode step of Qwen3-30B-A3B's shape on a GPU, end to end: Inductor alone beside ``moe_sparse`` under each policy.

Random bfloat16 weights, a static key/value cache of 256 tokens half full, the whole step in one CUDA graph.  The decoder
layer is compiled once and run by all layers, as ``layer.compile()`` would; 48 layers compiled as one graph take minutes,
and each policy needs its own.  Every backend compiles the same function.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm, Qwen3MoeRotaryEmbedding

import moe_fx
from benchmarks.gpu_layer import check_error
from benchmarks.gpu_measure import Results, Rig, microseconds, print_table, relative_error, result_name
from moe_fx.evaluate import cache_argument
from moe_fx.kernels import reference
from moe_fx.testing import random_similarity

BATCHES = (1, 4, 16, 64, 256)
CACHE_TOKENS, POSITION = 256, 128
CACHE = cache_argument(Qwen3MoeDecoderLayer)
TOKEN_SETS = 4
# Mask logits are normally distributed with standard deviation 1: 85% of them are below 1.036 = logit(0.738).
TAU = 0.738


@dataclass(frozen=True)
class Sizes:
    """The model, in the field's letters."""

    layers: int = 48
    vocab: int = 151936
    hidden: int = 2048
    heads: int = 32
    key_value_heads: int = 4
    head_dim: int = 128
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8


TINY = Sizes(2, 64, 64, 2, 1, 32, 32, 8, 4)


class LayerCache:
    """One layer's keys and values, of which a step writes those of one position."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class Model(nn.Module):
    """Embedding, decoder layers, head.  ``step`` runs one layer."""

    def __init__(self, sizes: Sizes, rig: Rig) -> None:
        super().__init__()
        extra: dict[str, Any] = {"head_dim": sizes.head_dim}
        self.config = Qwen3MoeConfig(
            vocab_size=sizes.vocab, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_value_heads,
            moe_intermediate_size=sizes.intermediate, num_experts=sizes.experts, num_experts_per_tok=sizes.top_k,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=4096, **extra,
        )  # fmt: skip
        self.config._attn_implementation = "sdpa"
        self.config._experts_implementation = "grouped_mm"
        self.sizes, self.rig = sizes, rig
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(rig.device):
                self.embed = nn.Embedding(sizes.vocab, sizes.hidden)
                # every layer is its cache's only one
                self.layers = nn.ModuleList([Qwen3MoeDecoderLayer(self.config, 0) for _ in range(sizes.layers)])
                self.norm = Qwen3MoeRMSNorm(sizes.hidden)
                self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        finally:
            torch.set_default_dtype(before)
        with torch.device(rig.device):
            self.rotary = Qwen3MoeRotaryEmbedding(self.config)
        self.requires_grad_(False).eval()
        generator = rig.generator(0)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)

    def caches(self, batch: int, dtype: torch.dtype = torch.bfloat16) -> list[LayerCache]:
        shape = (batch, self.sizes.key_value_heads, CACHE_TOKENS, self.sizes.head_dim)
        position = torch.tensor([POSITION], device=self.rig.device)
        numbers = range(len(self.layers))
        keys, values = ([self.rig.normal(*shape, seed=2 * n + odd, dtype=dtype) for n in numbers] for odd in (0, 1))
        return [LayerCache(k, v, position) for k, v in zip(keys, values, strict=True)]

    def around(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines, sines and the attention mask of a step."""
        position = torch.full((1, 1), POSITION, device=hidden.device)
        cos, sin = self.rotary(hidden, position)
        seen = torch.arange(CACHE_TOKENS, device=hidden.device) <= POSITION
        return cos, sin, seen[None, None, None].expand(len(hidden), 1, 1, CACHE_TOKENS)

    def forward(self, tokens: Tensor, caches: list[LayerCache], step: Callable[..., Tensor]) -> Tensor:
        """Tokens [batch, 1] -> the next ones [batch, 1]."""
        hidden = self.embed(tokens)
        around = self.around(hidden)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = step(layer, hidden, cache, *around)
        return self.head(self.norm(hidden)).argmax(-1)


def run_layer(layer: nn.Module, hidden: Tensor, cache: LayerCache, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """One decoder layer."""
    return layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), **{CACHE: cache})


def artifact(sizes: Sizes) -> moe_fx.Artifact:
    """Random similarities and mask routers under the sites' names."""
    e, h = sizes.experts, sizes.hidden
    similarity = random_similarity(e)
    mask_router = torch.randn(e, h, generator=torch.Generator().manual_seed(9)) * h**-0.5
    site = {"similarity": similarity, "mask_router": mask_router}
    return moe_fx.Artifact({f"layers.{n}.mlp": site for n in range(sizes.layers)})


def policies(sizes: Sizes) -> dict[str, moe_fx.Policy | None]:
    """The configurations; None is Inductor alone."""
    tables = artifact(sizes)
    sere = {f"moe_sparse, SERE S={s}": moe_fx.SERE(tables, primary=s) for s in (1, 2)}
    beam = {"moe_sparse, BEAM 85% off": moe_fx.BEAM(tables, tau=TAU)}
    return {"Inductor alone": None, "moe_sparse, TopK": moe_fx.TopK(), **sere, **beam}


def compiled_step(policy: moe_fx.Policy | None, rig: Rig) -> Callable[..., Tensor]:
    """The layer as a user compiles it; for all batches at once, as a compile takes longer than the measurement."""

    def step(layer: nn.Module, hidden: Tensor, cache: LayerCache, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        return run_layer(layer, hidden, cache, cos, sin, mask)

    inner = {"inner": "eager"} if rig.dry else {}
    if policy is None:
        return step if rig.dry else torch.compile(step, dynamic=True)
    options: Any = {"policy": policy, "strict": True, "fuse_experts": True, **inner}
    return torch.compile(step, backend="moe_sparse", dynamic=True, options=options)


# -------------------------------------------------------------------------------------------- the equality gate


@contextmanager
def patched_by_hand(layer: Any, policy: moe_fx.Policy | None) -> Iterator[list[Tensor]]:
    """The eager layer with its router's decision put through the reference; yields the ids of every call."""
    decided: list[Tensor] = []
    router = layer.mlp.gate

    def reroute(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, weights, ids = output
        if isinstance(policy, moe_fx.SERE):
            table = policy.require_artifact().sites["layers.0.mlp"]["similarity"].to(ids.device)
            ids = reference.sere_reroute(ids, table, policy.primary, policy.threshold)
        if isinstance(policy, moe_fx.BEAM) and policy.artifact is not None:
            masks = policy.artifact.sites["layers.0.mlp"]["mask_router"].to(ids.device)
            hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            weights, ids = reference.beam_mask(weights, ids, hidden @ masks.T, policy.tau)
        decided.append(ids)
        return (logits, *reference.fold_masked(weights, ids))

    handle = router.register_forward_hook(reroute)
    before = layer.mlp.experts.config._experts_implementation
    layer.mlp.experts.config._experts_implementation = "eager"
    try:
        yield decided
    finally:
        handle.remove()
        layer.mlp.experts.config._experts_implementation = before


def gate(name: str, policy: moe_fx.Policy | None, model: Model, rig: Rig) -> float:
    """One layer in float32, where rounding changes no routing decision, equals the eager layer patched by hand.

    Raises:
        WrongResultError: it does not.
    """
    single = nn.Module()
    single.layers = nn.ModuleList([copy.deepcopy(model.layers[0]).float()])
    layer = single.layers[0]
    hidden = rig.normal(16, 1, model.sizes.hidden, seed=7, dtype=torch.float32)
    around = [value.float() if value.is_floating_point() else value for value in model.around(hidden)]
    with patched_by_hand(layer, policy):
        expected = run_layer(layer, hidden, model.caches(16, torch.float32)[0], *around)
    step = compiled_step(policy, rig)

    def forward(self: nn.Module) -> Tensor:  # its frame tells the backend which module is the model
        return step(layer, hidden, model.caches(16, torch.float32)[0], *around)

    return check_error(name, relative_error(forward(single) - hidden, expected - hidden))


def active_experts(model: Model, policy: moe_fx.Policy | None, batch: int) -> float:
    """Experts that the first layer reads in a step, by the eager layer patched by hand."""
    layer: Any = model.layers[0]
    counts = []
    with patched_by_hand(layer, policy) as decided:
        for tokens in token_sets(model, batch):
            hidden = model.embed(tokens)
            run_layer(layer, hidden, model.caches(batch)[0], *model.around(hidden))
        counts = [int(reference.count_active(ids, model.sizes.experts)) for ids in decided]
    return statistics.fmean(counts)


def token_sets(model: Model, batch: int) -> list[Tensor]:
    return [
        torch.randint(model.sizes.vocab, (batch, 1), generator=model.rig.generator(seed), device=model.rig.device)
        for seed in range(TOKEN_SETS)
    ]


# -------------------------------------------------------------------------------------------------- timing


def run(rig: Rig, out: Path, layers: int | None = None) -> int:
    """All rows that are not there yet; returns how many configurations failed."""
    sizes = TINY if rig.dry else Sizes(layers=layers or Sizes.layers)
    results = Results(out / result_name("backend", rig), ("layers", "sequences", "configuration"), rig)
    failed = 0
    with torch.inference_mode():
        rig.say(f"making {sizes.layers} layers")
        model = Model(sizes, rig)
        for name, policy in policies(sizes).items():
            wanted = [b for b in ((3,) if rig.dry else BATCHES) if not has(results, sizes, b, name)]
            if not wanted:
                continue
            torch._dynamo.reset()
            try:
                error = gate(name, policy, model, rig)
                torch._dynamo.reset()
                step = compiled_step(policy, rig)
                for batch in wanted:
                    measure(results, model, name, policy, batch, step, error, rig)
            except Exception as problem:  # the other configurations can still be measured
                rig.say(f"FAILED: {name}: {type(problem).__name__}: {str(problem)[:300]}")
                failed += 1
    print_table(results.rows, ("layers", "sequences", "configuration", "microseconds", "tokens_per_second", "ratio_to_inductor"))
    return failed


def has(results: Results, sizes: Sizes, batch: int, name: str) -> bool:
    return results.has(layers=sizes.layers, sequences=batch, configuration=name)


def measure(
    results: Results, model: Model, name: str, policy: moe_fx.Policy | None, batch: int, step: Any, error: float, rig: Rig
) -> None:
    caches = model.caches(batch)
    seconds = rig.time([partial(model, tokens, caches, step) for tokens in token_sets(model, batch)])
    key = {"layers": model.sizes.layers, "sequences": batch, "configuration": name}
    base = results.find(**{**key, "configuration": "Inductor alone"})
    median = statistics.median(seconds)
    ratio = "" if base is None else round(float(str(base["microseconds"])) / (1e6 * median), 3)
    results.add(
        {
            **key,
            **microseconds(seconds),
            "tokens_per_second": round(batch / median, 1),
            "ratio_to_inductor": ratio if base is not None else 1.0,
            "active_experts": round(active_experts(model, policy, batch), 1),
            "relative_error": round(error, 6),
        }
    )
    rig.say(f"{name}, {batch} sequences: {1e6 * median:.0f} us")
