"""The committed table of architectures says what the code does today."""

from __future__ import annotations

import dataclasses
import os

import pytest

from benchmarks import coverage

CHEAP = (
    "mixtral/grouped_mm", "qwen3_moe/batched_mm", "olmoe/eager", "gpt_oss/grouped_mm", "phimoe/grouped_mm", "dbrx/own",
    "granitemoe/grouped_mm", "deepseek_v2/grouped_mm",
)  # fmt: skip


def committed() -> dict[str, str]:
    """The table's lines by "architecture/implementation"."""
    text = coverage.TABLE.read_text(encoding="utf-8")
    if coverage.versions() not in text:
        pytest.skip(f"the table is of other versions than {coverage.versions()}")
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return {"/".join(cell.strip() for cell in line.split("|")[1:3]): line for line in lines}


def check(name: str, implementation: str) -> None:
    architecture = next(a for a in coverage.architectures()[0] if a.name == name)
    made = coverage.as_markdown(coverage.examine(architecture, implementation))
    assert committed()[f"{name}/{implementation}"] == made, "docs/coverage.md is out of date: run python -m benchmarks.coverage"


@pytest.mark.parametrize("key", CHEAP)
def test_row_is_up_to_date(key: str) -> None:
    committed()
    check(*key.split("/"))


@pytest.mark.slow
@pytest.mark.skipif("MOE_FX_NIGHTLY" not in os.environ, reason="takes a quarter of an hour: set MOE_FX_NIGHTLY to run it")
def test_whole_table_is_up_to_date() -> None:
    lines, known = committed(), coverage.architectures()[0]
    for architecture in known:
        for name, implementation in coverage.rows_of(architecture):
            check(name, implementation)
    assert {key.split("/")[0] for key in lines} == {a.name for a in known}


def test_a_difference_shows() -> None:
    """A row whose output differs, or that finds fewer sites, is another line."""
    row = coverage.Row("a", "eager", expected=2, sites=2, topk=True, sere=True, beam=True, beam_folded=True, experts="fused")
    lines = {coverage.as_markdown(r) for r in (row, dataclasses.replace(row, sere=False), dataclasses.replace(row, sites=1))}
    assert len(lines) == 3


def test_every_model_that_counts_experts_is_listed() -> None:
    names = {a.name for a in coverage.architectures()[0]}
    assert {"mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss", "dbrx", "switch_transformers"} <= names
    assert not {"llama", "bert"} & names
