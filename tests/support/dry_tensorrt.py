"""Torch-TensorRT without a GPU: its lowering and partitioning are real, and PyTorch runs what would be engines.

``import torch_tensorrt`` and its compiler ask for a CUDA device.  Here they are told of one, and get the CPU wherever they
want to put a tensor on it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

#: Stops after partitioning; every op that has a converter goes into an engine; nothing that fails is passed over.
OPTIONS = {"dryrun": True, "min_block_size": 1, "pass_through_build_failures": True}


@dataclass
class Partition:
    """One compiled graph.

    Attributes:
        engines: the number of ops in each engine.
        outside: how often each op stays in PyTorch, by name, those that only take a result apart left out.
        settings: what Torch-TensorRT made of the options.
    """

    engines: list[int]
    outside: Counter[str]
    settings: Any


@contextlib.contextmanager
def dry_tensorrt() -> Iterator[list[Partition]]:
    """Yields the partitions of the graphs that are compiled from now on.  Where there is a GPU nothing is faked."""
    partitions: list[Partition] = []

    def collect(tracker: Any, _: object) -> None:
        ops = {name.removeprefix("torch.ops."): n for name, n in tracker.unsupported_ops.items()}
        ops.pop("_operator.getitem", None)
        sizes = [graph.subgraph_op_count for graph in tracker.per_subgraph_data]
        partitions.append(Partition(sizes, Counter(ops), tracker.compilation_settings))

    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(_told_of_a_device())
        compiler = importlib.import_module("torch_tensorrt.dynamo._compiler")
        stack.enter_context(mock.patch.object(compiler, "dryrun_stats_display", collect))
        yield partitions


@contextlib.contextmanager
def _told_of_a_device() -> Iterator[None]:
    properties = types.SimpleNamespace(name="none", major=9, minor=0, total_memory=2**36, multi_processor_count=128)
    answers = {"get_device_capability": (9, 0), "current_device": 0, "device_count": 1, "get_device_name": "none",
               "get_device_properties": properties, "mem_get_info": (2**35, 2**36)}  # fmt: skip
    is_file = os.path.isfile
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        # an annotation reads this type, which PyTorch for the CPU lacks
        stack.enter_context(mock.patch.object(torch._C, "_CudaDeviceProperties", types.SimpleNamespace, create=True))
        # its C++ runtime is linked against CUDA; without these files it takes the one in Python
        stack.enter_context(mock.patch.object(os.path, "isfile", lambda path: "libtorchtrt" not in str(path) and is_file(path)))
        package = importlib.import_module("torch_tensorrt")
        stack.enter_context(mock.patch.object(package.Device, "to", return_value=torch.device("cpu")))
        yield
