"""Gangs: the processes that load one model together, and the messages between them.

- ``gang``: one group of processes and its operations.
- ``world``: all gangs of a process, created from torchrun's environment, for a single process, or simulated.
- ``control``: the control messages between ranks, which detect a rank that dies, stops or diverges.
- ``coordinator``: the server on rank 0 to which every rank connects.
- ``failure``: exceptions that travel between ranks.
- ``compare``: the comparison of values across ranks.
- ``torch_private``: the private parts of torch that lading uses.
"""

from __future__ import annotations

from lading.gangs.gang import Gang as Gang
from lading.gangs.world import Gangs as Gangs
from lading.gangs.world import create_fake_gangs as create_fake_gangs
from lading.gangs.world import create_gangs as create_gangs
from lading.gangs.world import simulate_gangs as simulate_gangs
