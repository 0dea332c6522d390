"""scripts/bench_hub: its models are models, and it counts what it says it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qconvert.tensors import header_length, parse_header
from scripts import bench_hub_models as models
from scripts.bench_hub_runs import Run, client, occupied, run, served
from tests.hub.storage import Blob


def test_shards_hold_every_tensor_once_and_no_more_than_allowed() -> None:
    shapes = models.experts_tensors(layers=2, experts=4)
    limit = 60_000_000
    side, weights = models.headers(shapes, models.experts_config(2, 4), limit)
    index = json.loads(side[models.INDEX])["weight_map"]
    assert set(index) == set(shapes)
    found = {}
    for name, (header, specs) in weights.items():
        size = len(header) + sum(spec.nbytes for spec in specs)
        assert size <= limit + len(header) or len(specs) == 1
        length = header_length(header[:8], size, name)
        _, tensors, _ = parse_header(header[8 : 8 + length], name, (size, 0, 0))
        assert {index[tensor.name] for tensor in tensors} == {name}
        found |= {tensor.name: tensor.shape for tensor in tensors}
    assert found == shapes


def test_a_run_is_counted(tmp_path: Path) -> None:
    data = bytes(3_000_000)
    with served() as hub:
        hub.add_repo("org/model", {"model.safetensors": Blob.of(data)})
        hub.delay = 0.01
        code = 'hf_hub_download("org/model", "model.safetensors")'
        done = run(hub, tmp_path, client(f"{code}; import time; time.sleep(0.3)"))
    assert done.down == len(data) + sum(r.bytes_out for r in hub.log if r.host == "hub")
    assert (done.requests, done.up) == (len(hub.log), 0)
    assert 0 < done.moving < done.seconds
    assert done.disk_bytes >= len(data)
    assert done.peak_bytes > 20_000_000 or sys.platform != "linux"
    assert list(tmp_path.iterdir()) == []
    assert occupied(tmp_path) == 0


def test_the_middle_of_several_runs() -> None:
    from scripts.bench_hub_runs import median

    times = iter([3.0, 1.0, 2.0])
    assert median(3, lambda: Run(next(times), 0, 0, 0, 0, 0, 0)).seconds == 2.0
