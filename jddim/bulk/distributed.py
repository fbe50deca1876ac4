"""Processes that know each other, by `jax.distributed`: workers of one set, none of which goes on without the others.

On a TPU pod each host's process must join before it sees its chips; elsewhere `--shard I/N` does as well without this,
and is what to use where a worker that dies should not stop the rest.
"""

from __future__ import annotations

import re
from typing import Any

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as dead, and jax ends the others; likewise at the end."""

PATIENCE = 120
"""Seconds that the first process waits for the last one to begin."""


def join(where: str = "auto") -> tuple[int, int]:
    """Join the other processes, before jax is used: (this one's number, how many there are).

    where: "HOST:PORT,N,I", process I of N, of which process 0 listens at HOST:PORT; or "auto", what jax finds out by
    itself on TPUs, under SLURM and Open MPI. If a process dies, jax ends every other within HEARTBEAT seconds: by
    SIGABRT, with a line that says why. Raises ValueError if `where` is neither, or the others do not come.
    """
    import jax

    given: dict[str, Any] = {}
    if where != "auto":
        match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", where)
        if match is None or not int(match[3]) < int(match[2]):
            raise ValueError(f"processes are joined as HOST:PORT,N,I, with I from 0 to N-1, or auto; got {where!r}")
        given = {"coordinator_address": match[1], "num_processes": int(match[2]), "process_id": int(match[3])}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the command's
    given |= {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(**given, initialization_timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the processes did not find each other ({reason}); say where: HOST:PORT,N,I") from error
    return jax.process_index(), jax.process_count()


def check_same(digest: str) -> None:
    """Raise ValueError, in every process, unless all came with the same SHA-256."""
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(bytes.fromhex(digest), np.uint8).astype(np.int32)
    all_of_them = np.atleast_2d(multihost_utils.process_allgather(own))
    other = [i for i, row in enumerate(all_of_them) if (row != all_of_them[0]).any()]
    if other:
        raise ValueError(
            f"process {', '.join(map(str, other))} was given other settings than process 0, or runs another jddim or "
            "jax: start all of them with the same command"
        )


def wait_for_all() -> None:
    """Return when every process is here. Raises ValueError if one will not come."""
    from jax.experimental import multihost_utils

    try:
        multihost_utils.sync_global_devices("jddim")
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"this process has done its part, but another died: start them again ({reason})") from error
