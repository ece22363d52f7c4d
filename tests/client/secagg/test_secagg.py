"""What a client insists on in a secure sum, whatever the coordinator says."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedloom.client.policy import Policy, SecureAggregationPolicy, check_spec
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.secagg.participant import Attempt, check_assignment
from fedloom.core.config.run import SecureAggregationSection, Spec
from fedloom.core.errors import ConfigError, LedgerError, PolicyError, ProtocolError
from fedloom.core.schema import Role
from fedloom.core.secagg.keys import Place
from fedloom.core.secagg.shamir import SHARE_BYTES, combine, share_from_bytes
from fedloom.core.secagg.steps import ALL, MASKED
from fedloom.proto.messages import Assignment

NAMES = ("ann", "ben", "cat", "dan", "eve", "fay")
PLACE = Place("run", 1, 0)
SECTION = SecureAggregationSection(enabled=True)
UPDATE = np.arange(1000, dtype="<u4").tobytes()
REST = frozenset(NAMES[:4])


def test_a_peer_that_is_not_pinned_is_refused_by_name(cohort: Any, tmp_path: Path) -> None:
    known = {name: public_text(load_identity(tmp_path / name)) for name in NAMES if name != "fay"}
    mine = Attempt(cohort.member("ann", peers=known), PLACE, UPDATE, "ab")

    with pytest.raises(PolicyError, match="peer 'fay' is in the cohort but not in this site's policy"):
        mine.share({**cohort.adverts, "ann": mine.message.parts[ALL]})


def test_keys_swapped_by_the_coordinator_are_refused_by_name(cohort: Any) -> None:
    adverts = cohort.adverts
    theirs = Attempt(replace(cohort.member("eve"), name="ben"), PLACE, UPDATE, "ab")

    with pytest.raises(PolicyError, match="peer 'ben'"):
        cohort.attempts["ann"].share({**adverts, "ben": theirs.message.parts[ALL]})


@pytest.mark.parametrize("place", [Place("run", 1, 1), Place("run", 2, 0), Place("other", 1, 0)])
def test_keys_of_another_round_epoch_or_run_are_refused_by_name(cohort: Any, place: Place) -> None:
    old = Attempt(cohort.member("ben"), place, UPDATE, "ab").message.parts[ALL]

    with pytest.raises(PolicyError, match="peer 'ben'"):
        cohort.attempts["ann"].share({**cohort.adverts, "ben": old})


def test_a_cohort_with_other_keys_for_this_client_is_refused(cohort: Any) -> None:
    again = Attempt(cohort.member("ann"), PLACE, UPDATE, "ab").message.parts[ALL]

    with pytest.raises(ProtocolError, match="other keys for this client"):
        cohort.attempts["ann"].share({**cohort.adverts, "ann": again})


def test_a_cohort_smaller_than_the_policy_wants_is_refused(cohort: Any) -> None:
    mine = Attempt(cohort.member("ann", min_clients=7), PLACE, UPDATE, "ab")

    with pytest.raises(PolicyError, match=r"the cohort has 6 clients.*at least 7"):
        mine.share({**cohort.adverts, "ann": mine.message.parts[ALL]})


def test_a_cohort_whose_sum_could_overflow_is_refused(cohort: Any) -> None:
    few = replace(cohort.member("ann"), section=SecureAggregationSection(enabled=True, max_clients=5))
    mine = Attempt(few, PLACE, UPDATE, "ab")

    with pytest.raises(PolicyError, match="the run's step allows 5"):
        mine.share({**cohort.adverts, "ann": mine.message.parts[ALL]})


def test_masking_against_too_few_peers_is_refused(cohort: Any) -> None:
    sealed = cohort.shared()

    with pytest.raises(PolicyError, match="3 of 6 clients are left; 4 are needed"):
        cohort.attempts["ann"].mask({name: sealed[name]["ann"] for name in ("ben", "cat")})


def test_a_sum_of_fewer_than_the_policy_wants_is_refused(cohort: Any) -> None:
    mine = Attempt(cohort.member("ann", min_clients=5), PLACE, UPDATE, "ab")
    cohort.attempts["ann"] = mine
    cohort.masked()

    with pytest.raises(PolicyError, match="the sum has 4 clients"):
        mine.confirm(REST)


@pytest.mark.parametrize("survivors", [REST | {"gus"}, REST - {"ann"} | {"eve"}])
def test_survivors_that_cannot_be_are_refused(cohort: Any, survivors: frozenset[str]) -> None:
    cohort.masked()

    with pytest.raises(ProtocolError, match="survivors"):
        cohort.attempts["ann"].confirm(survivors)


def test_shares_sealed_for_somebody_else_are_refused_by_name(cohort: Any) -> None:
    sealed = cohort.shared()
    parts = {peer: sealed[peer]["ann"] for peer in NAMES if peer != "ann"}

    with pytest.raises(ProtocolError, match="peer 'ben'"):
        cohort.attempts["ann"].mask({**parts, "ben": sealed["ben"]["cat"]})
    with pytest.raises(ProtocolError, match="'gus', who is no peer"):
        cohort.attempts["ann"].mask({**parts, "gus": sealed["ben"]["ann"]})


def test_a_survivor_reveals_seeds_of_survivors_and_mask_keys_of_the_others_and_nothing_else(cohort: Any) -> None:
    """Put together as the coordinator would, and compared with the secrets inside the clients."""
    signatures = cohort.confirmed(REST)

    revealed = {name: cohort.attempts[name].unmask(signatures) for name in sorted(REST)}

    for peer in NAMES:
        shares = {NAMES.index(name) + 1: share_from_bytes(parts[peer]) for name, parts in revealed.items()}
        attempt = cohort.attempts[peer]
        secret = attempt._seed if peer in REST else attempt._mask_key.private_bytes_raw()
        assert combine(shares) == int.from_bytes(secret, "big")
    assert all(parts.keys() == set(NAMES) for parts in revealed.values())
    assert all(len(share) == SHARE_BYTES for parts in revealed.values() for share in parts.values())


def test_both_shares_of_a_peer_cannot_be_had_in_one_attempt(cohort: Any) -> None:
    """Told that Dan has survived and then that he has not, Ann would give his seed and his mask key."""
    signatures = cohort.confirmed(REST)
    cohort.attempts["ann"].unmask(signatures)

    with pytest.raises(PolicyError, match="one list only"):
        cohort.attempts["ann"].confirm(REST - {"dan"} | {"eve"})


@pytest.mark.parametrize("known", [("ben", "cat"), ("eve", "fay", "ben", "cat"), ()])
def test_fewer_than_t_signatures_over_the_list_reveal_nothing(cohort: Any, known: tuple[str, ...]) -> None:
    signatures = cohort.confirmed(REST)
    told_otherwise = cohort.attempts["eve"].confirm(frozenset(NAMES) - {"dan"})

    parts = {name: signatures.get(name, told_otherwise) for name in known}
    with pytest.raises(PolicyError, match=r"\d of the cohort have signed"):
        cohort.attempts["ann"].unmask(parts)
    assert not (cohort.folder / "ann" / "revealed").exists()


def test_signatures_of_another_attempt_do_not_count(cohort: Any) -> None:
    old = cohort.again().confirmed(REST)
    cohort.confirmed(REST)

    with pytest.raises(PolicyError, match="1 of the cohort have signed"):
        cohort.attempts["ann"].unmask(old)


def test_a_second_attempt_is_unmasked_for_the_same_survivors_only(cohort: Any) -> None:
    """Also by a client that has restarted in between: every attempt here is a new object."""
    cohort.attempts["ann"].unmask(cohort.confirmed(REST))

    same = cohort.again()
    assert same.attempts["ann"].unmask(same.confirmed(REST))
    other = cohort.again()
    signatures = other.confirmed(REST | {"eve"})
    with pytest.raises(PolicyError, match="round 1 was, with 4 survivors"):
        other.attempts["ann"].unmask(signatures)


@pytest.mark.parametrize("kind", [stat.S_ISREG, stat.S_ISDIR])
def test_nothing_is_revealed_before_it_is_on_the_disk(
    cohort: Any, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], bool]
) -> None:
    """Neither the file nor its name in the folder may still be in memory alone."""
    signatures = cohort.confirmed(REST)
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            raise OSError("no space")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(LedgerError, match="no space"):
        cohort.attempts["ann"].unmask(signatures)


def test_a_masked_update_looks_uniform_and_never_the_same(cohort: Any) -> None:
    nothing, most = bytes(200_000), b"\xff\xff\x7f\x00" * 50_000
    payloads = []
    for update in (nothing, most, nothing):
        cohort.update = update
        payloads.append(cohort.again().masked()["ann"])

    for payload in payloads:
        counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    difference = np.frombuffer(payloads[0], "<u4") - np.frombuffer(payloads[2], "<u4")
    assert stats.chisquare(np.bincount(difference.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_a_policy_may_demand_secure_sums(policy: Policy, spec: Spec) -> None:
    strict = policy.model_copy(update={"secure_aggregation": SecureAggregationPolicy(required=True)})

    with pytest.raises(PolicyError, match="sent openly"):
        check_spec(strict, spec)
    check_spec(policy, spec)


def test_a_secure_run_needs_pinned_peers(policy: Policy, spec: Spec) -> None:
    secure = spec.model_copy(update={"secure_aggregation": SECTION})
    peers = {name: f"{number:064x}" for number, name in enumerate(("site-a", "site-b"))}
    rules = SecureAggregationPolicy(peers=peers)

    with pytest.raises(PolicyError, match="at least 3 with 0 peers"):
        check_spec(policy, secure)
    with pytest.raises(PolicyError, match="at least 3 with 1 peers"):
        check_spec(policy.model_copy(update={"secure_aggregation": rules}), secure)
    more = SecureAggregationPolicy(peers={**peers, "site-c": "ab" * 32})
    check_spec(policy.model_copy(update={"secure_aggregation": more}), secure)


def test_one_key_for_two_peers_is_refused() -> None:
    with pytest.raises(ConfigError, match="two peers have the same key"):
        SecureAggregationPolicy(peers={"ann": "ab" * 32, "ben": "ab" * 32})


@pytest.mark.parametrize("key", ["", "AB" * 32, "ab" * 31, "zz" * 32])
def test_what_is_no_key_cannot_be_pinned(key: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        SecureAggregationPolicy(peers={"ann": key})


def test_an_update_is_never_handed_in_openly_in_a_secure_run(spec: Spec) -> None:
    openly = Assignment(0, frozenset({Role.HEAD}), frozenset({Role.HEAD}), "ab" * 32, 0)
    secure = spec.model_copy(update={"secure_aggregation": SECTION})

    check_assignment(spec, openly)
    check_assignment(secure, replace(openly, upload_codec=MASKED))
    for run, codec in ((secure, "fp32"), (secure, "fp16"), (spec, MASKED)):
        with pytest.raises(PolicyError, match="nothing is sent"):
            check_assignment(run, replace(openly, upload_codec=codec))
