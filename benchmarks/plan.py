"""How long a plan takes for all ranks of a large world, from a manifest alone.

    python benchmarks/plan.py
    python benchmarks/plan.py --layers 500 --tp 8 --sdp 16

The checkpoint is a Qwen 3 of very many small layers, as a manifest without bytes: nothing is read. Timed is all
that ``lading plan`` does once it has the manifest: the model's module on the meta device, what each rank owns, and what
its reads come to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from math import prod

import harness

GOAL_S = 10.0
FILES = 64


def main() -> None:
    """Measure it, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9_091, help="of 11 tensors each")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--sdp", type=int, default=125)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    options = parser.parse_args()

    from lading.checkpoints.checkpoint import Checkpoint
    from lading.families.qwen import FAMILY, QwenConfig
    from lading.formats.manifest import Manifest, Shard
    from lading.models.construct import build_on_meta
    from lading.models.targets import targets_of
    from lading.operations.plan import plan_checkpoint

    config = QwenConfig(
        model_dim=2_048, vocab_size=65_536, tied_embeddings=False, num_layers=options.layers, num_attn_heads=16,
        num_key_value_heads=8, head_dim=128, qkv_proj_bias=False, q_norm=True, k_norm=True, ffn_inner_dim=6_144,
    )  # fmt: skip
    targets = targets_of(build_on_meta(FAMILY, config), dtype=None)
    count = len(targets.names)
    shard_ids, offsets, ends = array("I"), array("q"), [8] * FILES
    for i, shape in enumerate(targets.shapes):
        shard = i * FILES // count
        shard_ids.append(shard)
        offsets.append(ends[shard])
        ends[shard] += 2 * prod(shape)
    manifest = Manifest(
        format="safetensors", shards=tuple(Shard(name=f"{n}.safetensors", size=end) for n, end in enumerate(ends)),
        names=targets.names, dtypes=["BF16"] * count, shapes=targets.shapes, shard_ids=shard_ids, offsets=offsets,
    )  # fmt: skip
    checkpoint = Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)
    sizes = {"pp": 1, "rdp": 1, "sdp": options.sdp, "ep": 1, "tp": options.tp}

    seconds = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        plan = plan_checkpoint(checkpoint, FAMILY, config, sizes=sizes, dtype=None, ranks=None)
        seconds.append(time.perf_counter() - start)
        assert len(plan.ranks) == options.sdp * options.tp

    median = statistics.median(seconds)
    rows = [
        ["ranks", "tensors", "seconds", "min–max", "goal: less than", ""],
        [
            f"{options.sdp * options.tp:,} (sdp {options.sdp} × tp {options.tp})",
            f"{count:,}",
            f"{median:.2f}",
            f"{min(seconds):.2f}–{max(seconds):.2f}",
            f"{GOAL_S:g} s",
            "met" if median < GOAL_S else "missed",
        ],
    ]
    print("\n".join(" | ".join(row) for row in rows))
    if options.save:
        results = {"benchmark": "plan", "machine": harness.machine(), "rounds": options.rounds}
        harness.save(options.save, results | {"plan": {"rows": rows}, "plan-runs": seconds})


if __name__ == "__main__":
    main()
