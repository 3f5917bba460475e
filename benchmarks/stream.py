"""How fast a checkpoint on a server becomes a model on the CPU, beside what else there is.

    python benchmarks/stream.py                           # all that is installed
    python benchmarks/stream.py --rounds 7 --only 'lading stream' floor

The checkpoint is that of ``load_cpu.py``, 2.15 GB, in the page cache of the server, which is on the loopback interface:
nginx for ``http://``, and ``rclone serve s3`` for ``s3://``. Client and server share the cores, so the CPU seconds of
the client stand beside the time. Each run is a fresh process; the contenders take turns; memory is backed.

- ``lading stream``: ``load_model(…, stream=True)``, from the catalog to the model; ``tp=4``: rank 0 of four, which are
  simulated; ``verified``: with digests of blocks, which the catalog has from an earlier copy.
- ``lading fetch and load``: ``load_model`` with an empty cache, which fetches, verifies and then reads the files.
- ``download and from_pretrained``: eight files at once by huggingface_hub's downloader, and transformers.
- ``s3fs``: ``fsspec`` with as many threads as lading has connections, and ``safetensors.torch.load``.
- ``runai``: run:ai's model streamer, from S3.
- ``floor``: the same ranges into the same memory by bare sockets over as many connections.
- ``slow``: at 1 Gbit/s (``tc tbf`` in a network namespace, which needs root) and a round trip of 50 ms (a proxy that
  delays); ``ideal`` is bytes by bandwidth, and three round trips.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import harness
import load_cpu
from harness import DATA

HTTP_PORT, S3_PORT, SLOW_PORT = 8731, 8732, 8733
STEP = 8 << 20
CONNECTIONS = 8
"""The connections of the floor and of s3fs: as many as lading has for a host by default."""
BANDWIDTH, ROUND_TRIP = 1e9 / 8, 0.05
"""Bytes a second, and seconds."""

CATALOG = DATA / "stream.sqlite"
KEYS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench-secret",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
    "AWS_REGION": "us-east-1",
}

Loader = Callable[[], Any]


def cards() -> str:
    """Return the card of the checkpoint at each server."""
    body = load_cpu.CARD.partition("---")[0].replace("checkpoint: checkpoint\n", "checkpoint: {address}\n")
    index = "model.safetensors.index.json"
    addresses = {
        "web": f"http://127.0.0.1:{HTTP_PORT}/{index}",
        "slow": f"http://127.0.0.1:{SLOW_PORT}/{index}",
        "s3": "s3://models/qwen",
    }

    return "---\n".join(
        body.replace("name: bench", f"name: {name}").replace("{address}", address)
        for name, address in addresses.items()
    )


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def server(command: list[str], port: int, **environment: str) -> Iterator[None]:
    """Run a server until the end of the block."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            sys.exit(f"{command[0]} does not answer at port {port}")
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def nginx(folder: Path, listen: str, port: int) -> Iterator[None]:
    """Serve a folder by nginx: at a port, or at a Unix socket behind the proxy that delays."""
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "nginx.conf"
        config.write_text(
            f"""daemon off; worker_processes 2; pid {place}/pid; error_log {place}/error.log; user {_user()};
            events {{ worker_connections 256; }}
            http {{
              access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
              client_body_temp_path {place}/a; proxy_temp_path {place}/b; fastcgi_temp_path {place}/c;
              uwsgi_temp_path {place}/d; scgi_temp_path {place}/e;
              server {{ listen {listen}; location / {{ root {folder}; }} }}
            }}"""
        )
        with ExitStack() as stack:
            command = [shutil.which("nginx") or "nginx", "-c", str(config), "-e", f"{place}/error.log"]
            if listen.startswith("unix:"):
                proxy = [sys.executable, __file__, "--proxy", listen.removeprefix("unix:")]
                stack.enter_context(server(proxy, port))
                process = subprocess.Popen(command)
                stack.callback(process.wait)
                stack.callback(process.terminate)
                time.sleep(1)
            else:
                stack.enter_context(server(command, port))
            yield


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


@contextmanager
def rclone() -> Iterator[None]:
    """Serve the checkpoint as ``s3://models/qwen``."""
    bucket = DATA / "s3" / "models"
    bucket.mkdir(parents=True, exist_ok=True)
    if not (bucket / "qwen").is_symlink():
        (bucket / "qwen").symlink_to(DATA / "checkpoint")
    program = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    address = f"127.0.0.1:{S3_PORT}"
    with server([program, "serve", "s3", str(DATA / "s3"), "-L", "--addr", address, "--auth-key", keys], S3_PORT):
        yield


def delay(path: str) -> None:
    """Forward each connection to a Unix socket; every byte arrives half a round trip later, in both directions."""
    import asyncio

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def send() -> None:
            while (item := await waiting.get())[1]:
                await asyncio.sleep(item[0] - time.monotonic())
                writer.write(item[1])
                await writer.drain()
            writer.close()

        sender = asyncio.ensure_future(send())
        while data := await reader.read(1 << 18):
            await waiting.put((time.monotonic() + ROUND_TRIP / 2, data))
        await waiting.put((0, b""))
        await sender

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", SLOW_PORT) as listening:
            await listening.serve_forever()

    asyncio.run(main())


