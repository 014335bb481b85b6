"""Which MoE architectures of transformers work: ``python -m benchmarks.coverage`` writes docs/coverage.md.

Every configuration class of the installed transformers that counts experts is built, tiny and with random weights, and
compiled.  What it must give is what its eager model gives with ``kernels/reference.py`` put between its routers and its
experts by hooks, which know nothing of our passes.  Finished rows are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import json
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import moe_fx
from benchmarks.measure import ROOT
from moe_fx.kernels import reference
from moe_fx.pipeline import Settings, run
from moe_fx.report import Report
from moe_fx.testing import tolerance

TABLE = ROOT / "docs" / "coverage.md"
PARTIAL = ROOT / "build" / "coverage.partial.json"
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
EXPERTS, TOP_K, HIDDEN, WIDTH, LAYERS, VOCAB = 8, 3, 32, 24, 2, 64
PRIMARY, THRESHOLD, TAU = 1, 0.4, 0.5

# ------------------------------------------------------------------------------------------------ what there is to build

#: Sizes by the names that configurations give them; each configuration takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(COUNTS, EXPERTS),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"], TOP_K),
    **dict.fromkeys(["hidden_size", "d_model"], HIDDEN),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(
        ["intermediate_size", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "moe_intermediate_size",
         "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
         "expert_ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"], WIDTH),
    **dict.fromkeys(["num_attention_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"], 4),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["max_position_embeddings", "max_seq_len", "model_max_length"], 64),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 0),
    **dict.fromkeys(["n_group", "num_expert_group"], 4),
    **dict.fromkeys(
        ["head_dim", "kv_channels", "v_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "linear_head_dim", "d_kv", "qk_head_dim", "swa_head_dim"], 8),
    **dict.fromkeys(
        ["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(
        ["mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size", "sliding_window", "attention_chunk_size"], 8),
    "topk_group": 2, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "kv_lora_rank": 12, "q_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "index_topk": 4,
    "index_n_heads": 2, "norm_topk_prob": True, "hidden_size_per_layer_input": 4, "use_mamba_kernels": False, "n_groups": 2,
    "attention_dropout": 0.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "moe_layer_freq": 1,
    "decoder_sparse_step": 1, "encoder_sparse_step": 1,
}  # fmt: skip

_SPARSE = {"mlp_layer_types": ["sparse"] * LAYERS}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
#: What an architecture needs beyond sizes; ``...`` leaves a size out.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk2", "beam", "deepseek_ocr2_text", "deepseek_v32", "glm_moe_dsa", "exaone_moe"], _SPARSE),
    "flint": {"mlp_only_layers": []},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {
        "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K,
        "ffn_act_fn": {"name": "silu"}}},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2, "hc_sinkhorn_iters": 2,
        "head_dim": 16, "layer_types": ["compressed_sparse_attention", "sliding_attention"], "index_topk": 3,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16, "keep_window_size": 4},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_interval": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [WIDTH, 20], **_SPARSE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0]}},
    "glm5_next_text": {**_SPARSE, "qk_rope_head_dim": 0, "head_dim": 0, "hc_mult": 2, "hc_sinkhorn_iters": 2, "index_kpool": 2,
        "layer_types": ["linear_attention", "indexed_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": WIDTH},
    "zaya": {"num_experts_per_tok": 1},
    "inkling_text": {"sliding_window_size": 8, "rel_extent": 16, "n_shared_experts": 2},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 4},
    "qwen3_5_moe_text": _HYBRID, "qwen3_next": _HYBRID,
    "qwen4_exp_text": {**_HYBRID, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2},
    "step3p5": {**_SPARSE, "swiglu_limits": [None, 7.0]},
    "switch_transformers": {"num_decoder_layers": LAYERS, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "vitpose_backbone": {"image_size": [32, 32], "patch_size": [16, 16], "mlp_ratio": 2, "part_features": 8},
}  # fmt: skip

#: Why an architecture cannot be checked by hooks, or has no site where one might be looked for.
NO_PAIRS = "no module takes (hidden, ids, weights), so there is nothing to patch by hooks"
EXPLAINED = {
    "deepseek_v4": "its hash layers look the experts of a token up in a table and select nothing",
    "doge": "product keys: the ids of its experts are made of two selections, so none of them can be moved alone",
    "llama4_text": "weights multiply the input of its experts: its top-K stays as it is",
    "vitpose_backbone": "its experts are chosen by an input of the model, not by a router",
}


@dataclass(frozen=True)
class Architecture:
    """A configuration class that counts experts, and the model class that is built from it."""

    name: str  # the configuration's model_type
    config: type
    model: type[nn.Module]


def architectures() -> tuple[list[Architecture], dict[str, str]]:
    """Every MoE architecture of the installed transformers, by name, and those for which no model class is found."""
    import transformers

    found: dict[str, Architecture] = {}
    missing: dict[str, str] = {}
    mentions = re.compile(r"\b(" + "|".join(COUNTS) + r")\b")
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/configuration_*.py")):
        if not mentions.search(path.read_text(encoding="utf-8")):
            continue
        package = f"transformers.models.{path.parent.name}"
        configs = [c for c in _classes(importlib.import_module(f"{package}.{path.stem}")) if _counts_experts(c)]
        name_of_module = f"{package}.{path.stem.replace('configuration', 'modeling')}"
        modeling = importlib.import_module(name_of_module) if importlib.util.find_spec(name_of_module) else None
        for config in configs:
            name = str(getattr(config, "model_type", ""))
            model = _model_class(modeling, config) if modeling is not None else None
            if modeling is None:
                missing[name] = "transformers ships its configuration without a model"
            elif model is None:
                missing[name] = "no model class in its module is built from its configuration"
            elif name not in found:
                found[name] = Architecture(name, config, model)
    return [found[name] for name in sorted(found)], {name: why for name, why in missing.items() if name not in found}


def _classes(module: Any) -> list[type]:
    return [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]


def _fields(config: type) -> set[str]:
    own = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    return own | set(inspect.signature(config.__init__).parameters)  # type: ignore[misc]


def _counts_experts(config: type) -> bool:
    fields = _fields(config)
    return bool(getattr(config, "model_type", "")) and bool(fields.intersection(COUNTS) or "ffn_config" in fields)


def _model_class(modeling: Any, config: type) -> type[nn.Module] | None:
    """A whole language model where there is one, and otherwise the smallest that holds all layers."""
    built = [c for c in _classes(modeling) if getattr(c, "config_class", None) is config]
    endings = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "TextModel", "Model", "Backbone")
    whole = [c for c in built if not c.__name__.endswith("PreTrainedModel")]
    return next((c for ending in endings for c in whole if c.__name__.endswith(ending)), None)


def build(architecture: Architecture, experts: str | None, **more: Any) -> nn.Module:
    """A tiny model in eval mode, float32, whose routers prefer different experts for different tokens.

    Args:
        experts: how transformers is to run them; None leaves the choice to it.
        more: sizes of its configuration to set in another way.
    """
    fields = _fields(architecture.config)
    given = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # every query head expands its own key and value
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    given |= OVERRIDES.get(architecture.name, {}) | more
    torch.manual_seed(0)
    model = architecture.model(architecture.config(**{k: v for k, v in given.items() if v is not ...})).float().eval()
    _randomise(model)
    if experts is not None:
        model.set_experts_implementation(experts)  # type: ignore[operator]
    return model.requires_grad_(False)


def _randomise(model: nn.Module) -> None:
    """Selection biases start at 0, scales at 1, stacks of experts uninitialised: then a mistake would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "tid2eid":
            picks = torch.rand(tensor.shape[0], EXPERTS, generator=generator).argsort(-1)[:, : tensor.shape[1]]
            tensor.data.copy_(picks)
        elif leaf in ("per_expert_scale", "global_scale"):
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and (tensor.dim() == 3 or "bias" in leaf or _is_constant(tensor)) and "norm" not in name:
            tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def _is_constant(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and bool((tensor == tensor.flatten()[0]).all())


def can_choose(model: nn.Module) -> bool:
    """Whether transformers lets one choose how the model runs its experts."""
    return bool(getattr(model, "_can_set_experts_implementation", lambda: False)())


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Keyword inputs: token ids, and whatever else the model asks for."""
    generator = torch.Generator().manual_seed(2)
    takes = inspect.signature(model.forward).parameters
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    if "pixel_values" in takes and "input_ids" not in takes:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "dataset_index": torch.tensor([1, 4])}
    given: dict[str, Any] = {"input_ids": ids}
    if "inputs_embeds" in takes and _embeds_nothing(model):
        given = {"inputs_embeds": torch.randn(2, 9, HIDDEN, generator=generator)}
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids.flip(1)
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


def _embeds_nothing(model: nn.Module) -> bool:
    try:
        return not isinstance(model.get_input_embeddings(), nn.Embedding)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return True


# ------------------------------------------------------------------------------------------------ by hand


Rule = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that take a routing decision, by name."""
    return {name: module for name, module in model.named_modules() if _takes_decision(module)}


def _takes_decision(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)
    return len(names) >= 3 and names[1] in ("top_k_index", "top_k_indices", "router_indices") and names[2].endswith("_weights")


@contextlib.contextmanager
def patched(model: nn.Module, rule: Rule) -> Iterator[None]:
    """``model`` with ``rule(block, router's input, ids, weights) -> (ids, weights)`` before all of its experts."""
    routed: dict[str, Tensor] = {}
    handles = []
    for name, module in expert_modules(model).items():
        block = name.rpartition(".")[0]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: str = block) -> Any:
            hidden, ids, weights = [*args, *kwargs.values()][:3]
            ids, weights = rule(block, routed.get(block, hidden), ids, weights)
            return (hidden, ids, weights), {}

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        router = _router(model.get_submodule(block))
        if router is not None:

            def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: str = block) -> None:
                routed[block] = [*args, *kwargs.values()][0].flatten(0, -2)

            handles.append(router.register_forward_pre_hook(remember, with_kwargs=True))
    topk = torch.topk

    def in_order(*args: Any, **kwargs: Any) -> Any:  # SERE's first picks are the best, and some routers ask for no order
        return topk(*args[:4], **{**kwargs, "sorted": True})

    try:
        with mock.patch.object(torch, "topk", in_order):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _router(block: nn.Module) -> nn.Module | None:
    """The module whose input is the router's, if the block has one: the innermost that holds the linear map."""
    router = next((m for name in ("gate", "router") if isinstance(m := getattr(block, name, None), nn.Module)), None)
    inner = (getattr(router, name, None) for name in ("proj", "classifier", "layer"))
    return next((m for m in inner if isinstance(m, nn.Linear)), router)


