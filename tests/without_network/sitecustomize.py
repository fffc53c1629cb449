"""Python imports this before anything else: who asks for another machine is written down and refused.

Local sockets stay, and this machine's own address does: the web page's server asks itself whether it is up.
"""

import os
import socket

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)


def check(host: object) -> None:
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL:
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{host}\n")
        raise OSError(f"no network here, and {host} was asked for")


def guard(name: str) -> None:
    original = getattr(socket.socket, name)

    def guarded(self: socket.socket, *args: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            check(args[-1][0])  # the address is the last
        return original(self, *args)

    setattr(socket.socket, name, guarded)


def guard_lookup(name: str) -> None:
    original = getattr(socket, name)

    def guarded(host: object, *args: object, **options: object) -> object:
        check(host)
        return original(host, *args, **options)

    setattr(socket, name, guarded)


for method in ("connect", "connect_ex", "sendto"):
    guard(method)
for lookup in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    guard_lookup(lookup)
