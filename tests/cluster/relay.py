"""A wire with a delay, which `tc` gives only where the kernel has netem: `relay.py SECONDS NAME NAME` hands on what comes in
at either of two network interfaces at the other, so much later. Frames keep the header by which the kernel
knows what is left to cut and to sum up."""

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE, ALL = 263, 15, 23, 33, 3  # as the kernel has them


def interface(name: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
    opened.setblocking(False)
    opened.bind((name, ALL))
    return opened


def main(seconds: str, *names: str) -> None:
    delay, ends = float(seconds), [interface(name) for name in names]
    across = dict(zip(ends, reversed(ends), strict=True))
    held: deque[tuple[float, socket.socket, bytes]] = deque()
    print("ready", flush=True)
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for end in select.select(ends, [], [], wait)[0]:
            while True:
                try:
                    frame = end.recv(1 << 17)
                except BlockingIOError:
                    break
                held.append((time.monotonic() + delay, across[end], frame))
        while held and held[0][0] <= time.monotonic():
            _, end, frame = held.popleft()
            with suppress(OSError):  # as on any wire, what does not fit is lost, and sent again
                end.send(frame)


if __name__ == "__main__":
    main(*sys.argv[1:])
