"""The private parts of torch that lading uses; tests of this module notice when a new torch changes them."""

from __future__ import annotations

import sys

import torch
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore
from torch.distributed import init_process_group
from torch.distributed.distributed_c10d import _get_default_store
from torch.testing._internal.distributed.fake_pg import FakeStore


def default_store() -> Store:
    """Return the rendezvous store of the default process group."""
    return _get_default_store()


def store_host(store: Store) -> str | None:
    """Return the address at which every rank reaches the host of rank 0, or ``None`` if the store is not a server."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store

    return store.host if isinstance(store, TCPStore) else None


def shards_over_two_axes() -> bool:
    """Return whether FSDP shards parameters that two other axes shard, too: torch 2.9 is the first that does."""
    return torch.__version__ >= "2.9"


def init_fake_process_group(rank: int, size: int) -> None:
    """Initialize a fake process group of ``size`` ranks, with this process as ``rank``; collectives do nothing."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        # The cache is keyed by mesh, and meshes of one world compare equal whatever the rank of this process.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
