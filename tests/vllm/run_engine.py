"""One vLLM engine in a process of its own: reads what to do as JSON from its argument, prints the result as its last line.

    {"model": PATH, "entry": {"policy": ...}, "form": "open" or "opaque", "patched": true, "engine": {...LLM's arguments},
     "rounds": [[prompt, ...], ...], "max_tokens": 8, "variants": {name: [policies], ...}, "own_pass": true, "watch": true,
     "int8": true, "monolithic": true, "pieces": true}

``entry`` is our entry of ``additional_config``.  ``patched`` is what an engine is held against: its router calls
``kernels/reference.py`` in Python, and nothing of ours runs.  Starting an engine takes most of a minute, so the rounds are
run once for every variant, its policies put in the place of those that the engine started with.  ``own_pass`` adds a pass of
the user's own; ``watch`` has every rank tell the ids that it routed to.
``int8`` runs vLLM's int8 experts also on a CPU without AMX, which vLLM does not offer although their kernel needs only VNNI.
``monolithic`` has the layers say that their kernel routes inside itself.  ``pieces`` compiles with vLLM's own backend, piece
by piece, as a GPU engine does; a CPU engine by itself gives the whole model to Inductor.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def take_opaque_form() -> None:
    """Have the CPU engine call vLLM's MoE op, as the CUDA engine does."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    def select_forward(self: Any) -> Any:
        name = "moe_forward" if self._shared_experts is None else "moe_forward_shared"
        return getattr(torch.ops.vllm, name)

    MoERunner._select_forward = select_forward


