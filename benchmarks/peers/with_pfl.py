"""pfl-research: one resident model, clients in turn; under torchrun each worker process has a share of them.

python -m peers.with_pfl FOLDER, or torchrun --nproc-per-node 2 -m peers.with_pfl FOLDER
"""

from typing import Any

import torch
from peers.work import Clock, LoraModel, Work, given_work, report, save_final
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.selector import get_default_framework_module as get_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")


class Module(torch.nn.Module):
    """What pfl asks of a model, around PEFT's."""

    def __init__(self, lora: LoraModel) -> None:
        super().__init__()
        self.lora = lora.model

    def loss(self, *columns: torch.Tensor) -> torch.Tensor:
        """The batch's mean loss."""
        loss: torch.Tensor = self.lora(**dict(zip(COLUMNS, columns, strict=True))).loss
        return loss

    @torch.no_grad()
    def metrics(self, *columns: torch.Tensor) -> dict[str, Any]:
        """As pfl wants it; only asked for in the round that warms up."""
        return {"loss": Weighted(self.loss(*columns).item() * len(columns[0]), len(columns[0]))}


class Stamp(TrainingProcessCallback):  # type: ignore[misc]  # pfl has no types here
    """Notes when rounds end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """A round is over."""
        if get_ops().distributed.global_rank == 0:
            self._clock.committed()
        return False, Metrics()


def main() -> None:
    work = given_work()
    workers = get_ops_workers()
    lora = LoraModel(work, max(1, work.cores // workers))
    clock = Clock(work)
    simulate(work, lora, clock)
    if get_ops().distributed.global_rank == 0:
        save_final(work, lora.read())
        report(("pfl",), clock.read())


def get_ops_workers() -> int:
    """Worker processes that torchrun has started."""
    workers: int = get_ops().distributed.world_size
    return workers


def simulate(work: Work, lora: LoraModel, clock: Clock) -> None:
    """All rounds."""
    # Tokenized once, as fedloom does when a client joins.
    batches = [lora.batch(client) for client in range(work.clients)]
    users = FederatedDataset(
        lambda client: Dataset([batches[client][name] for name in COLUMNS], user_id=str(client)),
        get_user_sampler("minimize_reuse", list(range(work.clients))),
    )
    module = Module(lora)
    model = PyTorchModel(
        module,
        # Only what is trained: an optimizer over all parameters would look at each frozen one too.
        lambda parameters, lr: torch.optim.SGD([each for each in parameters if each.requires_grad], lr=lr),
        torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=1.0),
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,  # in the round that warms up alone
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(users, users),
        model,
        NNTrainHyperParams(local_num_epochs=work.steps, local_learning_rate=work.rate, local_batch_size=None),
        callbacks=[Stamp(clock)],
    )


if __name__ == "__main__":
    main()
