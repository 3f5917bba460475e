"""Load a model over several processes, which each read what they own:

    torchrun --nproc-per-node 2 examples/many_devices.py NAME --tp 2

NAME is that of a card of a decoder, or a folder of one in Hugging Face's form. On a machine with GPUs each
process takes one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from lading import create_gangs
from lading.models.hub import load_with_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--sdp", type=int, default=1)
    options = parser.parse_args()
    card = Path(options.name) if Path(options.name).is_dir() else options.name

    with create_gangs(tp=options.tp, sdp=options.sdp) as gangs:
        model, report = load_with_report(card, gangs=gangs, dtype="auto", progress=False)
        model.eval()

        ids = torch.tensor([[1, 2, 3, 4]], device=gangs.root.device)
        with torch.no_grad():
            output = model(ids)
            logits = getattr(output, "logits", output)  # those of transformers give them among other things
            best = logits[0, -1].argmax().item()

        for line in gangs.root.gather_objects(
            f"rank {gangs.root.rank} (sdp {gangs.sdp.rank}, tp {gangs.tp.rank}): {report.bytes_read:,} bytes read, "
            f"next token {best}"
        ):
            if gangs.root.rank == 0:
                print(line)

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