def compile_in_pieces() -> None:
    """Have the CPU platform leave vLLM's own backend in its place."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        config = vllm_config.compilation_config
        wanted = config.mode
        check(cls, vllm_config)
        if wanted == CompilationMode.VLLM_COMPILE:
            config.mode, config.backend, config.compile_sizes = wanted, "inductor", []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # it names ops that only a GPU build has


#: The policies that a patched router applies now, each with its artifact.
_PATCHED: list[tuple[dict[str, Any], Any]] = []


def patch_router() -> None:
    """Put the reference between vLLM's CPU router and its experts, as one op so that the rest compiles as it always does."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from moe_fx.kernels import reference

    @torch.library.custom_op("moe_fx_test::patched", mutates_args=())
    def patched(weights: Tensor, ids: Tensor, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        weights, ids = weights.clone(), ids.clone()
        for policy, artifact in _PATCHED:
            (site,) = (s for s in artifact.sites if f".{layer}." in s)
            if policy["name"] == "sere":
                table = artifact.sites[site]["similarity"]
                of_layer = {name: settings for name, *settings in policy.get("layers", ())}
                primary, threshold = of_layer.get(site, (policy.get("primary"), policy.get("threshold", 0.0)))
                ids = reference.sere_reroute(ids, table, primary, threshold, max_tokens=policy.get("max_tokens"))
            else:
                logits = hidden.float() @ artifact.sites[site]["mask_router"].T
                weights, ids = reference.beam_mask(weights, ids, logits, policy.get("tau", 0.5))
        on = ids >= 0
        # an off pick reads an expert that is there, with weight 0: the kernel does not know id -1
        return torch.where(on, weights, 0.0), torch.where(on, ids, ids.clamp(min=0).amax(1, keepdim=True))

    @patched.register_fake
    def _(weights: Tensor, ids: Tensor, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return torch.empty_like(weights), torch.empty_like(ids)

    compute, topk = cpu_router.CPURouter._compute_routing, torch.topk

    def in_order(*args: Any, **kwargs: Any) -> Any:
        return topk(*args, **{**kwargs, "sorted": True})

    def compute_routing(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        torch.topk = in_order  # the best picks first
        weights, ids = compute(self, hidden_states, *args, **kwargs)
        torch.topk = topk
        return torch.ops.moe_fx_test.patched(weights, ids, hidden_states, self.test_layer)

    init = MoERunner.__init__

    def numbered(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.router.test_layer = int(self.layer_name.split("layers.")[1].split(".")[0])

    cpu_router.CPURouter._compute_routing = compute_routing
    MoERunner.__init__ = numbered


def change_policies(llm: Any, policies: list[dict[str, Any]], patched: bool) -> None:
    """Have the running engine apply other policies from now on."""
    import moe_fx

    if patched:
        _PATCHED[:] = [(p, moe_fx.Artifact.load(p["artifact"])) for p in policies]
        return
    from moe_fx.vllm import config, layers

    settings = config.parse({"policy": policies})
    llm.collective_rpc(lambda worker: layers.install(worker.model_runner, settings, worker.device))


class Watch:
    """A worker extension that remembers the ids of every routing decision of its rank."""

    def watch(self) -> None:
        from moe_fx.vllm import ops

        self.seen: list[list[list[int]]] = []
        route = ops.route

        def watched(layer: Any, weights: Any, ids: Tensor, hidden: Any) -> Any:
            new_weights, new_ids = route(layer, weights, ids, hidden)
            self.seen.append(new_ids.tolist())
            return new_weights, new_ids

        ops.route = watched

    def saw(self) -> list[list[list[int]]]:
        return self.seen


def own_pass() -> Any:
    """A user's pass, which says that it ran."""
    from vllm.compilation.passes.inductor_pass import InductorPass

    class OwnPass(InductorPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            print("the user's own pass ran on", len(graph.find_nodes(op="output")), "output", flush=True)

    return OwnPass()


#: How many tokens of each round's prompts were in the prefix cache.
_CACHED: list[int] = []


def generate(llm: Any, spec: dict[str, Any]) -> list[list[list[int]]]:
    """The tokens of every prompt of every round; the prompts of a round are decoded together."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=spec.get("max_tokens", 8), ignore_eos=True, detokenize=False)
    rounds = []
    for prompts in spec["rounds"]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        rounds.append([list(o.outputs[0].token_ids) for o in outputs])
        _CACHED.append(sum(o.num_cached_tokens or 0 for o in outputs))
    return rounds


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec.get("form") == "opaque":
        take_opaque_form()
    if spec.get("patched"):
        patch_router()
    if spec.get("monolithic"):
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        MoERunner.is_monolithic = True
    if spec.get("pieces"):
        compile_in_pieces()
    if spec.get("int8"):
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

        CPUExpertsInt8._supports_current_device = staticmethod(lambda: True)
        spec["engine"] = {"quantization": "experts_int8", "dtype": "bfloat16"}
    from vllm import LLM

    additional = {"moe_fx": spec["entry"]} if spec.get("entry") else {}
    arguments = {
        "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 16, "seed": 0,
        "enable_prefix_caching": False, "additional_config": additional,
    } | spec.get("engine", {})  # fmt: skip
    if spec.get("own_pass"):
        arguments["compilation_config"] = {"inductor_compile_config": {"post_grad_custom_post_pass": own_pass()}}
    if spec.get("watch"):
        arguments["worker_extension_cls"] = "run_engine.Watch"
    llm = LLM(spec["model"], **arguments)
    if spec.get("watch"):
        llm.collective_rpc("watch")
    result: dict[str, Any] = {"cached": _CACHED}
    for name, policies in spec.get("variants", {"started": None}).items():
        if policies is not None:
            change_policies(llm, policies, bool(spec.get("patched")))
        result[name] = generate(llm, spec)
    if (spec.get("entry") or {}).get("stats"):
        import time

        import moe_fx.vllm

        time.sleep(3 * moe_fx.vllm.metrics.INTERVAL_S)  # an engine in other processes publishes now and then
        result["stats"] = {name: [s.steps, s.before, s.active, s.off] for name, s in moe_fx.vllm.stats().items()}
    if spec.get("watch"):
        result["saw"] = llm.collective_rpc("saw")
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
