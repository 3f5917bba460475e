"""One of two hosts: a web server on its own loopback interface, and two of four ranks that load what it serves.

    python one_host.py NUMBER PORT HOME [together]

Prints as JSON what the ranks have found, and how the server was asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def main(number: int, port: int, home: Path, *options: str) -> None:
    from tests.servers.hostile import serve

    file = home / "origin" / "model.safetensors"
    with serve({"/model.safetensors": file.read_bytes()}, digests=True, port=port) as server:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.one_host", "rank", *options],
                env=os.environ | environment(number, 2 * number + local, home),
                stdout=subprocess.PIPE,
                text=True,
            )
            for local in range(2)
        ]
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
        asked = [headers.get("range") for headers in server.gets()]
    if any(rank.returncode for rank in ranks):
        sys.exit(1)

    answer = {"ranks": [json.loads(output) for output in outputs], "whole": asked.count(None)}
    print(json.dumps(answer | {"ranges": len(asked) - asked.count(None)}))


def environment(number: int, rank: int, home: Path) -> dict[str, str]:
    own = home / str(number)
    own.mkdir(exist_ok=True)
    world = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    disk = {"LADING_CACHE_DIR": str(own / "cache"), "LADING_DATABASE_URL": f"sqlite:///{own}/c.sqlite"}
    cards = {"LADING_CARDS": str(home / "far.yaml"), "XDG_CONFIG_HOME": str(own), "LADING_OFFLINE": ""}

    return {**world, **disk, **cards, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def be_rank(*options: str) -> None:
    import torch

    from lading.gangs import create_gangs
    from lading.models.hub import load_with_report
    from tests.distributed.tiny_models import whole

    torch.set_num_threads(1)
    with create_gangs("cpu", tp=2, sdp=2) as gangs:
        model, report = load_with_report(
            "far", gangs=gangs, dtype="auto", progress=False, cooperative="together" in options
        )
        sums = {name: whole(p).detach().float().sum().item() for name, p in model.named_parameters()}
        gangs.root.barrier()
    print(json.dumps({"sums": sums, "read": report.bytes_read, "neighbors": gangs.root.local_size}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        be_rank(*sys.argv[2:])
    else:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
