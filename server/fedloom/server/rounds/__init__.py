"""Rounds: the state machine, who takes part, and what a round's updates become."""
