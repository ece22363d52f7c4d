"""Ray itself: where it is not installed, on this machine alone, or as a cluster that runs already."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from fedloom.core.errors import ConfigError, FedloomError

__all__ = ["check_installed", "connected"]

_LOOPBACK = "127.0.0.1"
_EVERYWHERE = {"RAY_USAGE_STATS_ENABLED": "0"}
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""Ray reads these when it is imported. The first makes it listen on loopback, on Linux too; by the second, other users
of this machine get nowhere without a token."""


def check_installed() -> None:
    """Look whether Ray is here, without loading it.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            'engine.kind = "ray" needs Ray, which is not installed; pip install "fedloom[ray]", or take '
            'engine.kind = "inprocess"'
        )


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster until the block ends.

    A Ray that this process is connected to already is used as it is, and stays.

    Args:
        address: Of a running cluster, HOST:PORT or "auto"; this machine must be one of its nodes. "" starts Ray on
            this machine, where nothing but loopback reaches it, and ends it afterwards.

    Yields:
        The module `ray`.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
        FedloomError: Ray would listen beyond loopback though no address is given.
    """
    check_installed()
    os.environ.update(_EVERYWHERE)
    if not address:
        os.environ.update({"RAY_AUTH_TOKEN": secrets.token_hex(32)} | _ALONE | _given())
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else _QUIET))
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"engine.address = {address!r}: no Ray cluster answers there" if address else "Ray does not start here"
        raise ConfigError(
            f"{where}: {error}; start one with `ray start`, with the same versions of Python, Ray and fedloom on every "
            "node, or leave engine.address out"
        ) from error
    try:
        if not address:
            _check_loopback(ray)
        yield ray
    finally:
        ray.shutdown()


_QUIET = {"include_dashboard": False}


def _given() -> dict[str, str]:
    """A token that whoever started this process has chosen."""
    return {name: os.environ[name] for name in ("RAY_AUTH_TOKEN",) if name in os.environ}


def _check_loopback(ray: Any) -> None:
    """Ray takes the setting when it is imported, which a caller may have done before."""
    hosts = {node["NodeManagerAddress"] for node in ray.nodes()}
    if hosts != {_LOOPBACK}:
        raise FedloomError(
            f"Ray listens on {', '.join(sorted(hosts))}, and without engine.address it should on {_LOOPBACK} only; do "
            "not import ray before the simulation, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 first"
        )