def _table(site: str, rows: int, columns: int, symmetric: bool) -> Tensor:
    """A site's random table, the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{site}/{symmetric}".encode()))
    if not symmetric:
        return 0.4 * torch.randn(rows, columns, generator=generator)
    table = torch.rand(rows, columns, generator=generator)
    return ((table + table.T) / 2).fill_diagonal_(1)


# ------------------------------------------------------------------------------------------------ compiled


def _settings(artifact: moe_fx.Artifact | None) -> dict[str, Settings]:
    plain = {"topk": Settings(fuse=False)}
    if artifact is None:
        return plain
    sere = moe_fx.SERE(artifact, primary=PRIMARY, threshold=THRESHOLD)
    beam = moe_fx.BEAM(artifact, tau=TAU)
    return plain | {
        "sere": Settings((sere,), fuse=True), "beam": Settings((beam,), fuse=True), "beam_folded": Settings((beam,), fuse=False),
    }  # fmt: skip


class Variants:
    """A compiler that rewrites each graph once for each policy, of which ``chosen`` runs: Dynamo traces only once."""

    def __init__(self) -> None:
        self.reports = {name: Report() for name in ("topk", "sere", "beam", "beam_folded")}
        self.chosen = "topk"
        self.tables: dict[str, dict[str, Tensor]] = {}

    def __call__(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs = {"topk": run(gm, _settings(None)["topk"], self.reports["topk"])}
        for site in self.reports["topk"].sites:
            self.tables[site.name] = {
                "similarity": _table(site.name, site.num_experts, site.num_experts, True),
                "mask_router": _table(site.name, site.num_experts, site.hidden_size, False),
            }
        for name, settings in _settings(moe_fx.Artifact(self.tables) if self.tables else None).items():
            if name != "topk":
                graphs[name] = run(gm, settings, self.reports[name])
        return lambda *args: graphs.get(self.chosen, graphs["topk"])(*args)


def _first_tensor(output: Any) -> Tensor:
    """Logits, or the last hidden state."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "feature_maps"):
        value = getattr(output, name, None)
        if value is not None:
            return value if isinstance(value, Tensor) else value[-1]
    return output[0]


