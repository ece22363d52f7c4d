"""Ray itself: where it is not installed, on this machine alone, or as a cluster that runs already."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from fedloom.core.errors import ConfigError, FedloomError

__all__ = ["ALONE", "check_installed", "connected"]

_LOOPBACK = "127.0.0.1"
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
}
"""Of a Ray that is this process's own. Ray reads the first when it is imported, and then listens on loopback on Linux
too; the others keep out other users of this machine. The token is read once in a process, so it stays the same."""


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

    Args:
        address: Of a running cluster, HOST:PORT or "auto"; this machine must be one of its nodes. "" starts Ray on
            this machine, where nothing but loopback reaches it, and ends it afterwards.

    Yields:
        The module `ray`.

    Raises:
        ConfigError: Ray is not installed, is in use by this process already, or there is no such cluster.
        FedloomError: Ray would listen beyond loopback though no address is given.
    """
    check_installed()
    with _environment({} if address else ALONE):
        import ray

        if ray.is_initialized():
            raise ConfigError("this process is connected to Ray already; call ray.shutdown() before the simulation")
        try:
            if address:
                ray.init(address, **_QUIET)
            else:
                ray.init("local", include_dashboard=False, **_QUIET)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if not address:
                raise ConfigError(
                    f"Ray does not start: {error}; do not import ray before the simulation, which sets how it starts, "
                    "or start one with `ray start` and give its engine.address"
                ) from error
            raise ConfigError(
                f"engine.address = {address!r}: no Ray cluster answers: {error}; start one with `ray start`, with "
                "the same versions of Python, Ray and fedloom on every node, or leave engine.address out"
            ) from error
        try:
            if not address:
                _check_loopback(ray)
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that Ray and its processes read."""
    values = {"RAY_USAGE_STATS_ENABLED": "0", **values}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_loopback(ray: Any) -> None:
    """Ray takes the setting when it is imported, which a caller may have done before."""
    hosts = {node["NodeManagerAddress"] for node in ray.nodes()}
    if hosts != {_LOOPBACK}:
        raise FedloomError(
            f"Ray listens on {', '.join(sorted(hosts))}, and without engine.address it should on {_LOOPBACK} only; do "
            "not import ray before the simulation, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 first"
        )
