"""The local Hub, new for each test; what must never happen on it is checked at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub.server import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """No token may have reached the second host, and the server itself must not have failed."""
    with Hub() as server:
        yield server
        assert server.leaks == []
        assert server.errors == []