@dataclass
class Row:
    """What came of one architecture with one implementation of its experts.

    Attributes:
        expected: how many modules take a routing decision.
        same_names: whether every site found bears the name of a block with such a module.
        topk, sere, beam, beam_folded: whether the compiled model equals the eager one; None where that cannot be checked.
        moved: how many of the policies changed the eager model's output: a check that changes nothing would prove nothing.
        experts: what became of the experts under BEAM.
    """

    name: str
    implementation: str
    expected: int = 0
    sites: int = 0
    graphs: int = 0
    same_names: bool = True
    topk: bool | None = None
    sere: bool | None = None
    beam: bool | None = None
    beam_folded: bool | None = None
    moved: int = 0
    experts: str = ""
    notes: list[str] = field(default_factory=list)


def examine(architecture: Architecture, implementation: str) -> Row:
    """Build, compile, and compare."""
    row = Row(architecture.name, implementation)
    model = build(architecture, None if implementation == "own" else implementation)
    inputs = inputs_of(model)
    blocks: set[str] = set()

    def remember(block: str, _: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        blocks.add(block)
        return ids, weights

    with torch.no_grad(), patched(model, remember):
        model(**inputs)
    row.expected = len(blocks)
    torch._dynamo.reset()
    variants = Variants()
    with torch.no_grad():
        exact = _first_tensor(model(**inputs))
        compiled = torch.compile(model, backend=variants)
        row.topk = _equal(_first_tensor(compiled(**inputs)), exact)
        report = variants.reports["topk"]
        names = {s.name for s in report.sites}
        row.sites, row.graphs = len(names & blocks if blocks else names), report.graphs
        # layers may share a graph that only some of them ran
        row.same_names = names <= {name.rpartition(".")[0] for name in expert_modules(model)}
        if report.sites:
            for policy, rule in _rules(variants.tables).items():
                variants.chosen = policy
                got = _first_tensor(compiled(**inputs))
                if row.same_names and row.expected and variants.reports[policy].sites:  # a refusal stands in the notes
                    with patched(model, rule):
                        want = _first_tensor(model(**inputs))
                    setattr(row, policy, _equal(got, want))
                    row.moved += int(not _equal(want, exact))
    beam, folded = variants.reports["beam"], variants.reports["beam_folded"]
    states = Counter(s.experts for s in beam.sites) or Counter({"": 0})
    row.experts = ", ".join(sorted(states))
    reasons = [s.reason for report in (variants.reports["topk"], variants.reports["sere"], beam, folded) for s in report.skips]
    row.notes = list(dict.fromkeys(_general(r) for r in reasons))
    if architecture.name in EXPLAINED:
        row.notes.insert(0, EXPLAINED[architecture.name])
    if not blocks:
        row.notes.append(NO_PAIRS)
    return row


def _rules(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Rule]:
    def sere(block: str, _: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if block not in tables:
            return ids, weights
        return reference.sere_reroute(ids, tables[block]["similarity"], PRIMARY, THRESHOLD), weights

    def beam(block: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if block not in tables:
            return ids, weights
        masked, masked_ids = reference.beam_mask(weights, ids, hidden.float() @ tables[block]["mask_router"].T, TAU)
        return torch.where(masked_ids < 0, ids, masked_ids), masked

    return {"sere": sere, "beam": beam, "beam_folded": beam}


def _equal(got: Tensor, want: Tensor) -> bool:
    close = tolerance(torch.float32)
    return got.shape == want.shape and torch.allclose(got, want, rtol=close["rtol"], atol=close["atol"])


def _general(reason: str) -> str:
    """A reason without what differs from run to run."""
    return re.sub(r"\(node \w+\) ", "", reason)


# ------------------------------------------------------------------------------------------------ the table


def rows_of(architecture: Architecture) -> list[tuple[str, str]]:
    """The (name, implementation) pairs of an architecture.

    Raises:
        Exception: whatever building the model raises.
    """
    chooses = can_choose(build(architecture, None))
    return [(architecture.name, i) for i in (IMPLEMENTATIONS if chooses else ("own",))]


def as_markdown(row: Row) -> str:
    """One line of the table."""
    found = f"{row.sites}/{row.expected}" if row.expected else f"{row.sites}"
    cells = [row.name, row.implementation, found, *(_mark(v) for v in (row.topk, row.sere, row.beam, row.beam_folded))]
    return "| " + " | ".join([*cells, row.experts or "-", "; ".join(row.notes)]) + " |"


def _mark(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "**no**"


HEADER = """\
| architecture | experts run by | sites found | top-K equal | SERE equal | BEAM equal | BEAM folded equal | experts | notes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""

ABOUT = """\
# MoE architectures of transformers

Written by `python -m benchmarks.coverage`; do not edit.  Versions: {versions}.

Every configuration class of transformers that counts experts, built tiny ({sizes}) with random weights in float32 and compiled
with `inner="eager"`.  "Sites found" is of how many modules take a routing decision.  "Equal" is equal to the eager model with
the definitions of `kernels/reference.py` put between its routers and its experts by hooks, within the tolerance of float32;
"-" is not comparable by hooks.  "Experts" says what becomes of them under BEAM: `fused` into one op that skips what is off,
or `folded`.
"""


def markdown(rows: Sequence[Row], unbuilt: Mapping[str, str]) -> str:
    """The whole file."""
    sizes = f"{LAYERS} layers, E={EXPERTS}, K={TOP_K}, H={HIDDEN}"
    right = sum(1 for r in rows if r.expected and r.sites == r.expected and r.sere and r.beam and r.beam_folded)
    summary = f"{right} of the {sum(1 for r in rows if r.expected)} rows with known sites are right in every column."
    lines = [ABOUT.format(versions=versions(), sizes=sizes), summary, "", HEADER, *map(as_markdown, rows)]
    if unbuilt:
        lines += ["", "Not built:", "", *(f"* {name}: {reason}" for name, reason in sorted(unbuilt.items()))]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """The versions that a table is true of."""
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "transformers"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures to try, printed and not kept (default: all)")
    parser.add_argument("--fresh", action="store_true", help="forget finished rows of an interrupted run")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    known, unbuilt = architectures()
    if options.names:
        for architecture in (a for a in known if a.name in options.names):
            for _, implementation in rows_of(architecture):
                print(as_markdown(examine(architecture, implementation)), flush=True)
        return 0
    if options.fresh:
        PARTIAL.unlink(missing_ok=True)
    rows, unbuilt = _all_rows(known, unbuilt)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(markdown(rows, unbuilt), encoding="utf-8")
    PARTIAL.unlink(missing_ok=True)
    print(f"Written: {TABLE}")
    return 0


def _all_rows(known: Sequence[Architecture], unbuilt: dict[str, str]) -> tuple[list[Row], dict[str, str]]:
    """Every row, those that an interrupted run left included."""
    done = json.loads(PARTIAL.read_text()) if PARTIAL.is_file() else {}
    if done.get("versions") != versions():
        done = {"versions": versions(), "rows": {}}
    rows: list[Row] = []
    for number, architecture in enumerate(known, 1):
        try:
            wanted = rows_of(architecture)
        except Exception as error:
            unbuilt[architecture.name] = f"{type(error).__name__}: {_first_line(error)}"
            continue
        for _, implementation in wanted:
            key, start = f"{architecture.name}/{implementation}", time.perf_counter()
            if key not in done["rows"]:
                done["rows"][key] = dataclasses.asdict(_examined(architecture, implementation))
                PARTIAL.parent.mkdir(exist_ok=True)
                PARTIAL.write_text(json.dumps(done, indent=1))
                line, seconds = as_markdown(Row(**done["rows"][key])), time.perf_counter() - start
                print(f"{number}/{len(known)} {line} {seconds:.0f} s", flush=True)
            rows.append(Row(**done["rows"][key]))
            gc.collect()
    return rows, unbuilt


def _examined(architecture: Architecture, implementation: str) -> Row:
    try:
        return examine(architecture, implementation)
    except Exception as error:
        return Row(architecture.name, implementation, topk=False, notes=[f"{type(error).__name__}: {_first_line(error)}"])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160].replace("|", "/")


if __name__ == "__main__":
    raise SystemExit(main())
