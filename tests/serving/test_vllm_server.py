"""What `vllm serve FOLDER` starts: an OpenAI endpoint, here on loopback, that streams.

Its module is started and not the command, which looks for a package named vllm: the wheel for CPUs has another name.
"""

import json
import os
import socket
import subprocess
import sys
from urllib.error import URLError
from urllib.request import Request, urlopen

import engines
import pytest
import torch
from served import VOCABULARY, tiny_llama

import mxcompile

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
STARTS_WITHIN = 240  # seconds, at least
PROMPT = [5, 9, 200, 17, 33, 41]
TOKENS = 6


def tokenizer():
    """Words "t0", "t1" and so on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{n}": n for n in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2")


@pytest.fixture(scope="module")
def model():
    return mxcompile.quantize_and_compile(
        tiny_llama(), {"input_ids": engines.prompts()}, recipe="w4a8-mxint-quick", compile=False
    )


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    mxcompile.save(model, folder, tokenizer=tokenizer())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--enforce-eager"]
    settings = {name: value for name, value in engines.SETTINGS.items() if "MULTIPROCESSING" not in name}
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
        process = subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=output)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            yield address, str(folder)
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address, process, log):
    for _ in range(STARTS_WITHIN):
        try:
            urlopen(f"{address}/health", timeout=5).close()
            return
        except (URLError, ConnectionError, TimeoutError):
            if ended_within_a_second(process):
                break
    raise RuntimeError(log.read_text())


def ended_within_a_second(process):
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        return False
    return True


def post(address, **content):
    data = json.dumps(content).encode()
    return urlopen(Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"}), timeout=120)


def test_a_completion_is_streamed_and_is_what_the_model_generates(server, model):
    address, name = server
    request = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    with post(address, **request) as response:
        whole = json.load(response)["choices"][0]
    with post(address, **request, stream=True) as response:
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.startswith(b"data: ")]
    assert lines.pop() == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines]
    assert len([piece for piece in pieces if piece]) == TOKENS
    assert "".join(pieces) == whole["text"]
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=torch.tensor([PROMPT])).logits[0, -1].float(), -1)
    first = int(whole["logprobs"]["tokens"][0].strip().removeprefix("t"))
    assert abs(whole["logprobs"]["token_logprobs"][0] - expected[first].item()) < 0.1
    assert expected[first] > expected.max() - 0.2
