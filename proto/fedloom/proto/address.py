"""HOST:PORT, and why it must be loopback for now."""

import ipaddress

from fedloom.proto.errors import ConfigError

__all__ = ["loopback_host"]


def loopback_host(address: str) -> str:
    """The host of a HOST:PORT on the loopback interface.

    Both sides refuse every other address: a connection is not encrypted yet, and what crosses it would be read.

    Raises:
        ConfigError: It is another interface, or not HOST:PORT.

    >>> loopback_host("127.0.0.1:8470")
    '127.0.0.1'
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"address {address!r} must be HOST:PORT, such as 127.0.0.1:8470; port 0 takes a free one")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"address {address!r} is not a loopback address; connections are not encrypted yet, so only 127.0.0.1, "
            "[::1] and localhost are used; put an encrypted tunnel between the machines"
        )
    return host
