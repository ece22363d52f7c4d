"""The noise that an update is expected to carry, where the optimiser is linear: the run's own numbers say it."""

from fedloom.client.optimizers.api import noise_std, optimizer_of
from fedloom.client.optimizers.sgd import SGD
from fedloom.client.training.schedules import share_of_rate
from fedloom.core.config.run import Spec, TrainSection

__all__ = ["update_noise"]


def update_noise(spec: Spec, train: TrainSection, round: int, declared_examples: int) -> tuple[float, float] | None:
    """Variance of the noise in one value of a client's update: of the adapter, and of the head.

    A step of SGD with momentum m at rate r adds noise of standard deviation s = sigma C / (q n) to each value of the
    gradient, which moves the value by r s in this step and by r s m, r s m^2, ... in the later ones of the round. The
    noise of T steps is independent:

        v = r^2 s^2 sum_{j=1}^{T} ((1 - m^j) / (1 - m))^2,    T r^2 s^2 without momentum.

    That the gradients of later steps answer to the noise of earlier ones is left out.

    Args:
        spec: The run.
        train: [train] as this client had it in this round.
        round: Counted from 0.
        declared_examples: n.

    Returns:
        None where it is not known: without noise or a declared size, and where something else than the sum of the
        gradients moves the values (another optimiser, proximal_mu, ema).
    """
    optimizer = optimizer_of(train)
    if not isinstance(optimizer, SGD) or train.proximal_mu or train.ema or declared_examples < 1:
        return None
    deviation, rate = noise_std(spec, declared_examples), share_of_rate(train, round, spec.run.rounds)
    if not deviation:
        return None
    momentum, carried, gain = optimizer.momentum, 0.0, 0.0
    for _ in range(train.steps):
        carried = 1 + momentum * carried  # (1 - m^j) / (1 - m)
        gain += carried**2
    head = train.head_learning_rate or train.learning_rate
    adapter, top = ((rate * each * deviation) ** 2 * gain for each in (train.learning_rate, head))
    return adapter, top
