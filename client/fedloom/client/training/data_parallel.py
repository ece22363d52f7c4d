"""Several processes of one client, which share out the examples of each step.

The first one is the client: it has the policy, the ledger, the connection and what is kept here, draws every sample and
all noise, and takes every step. The others hold the same base model and the same rows, compute the gradients of the
examples that they are given, and decide nothing. They are told by lines of JSON on a socket that only its two ends
have. Tensors go through torch.distributed on the loopback interface, by gloo between CPUs and by NCCL between GPUs.

Each example is clipped once, where it is computed. Clipped sums are whole numbers, so their sum over the processes is
exact, and the noise that the first process adds to it is all the noise there is.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed, nn

from fedloom.client.data.rows import Indices
from fedloom.client.data.site_data import own_rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.client.training.device import compute_of
from fedloom.client.training.gradients import Gradients
from fedloom.client.training.local_eval import split
from fedloom.core.config.run import Spec
from fedloom.core.errors import DataError, FedloomError, ModelError
from fedloom.core.privacy.gaussian import Integers

__all__ = ["Alone", "Team", "main"]

_PATIENCE_S = 1800.0
"""Longest wait for a process that loads, or that computes its part of a step when this one has computed its own."""

Order = dict[str, Any]
"""One line of JSON."""


class Alone:
    """A client of one process: it does every example itself."""

    def round(self) -> AbstractContextManager[None]:
        """A block of steps, on a model that has just been given its round's values."""
        return nullcontext()

    def share(self, names: Collection[str], sample: Indices) -> Indices:
        """This process's part of a step's sample, which may be empty; the others begin with theirs.

        Args:
            names: Tensors that move in the step.
            sample: Indices of its examples.
        """
        return sample

    def add(self, total: torch.Tensor) -> None:
        """Add the others' clipped sums to this process's, int64, shape (P,). Ends what `share` began."""

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add the others' gradients to this process's; None stays where no process has one. Ends what `share` began."""


class Team(Alone):
    """The other processes of a client, as the first one has them.

    One that ends or does not answer ends the step with a ModelError before anything of it is noised or released. They
    end with this object, and with this process, however that ends.
    """

    def __init__(self, policy: Policy, spec: Spec, base: Path) -> None:
        """Start the others, which load while this process does.

        Args:
            policy: The site's policy, with compute.processes of at least 2.
            spec: The run, already checked against it.
            base: Folder of the base model.

        Raises:
            ConfigError: See `compute_of`.
        """
        self._size, self._busy, stack = policy.compute.processes, False, ExitStack()
        compute = [compute_of(policy.compute, number) for number in range(self._size)]
        self.close = weakref.finalize(self, stack.close)
        """End the others."""
        self._folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-", ignore_cleanup_errors=True))
        self._line = stack.enter_context(ExitStack())
        self._others = [_started(stack, number, self._size) for number in range(1, self._size)]
        order = {"spec": spec.model_dump_json(), "base": str(base), "digest": spec.model.digest or base_digest(base)}
        for number, other in enumerate(self._others, 1):
            theirs = policy.model_copy(update={"compute": compute[number]}).model_dump_json()
            other.tell(order | {"policy": theirs, "number": number, "folder": self._folder})

    def join(self, gradients: Gradients) -> None:
        """Wait until the others are ready, and make sure that they have what this process has.

        Raises:
            DataError: One has other rows, or cannot read them.
            ModelError: One has another base model, cannot load it, or has ended.
        """
        self._model, self._lengths = gradients.model, _lengths(gradients)
        ours = _identity(gradients)
        try:
            for other in self._others:
                theirs = other.hear()
                for what in ours:
                    if theirs[what] != ours[what]:
                        raise (DataError if what == "rows" else ModelError)(
                            f"{other.name} of this client has other {what} than the first; leave data.source, the base "
                            "model and the installed packages as they are while a client starts, and start it again"
                        )
            with self._linked():
                _connect(self._folder, 0, self._size, self._model.device)
                self._line.callback(distributed.destroy_process_group)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def round(self) -> Iterator[None]:
        """See `Alone`. The others get the corrections of the base model.

        Raises:
            ModelError: Another process has ended, or has failed over its part of a step.
        """
        if not self.close.alive:
            raise ModelError("the other processes of this client have ended; start it again")
        values = self._model.corrections
        order = {"rank": self._model.rank, "corrections": {name: value.shape for name, value in values.items()}}
        self._busy = True
        try:
            for other in self._others:
                other.tell(order)
            if values:
                flat = np.concatenate([value.astype(np.float32).reshape(-1) for value in values.values()])
                self._send(torch.from_numpy(flat).to(self._model.device))
            self._busy = False
            yield
        except BaseException:
            if self._busy:  # the others wait for a sum that will not come; between two steps nobody waits
                self.close()
            raise

    def share(self, names: Collection[str], sample: Indices) -> Indices:
        """See `Alone`. The others get the adapter's values, too."""
        self._busy = True
        mine, *parts = _parts(sample, self._lengths[sample], self._size)
        for part, other in zip(parts, self._others, strict=True):
            other.tell({"names": sorted(names), "sample": part.tolist(), "count": len(sample)})
        self._send(_values(self._model))
        return mine

    def add(self, total: torch.Tensor) -> None:
        """See `Alone`."""
        # Before the sum: that of a process which has failed would never come.
        for other in self._others:
            other.hear()
        with self._linked():
            distributed.reduce(total, 0)
        self._busy = False

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """See `Alone`."""
        flat = _gradients(parameters)
        self.add(flat)
        for place, (parameter, part) in enumerate(zip(parameters, _split(flat, parameters), strict=True)):
            had = bool(flat[place - len(parameters)])
            parameter.grad = part.view_as(parameter).to(parameter.dtype) if had else None

    def _send(self, values: torch.Tensor) -> None:
        with self._linked():
            distributed.broadcast(values, 0)

    @contextmanager
    def _linked(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            for other in self._others:
                other.check()
            raise ModelError(f"the processes of this client have lost each other ({error}); start it again") from error


class _Other:
    """One of the other processes."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", line: socket.socket) -> None:
        self.name, self._process, self._line = name, process, line
        self._answers = line.makefile("rb")

    def tell(self, order: Order) -> None:
        """Send an order; one that has ended is heard of in `hear`, where it may have said why."""
        with suppress(ConnectionError):
            self._line.sendall(json.dumps(order).encode() + b"\n")

    def hear(self) -> Order:
        """Its answer to the last order.

        Raises:
            DataError: It failed over the rows.
            ModelError: It failed otherwise, has ended, or does not answer.
        """
        try:
            line = self._answers.readline()
        except TimeoutError as error:
            raise ModelError(
                f"{self.name} of this client has not answered for {_PATIENCE_S:g} s; see what holds it up, and start "
                "the client again"
            ) from error
        except ConnectionError:
            line = b""
        if not line:
            status = self._process.wait()
            raise ModelError(
                f"{self.name} of this client has ended with status {status}; nothing of the step was released. See "
                "whether the machine ran out of memory, and start the client again"
            )
        answer: Order = json.loads(line)
        if "error" in answer:
            raise (DataError if answer["data"] else ModelError)(f"{self.name} of this client: {answer['error']}")
        return answer

    def check(self) -> None:
        """Raise what `hear` does if it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # a line that breaks is seen a little before its process has ended
            self.hear()

    def close(self) -> None:
        """End it; it keeps nothing."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._line.close()


class _NoNoise:
    """The entropy of a process that must not draw."""

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        raise ModelError("only the first process of a client draws samples")

    def normal(self, deviation: int, count: int) -> Integers:
        raise ModelError("only the first process of a client draws noise")


def _started(stack: ExitStack, number: int, size: int) -> _Other:
    ours, theirs = socket.socketpair()
    ours.settimeout(_PATIENCE_S)
    with theirs:
        command = [sys.executable, "-m", "fedloom.client.training.data_parallel", str(theirs.fileno())]
        # What it prints is for people, and this process's output may be for programs.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()])
    return stack.enter_context(closing(_Other(f"process {number + 1} of {size}", process, ours)))


def _connect(folder: str, number: int, size: int, device: torch.device) -> None:
    """Join the processes. Sums without noise go this way, so never through a network, nor through a port of one."""
    loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback, NCCL_IB_DISABLE="1")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=_PATIENCE_S),
    )


def _identity(gradients: Gradients) -> dict[str, str]:
    """What all processes must have alike. The digest of the base model's files is compared when it is loaded."""
    rows, encoded = hashlib.blake2b(), gradients.encoded
    parts: list[npt.NDArray[Any]] = [*encoded.input_ids, *encoded.targets, *encoded.media, encoded.labels]
    for part in parts:
        rows.update(f"{part.shape}".encode() + part.tobytes())
    return {"rows": rows.hexdigest(), "adapter tensors": gradients.model.schema.digest, "torch": torch.__version__}


def _lengths(gradients: Gradients) -> Indices:
    encoded = gradients.encoded
    return np.array([encoded.length(index) for index in range(len(encoded))], np.int64)


def _parts(sample: Indices, lengths: Indices, size: int) -> list[Indices]:
    """A sample as so many parts, alike in number of examples and in length."""
    ordered = sample[np.argsort(lengths, kind="stable")]
    return [np.sort(ordered[number::size]) for number in range(size)]


def _values(model: AdapterModel) -> torch.Tensor:
    """All values of the adapter, float32, in wire order."""
    return torch.cat([slot.parameter.detach().reshape(-1).float() for slot in model.slots.values()])


def _gradients(parameters: list[nn.Parameter]) -> torch.Tensor:
    """All gradients, float32, and then for each parameter whether it has one."""
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    has = torch.tensor([float(each.grad is not None) for each in parameters], device=parts[0].device)
    return torch.cat([*(part.reshape(-1).float() for part in parts), has])


def _split(flat: torch.Tensor, parameters: list[nn.Parameter]) -> tuple[torch.Tensor, ...]:
    """What of a flat vector belongs to each parameter."""
    sizes = [each.numel() for each in parameters]
    return torch.split(flat[: sum(sizes)], sizes)


def main() -> None:
    """Compute for the process that started this one, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, with which this one ends
    line = socket.socket(fileno=int(sys.argv[1]))
    orders: SimpleQueue[Order] = SimpleQueue()

    def listen() -> None:
        for each in line.makefile("rb"):
            orders.put(json.loads(each))
        os._exit(0)  # nobody is there any more, whatever this process is doing

    def answer(content: Order) -> None:
        line.sendall(json.dumps(content).encode() + b"\n")

    threading.Thread(target=listen, daemon=True).start()
    try:
        _serve(orders.get, answer)
    except FedloomError as error:
        answer({"error": str(error), "data": isinstance(error, DataError)})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}", "data": False})


def _serve(order: Callable[[], Order], answer: Callable[[Order], None]) -> None:
    first = order()
    policy, spec = Policy.model_validate_json(first["policy"]), Spec.from_json(first["spec"])
    base = spec.model.model_copy(update={"base": first["base"], "digest": first["digest"]})
    model = load_model(base, spec.adapter, policy.compute)
    gradients = Gradients(model, split(own_rows(policy, spec), policy.data.held_out)[0], spec, policy)
    answer(_identity(gradients))
    _connect(first["folder"], first["number"], policy.compute.processes, model.device)
    while True:
        told = order()
        if "rank" in told:
            _begin(model, told)
        else:
            distributed.reduce(_computed(gradients, told, answer), 0)


def _begin(model: AdapterModel, told: Order) -> None:
    shapes = {name: tuple(shape) for name, shape in told["corrections"].items()}
    flat = torch.empty(sum(int(np.prod(shape)) for shape in shapes.values()), device=model.device)
    if shapes:
        distributed.broadcast(flat, 0)
    parts = torch.split(flat.cpu(), [int(np.prod(shape)) for shape in shapes.values()])
    values = {name: part.view(shape).numpy() for (name, shape), part in zip(shapes.items(), parts, strict=False)}
    model.show(values, told["rank"])


def _computed(gradients: Gradients, told: Order, answer: Callable[[Order], None]) -> torch.Tensor:
    """This process's part of a step's sum, once it has been told that it is ready."""
    model, sample = gradients.model, np.array(told["sample"], np.int64)
    values = _values(model)
    distributed.broadcast(values, 0)
    slots = [slot.parameter for slot in model.slots.values()]
    with torch.no_grad():
        for parameter, part in zip(slots, _split(values, slots), strict=True):
            parameter.copy_(part.view_as(parameter))
    if gradients.spec.privacy.enabled:
        with gradients.clipping(told["names"], torch.optim.SGD(slots), _NoNoise()) as optimizer:
            gradients.accumulate(optimizer, sample)
            total = optimizer.grid_sum
    else:
        parameters = model.trainable(told["names"])
        gradients.differentiate(parameters, sample, told["count"])
        total = _gradients(parameters)
    answer({})
    return total


if __name__ == "__main__":
    main()
