"""What a data owner wants to know before joining a run: will my data be taken, what is lost, what does it cost?"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from fedloom.client.data.labels import Labelling
from fedloom.client.data.load import Tally, tell_of
from fedloom.client.data.survey import Lengths, Survey, guess_task, lengths, survey
from fedloom.client.models.base_folder import allowed_base
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy, check_spec
from fedloom.client.privacy.ledger.account import existing_account
from fedloom.client.privacy.ledger.budget import affordable
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError, PolicyError
from fedloom.core.privacy.accounting import epsilon
from fedloom.core.privacy.spends import faint, run_spends

__all__ = ["Cost", "Finding", "Report", "check"]

_SHOWN = 20
_DARK_BITS = 14
"""16-bit pictures of which none needs more have been written by a device that has no more: 10, 12 or 14 bits."""


class Finding(NamedTuple):
    """One thing the owner should know."""

    level: Literal["error", "warning", "note"]
    """error: the run would be refused here, or would stop. warning: it would go on. note: there is nothing to do."""
    text: str


@dataclass(frozen=True)
class Cost:
    """The privacy account under a run."""

    before: float
    """Epsilon spent so far, at the policy's delta."""
    after: float
    """The same with every round of the run on top."""
    budget: float
    delta: float
    rounds: int
    affordable: int
    """Rounds of the run that the rest of the budget pays for."""


@dataclass
class Report:
    """All that was found. It is exact, and stays on this machine."""

    survey: Survey
    lengths: Lengths | None = None
    cost: Cost | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether training would take the data."""
        return all(finding.level != "error" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Everything as JSON."""
        found = self.survey
        return {
            "sound": self.sound,
            "task": found.task,
            "rows": found.rows,
            "usable": len(found.usable),
            "groups": found.groups,
            "labels": dict(found.labels),
            "unknown_labels": dict(found.unknown),
            "labels_as": found.labelling.labels_as if found.labelling else None,
            "tokens": asdict(self.lengths) if self.lengths else None,
            "privacy": asdict(self.cost) if self.cost else None,
            "findings": [finding._asdict() for finding in self.findings],
        }


def check(policy: Policy, spec: Spec | None) -> Report:
    """Look at a site's data as a run would, without training, charging or sending anything.

    Args:
        policy: The site's policy.
        spec: The run with its noise multiplier; None looks at the data alone.

    Raises:
        DataError: The data cannot be read at all.
    """
    data = policy.data
    task, labels = data.own_task, data.labels
    if task is None:
        task = spec.model.task if spec else guess_task(data.source, data)
        labels = spec.model.labels if spec else ()
    report = Report(survey(data.source, labels, task, data))
    _judge_rows(report, labels)
    if spec is None:
        return report
    try:
        check_spec(policy, spec)
    except PolicyError as error:
        report.findings.append(Finding("error", str(error)))
    _judge_model(report, policy, spec, labels)
    if spec.privacy.enabled:
        _judge_size(report, policy, spec)
        _judge_cost(report, policy, spec)
    return report


def _judge_rows(report: Report, labels: tuple[str, ...]) -> None:
    found, add = report.survey, report.findings.append
    if not found.rows:
        add(Finding("error", "there is no row"))
    for what, fault in found.unreadable.items():
        add(Finding("error", f"{_rows(fault)}: {what}"))
    if found.labelling:
        add(Finding("note", str(found.labelling)))
    if found.unknown:
        unknown = _some([repr(each) for each in sorted(found.unknown)])
        text = f"{found.unknown.total()} labels are not among those expected ({_expected(found.labelling)}): {unknown}"
        add(Finding("error", f"{text}; correct them in the data, where all must be names or all positions"))
    for what, fault in found.doubtful.items():
        add(Finding("warning", f"{_rows(fault)}: {what}"))
    tell_of(found.notes, lambda level, text: add(Finding("warning" if level == logging.WARNING else "note", text)))
    if found.deep and (bits := max(found.deep).bit_length()) <= _DARK_BITS:
        text = f"{len(found.deep):,} pictures of 16 bits have no value above {max(found.deep):,} of 65,535, and are "
        text += f"read as nearly black: save them with every value times {1 << (16 - bits)}, or with 8 bits"
        add(Finding("warning", text))
    absent = [name for name in labels if name not in found.labels]
    if absent and found.rows:
        add(Finding("warning", f"no row has the label {_some([repr(each) for each in absent])}"))


