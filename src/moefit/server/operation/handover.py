"""Restarts without lost requests: a listening socket from outside, and when to leave.

A supervisor, such as systemd, opens the socket and keeps it while servers come and go (socket
activation). Connections that no server accepts wait in the socket's queue for the next one. A
server that leaves stops accepting, answers what it has accepted, and then ends.
"""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

from moefit.errors import ConfigError

FIRST_DESCRIPTOR = 3  # of sd_listen_fds(3)
_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_HINT = "give ListenStream= an address and port, such as 127.0.0.1:8000"


def inherited_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """Return the listening socket that the process was started with, if there is one.

    The variables are removed, so that no process that this one starts takes the socket for its own.

    Args:
        environ: Environment with systemd's `LISTEN_FDS` and `LISTEN_PID`.

    Raises:
        ConfigError: If there are several sockets, or it is not a TCP socket that listens.
    """
    given = {name: environ.pop(name, "") for name in _VARIABLES}
    if given["LISTEN_PID"] != str(os.getpid()) or given["LISTEN_FDS"] in ("", "0"):
        return None
    if given["LISTEN_FDS"] != "1":
        raise ConfigError(
            f"the process was started with LISTEN_FDS={given['LISTEN_FDS']} sockets, but serves "
            "one; leave one ListenStream= in the socket unit"
        )
    try:
        found = socket.socket(fileno=FIRST_DESCRIPTOR)
    except OSError as error:
        raise ConfigError(
            f"LISTEN_FDS=1, but descriptor {FIRST_DESCRIPTOR} is no socket: {error.strerror}"
        ) from error
    try:
        _check_listening(found)
    except ConfigError:
        found.detach()  # not ours to close
        raise
    os.set_inheritable(FIRST_DESCRIPTOR, False)
    found.setblocking(False)
    return found


def _check_listening(found: socket.socket) -> None:
    tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
    if not tcp:
        raise ConfigError(
            f"the socket that the process was started with is not TCP but {found.family.name}, "
            f"{found.type.name}; {_HINT}"
        )
    if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError(
            "the socket that the process was started with does not listen; use Accept=no, and "
            f"{_HINT}"
        )


def notify_supervisor(environ: MutableMapping[str, str], state: str) -> None:
    """Tell systemd about a change (sd_notify(3)), such as READY=1; do nothing without it.

    Args:
        environ: Environment with `NOTIFY_SOCKET`.
        state: What to say.
    """
    if not (address := environ.get("NOTIFY_SOCKET")):
        return
    name = f"\0{address[1:]}" if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(state.encode(), name)


class Leaving:
    """Decides when a server that has stopped accepting may end.

    A connection between two requests may have one more under way, so that idle ones stay open for a
    moment; its answer says `Connection: close`.

    Args:
        began: When it stopped accepting, in seconds.
        grace: Seconds for which idle connections stay open.
    """

    def __init__(self, began: float, grace: float):
        self._quiet_since, self._grace = began, grace

    def may_end(self, busy: bool, now: float) -> bool:
        """Return whether nothing has been under way for the grace period.

        Args:
            busy: Whether a request is under way on any connection.
            now: The time in seconds.
        """
        if busy:
            self._quiet_since = now
        return now - self._quiet_since >= self._grace
