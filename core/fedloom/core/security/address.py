"""HOST:PORT, and why it must be loopback where nothing is encrypted."""

import ipaddress

from fedloom.core.errors import ConfigError

__all__ = ["host_of", "loopback_host"]


def host_of(address: str) -> str:
    """The host of HOST:PORT, without the brackets of an IPv6 address.

    Raises:
        ConfigError: It is not HOST:PORT.

    >>> host_of("[::1]:8470")
    '::1'
    """
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"address {address!r} must be HOST:PORT, such as 127.0.0.1:8470; port 0 takes a free one")
    return host.removeprefix("[").removesuffix("]")


def loopback_host(address: str) -> str:
    """The host of a HOST:PORT on the loopback interface.

    Both sides refuse every other address without certificates: what crosses such a connection can be read and changed,
    and who is at its other end is not known.

    Raises:
        ConfigError: It is another interface, or not HOST:PORT.

    >>> loopback_host("127.0.0.1:8470")
    '127.0.0.1'
    """
    host = host_of(address)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"address {address!r} is not a loopback address; without certificates only 127.0.0.1, [::1] and localhost "
            "are used; make certificates with `fedloom certs`"
        )
    return host
