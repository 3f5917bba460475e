"""Gangs: the processes that load one model together, and what they tell one another.

- ``gang``: one group of processes and what it can do.
- ``world``: all gangs of a process; made from torchrun's environment, of one process, or simulated.
- ``line``: how control flows between ranks, noticing whoever dies, stops or does something else.
- ``switchboard``: the end of all lines, on rank 0.
- ``private``: what is private to torch.
"""

from __future__ import annotations

from lading.gangs.gang import Gang as Gang
from lading.gangs.world import Gangs as Gangs
from lading.gangs.world import create_fake_gangs as create_fake_gangs
from lading.gangs.world import create_gangs as create_gangs
from lading.gangs.world import simulate_gangs as simulate_gangs
