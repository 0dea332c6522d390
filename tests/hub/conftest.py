"""The local Hub, new for each test; what must never happen on it is checked at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.canary import found_in_files, found_on_the_hub
from tests.hub.pushing import REPO, TOKEN, Desk
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


@pytest.fixture(scope="module")
def desk_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with Desk(tmp_path_factory.mktemp("desk")) as desk:
        yield desk


@pytest.fixture
def desk(desk_of_module: Desk) -> Iterator[Desk]:
    """The repository `REPO` is new in each test, and nothing waits to go wrong."""
    hub = desk_of_module.hub
    yield desk_of_module
    hub.repos.pop(("model", REPO), None)
    hub.faults = type(hub.faults)()
    hub.tokens[TOKEN].expired = False
    hub.log.clear()
