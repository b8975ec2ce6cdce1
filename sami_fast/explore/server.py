"""The server's way into the network: an address of this machine, a port that is free, and an end by Ctrl-C."""

import socket
import threading
from contextlib import suppress
from types import FrameType

import psutil
import uvicorn

from ..errors import UserError
from .app import build_app
from .explorer import Explorer

LOOPBACK = "127.0.0.1"
EVERYWHERE = {"0.0.0.0", "::"}  # every address that the machine has
IP = (socket.AF_INET, socket.AF_INET6)
CONNECTIONS = 64  # at a time; of more, each is told to come later
LEAVE = 5  # seconds that requests have to end in


class Server(uvicorn.Server):
    """One that ends what is being drawn before it waits for requests to end."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping.set()
        super().handle_exit(sig, frame)


def listen(host: str, port: int, *, another: bool) -> socket.socket:
    """A socket that listens.

    Args:
        host: Name or address.
        port: 0 for any that is free.
        another: Whether any free port will do where this one is in use.
    Raises:
        UserError: there is no such address here, or the port is in use or not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=64)
    except (OSError, UnicodeError) as error:
        if another and port:
            return listen(host, 0, another=False)
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # of binding to the address that is named here
        raise UserError(f"cannot listen at {host} port {port} ({reason}); choose another --port or --host") from None


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    address = sock.getsockname()[0]
    return address == "::1" or address.startswith("127.")


def names_of(host: str, sock: socket.socket) -> list[str]:
    """What a browser may call the server: its address, the name it was given, and names of this machine where others reach it too."""
    addresses = {host, sock.getsockname()[0]}
    if is_loopback(sock):
        addresses |= {"localhost", LOOPBACK}
    elif addresses & EVERYWHERE:
        addresses |= {each.address.partition("%")[0] for found in psutil.net_if_addrs().values() for each in found if each.family in IP}
        addresses |= {"localhost", socket.gethostname(), socket.getfqdn()}
    return sorted(addresses | {f"[{address}]" for address in addresses if ":" in address})


def address_of(host: str, sock: socket.socket) -> str:
    """What to type into a browser."""
    shown = socket.gethostname() if host in EVERYWHERE else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{sock.getsockname()[1]}"


def server_of(explorer: Explorer, host: str, sock: socket.socket) -> Server:
    """A server of the page at a socket of `listen`, to run."""
    stopping = threading.Event()
    config = uvicorn.Config(
        build_app(explorer, names_of(host, sock), stopping),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=LEAVE,
    )
    return Server(config, stopping)


def serve(explorer: Explorer, host: str, sock: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    with suppress(KeyboardInterrupt):  # uvicorn has ended in order by then, and raises the signal again
        server_of(explorer, host, sock).run(sockets=[sock])
