"""``vllm serve`` with a policy on: 200 requests in flight over HTTP, what it answers, logs and measures."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REQUESTS, TOKENS = 200, 16


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read().decode()


def wait_until_up(process, url, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            get(f"{url}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError("the server did not come up:\n" + log.read_text()[-4000:])


@pytest.fixture(scope="module")
def server(models, cache, tmp_path_factory):
    """The address of a running server, and its log."""
    folder, log = models("qwen3_moe"), tmp_path_factory.mktemp("server") / "log.txt"
    policy = {"name": "sere", "artifact": str(folder.with_suffix(".moe.safetensors")), "primary": 1}
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "32", "--max-num-batched-tokens", "64",
        "--additional-config", json.dumps({"moe_fx": {"policy": policy, "stats": True}}),
    ]  # fmt: skip
    environment = dict(os.environ, VLLM_CACHE_ROOT=str(cache), VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="2")
    environment.pop("TRITON_INTERPRET", None)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_up(process, url, log)
        yield url, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def answers(server):
    """The answers to all requests, all in flight at once; prompts of many lengths, so that prefill and decoding mix."""
    openai = pytest.importorskip("openai")
    url, _ = server

    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
        model = (await client.models.list()).data[0].id
        prompts = [[3 + (7 * n + i) % 250 for i in range(1 + n % 40)] for n in range(REQUESTS)]
        calls = [client.completions.create(model=model, prompt=p, max_tokens=TOKENS, temperature=0) for p in prompts]
        return await asyncio.gather(*calls)

    return asyncio.run(ask())


def test_every_request_is_answered(answers):
    assert [a.choices[0].finish_reason in ("length", "stop") for a in answers] == [True] * REQUESTS
    assert all(re.fullmatch(r"(\s*t\d+)*", a.choices[0].text) for a in answers)


def test_a_bad_body_leaves_the_server_up(server):
    url, _ = server
    for body in (b'{"prompt": ', b'{"model": "nobody", "prompt": [1]}', b'{"prompt": {"a": 1}, "max_tokens": "many"}'):
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=30)
        assert 400 <= error.value.code < 500
    get(f"{url}/health")


def test_metrics_show_the_drop_in_active_experts(server, answers):
    url, _ = server
    time.sleep(1.5)  # workers publish every half second
    text = get(f"{url}/metrics")
    found = re.findall(r'moe_fx:active_experts\{layer="([^"]+)",routing="(\w+)"\} ([\d.]+)', text)
    active = {(layer, routing): float(number) for layer, routing, number in found}
    layers = {layer for layer, _ in active}
    assert layers == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    for layer in layers:
        assert 1 <= active[layer, "policy"] < 0.9 * active[layer, "model"] <= 16
    steps = re.search(r'moe_fx:forwards_total\{layer="model.layers.0.mlp.experts"\} ([\d.]+)', text)
    assert float(steps[1]) >= REQUESTS * TOKENS / 64
    assert "vllm:request_success_total" in text  # on vLLM's own page


def test_the_log_holds_no_error(server, answers):
    _, log = server
    text = log.read_text()
    assert "2 of 2 MoE layers run SERE(primary=1, threshold=0.0)" in text
    wrong = [line for line in text.splitlines() if " ERROR " in line or "Traceback" in line]
    assert wrong == []
