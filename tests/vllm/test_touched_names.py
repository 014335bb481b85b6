"""Every name of vLLM's that this package reads, replaces or wraps is there, in the sources of each version at hand.

The installed vLLM's by default.  Another version's need not be installed, nor fit this machine: unpack its wheel and name
the folder, ``MOE_FX_VLLM_SOURCES=/tmp/vllm-0.26.0 python -m pytest tests/vllm/test_touched_names.py``.
"""

import ast
import importlib.util
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

_MOE = "model_executor/layers/fused_moe"
_RUNNER = ["execute_model", "_dummy_run", "get_model", "vllm_config"]
#: What is touched, by file and owner; the owner "" is the module itself.
TOUCHED = {
    "engine/arg_utils.py": {"EngineArgs": ["create_engine_config"]},
    "v1/worker/worker_base.py": {"WorkerWrapperBase": ["init_device", "worker"], "WorkerBase": ["vllm_config"]},
    "v1/worker/gpu_worker.py": {"Worker": ["load_model", "compile_or_warm_up_model", "model_runner", "device"]},
    "v1/worker/gpu_model_runner.py": {"GPUModelRunner": _RUNNER},
    "v1/worker/gpu/model_runner.py": {"GPUModelRunner": [*_RUNNER, "input_buffers"]},
    "v1/worker/gpu/input_batch.py": {"InputBuffers": ["is_padding"]},
    "v1/engine/utils.py": {"": ["wait_for_engine_startup"]},
    "logger.py": {"": ["init_logger"]},
    "forward_context.py": {
        "": ["get_forward_context", "is_forward_context_available"],
        "ForwardContext": ["no_compile_layers", "additional_kwargs", "is_padding"],
    },
    "compilation/passes/inductor_pass.py": {
        "": ["CallableInductorPass"], "InductorPass": ["uuid", "hash_dict", "is_applicable_for_range"],
    },
    "config/vllm.py": {"VllmConfig": ["additional_config", "compilation_config", "model_config", "parallel_config"]},
    "config/model.py": {"ModelConfig": ["model", "enforce_eager", "get_num_experts"]},
    "config/compilation.py": {"CompilationConfig": ["mode", "backend", "inductor_compile_config"]},
    "config/parallel.py": {
        "ParallelConfig": ["rank", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_index", "use_ubatching"],
    },
    f"{_MOE}/config.py": {
        "FusedMoEConfig": ["num_logical_experts", "hidden_dim_unpadded", "is_sequence_parallel", "moe_parallel_config"],
        "FusedMoEParallelConfig": ["pcp_size"],
    },
    f"{_MOE}/runner/moe_runner.py": {
        "": ["LayerName", "get_layer_from_name", "_resolve_layer_name", "_moe_forward", "_moe_forward_fake",
             "_moe_forward_shared", "_moe_forward_shared_fake"],
        "MoERunner": ["layer_name", "router", "gate", "moe_config", "_forward_entry", "_forward_impl", "_quant_method",
                      "is_monolithic", "do_naive_dispatch_combine", "routed_input_transform"],
    },
    f"{_MOE}/router/base_router.py": {"BaseRouter": ["_compute_routing"]},
    f"{_MOE}/router/fused_topk_router.py": {"": ["FusedTopKRouter"]},
    f"{_MOE}/router/fused_topk_bias_router.py": {"FusedTopKBiasRouter": ["e_score_correction_bias", "scoring_func"]},
    f"{_MOE}/router/grouped_topk_router.py": {"GroupedTopKRouter": ["e_score_correction_bias", "scoring_func"]},
    f"{_MOE}/router/custom_routing_router.py": {"CustomRoutingRouter": ["custom_routing_function"]},
    f"{_MOE}/router/zero_expert_router.py": {"ZeroExpertRouter": ["zero_expert_type"]},
}  # fmt: skip


def sources():
    """The folders named ``vllm`` to look into."""
    given = [Path(folder) / "vllm" for folder in os.environ.get("MOE_FX_VLLM_SOURCES", "").split(os.pathsep) if folder]
    found = importlib.util.find_spec("vllm")
    return given or ([Path(found.submodule_search_locations[0])] if found else [])


def names_in(owner):
    """What a module or a class defines, imports or sets on ``self``."""
    names = set()
    for node in ast.walk(owner):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def missing(folder, file, owners):
    tree = ast.parse((folder / file).read_text())
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"": tree}
    for owner, wanted in owners.items():
        present = names_in(classes[owner]) if owner in classes else set()
        yield from (f"{file}: {owner}.{name}" for name in wanted if name not in present)


@pytest.mark.parametrize("folder", sources(), ids=str)
def test_every_touched_name_is_there(folder):
    assert [name for file, owners in TOUCHED.items() for name in missing(folder, file, owners)] == []
