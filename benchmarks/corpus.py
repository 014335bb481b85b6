"""Real text that every machine has: the source of Python's own standard library, cut into tokens.

Files are split by a hash of their name into text to train on and text held out, so that no held-out file shares a line of
context with training, and so that the split does not depend on the order in which a file system lists files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|file|>"
_MIN_BYTES, _MAX_BYTES = 2_000, 250_000
_HELD_OUT_ONE_IN = 8
# Third-party packages, tests and generated tables: not the library's own prose and code.
_SKIPPED_FOLDERS = {
    "__pycache__", "config", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Token streams of the training files (one tensor, files joined by the separator) and of each held-out file."""

    tokenizer: Tokenizer
    train: torch.Tensor
    held_out: dict[str, torch.Tensor]
    train_bytes: int
    train_files: int


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The ``*.py`` files of the standard library, sorted by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)]
    files = [p for p in files if _MIN_BYTES <= p.stat().st_size <= _MAX_BYTES]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def is_held_out(name: str) -> bool:
    """True for one file in eight, decided by the file's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT_ONE_IN == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text can be encoded, and decoded back to the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_corpus(vocab_size: int, max_train_bytes: int | None = None) -> Corpus:
    """Read, split and tokenise the standard library; ``max_train_bytes`` stops reading training files early."""
    train_texts: list[str] = []
    held_out_texts: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    train_bytes = 0
    for path in stdlib_files(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")
        if is_held_out(name):
            held_out_texts[name] = text
        elif max_train_bytes is None or train_bytes < max_train_bytes:
            train_texts.append(text)
            train_bytes += len(text.encode())
    if not train_texts:
        raise FileNotFoundError(f"no Python source in {root}: the demo needs the standard library as .py files")
    tokenizer = train_tokenizer(train_texts, vocab_size)
    separator = tokenizer.encode(SEPARATOR).ids
    ids = [separator + encoding.ids for encoding in tokenizer.encode_batch_fast(train_texts)]
    return Corpus(
        tokenizer=tokenizer,
        train=torch.tensor([token for file in ids for token in file], dtype=torch.int64),
        held_out={name: torch.tensor(separator + tokenizer.encode(text).ids) for name, text in held_out_texts.items()},
        train_bytes=train_bytes,
        train_files=len(train_texts),
    )


def held_out_batch(corpus: Corpus, rows: int, length: int, skip: int = 0) -> torch.Tensor:
    """``[rows, length]`` tokens, each row from another held-out file, beginning a third into it.

    The beginning of a file is mostly a licence or a docstring; a third into it stands the code.
    """
    long_enough = [ids for ids in corpus.held_out.values() if len(ids) * 2 // 3 > length]
    chosen = long_enough[skip * rows : (skip + 1) * rows]
    if len(chosen) < rows:
        raise ValueError(f"{len(long_enough)} held-out files are longer than {length} tokens, {(skip + 1) * rows} wanted")
    return torch.stack([ids[len(ids) // 3 :][:length] for ids in chosen])


def training_windows(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, length]`` windows at random places of the training stream."""
    starts = torch.randint(0, len(tokens) - length, (rows,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def unigram_perplexity(corpus: Corpus, targets: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of ``targets`` under the (add-one) frequencies of the training tokens: what knowing no context gives."""
    counts = torch.bincount(corpus.train, minlength=vocab_size).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[targets.reshape(-1)].mean()))
