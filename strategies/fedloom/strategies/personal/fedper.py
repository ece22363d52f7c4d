"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818)."""

from dataclasses import dataclass

from fedloom.core.errors import SchemaError
from fedloom.core.schema import Role, Schema
from fedloom.strategies.api import Strategy
from fedloom.strategies.personal.keeping import Keeping
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedPer"]


@dataclass(frozen=True)
class FedPer(Composed):
    """Average the adapter and leave the head with its client: one representation, and a classifier for each site.

    All of the adapter but the head moves by its mean change; each client trains a head of its own beside it (algorithm
    1 of the paper, with an adapter for its base layers). A simulation scores every client's own adapter. In a private
    run the head is in the gradient that is clipped and noised, though it stays: the gradients on what is shared depend
    on it.

    Args:
        train_head: Whether the head is trained. It must be.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """An average of all but the head."""
        return Keeping(self._shared, Role.HEAD)

    def _shared(self, schema: Schema) -> Schema:
        have, others = schema.roles, schema.roles - {Role.HEAD}
        if not self.train_head or others == have or not others:
            raise SchemaError(
                "this strategy trains an adapter and a head, but "
                + (f"the adapter has {', '.join(sorted(have))}" if self.train_head else "the head is frozen")
                + '; set model.head = "train", and an adapter.kind that trains something beside it'
            )
        return schema.select(others)
