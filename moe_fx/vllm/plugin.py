"""vLLM's plugin: loaded in every process of an engine, it acts only where ``additional_config`` has a ``moe_fx`` entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_WRAPPED = "_moe_fx_wrapped"


def register() -> None:
    """Entry point ``vllm.general_plugins``.  May be called any number of times in a process."""
    from vllm.engine.arg_utils import EngineArgs

    from moe_fx.vllm.config import is_supported

    _after(EngineArgs, "create_engine_config", lambda engine_args, config: _start(config))
    if not is_supported():
        return  # an entry is refused there; without one, nothing that may have moved in another vLLM is touched
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    # a worker's process loads plugins while its worker is being made; this is the next thing that happens to it
    _after(WorkerWrapperBase, "init_device", lambda wrapper, _: _attend(wrapper.worker))


def _after(cls: type, name: str, then: Callable[[Any, Any], object]) -> None:
    """Have a method call ``then(self, result)`` before it returns."""
    method = vars(cls)[name]
    if hasattr(method, _WRAPPED):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        then(self, result)
        return result

    setattr(wrapped, _WRAPPED, True)
    setattr(cls, name, wrapped)


def _start(vllm_config: Any) -> None:
    """In the process that starts an engine."""
    if _prepare(vllm_config) is not None:
        from moe_fx.vllm import refusal

        refusal.listen()


def _prepare(vllm_config: Any) -> Any:
    """The settings asked for, our pass being in place; None without an entry of ours."""
    from moe_fx.vllm import config

    return config.prepare(vllm_config)


def _attend(worker: Any) -> None:
    """Follow one worker through its start, if its engine has an entry of ours."""
    from moe_fx.vllm import refusal

    with refusal.told():
        settings = _prepare(worker.vllm_config)
    if settings is None:
        return
    load_model, warm_up = worker.load_model, worker.compile_or_warm_up_model

    def load(*args: Any, **kwargs: Any) -> Any:
        from moe_fx.vllm import layers

        result = load_model(*args, **kwargs)
        with refusal.told():
            layers.install(worker.model_runner, settings, worker.device)
        return result

    def checked(*args: Any, **kwargs: Any) -> Any:
        from moe_fx.vllm import layers

        result = warm_up(*args, **kwargs)
        model = worker.model_runner.get_model()
        with refusal.told():
            layers.check_all_ran(model)
        worker.moe_fx_publisher = layers.publish_totals(model, worker.vllm_config.parallel_config)
        return result

    worker.load_model, worker.compile_or_warm_up_model = load, checked
