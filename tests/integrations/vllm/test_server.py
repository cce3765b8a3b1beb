"""A server on the loopback address: chats, transcriptions, many requests at once, a damaged upload, a restart."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT, served_llms

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RULE = "uniform:3"
LENGTHS = np.linspace(0.5, 8.0, 16).round(2).tolist()


class Server:
    """A server process in its own process group."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = [
            "--model", str(folder), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "2048",
            "--max-num-seqs", "16", "--hf-overrides", json.dumps({"fastcompress": {"rule": RULE}}),
        ]  # fmt: skip
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(ROOT / "out" / "vllm"),
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float = 900) -> None:
        """Wait until the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def stop(self) -> int:
        """Stop the server as Ctrl-C does, and return its exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait(60)

    def post(self, path: str, body: bytes, kind: str) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body, headers={"Content-Type": kind}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def chat(self, data: bytes) -> tuple[int, Any]:
        audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
        body = {
            "model": "tiny", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True,
            "messages": [{"role": "user", "content": [audio, {"type": "text", "text": "write what you hear"}]}],
        }  # fmt: skip
        return self.post("/v1/chat/completions", json.dumps(body).encode(), "application/json")

    def transcribe(self, data: bytes) -> tuple[int, Any]:
        mark = "fastcompress-boundary"
        fields = {"model": "tiny", "temperature": "0", "response_format": "json", "max_completion_tokens": "8"}
        parts = [
            f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        ]
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
        body = b"".join([*parts, head, data, f"\r\n--{mark}--\r\n".encode()])
        return self.post("/v1/audio/transcriptions", body, f"multipart/form-data; boundary={mark}")


def wav(seconds: float, seed: int = 0) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(served_llms.RATE)
        writer.writeframes((served_llms.speech(seconds, seed) * 32767).astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_llms.write("glmasr", tmp_path_factory.mktemp("glmasr"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(folder, tmp_path_factory.mktemp("log") / "server.log")
    try:
        found.wait()
        yield found
    finally:
        found.stop()


def rows(seconds: float) -> int:
    """Return the rows of an audio of less than 30 s: a window of features has one per 10 ms."""
    frames = -(-int(seconds * served_llms.RATE) // 160)
    return (((frames - 1) // 2 + 1) - 4) // 4 + 1


def test_chats_transcriptions_and_many_requests(server: Server):
    alone = {}
    for seconds in LENGTHS:
        status, answer = server.chat(wav(seconds))
        assert status == 200, answer
        (choice,) = answer["choices"]
        alone[seconds] = (choice["token_ids"], answer["usage"]["prompt_tokens"])
    # Usage: the prompts differ by the tokens of their audios only.
    first = LENGTHS[0]
    for seconds in LENGTHS:
        tokens = [-(-rows(length) // 3) for length in (seconds, first)]
        assert alone[seconds][1] - alone[first][1] == tokens[0] - tokens[1], seconds
    asked = [LENGTHS[i % 16] for i in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda seconds: server.chat(wav(seconds)), asked))
    for seconds, (status, answer) in zip(asked, answers, strict=True):
        assert status == 200, answer
        assert (answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens"]) == alone[seconds]
    texts = [server.transcribe(wav(seconds)) for seconds in (2.0, 2.0, 41.0)]
    assert [status for status, _ in texts] == [200] * 3, texts
    assert texts[0][1]["text"] == texts[1][1]["text"]


def test_damaged_uploads(server: Server):
    for data in (b"", b"RIFF not audio", wav(1.0)[:30]):
        for send in (server.chat, server.transcribe):
            status, answer = send(data)
            assert 400 <= status < 600, answer
    status, answer = server.chat(wav(1.0))
    assert status == 200, answer  # the server still runs


def test_a_restart_gives_the_same_answers(server: Server, folder: Path, tmp_path: Path):
    wanted = server.chat(wav(2.0))[1]["choices"][0]["token_ids"]
    assert f"runs with {RULE}; 750 rows of audio take 250 tokens" in server.log.read_text()
    server.stop()
    again = Server(folder, tmp_path / "server.log")
    try:
        again.wait()
        assert again.chat(wav(2.0))[1]["choices"][0]["token_ids"] == wanted
    finally:
        again.stop()
    assert again.process.poll() is not None
