"""The MoE layers of a loaded model: each gets its policies and its artifact tensors, or the engine does not start."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner import moe_runner

from moe_fx.artifacts import Artifact, ArtifactError
from moe_fx.policy import SERE, Policy, TopK
from moe_fx.vllm import ops, padding
from moe_fx.vllm.config import EngineSettings, VllmError
from moe_fx.vllm.metrics import Publisher
from moe_fx.vllm.names import match_sites

logger = init_logger("vllm.moe_fx")


def moe_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The MoE layers of a model, by the engine's names.  Those of a draft model beside it are none of them."""
    return {m.layer_name: m for m in model.modules() if isinstance(m, moe_runner.MoERunner)}


def is_opaque(layer: Any) -> bool:
    """Whether routing runs inside vLLM's MoE op, where no graph shows it."""
    return layer._forward_entry in (torch.ops.vllm.moe_forward, torch.ops.vllm.moe_forward_shared)


def install(runner: Any, settings: EngineSettings, device: torch.device) -> None:
    """Give every MoE layer of a model runner's model its ``LayerPolicy``.

    Raises:
        VllmError: a layer that cannot be rerouted; the message names it and the reason.
        ArtifactError: an artifact that does not fit the model.
    """
    layers = moe_layers(runner.get_model())
    whole = runner.vllm_config.parallel_config.pipeline_parallel_size == 1
    if not layers:
        if whole and runner.vllm_config.model_config.get_num_experts() > 0:
            raise VllmError(
                "the model runs its experts past vLLM's own MoE layers, as kernels do that include the communication, so no pass "
                "can reach their routing: choose another MoE kernel (--moe-backend triton)"
            )
        logger.warning("moe_fx: the model has no mixture-of-experts layer, so the policy does nothing")
        return
    for name, layer in layers.items():
        reason = obstacle(layer, settings)
        if reason is not None:
            raise VllmError(f"moe_fx cannot change the routing of '{name}': {reason}")
    tensors = [_tensors_of(policy, layers, whole, device) for policy in settings.policies]
    for name, layer in layers.items():
        sere = next((p.at(site) for p, (sites, _) in zip(settings.policies, tensors, strict=True)
                     if isinstance(p, SERE) for site in [sites[name]]), (1, 0.0))  # fmt: skip
        totals = torch.zeros(4, dtype=torch.int64, device=device) if settings.stats else None
        by_policy = tuple(by_layer.get(name) for _, by_layer in tensors)
        policy = ops.LayerPolicy(name, settings.policies, by_policy, _num_experts(layer), sere, totals)
        setattr(layer, ops.ATTRIBUTE, policy)
        if is_opaque(layer):
            ops.arm(layer)
    if not padding.makes_mask(runner) and device.type != "cpu":
        if runner.vllm_config.parallel_config.use_ubatching:
            raise VllmError("vLLM's first model runner does not tell what is padding in a micro-batch: leave --enable-dbo out")
        padding.count_real_tokens(runner, device)


def obstacle(layer: Any, settings: EngineSettings) -> str | None:
    """Why a layer's routing cannot be changed as asked, or None."""
    config = layer.moe_config
    if is_opaque(layer) and layer.is_monolithic:
        method = type(layer._quant_method).__name__
        return (
            f"its kernel ({method}) routes inside itself, so no pass can reach the decision: choose another MoE kernel "
            "(--moe-backend triton)"
        )
    if is_opaque(layer) and getattr(config, "use_deferred_moe_finalize", False):
        return "the model runs it outside vLLM's MoE op in small batches, where no pass sees it: serve without tensor parallelism"
    if is_opaque(layer) and not isinstance(layer.router, BaseRouter):
        return f"its router ({type(layer.router).__name__}) has no step between choosing experts and placing them"
    if is_opaque(layer) and getattr(layer.router, "zero_expert_type", None) is not None:
        return "its router has taken out the picks of zero experts, and what is left in their place would vote like real picks"
    if not settings.switches_off and all(isinstance(p, TopK) for p in settings.policies):
        return None
    if getattr(getattr(layer, "routed_experts", None), "expert_substitution", None) is not None:  # from vLLM 0.33 on
        return "some of its experts are constants, which cost nothing and would vote and be moved like others"
    if layer.do_naive_dispatch_combine or config.is_sequence_parallel or config.moe_parallel_config.pcp_size > 1:
        return "its router sees the tokens of other ranks, and cannot tell which are padding: serve without sequence-parallel MoE"
    if settings.switches_off and layer.routed_input_transform is not None:
        return "its experts read a transformed hidden state, and BEAM's mask router reads the router's own input"
    return None


def _num_experts(layer: Any) -> int:
    return layer.moe_config.num_logical_experts


def _tensors_of(
    policy: Policy, layers: dict[str, Any], whole: bool, device: torch.device
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The artifact's site of each layer, and its tensor on the device."""
    artifact: Artifact | None = getattr(policy, "artifact", None)
    if artifact is None:
        return {}, {}
    sites, reason = match_sites(layers, artifact)
    if reason is None and whole and len(artifact.sites) != len(layers):
        reason = f"it has {len(artifact.sites)} sites, but the model has {len(layers)} MoE layers"
    if reason is not None:
        raise ArtifactError(f"the artifact does not fit the model: {reason}. Recalibrate it with the model that is served")
    hidden = {name: _hidden_size(layer) for name, layer in layers.items()}
    return sites, {
        name: artifact.tensor(site, str(policy.kind), _num_experts(layers[name]), hidden[name]).to(device)
        for name, site in sites.items()
    }


def _hidden_size(layer: Any) -> int | None:
    """H, the width of the router's input; None where the engine does not tell."""
    gate = layer.gate
    size = getattr(gate, "input_size", None)
    return size if size is not None else getattr(layer.moe_config, "hidden_dim_unpadded", None)


def check_all_ran(model: torch.nn.Module) -> None:
    """After the first forward: every layer must have been rerouted, whether it was compiled now or taken from a cache.

    Raises:
        VllmError: naming the layers that were not.
    """
    policies = [p for layer in moe_layers(model).values() if (p := getattr(layer, ops.ATTRIBUTE, None)) is not None]
    idle = [p.layer for p in policies if not p.ran]
    if idle:
        raise VllmError(
            f"the policy reached {len(policies) - len(idle)} of {len(policies)} MoE layers and not {', '.join(idle[:3])}: "
            "see the warnings of moe_fx above for the reasons"
        )
    if policies:
        described = " + ".join(p.describe() for p in policies[0].policies)
        logger.info("moe_fx: %d of %d MoE layers run %s", len(policies), len(policies), described)


def publish_totals(model: torch.nn.Module, parallel_config: Any) -> Publisher | None:
    """Have a worker's counts published, from zero; None where it does not count, or another rank counts the same."""
    policies = [getattr(layer, ops.ATTRIBUTE) for layer in moe_layers(model).values()]
    if not policies or policies[0].totals is None or parallel_config.rank % parallel_config.tensor_parallel_size:
        return None
    for policy in policies:
        policy.totals.zero_()
    return Publisher(policies, f"{parallel_config.data_parallel_index}-{parallel_config.rank}-{os.getpid()}")
