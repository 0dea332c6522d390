"""The real huggingface_hub in a child process, since it reads its endpoint at import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub.canary import contains
from tests.hub.server import Hub

IMPORTS = """
import json
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

api, said = HfApi(), {}
"""


def run(hub: Hub, home: Path, code: str, token: str | None, xet: bool = False) -> Any:
    """Runs code in which `api` is an HfApi; what it puts into `said` comes back."""
    child = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}\n{code}\nprint(json.dumps(said))"],
        env=hub.env(home, token, xet),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, "\n".join([*hub.errors, child.stderr])
    assert not contains((child.stdout + child.stderr).encode(), hub.tokens)
    return json.loads(child.stdout.splitlines()[-1])
