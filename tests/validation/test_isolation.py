"""The reload child can reach nobody and knows no secret."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qconvert.validation import isolation

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY",
    "https_proxy", "SSH_AUTH_SOCK", "NETRC", "MY_OWN_SECRET",
)  # fmt: skip
PROBE = """
import ctypes, json, socket, struct, sys
from qconvert.validation import isolation
port = int(sys.argv[1])
found = {"means": isolation.cut_network()}
try:
    socket.create_connection(("127.0.0.1", port), timeout=5)
    found["python"] = "connected"
except OSError as error:
    found["python"] = type(error).__name__
try:
    socket.getaddrinfo("huggingface.co", 443)
    found["lookup"] = "resolved"
except OSError as error:
    found["lookup"] = type(error).__name__
libc = ctypes.CDLL(None)
fd = libc.socket(2, 1, 0)
address = struct.pack("=HH4s8x", 2, socket.htons(port), socket.inet_aton("127.0.0.1"))
found["native"] = libc.connect(fd, address, len(address))
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libc by its Linux names")
def test_nobody_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass  # it can, from here
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(port)], check=True, capture_output=True, text=True
        )
    found = json.loads(done.stdout)
    assert found["python"] == found["lookup"] == "PermissionError"
    if found["means"] == "network namespace":
        assert found["native"] == -1
    else:
        assert found["means"] == "audit hook on sockets"


def test_no_secret_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    canary = "hf_CANARY0123456789"
    for name in SECRETS:
        monkeypatch.setenv(name, canary)
    passed = isolation.environment(tmp_path)
    assert canary not in str(passed)
    assert passed["HF_HOME"] == str(tmp_path)
    assert passed["HF_HUB_OFFLINE"] == passed["TRANSFORMERS_OFFLINE"] == "1"
    assert "PATH" in passed


def test_the_package_starts_no_thread_before_the_child_is_cut_off() -> None:
    code = (
        "import os, sys, qconvert.validation.child\n"
        "assert not {'numpy', 'torch', 'qconvert.types'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
