"""The ClientApp: hands a message to the site's resident trainer, which knows the policy, and its answer back."""

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloom.client.policy import load_policy
from fedloom.core.errors import ConfigError
from fedloom.flower.messages import Reply
from fedloom.flower.records import packed, unpacked
from fedloom.flower.unix_socket import ask, socket_path
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import REFUSED

__all__ = ["answer", "app"]

log = logging.getLogger(__name__)


def answer(message: Message, context: Context) -> Message:
    """What the site's resident trainer says; an error's text stays on this machine, since it may name files."""
    try:
        head, payload = _asked(message, context)
    except Exception:
        log.exception("the resident trainer was not asked")
        head, payload = to_json(Reply("", refusal=REFUSED)), b""
    return Message(packed(head, payload), reply_to=message)


def _asked(message: Message, context: Context) -> tuple[bytes, bytes]:
    head, payload = unpacked(message.content)
    policy = _policy_path(context.node_config, context.run_config)
    path = socket_path(load_policy(policy))
    # Flower's executor is this process's parent, and ends with the SuperNode: so does the trainer.
    command = [*_fedloom(context.node_config), "flower", "node", "--policy", str(policy), "--parent", str(os.getppid())]
    return ask(path, command, head, payload)


def _policy_path(node: Mapping[str, object], run: Mapping[str, object]) -> Path:
    """The site's policy file, which its own SuperNode names; in a local simulation, the one of a made-up client."""
    if "policy" in node:
        return Path(str(node["policy"])).absolute()
    clients = str(run.get("clients", ""))
    if clients and "partition-id" in node:
        folders = sorted(Path(clients).glob("*/policy.toml"))
        index = int(str(node["partition-id"]))
        if index < len(folders):
            return folders[index].absolute()
    raise ConfigError(
        """this node names no policy; start it with --node-config 'policy="/path/client.toml"', and a local """
        """simulation with --run-config 'clients="/path"', a folder that `fedloom flower export --clients` made"""
    )


def _fedloom(node: Mapping[str, object]) -> list[str]:
    """The command of the installation that trains; this one, unless the node names another."""
    if "fedloom" in node:
        return shlex.split(str(node["fedloom"]))
    return [sys.executable, "-m", "fedloom.cli.main"]


app = ClientApp()
app.train()(answer)
app.query()(answer)
