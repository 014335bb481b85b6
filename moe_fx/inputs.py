"""Models and texts from a disk or a hub, and models back to a disk, for the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class InputError(ValueError):
    """A model or a text cannot be read; the message says what to do."""


def load_model(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[nn.Module, Any]:
    """A causal language model in eval mode, or one that reads images too and is given none, and its tokenizer.

    A folder is read without any network; anything else is taken for the id of a model on the hub.

    Raises:
        InputError: there is no such model, it is none that transformers knows, its files are damaged, it has no tokenizer, or it
            cannot be put on the device.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    if not is_local and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"there is no model folder {folder}: give a folder with a config.json, or the id of a model on the hub")
    where: dict[str, Any] = {"local_files_only": True} if is_local else {}
    if is_local and not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, so it is no model: give the folder that save_pretrained wrote")
    source = str(folder) if is_local else name
    try:
        model = _from_pretrained(source, dtype=dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load model '{name}': {_first_line(error)}") from error
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot put the model on device '{device}': {_first_line(error)}; choose another --device") from error
    return model.eval().requires_grad_(False), tokenizer


def _from_pretrained(source: str, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return kind.from_pretrained(source, **settings)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    raise ValueError(
        "transformers has no class for its kind that continues a text, as the command line needs; from Python, "
        "moe_fx.calibrate and the backend take any torch.nn.Module"
    )


def keep_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer, for ``load_model``.

    Raises:
        InputError: the folder cannot be written.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot keep the model in {folder}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_documents(files: Sequence[Path]) -> list[str]:
    """The texts in some files: one for each ``.jsonl`` line (its ``text``), one for each other file; folders are searched.

    Raises:
        InputError: a file is missing, empty, or no UTF-8 text.
    """
    documents = [text for file in files for text in _documents_in(file)]
    if not documents:
        raise InputError(f"there is no text in {', '.join(map(str, files))}")
    return documents


def _documents_in(file: Path) -> Iterator[str]:
    file = file.expanduser()
    if file.is_dir():
        inside = sorted(p for p in file.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not inside:
            raise InputError(f"data folder {file} is empty: name text files, or a folder of them")
        for path in inside:
            yield from _documents_in(path)
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise InputError(f"there is no data file {file}: check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"data file {file} is not UTF-8 text (byte {error.start}): give plain text or .jsonl") from None
    except OSError as error:
        raise InputError(f"cannot read data file {file}: {error}") from None
    if "\0" in text:
        raise InputError(f"data file {file} is binary: give plain text, or .jsonl with a 'text' in each line")
    if not text.strip():
        raise InputError(f"data file {file} is empty")
    yield from _json_lines(file, text) if file.suffix == ".jsonl" else [text]


def _json_lines(file: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):  # a text may hold what Unicode, too, calls a line's end
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number}, is not JSON ({error}): each line is an object with a 'text'") from None
        if not isinstance(content, dict) or not isinstance(content.get("text"), str):
            raise InputError(f"{file}, line {number}, has no 'text': each line is an object with a 'text'")
        if any("\ud800" <= character <= "\udfff" for character in content["text"]):
            raise InputError(f"{file}, line {number}, has half of a surrogate pair in its 'text': mend the line")
        yield content["text"]


def tokenized(documents: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Token ids of each document, beginning with the token that begins texts, where the tokenizer has one.

    Raises:
        InputError: the tokenizer makes no token of any of them.
    """
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    if not any(ids):  # what transformers makes of a folder without a tokenizer knows no words
        where = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(f"the tokenizer of {where} makes no token of the text: are the tokenizer's files beside the model?")
    return [torch.tensor([*begin, *row], dtype=torch.int64) for row in ids]


def calibration_batches(documents: Sequence[Tensor], tokens: int, length: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Batches of ``rows`` windows of ``length`` tokens each, without overlap, drawn from all documents by ``seed``.

    Raises:
        InputError: the documents hold fewer tokens in whole windows than asked for.
    """
    windows = [w for d in documents for w in d.split(length) if len(w) == length]
    wanted = max(1, tokens // length)
    if len(windows) < wanted:
        total, whole = sum(len(d) for d in documents), len(windows) * length
        raise InputError(
            f"the data have {total:,} tokens, {whole:,} of them in whole windows of {length}, but {tokens:,} are asked for: "
            f"give more text, {f'or --tokens {whole} ' if whole else ''}or a smaller --length"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    chosen = torch.stack([windows[i] for i in order])
    return [{"input_ids": part, "use_cache": False} for part in chosen.split(rows)]


def random_batches(vocabulary: int, tokens: int, length: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Batches of random token ids, to lead to the experts where there are no data."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (max(1, tokens // length), length), generator=generator)
    return [{"input_ids": part, "use_cache": False} for part in ids.split(rows)]
