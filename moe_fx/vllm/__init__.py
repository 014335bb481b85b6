"""SERE and BEAM inside vLLM, from its command line or from Python; no model file is patched.

    vllm serve MODEL --additional-config '{"moe_fx": {"policy": {"name": "sere", "artifact": "model.moe.safetensors"}}}'
    vllm.LLM(MODEL, **moe_fx.vllm.engine_args(policy=moe_fx.SERE("model.moe.safetensors", primary=2)))

Importing this does not import vLLM.  docs/vllm.md says how it works.
"""

from moe_fx.vllm.config import VllmError, engine_args
from moe_fx.vllm.metrics import stats

__all__ = ["VllmError", "engine_args", "stats"]