def _judge_model(report: Report, policy: Policy, spec: Spec, labels: tuple[str, ...]) -> None:
    """Whether the base model can be loaded as the run will: with its head, adapter and lengths; and then the rows."""
    try:
        folder = str(allowed_base(policy, spec))
        model = load_model(spec.model.model_copy(update={"base": folder}), spec.adapter, policy.compute)
        if report.survey.usable and isinstance(model.tokenizer, PreTrainedTokenizerBase):  # or it reads pictures
            _judge_lengths(report, policy, spec, labels, model.tokenizer)
    except FedloomError as error:
        report.findings.append(Finding("error", str(error)))


def _judge_lengths(
    report: Report, policy: Policy, spec: Spec, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    add, most = report.findings.append, spec.model.max_length
    found = report.lengths = lengths(report.survey, labels, tokenizer, most, policy.data)
    # A private run learns nothing of such rows: a refusal would tell of them.
    stops = not spec.privacy.enabled or sum(each.count for each in found.refused.values()) == len(report.survey.usable)
    for what, fault in found.refused.items():
        add(Finding("error" if stops else "warning", f"{_rows(fault)}: {what}"))
    if found.cut:
        share = found.cut / len(report.survey.usable)
        add(Finding("warning", f"{_counted(found.cut)} ({share:.1%}) lose their end at model.max_length = {most}"))
    if found.idle:
        add(Finding("warning", f"{_counted(found.idle)} have nothing to learn within model.max_length = {most}"))


def _judge_size(report: Report, policy: Policy, spec: Spec) -> None:
    declared, usable = policy.data.declared_examples, round((1 - policy.data.held_out) * len(report.survey.usable))
    if declared is None or not usable:
        return  # check_spec and _judge_rows have said so
    if not 0.8 <= declared / usable <= 1.25:
        what = "steps are shorter than they could be" if declared > usable else "noise weighs less than it should"
        add = f"data.declared_examples = {declared:,} and there are {usable:,} rows: {what}; declare a rounded number"
        report.findings.append(Finding("warning", add))
    if (text := faint(spec, declared)) is not None:
        report.findings.append(Finding("warning", text))


def _judge_cost(report: Report, policy: Policy, spec: Spec) -> None:
    mine, rounds, add = policy.privacy, spec.run.rounds, report.findings.append
    try:
        whole = run_spends(spec, rounds)
        with existing_account(policy, beside_client=True) as ledger:
            prior = ledger.spends() if ledger is not None else []
    except FedloomError as error:
        add(Finding("error", str(error)))
        return
    before, after = (epsilon([*prior, *more], mine.delta) for more in ((), whole))
    paid = affordable(prior, spec, mine)
    report.cost = Cost(before, after, mine.epsilon, mine.delta, rounds, paid)
    if paid < rounds:
        text = f"the budget of epsilon {mine.epsilon:g} pays for {paid} of {rounds} rounds"
        add(Finding("warning" if paid else "error", text))


def _expected(way: Labelling | None) -> str:
    names = _some([repr(each) for each in way.names]) if way else ""
    return f"0 to {len(way.names) - 1}, the positions of {names}" if way and way.labels_as == "positions" else names


def _rows(fault: Tally) -> str:
    return f"{_counted(fault.count)}, the first at {fault.first}"


def _counted(count: int) -> str:
    return f"{count:,} row{'s' * (count > 1)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} ... ({len(names)} in all)"
