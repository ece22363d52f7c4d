"""FedDPA's shared and own adapter (Yang et al., NeurIPS 2024, arXiv 2403.19211)."""

from dataclasses import dataclass

from fedloom.core.schema import Schema
from fedloom.strategies.api import Strategy
from fedloom.strategies.personal.keeping import Keeping
from fedloom.strategies.transforms.average import trained
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedDPA"]


@dataclass(frozen=True)
class FedDPA(Composed):
    """Train two pairs on every layer, average one and leave the other with its client; needs the adapter `dual-lora`.

    Both factors of the shared pair move by their mean changes, which is not exact for their product. The own pair never
    leaves its client, and there is no global model to score but that of the shared pairs: a simulation scores every
    client's own adapter. The two count alike, W = W0 + s (B_s A_s + B_o A_o), and are trained together in every step;
    the paper trains them one after the other or by turns, and weighs them by the input when the model is used.

    In a private run both pairs are in the gradient that is clipped and noised. The gradients on the shared pair depend
    on the own one: had that been trained without noise, what is sent would tell of it, and no account of the noised
    steps would cover that.

    Args:
        train_head: Whether the head is trained; it is shared.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """An average of the shared pairs."""
        return Keeping(self._shared, "own")

    def _shared(self, schema: Schema) -> Schema:
        whole = trained(schema, {"shared", "own"}, head=self.train_head)
        return whole.select(whole.roles - {"own"})
