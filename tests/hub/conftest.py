"""The local Hub, new for each test; what must never happen on it is checked at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.canary import found_in_files, found_on_the_hub
from tests.hub.server import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub whose tokens are canaries.

    At the end none may have reached the second host, nor stand in a file below `tmp_path`, in what
    was pushed, or in a request but for its header; and the server itself must not have failed.
    """
    with Hub() as server:
        yield server
        assert server.leaks == []
        assert server.errors == []
        tokens = list(server.tokens)
        assert found_in_files(tokens, tmp_path) == []
        assert found_on_the_hub(tokens, server) == []
