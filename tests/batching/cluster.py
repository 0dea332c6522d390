"""A Ray cluster on this machine, of several nodes, in a process of its own, so that no test shares
its process with Ray's threads: `python -m tests.batching.cluster FOLDER NODES`.

Each line on stdin adds a node; the end of stdin ends them all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""Of the cluster and of whoever connects to it: no token in anybody's home."""
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@dataclass
class Nodes:
    """The cluster, seen from a test."""

    address: str
    raylets: list[int]
    """Process ids; the first is that of the node to which batches connect."""
    folder: Path
    """Where Ray keeps logs and sockets."""
    process: subprocess.Popen[str]

    def kill(self, raylet: int) -> None:
        """A node is gone, with no word."""
        os.kill(raylet, signal.SIGKILL)
        self.raylets.remove(raylet)

    def add(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        print("add", file=self.process.stdin, flush=True)
        self.raylets.append(json.loads(self.process.stdout.readline()))


@contextmanager
def cluster(nodes: int, environment: Mapping[str, str]) -> Iterator[Nodes]:
    """Starts one, with this many nodes of one processor."""
    with tempfile.TemporaryDirectory(prefix="qc-ray-", dir="/tmp") as folder:  # sockets: short
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.batching.cluster", folder, str(nodes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment, **ENVIRONMENT},
        )  # fmt: skip
        assert process.stdin
        assert process.stdout
        try:
            address, raylets = json.loads(process.stdout.readline())
            yield Nodes(address, raylets, Path(folder), process)
        finally:
            process.stdin.close()
            process.wait(60)


def main(folder: str, nodes: str) -> None:
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET
    from ray.cluster_utils import Cluster

    def raylet(node: Any) -> int:
        found: int = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
        return found

    head = {**NODE, "temp_dir": folder, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    raylets = [raylet(made.head_node)]
    raylets += [raylet(made.add_node(**NODE)) for _ in range(int(nodes) - 1)]
    print(json.dumps([made.address, raylets]), flush=True)
    for _ in sys.stdin:
        print(raylet(made.add_node(**NODE)), flush=True)
    made.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