# --- contenders: each imports what it needs, and returns what is timed -----------------------------------------------


def lading(name: str, gangs: dict[str, int] | None = None, **options: Any) -> Callable[[], Loader]:
    """``load_model`` of a card."""

    def prepare() -> Loader:
        os.environ["LADING_DATABASE_URL"] = f"sqlite:///{CATALOG}"
        os.environ["LADING_CACHE_DIR"] = tempfile.mkdtemp(dir=DATA)
        harness.import_lading("qwen")
        import lading.sources.web.source

        if name == "s3":
            import obstore  # noqa: F401

            import lading.sources.cloud.source  # noqa: F401
        from lading.gangs import simulate_gangs
        from lading.models.hub import load_model

        ranks = None if gangs is None else simulate_gangs(0, **gangs)

        return lambda: load_model(name, gangs=ranks, dtype="auto", progress=False, **options)

    return prepare


def download_and_from_pretrained() -> Loader:
    """huggingface_hub's downloader into an empty folder, and ``from_pretrained``."""
    import torch
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import disable_progress_bars
    from transformers import Qwen3ForCausalLM
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(dir=DATA))
    names = sorted(path.name for path in (DATA / "checkpoint").iterdir())

    def get(name: str) -> None:
        with (folder / name).open("wb") as file:
            http_get(f"http://127.0.0.1:{HTTP_PORT}/{name}", file)

    def load() -> Any:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(get, names))
        return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    return load


def s3fs() -> Loader:
    """fsspec reads the files, and safetensors makes tensors of the bytes."""
    import s3fs
    from safetensors.torch import load as parse

    names = [path.name for path in load_cpu.shards(DATA / "checkpoint")]
    files = s3fs.S3FileSystem(
        key=KEYS["AWS_ACCESS_KEY_ID"], secret=KEYS["AWS_SECRET_ACCESS_KEY"], endpoint_url=KEYS["AWS_ENDPOINT_URL"]
    )

    def load() -> dict[str, Any]:
        state = {}
        for name in names:
            path = f"models/qwen/{name}"
            size = files.size(path)
            at = range(0, size, STEP)
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                parts = pool.map(lambda start: files.cat_file(path, start=start, end=min(start + STEP, size)), at)  # noqa: B023
                state |= parse(b"".join(parts))
        return state

    return load


def runai() -> Loader:
    """run:ai's model streamer."""
    os.environ |= {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "AWS_EC2_METADATA_DISABLED": "true"}
    from runai_model_streamer import SafetensorsStreamer

    names = [f"s3://models/qwen/{path.name}" for path in load_cpu.shards(DATA / "checkpoint")]

    def load() -> dict[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(names)
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}

    return load


