"""`fedloom client`: one data owner's side of a run."""

from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import INSECURE, out, pace
from fedloom.cli.logs import LogFormat, LogLevel, write_logs
from fedloom.core.errors import IdentityError

if TYPE_CHECKING:
    from fedloom.client.session.api import Training
    from fedloom.core.schema import Tensors
    from fedloom.proto.messages import Joined

__all__ = ["client"]


def client(
    server: Annotated[str, typer.Option(help="Address of the coordinator, HOST:PORT.")],
    policy: Annotated[Path, typer.Option(help="This site's policy file.")],
    certs: Annotated[
        Path | None,
        typer.Option(help="Folder that `fedloom certs enrol` wrote; certs in the state folder, otherwise."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure-loopback", help="No encryption and no certificates; loopback addresses only.")
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the run's final adapter in PEFT's format, with what this site kept to itself; replaced if "
            "it is there."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a policy key, such as compute.device=cuda.")
    ] = None,
    log_format: LogFormat = "text",
    log_level: LogLevel = None,
) -> None:
    """Train on this site's data, within this site's policy, until the run is over.

    The base model is loaded once and stays; the data and the ledger never leave this machine.

    Example: fedloom client --server fl.example.org:8470 --policy client.toml
    """
    from fedloom.client.policy import load_policy

    write_logs(log_format, log_level)
    site = load_policy(policy, tuple(overrides or ()))
    folder = None if insecure else _checked(certs or site.client.state / "certs", site.client.name)
    if insecure:
        out.print(INSECURE)
    # Loads torch, which takes seconds: a mistake in the policy file should not have to wait for it.
    from fedloom.client.data.site_data import own_data
    from fedloom.client.models.exports.result import save_final
    from fedloom.client.privacy.ledger.account import outbox_folder
    from fedloom.client.session.outbox import kept
    from fedloom.client.session.participant import Participant
    from fedloom.client.session.prepare import prepare
    from fedloom.client.session.send_times import AT_ONCE, Pace
    from fedloom.client.training.trainer import Trainer
    from fedloom.client.transport.enrollment import renewing
    from fedloom.client.transport.grpc import GrpcConnection

    grid = AT_ONCE if insecure else Pace()  # whoever can reach the loopback interface can watch this process work
    own = own_data(site, grid)  # whatever is wrong with the data is found before a coordinator hears of this client
    upload, download = site.compute.upload_bytes_per_s, site.compute.download_bytes_per_s
    connection = GrpcConnection(server, folder, upload=upload, download=download)
    outbox, name = outbox_folder(site), site.client.name

    def tell(line: str) -> None:
        out.print(f"{name}: {line}")

    made: list[Trainer] = []
    runs: list[str] = []

    def ready(joined: "Joined") -> "Training":
        rounds = joined.spec.run.rounds
        rest = pace(rounds)
        participant.delivered = lambda number: tell(f"round {number}/{rounds} sent{rest(number)}")
        runs.append(joined.run)
        participant.ended = ended if adapter is not None or joined.spec.federated_evaluation.enabled else None
        owing = kept(outbox, joined.run, name) is not None
        made.append(prepare(site, joined.spec, own, announce=tell, run=joined.run, owing=owing))
        return made[-1]

    def ended(tensors: "Tensors", rounds: int) -> tuple[float, ...]:
        if adapter is not None:
            save(adapter, tensors, rounds)
        return made[-1].score(runs[-1], rounds, tensors)

    def save(adapter: Path, tensors: "Tensors", rounds: int) -> None:
        trainer, own = made[-1], made[-1].personal(runs[-1])
        save_final(trainer.model, trainer.spec, {**tensors, **own}, adapter, rounds)
        with_own = f" with this site's own {', '.join(sorted(trainer.schema.select(own).roles))}" if own else ""
        what = "merged model" if trainer.model.adapter.traits.result == "merged" else "adapter"
        tell(f"the run's {what}{with_own} is in {adapter}")

    participant = Participant(connection, site, ready, outbox=outbox, pace=grid)
    out.print(f"{participant.name}: joining {server}")
    with closing(connection), renewing(server, folder) if folder else nullcontext():
        finished = participant.run()
    out.print(f"{participant.name}: run over after {finished.rounds} rounds; trained {participant.rounds_trained}")


def _checked(certs: Path, name: str) -> Path:
    """The folder of certificates, if its certificate is this client's own."""
    from fedloom.client.transport.tls import member

    found = member(certs)
    if (found.role, found.name) != ("client", name):
        raise IdentityError(
            f"the certificate in {certs} is for the {found.role} {found.name}, the policy for the client {name}; "
            "enrol with a join token for that name"
        )
    return certs
