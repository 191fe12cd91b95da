"""Where the engine's process comes from: a fork server, which has imported what an engine needs.

Python and PyTorch take seconds to be imported. A process that is spawned begins anew, and only when the
server is up; a fork server does it beside the server's own imports, once, and each engine that is started,
the one after a crash too, begins where its imports have ended. It runs no thread and touches no device.

Nothing is imported here, so that `prepare` may come before all that takes time.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver

METHOD = "forkserver"


def prepare(modules: Sequence[str]) -> None:
    """Begin to import `modules` for the engines to come."""
    multiprocessing.set_forkserver_preload([*modules])
    forkserver.ensure_running()
