"""Why a worker refused to start: one line of the log, and the last line of the process that starts the engine.

vLLM puts a worker's error into the middle of tracebacks, and ends with one that says only that there was an error.  So the
worker leaves its message in a file, and the process that waits for it raises it again.  The processes of another machine
do not see the file: there the line in the log remains.
"""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_fx.artifacts import ArtifactError
from moe_fx.policy import PolicyError
from moe_fx.vllm.config import VllmError

FILE = "MOE_FX_REFUSAL_FILE"
_EXPLAINED = "_moe_fx_explained"


@contextmanager
def told() -> Iterator[None]:
    """Tell of an error of ours that leaves the block."""
    try:
        yield
    except (VllmError, PolicyError, ArtifactError) as error:
        _tell(str(error))
        raise


def _tell(message: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.moe_fx").error("moe_fx: %s", message)
    with suppress(OSError, KeyError), Path(os.environ[FILE]).open("x") as file:  # the first of several ranks is enough
        file.write(message)


def listen() -> None:
    """In the process that starts an engine: end with what a worker tells.  To be called before the engine is started."""
    file = Path(tempfile.gettempdir()) / f"moe_fx-refusal-{uuid.uuid4().hex}"
    os.environ[FILE] = str(file)
    atexit.register(file.unlink, missing_ok=True)
    from vllm.v1.engine import utils

    utils.wait_for_engine_startup = _explained(utils.wait_for_engine_startup)


def _explained(wait: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(wait, _EXPLAINED):
        return wait

    @functools.wraps(wait)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return wait(*args, **kwargs)
        except RuntimeError as error:
            message = _heard()
            if message is None:
                raise
            raise VllmError(message) from error

    setattr(wrapped, _EXPLAINED, True)
    return wrapped


def _heard() -> str | None:
    file = Path(os.environ[FILE])
    return file.read_text() if file.exists() else None
