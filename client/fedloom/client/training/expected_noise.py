"""The noise that an update is expected to carry, where the optimiser is linear: the run's own numbers say it."""

from fedloom.client.optimizers.api import noise_std, optimizer_of
from fedloom.client.optimizers.sgd import SGD
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.config.schedules import learning_rates
from fedloom.core.privacy.iterates import noise_of_mean

__all__ = ["update_noise"]


def update_noise(spec: Spec, train: TrainSection, round: int, declared_examples: int) -> tuple[float, float] | None:
    """Variance of the noise in one value of a client's update: of the adapter, and of the head.

    The square of what `SGD.noise_moved` says at either's learning rate, or of what is left of it in the mean of the
    iterates: T r^2 s^2 without momentum and mean, where s = sigma C / (q n) is the standard deviation of the noise in a
    step's gradient.

    That the gradients of later steps answer to the noise of earlier ones is left out.

    Args:
        spec: The run.
        train: [train] as this client had it in this round.
        round: Counted from 0.
        declared_examples: n.

    Returns:
        None where it is not known: without noise or a declared size, and where something else than the sum of the
        gradients moves the values (another optimiser, smoothing, proximal_mu) or the noise of steps is correlated.
    """
    optimizer = optimizer_of(train)
    if not isinstance(optimizer, SGD) or optimizer.smoothing or train.proximal_mu:
        return None
    if spec.privacy.noise_bands > 1 or declared_examples < 1:
        return None
    deviation = noise_std(spec, declared_examples)
    if not deviation:
        return None

    def moved(rate: float) -> float:
        return noise_of_mean(lambda steps: optimizer.noise_moved(steps, rate, deviation) or 0.0, train.steps, train.ema)

    adapter, head = learning_rates(train, round, spec.run.rounds)
    return moved(adapter) ** 2, moved(head) ** 2
