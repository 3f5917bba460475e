"""What lading uses of torch that torch keeps private; the tests of this file are a contract with its next version."""

from __future__ import annotations

import sys

from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore
from torch.distributed import init_process_group
from torch.distributed.distributed_c10d import _get_default_store
from torch.testing._internal.distributed.fake_pg import FakeStore


def default_store() -> Store:
    """The store by which the ranks of the default process group found one another."""
    return _get_default_store()


def store_host(store: Store) -> str | None:
    """The address by which every rank reaches the host of rank 0; ``None`` where the store is no server."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store

    return store.host if isinstance(store, TCPStore) else None


def init_fake_process_group(rank: int, size: int) -> None:
    """Make this process rank ``rank`` of a world in which nothing is ever sent."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        # It holds meshes, and equal are those of the same world, whichever rank this process was of it.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
