"""The command line on a tiny model in a folder: what it writes, what it says, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import moe_fx
import tiny
from moe_fx.cli import _progress, _readers_of, app
from moe_fx.inputs import read_documents

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it "


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and texts, as from a hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)  # as in the tests: what is calibrated is repeated to the bit only by as many threads
    root = tmp_path_factory.mktemp("cli")
    tiny.build("qwen3_moe").save_pretrained(root / "model")
    words = {word: i + 3 for i, word in enumerate(dict.fromkeys(TEXT.split()))} | {"[UNK]": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root / "model")
    lines = [" ".join(TEXT.split()[i:] + TEXT.split()[:i]) * 6 for i in range(6)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    result = run("calibrate", root / "model", "--data", root / "data.jsonl", "--tokens", 64, "--length", 16, "--rows", 2,
                 "--out", root / "model.moe.safetensors", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_calibrate_writes_a_good_artifact_that_another_run_repeats(folder: Path) -> None:
    artifact = moe_fx.Artifact.load(folder / "model.moe.safetensors").validate(tiny.build("qwen3_moe"))
    assert artifact.kinds == ("coactivation", "fold_gain", "fold_scale", "similarity")
    assert artifact.metadata["calibration"] == {"batches": 2, "tokens": 64}
    assert artifact.metadata["calibrated_on"] == [str(folder / "data.jsonl")]
    again = run("calibrate", folder / "model", "--data", folder / "data.jsonl", "--tokens", 64, "--length", 16, "--rows", 2,
                "--out", folder / "again.safetensors")  # fmt: skip
    assert again.exit_code == 0
    assert "64 tokens" in again.stdout
    assert moe_fx.Artifact.load(folder / "again.safetensors") == artifact
    assert not list(folder.glob("*.partial"))


def test_calibrate_without_data_is_labelled(folder: Path) -> None:
    result = run("calibrate", folder / "model", "--data", "none", "--tokens", 32, "--length", 16, "--metric", "cosine",
                 "--out", folder / "noise.safetensors", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    metadata = moe_fx.Artifact.load(folder / "noise.safetensors").metadata
    assert "no data" in str(metadata["calibrated_on"])
    assert metadata["metric"] == "cosine"


def test_inspect_shows_and_draws(folder: Path) -> None:
    plot = folder / "plot.png"
    shown = run("inspect", folder / "model", "--similarity", folder / "model.moe.safetensors", "--plot", plot)
    assert shown.exit_code == 0, shown.output
    assert "model.layers.1.mlp" in shown.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("inspect", folder / "model", "--json").stdout)
    assert [s["site"] for s in found["sites"]] == list(tiny.ARCHS["qwen3_moe"].sites)
    assert {(s["experts"], s["top_k"], s["hidden_size"], s["off_picks"]) for s in found["sites"]} == {(10, 3, 32, "skipped")}
    assert found["skips"] == []


def test_eval_writes_rows_and_a_plot(folder: Path) -> None:
    out, plot = folder / "rows.csv", folder / "pareto.png"
    result = run("eval", folder / "model", "--data", folder / "data.jsonl", "--artifact", folder / "model.moe.safetensors",
                 "--policy", "sere:primary=1,threshold=0.1", "--policy", '{"name": "exfold", "primary": 1}',
                 "--policy", "top_p:p=0.5",
                 "--batch", 3, "--batch", 2, "--context", 8, "--groups", 1, "--csv", out, "--plot", plot, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [r["batch"] for r in rows] == [3] * 4 + [2] * 4
    assert rows[0]["policy"] == "full"
    assert all(0 < r["active_experts_per_layer"] <= 10 for r in rows)
    with out.open() as file:
        assert [r["policy"] for r in csv.DictReader(file)] == [r["policy"] for r in rows]
    assert json.loads(result.stdout)["plots"] == [str(plot.with_stem(f"pareto-{size}")) for size in (3, 2)]
    assert all(plot.with_stem(f"pareto-{size}").read_bytes().startswith(b"\x89PNG") for size in (3, 2))


def test_tune_writes_settings_that_serve_alone(folder: Path) -> None:
    out = folder / "tuned.safetensors"
    with mock.patch.multiple("moe_fx.tune", _CHECKS=2, _MEASUREMENTS=4):  # each is a compilation
        result = run(
            "tune", folder / "model", "--data", folder / "data.jsonl", "--artifact", folder / "model.moe.safetensors",
            "--max-ppl-increase", "50%", "--batch", 3, "--context", 6, "--groups", 1, "--out", out, "--json",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    tuned = json.loads(result.stdout)["tuned"]
    assert moe_fx.SERE(out).layers == tuple((site, s, t) for site, (s, t) in sorted(tuned.items()))
    assert moe_fx.SERE(folder / "model.moe.safetensors").layers == ()


def test_bench_times_side_by_side(folder: Path) -> None:
    result = run("bench", folder / "model", "--artifact", folder / "model.moe.safetensors", "--batch", 2, "--length", 16,
                 "--turns", 2, "--inner", "eager", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(r["what"], r["configuration"]) for r in rows] == [
        (what, name) for what in ("decode", "prefill")
        for name in ("eager alone", "moe_sparse, TopK", "moe_sparse, SERE(primary=2, threshold=0.0)")
    ]  # fmt: skip
    assert all(r["ms"] > 0 for r in rows)
    assert rows[0]["active_experts_per_layer"] >= rows[2]["active_experts_per_layer"]


def bad_data(folder: Path) -> dict[str, tuple[Path, str]]:
    cases = {
        "missing": (None, "there is no data file"),
        "empty": (b" \n", "is empty"),
        "binary": (b"\xff\xfe\x00", "is not UTF-8 text"),
        "zeros": (b"a\x00b", "is binary"),
        "short": (b"the quick brown fox", "the data have 4 tokens, 0 of them in whole windows of 16, but 64 are"),
        "notjson.jsonl": (b"{", "line 1, is not JSON"),
        "notext.jsonl": (b'{"a": 1}', "has no 'text'"),
        "surrogate.jsonl": (b'{"text": "the quick"}\n{"text": "fox \\ud800"}', "line 2, has half of a surrogate pair"),
    }
    for name, (content, _) in cases.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return {name: (folder / name, words) for name, (_, words) in cases.items()}


@pytest.mark.parametrize(
    "name", ["missing", "empty", "binary", "zeros", "short", "notjson.jsonl", "notext.jsonl", "surrogate.jsonl"]
)
def test_bad_data(folder: Path, tmp_path: Path, name: str) -> None:
    path, words = bad_data(tmp_path)[name]
    result = run("calibrate", folder / "model", "--data", path, "--tokens", 64, "--length", 16, "--out", tmp_path / "o", "--json")
    assert result.exit_code == 1
    assert words in json.loads(result.stdout)["error"]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_where_json_lines_end_and_nowhere_else(tmp_path: Path, end: str) -> None:
    texts = ["the \u2028 quick \x85 brown \x0b fox \x1c jumps", "over \U0001f98a the lazy dog"]
    lines = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end
    for name, mark in (("plain.jsonl", b""), ("marked.jsonl", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + lines.encode())
        assert read_documents([tmp_path / name]) == texts
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfthe quick")
    assert read_documents([tmp_path / "marked.txt"]) == ["the quick"]


def test_no_such_model(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", tmp_path):
        result = run("inspect", name)
        assert result.exit_code == 1
        assert "error:" in result.stderr
        assert str(tmp_path) in result.stderr.replace("\n", "")


def test_wrong_use(folder: Path, tmp_path: Path) -> None:
    model, data, artifact = folder / "model", folder / "data.jsonl", folder / "model.moe.safetensors"
    masks = tmp_path / "masks.safetensors"
    zeros = {site: {"mask_router": torch.zeros(tiny.EXPERTS, tiny.HIDDEN)} for site in tiny.ARCHS["qwen3_moe"].sites}
    moe_fx.Artifact(zeros).save(masks)
    cases: dict[str, tuple[object, ...]] = {
        "say how much quality may go": ("tune", model, "--data", data, "--artifact", artifact),
        "expected a share": ("tune", model, "--data", data, "--artifact", artifact, "--max-ppl-increase", "much"),
        "name it with --artifact": ("eval", model, "--data", data, "--policy", "sere"),
        "unknown policy 'seer'": ("eval", model, "--data", data, "--policy", "seer"),
        "key=value is expected": ("eval", model, "--data", data, "--policy", "top_p:0.5"),
        "--plot draws similarities": ("inspect", model, "--plot", folder / "x.png"),
        "there is no such compiler": ("bench", model, "--batch", 2, "--length", 16, "--turns", 2, "--inner", "none"),
        "unknown inner compiler 'none'": ("eval", model, "--data", data, "--batch", 2, "--context", 4, "--inner", "none"),
        "make one with 'moe-fx train-beam'": ("eval", model, "--data", data, "--artifact", artifact, "--policy", "BEAM"),
        "a mapping with a 'name', but got 1 (int)": ("eval", model, "--data", data, "--policy", "[1]"),
        "make one with 'moe-fx calibrate'": ("tune", model, "--data", data, "--artifact", masks, "--max-kl", 1),
        "has only mask_router and no similarity": ("inspect", model, "--similarity", masks, "--plot", folder / "x.png"),
        "documents are decoded together": (),
    }
    for words, arguments in cases.items():
        if arguments:
            result = run(*arguments, "--json")
            assert result.exit_code == 1, words
            assert words in json.loads(result.stdout)["error"]
    few = json.loads(run("eval", model, "--data", data, "--batch", 99, "--context", 8, "--json").stdout)
    assert "but 99 are decoded together" in few["error"]


def test_an_artifact_of_another_model_or_revision(folder: Path, tmp_path: Path) -> None:
    other = tiny.random_artifact("mixtral")
    sites = {f"model.layers.{i + 1}.mlp": kinds for i, kinds in enumerate(other.sites.values())}
    moe_fx.Artifact(sites).save(tmp_path / "other")
    good = moe_fx.Artifact.load(folder / "model.moe.safetensors")
    sample = [value + 0.5 for value in good.metadata["weights_sample"]]  # type: ignore[attr-defined]
    moe_fx.Artifact(good.sites, {**good.metadata, "weights_sample": sample}).save(tmp_path / "revision")
    for name, words in (("other", "is not a module of the model"), ("revision", "another revision")):
        result = run("inspect", folder / "model", "--similarity", tmp_path / name, "--json")
        assert result.exit_code == 1
        assert words in json.loads(result.stdout)["error"]
        policy = json.dumps({"name": "sere", "artifact": str(tmp_path / name)})
        result = run("eval", folder / "model", "--data", folder / "data.jsonl", "--artifact", folder / "model.moe.safetensors",
                     "--policy", policy)  # fmt: skip
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()  # of several problems, too
        assert words in line


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A model without experts."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    root = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(root)
    transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(root)
    return root


OPTIONS: dict[str, list[object]] = {
    "calibrate": ["--tokens", 32, "--length", 16, "--out", "{tmp}/o"],
    "eval": ["--batch", 2, "--context", 4, "--groups", 1],
    "tune": ["--max-kl", 0.1, "--artifact", "{folder}/model.moe.safetensors"],
    "train-beam": ["--steps", 2, "--rows", 2, "--length", 16, "--held-out", 2, "--out", "{tmp}/o"],
    "bench": ["--batch", 2, "--length", 16, "--turns", 2, "--inner", "eager"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_a_model_without_experts(folder: Path, dense: Path, tmp_path: Path, command: str) -> None:
    options = [str(o).format(tmp=tmp_path, folder=folder) for o in OPTIONS[command]]
    result = run(command, dense, "--data", folder / "data.jsonl", *options, "--json")
    assert result.exit_code == 1
    words = "does not fit a model of class LlamaForCausalLM" if command == "tune" else "no expert routing was found in this"
    assert words in json.loads(result.stdout)["error"]
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_that_there_are_no_experts(dense: Path) -> None:
    result = run("inspect", dense)
    assert result.exit_code == 0
    assert "No expert routing was found" in result.stdout


def test_models_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    cut, strange = tmp_path / "cut", tmp_path / "strange"
    shutil.copytree(folder / "model", cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:4000])
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "nobody_knows_it"}')
    for path, words in ((cut, "header"), (strange, "nobody_knows_it")):
        result = run("inspect", path, "--json")
        assert result.exit_code == 1
        assert f"cannot load model '{path}'" in json.loads(result.stdout)["error"]
        assert words in json.loads(result.stdout)["error"]
    shutil.copytree(folder / "model", tmp_path / "wordless", ignore=shutil.ignore_patterns("tokenizer*"))
    result = run("calibrate", tmp_path / "wordless", "--data", folder / "data.jsonl", "--out", tmp_path / "o", "--json")
    assert result.exit_code == 1
    assert "tokenizer" in json.loads(result.stdout)["error"]
    result = run("inspect", folder / "model", "--device", "no_such_device", "--json")
    assert "cannot put the model on device 'no_such_device'" in json.loads(result.stdout)["error"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    artifact, nowhere = folder / "model.moe.safetensors", tmp_path / "nowhere" / "file"
    cases: list[tuple[list[object], str]] = [
        (["calibrate", "--out", nowhere], "there is no directory"),
        (["calibrate", "--out", tmp_path], "it is not a regular file"),
        (["tune", "--max-kl", 1, "--artifact", artifact, "--out", nowhere], "there is no directory"),
        (["train-beam", "--out", nowhere], "there is no directory"),
        (["train-beam", "--out", tmp_path / "o", "--plot", tmp_path / "a.jpeg2"], "expected a file name that ends in .png"),
        (["eval", "--csv", nowhere], "there is no directory"),
        (["eval", "--plot", nowhere.with_suffix(".png")], "there is no directory"),
        (["bench", "--csv", tmp_path], "it is not a regular file"),
    ]
    with mock.patch("moe_fx.inputs.load_model", side_effect=AssertionError("the work began")):
        for (command, *options), words in cases:
            result = run(command, folder / "model", "--data", folder / "data.jsonl", *options, "--json")
            assert result.exit_code == 1, (command, result.output)
            assert words in json.loads(result.stdout)["error"]


def test_a_warning_of_too_few_tokens_is_one_line_with_the_spread(folder: Path, tmp_path: Path) -> None:
    result = run("calibrate", folder / "model", "--data", folder / "data.jsonl", "--tokens", 16, "--length", 16,
                 "--out", tmp_path / "o")  # fmt: skip
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: similarities are known only to ± 0.")
    assert line.endswith(": 16 tokens are too few; give more --tokens")


@pytest.mark.parametrize("what", ["artifact", "csv", "plot", "checkpoint"])
def test_a_full_disk_leaves_the_old_file(folder: Path, tmp_path: Path, what: str) -> None:
    out, old = tmp_path / f"old.{'png' if what == 'plot' else 'file'}", b"what was there before"
    evaluation: list[object] = ["eval", "--batch", 2, "--context", 4, "--groups", 1]
    arguments: dict[str, list[object]] = {
        "artifact": ["calibrate", "--tokens", 32, "--length", 16, "--out", out],
        "csv": [*evaluation, "--csv", out],
        "plot": [*evaluation, "--plot", out],
        "checkpoint": ["train-beam", "--steps", 2, "--rows", 2, "--length", 16, "--held-out", 2, "--every", 1, "--out", out],
    }
    command, *options = arguments[what]
    out.write_bytes(old)
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        result = run(command, folder / "model", "--data", folder / "data.jsonl", *options, "--json")
    assert result.exit_code == 1
    assert "No space left on device; what was there before is unchanged" in json.loads(result.stdout.splitlines()[-1])["error"]
    assert out.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for line_seconds, as_json, lines in ((0, False, 2), (99, False, 0), (0, True, 0)):
        with mock.patch("moe_fx.cli._LINE_SECONDS", line_seconds), _progress("train-beam", 4, as_json) as advance:
            advance(1, "loss 2.500, picks 1.50 (1.0 2.0)")
            advance(2, "")
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == lines
        if lines:
            assert said.err.startswith("train-beam: loss 2.500, picks 1.50 (1.0 2.0); 1 of 4, 0 s left\ntrain-beam; 2 of 4")


def test_a_home_folder_is_found_in_every_option(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("calibrate", folder / "model", "--data", folder / "data.jsonl", "--tokens", 32, "--length", 16, "--out", "~/o")
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_what_an_artifact_is_for_is_timed_where_no_policy_is_named() -> None:
    both = tiny.random_artifact("qwen3_moe")
    masks = moe_fx.Artifact({site: {"mask_router": kinds["mask_router"]} for site, kinds in both.sites.items()})
    assert [_readers_of(artifact) for artifact in (None, masks, both)] == [[], ["beam"], ["sere", "beam"]]


def test_a_model_that_reads_images_too(folder: Path, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "head_dim": 8, "vocab_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6,
             "num_experts_per_tok": 2}  # fmt: skip
    images = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=sizes, vision_config=images)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    data, artifact = ["--data", folder / "data.jsonl"], tmp_path / "o.safetensors"
    result = run("calibrate", tmp_path / "model", *data, "--tokens", 32, "--length", 16, "--out", artifact, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"] == [f"model.language_model.layers.{i}.mlp" for i in range(2)]
    result = run("eval", tmp_path / "model", *data, "--artifact", artifact, "--policy", "sere:primary=1", "--batch", 3,
                 "--context", 4, "--groups", 1, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    full, sere = json.loads(result.stdout)["rows"]
    assert sere["active_experts_per_layer"] < full["active_experts_per_layer"]


def test_a_model_that_does_not_continue_texts_is_told(folder: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 1
    assert "has no class for its kind that continues a text" in json.loads(result.stdout)["error"]


def test_a_local_model_needs_no_network(folder: Path) -> None:
    with mock.patch("socket.socket.connect", side_effect=AssertionError("the network was used")):
        assert run("inspect", folder / "model", "--json").exit_code == 0


def test_lm_eval_is_optional(folder: Path) -> None:
    with mock.patch.dict("sys.modules", {"lm_eval": None}):
        result = run("eval", folder / "model", "--data", folder / "data.jsonl", "--batch", 2, "--context", 4, "--groups", 1,
                     "--lm-eval", "piqa", "--json")  # fmt: skip
    assert result.exit_code == 1
    assert "pip install 'moe-fx[eval]'" in json.loads(result.stdout)["error"]


def lm_eval_task(root: Path, output_type: str, metric: str) -> Path:
    """A task of lm-eval whose texts lie beside it: three words to continue, each with the four that follow."""
    words = TEXT.split()
    texts = [{"begin": " ".join(words[i : i + 3]), "end": " ".join(words[i + 3 : i + 7])} for i in range(7)]
    (root / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    task = {"task": f"local_{output_type}", "dataset_path": "json", "test_split": "test", "output_type": output_type,
            "dataset_kwargs": {"data_files": {"test": str(root / "texts.jsonl")}}, "doc_to_text": "{{begin}}",
            "doc_to_target": "{{end}}", "metric_list": [{"metric": metric}]}  # fmt: skip
    if output_type == "generate_until":
        task["generation_kwargs"] = {"until": ["."], "max_gen_toks": 4}
    (root / f"{output_type}.yaml").write_text(json.dumps(task))
    return root / f"{output_type}.yaml"


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The real library, or a skip."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("accelerate", reason="lm-eval runs models of transformers by accelerate: pip install 'moe-fx[eval]'")
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'moe-fx[eval]'")


@pytest.fixture
def with_end(folder: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer that has a token which ends texts: lm-eval needs one."""
    from transformers import AutoTokenizer

    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = "[UNK]"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_lm_eval_scores_the_plain_model_as_by_itself_and_a_policy_changes_them(
    lm_eval: Any, folder: Path, with_end: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kinds = (("loglikelihood", "perplexity"), ("generate_until", "exact_match"))
    tasks = [str(lm_eval_task(tmp_path, *kind)) for kind in kinds]
    model = AutoModelForCausalLM.from_pretrained(with_end).eval()
    language_model = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(with_end), batch_size=4)
    plain = lm_eval.simple_evaluate(model=language_model, tasks=tasks, bootstrap_iters=0)
    masks = tmp_path / "masks.safetensors"
    tiny.random_artifact("qwen3_moe").save(masks)
    policies = ["sere:primary=1", json.dumps({"name": "beam", "tau": 0.5})]
    result = run("eval", with_end, "--data", folder / "data.jsonl", "--batch", 4, "--context", 4, "--groups", 1,
                 "--artifact", masks, *(a for p in policies for a in ("--policy", p)),
                 *(a for t in tasks for a in ("--lm-eval", t)), "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["lm_eval"]
    perplexity = {name: found["local_loglikelihood"]["perplexity,none"] for name, found in scores.items()}
    full, sere, beam = perplexity.values()
    assert full == pytest.approx(plain["results"]["local_loglikelihood"]["perplexity,none"], rel=1e-4)
    assert abs(sere / full - 1) > 0.001
    assert abs(beam / full - 1) > 0.001
    assert all(found["local_generate_until"]["sample_len"] == 7 for found in scores.values())


def test_lm_eval_prints_a_table(lm_eval: Any, folder: Path, with_end: Path, tmp_path: Path) -> None:
    result = run("eval", with_end, "--data", folder / "data.jsonl", "--batch", 2, "--context", 4, "--groups", 1,
                 "--lm-eval", lm_eval_task(tmp_path, "loglikelihood", "acc"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "lm-eval, 2 texts together" in result.stdout
    assert "local_loglikelihood" in result.stdout


@pytest.mark.parametrize(
    ("task", "words"),
    [("no_such_task", "cannot load the lm-eval task no_such_task"), ("loglikelihood", "set its bos_token")],
)
def test_lm_eval_says_what_is_wrong_with_a_task(lm_eval: Any, folder: Path, tmp_path: Path, task: str, words: str) -> None:
    name = task if task == "no_such_task" else lm_eval_task(tmp_path, task, "acc")
    result = run("eval", folder / "model", "--data", folder / "data.jsonl", "--batch", 2, "--context", 4, "--groups", 1,
                 "--lm-eval", name, "--json")  # fmt: skip
    assert result.exit_code == 1
    assert words in json.loads(result.stdout)["error"]


def test_a_missing_library_says_which_extra_brings_it(folder: Path, tmp_path: Path) -> None:
    with mock.patch.dict("sys.modules", {"matplotlib": None}):
        result = run("inspect", folder / "model", "--similarity", folder / "model.moe.safetensors", "--plot", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "pip install 'moe-fx[cli]'" in result.stderr.replace("\n", " ")
