"""The labelling page of some pairs, served as the command serves it, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from diffalign.labelling.server import HOST, bind, server_of
from diffalign.labelling.session import Session


@contextmanager
def served(session: Session, port: int = 0) -> Iterator[int]:
    """Gives the port; at the end nothing answers there any more."""
    with bind(port) as listener:
        server = server_of(session)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive() and HOST == "127.0.0.1"
