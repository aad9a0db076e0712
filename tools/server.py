"""A `vllm serve` that lasts as long as somebody asks it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import openai


class ServerError(Exception):
    """The server did not start; the message says why and where its log is."""


@contextlib.contextmanager
def served(
    arguments: Sequence[str], log: Path, timeout: float, environment: Mapping[str, str], cwd: Path | None = None
) -> Iterator[openai.OpenAI]:
    """A client of `vllm ARGUMENTS`; the server and all its children are gone afterwards.

    Args:
        arguments: "serve", the model and flags; a free port of this machine is added.
        log: gets what the server prints.
        timeout: seconds until it must answer.

    Raises:
        ServerError: it did not start, or not in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = Path(sys.executable).with_name("vllm")
    with log.open("w") as sink:
        server = subprocess.Popen(
            [str(vllm), *arguments, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=dict(environment),
        )
        try:
            # A proxy of the environment does not know the server on this machine.
            direct = openai.DefaultHttpxClient(trust_env=False)
            url = f"http://127.0.0.1:{port}/v1"
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=direct)
            _wait_until_ready(server, client, log, timeout)
            yield client
        finally:
            _stop(server)


def _wait_until_ready(server: subprocess.Popen, client: openai.OpenAI, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            client.models.list(timeout=5)
            return
        except openai.APIConnectionError:
            time.sleep(0.25)
    what = f"did not start within {timeout:g} s" if server.poll() is None else f"ended ({server.returncode})"
    last = [line for line in log.read_text().splitlines() if "Error" in line][-1:] or ["no error in its log"]
    raise ServerError(f"the server {what}: {last[0].strip()}; its log is {log}")


def _stop(server: subprocess.Popen) -> None:
    """End the server and its children: politely, then, whatever happens meanwhile, the whole process group."""
    try:
        if server.poll() is None:
            server.terminate()
            server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