def floor() -> Loader:
    """Bare sockets: one request for each range, received into fresh memory."""
    import torch  # noqa: F401 - which touches the pages afterwards

    files = [(path.name, path.stat().st_size) for path in load_cpu.shards(DATA / "checkpoint")]

    def load() -> list[mmap.mmap]:
        arena = mmap.mmap(-1, sum(size for _, size in files), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arena.madvise(mmap.MADV_HUGEPAGE)
        view, place, jobs = memoryview(arena), 0, []
        for name, size in files:
            jobs += [(name, at, min(STEP, size - at), place + at) for at in range(0, size, STEP)]
            place += size
        waiting, lock = iter(jobs), threading.Lock()

        def work() -> None:
            with socket.create_connection(("127.0.0.1", HTTP_PORT)) as peer:
                while True:
                    with lock:
                        job = next(waiting, None)
                    if job is None:
                        return
                    name, at, size, to = job
                    request = f"GET /{name} HTTP/1.1\r\nHost: localhost\r\nRange: bytes={at}-{at + size - 1}\r\n\r\n"
                    peer.sendall(request.encode())
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += peer.recv(4096)
                    body = head.partition(b"\r\n\r\n")[2]
                    view[to : to + len(body)] = body
                    done = len(body)
                    while done < size:
                        done += peer.recv_into(view[to + done : to + size])

        threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        return [arena]

    return load


CONTENDERS: dict[str, tuple[Callable[[], Loader], str | None]] = {
    "lading stream": (lading("web", stream=True, verify="never"), None),
    "lading stream verified": (lading("web", stream=True, verify="always"), None),
    "lading stream tp=4": (lading("web", {"tp": 4}, stream=True, verify="never"), None),
    "lading fetch and load": (lading("web"), None),
    "download and from_pretrained": (download_and_from_pretrained, "transformers"),
    "floor": (floor, None),
    "lading stream s3": (lading("s3", stream=True, verify="never"), "obstore"),
    "s3fs": (s3fs, "s3fs"),
    "runai": (runai, "runai_model_streamer_s3"),
}
SLOW = {"lading stream slow": (lading("slow", stream=True, verify="never"), None)}

BARS = [
    ("one device", "lading stream", "floor", 1.25),
    ("download", "lading stream", "download and from_pretrained", 0.5),
    ("S3", "lading stream s3", "runai", 1.0),
    ("S3", "lading stream s3", "s3fs", 1.0),
    ("rank", "lading stream tp=4", "lading stream", 0.5),
    ("slow", "lading stream slow", "ideal", 1.3),
]


# --- runs ------------------------------------------------------------------------------------------------------------


def run_one(name: str) -> None:
    """Run one contender in this process, and print what was measured as JSON."""
    os.environ |= KEYS
    before = set(DATA.iterdir())
    load = (CONTENDERS | SLOW)[name][0]()
    harness.warm(load_cpu.shards(DATA / "checkpoint"))
    harness.have_memory(5 << 30)
    try:
        print(json.dumps(harness.timed(load, load_cpu.touch)))
    finally:
        for folder in set(DATA.iterdir()) - before:
            if folder.name.startswith("tmp"):
                shutil.rmtree(folder, ignore_errors=True)


def make_catalog() -> None:
    """Make the catalog that knows the checkpoint at each server, with digests of blocks for the first one."""
    (DATA / "stream.yaml").write_text(cards())
    with tempfile.TemporaryDirectory(dir=DATA) as cache:
        os.environ["LADING_CACHE_DIR"] = cache
        harness.make_catalog(
            CATALOG, ["import", str(DATA / "stream.yaml")], ["pull", "web"], ["verify", "web"], ["index", "s3"]
        )


def interleave(contenders: dict[str, Any], rounds: int) -> harness.Runs:
    """Run the contenders in turn."""
    return harness.interleave({name: [sys.executable, __file__, "--one", name] for name in contenders}, rounds)


def rows(found: harness.Runs) -> list[list[str]]:
    """Return a table of times, CPU seconds of the client, and memory."""
    head = ["contender", "total s", "min–max", "client CPU s per GB", "peak MB beyond start"]
    size = sum(path.stat().st_size for path in load_cpu.shards(DATA / "checkpoint"))
    body = []
    for name, runs in sorted(found.items(), key=lambda item: harness.median(item[1], "total_s")):
        totals = [run["total_s"] for run in runs]
        body.append(
            [
                name,
                f"{harness.median(runs, 'total_s'):.3f}",
                f"{min(totals):.3f}–{max(totals):.3f}",
                f"{harness.median(runs, 'cpu_s') / size * 1e9:.2f}",
                f"{harness.median(runs, 'peak_bytes') / 1e6:,.0f}",
            ]
        )

    return [head, *body]


def run_slow(rounds: int) -> harness.Runs:
    """Run at a limited bandwidth and with delays, in a network namespace of their own."""
    limit = "tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 50ms"
    command = f"ip link set lo up && {limit} && exec {sys.executable} {__file__} --slow {rounds}"
    done = subprocess.run(["unshare", "-n", "sh", "-c", command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print("no figures of a slow network: this needs root, `ip` and `tc`", file=sys.stderr)
        return {}
    found: harness.Runs = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in load_cpu.shards(DATA / "checkpoint"))
    ideal = {"total_s": size / BANDWIDTH + 3 * ROUND_TRIP, "cpu_s": 0.0, "peak_bytes": 0.0}

    return found | {"ideal": [ideal] * rounds}


def main() -> None:
    """Run everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS, *SLOW])
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    for hidden in ("--one", "--proxy"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--slow", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.one:
        run_one(options.one)
        return
    if options.proxy:
        delay(options.proxy)
        return
    folder = DATA / "checkpoint"
    if options.slow:
        with (
            tempfile.TemporaryDirectory() as place,
            nginx(folder, f"unix:{place}/nginx", SLOW_PORT),
        ):
            harness.make_catalog(CATALOG, ["import", str(DATA / "stream.yaml")], ["index", "slow"])
            print(json.dumps(interleave(SLOW, options.slow)))
        return

    load_cpu.make_checkpoint()
    wanted = {
        name: contender
        for name, contender in CONTENDERS.items()
        if (options.only is None or name in options.only)
        and (contender[1] is None or importlib.util.find_spec(contender[1]) is not None)
    }
    results = {
        "benchmark": "stream",
        "machine": harness.machine(),
        "rounds": options.rounds,
        "load_average": os.getloadavg()[0],
    }
    found: harness.Runs = {}
    os.environ |= KEYS
    with nginx(folder, f"127.0.0.1:{HTTP_PORT}", HTTP_PORT), rclone():
        make_catalog()
        found |= interleave(wanted, options.rounds)
    if options.only is None or any(name in options.only for name in SLOW):
        found |= run_slow(options.rounds)
    results |= {"streamed": found, "clients": {"rows": rows(found)}}
    for line in results["clients"]["rows"]:
        print(" | ".join(line))
    print(f"\n{harness.ratios(found, BARS)}", flush=True)

    if options.save:
        harness.save(options.save, results)


if __name__ == "__main__":
    main()
