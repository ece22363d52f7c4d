"""Which model families load and train privately: what docs/families.md says, measured anew."""

from collections.abc import Callable
from pathlib import Path

import pytest

from docs import make_families
from tests.families import FAMILIES, LANGUAGE_MODELS, PICTURES, SOUNDS, SPEECH, save_family
from tests.family_gradients import CASES, TARGETS, TOLERANCE, Case, measured, recorded

REFUSED = {
    ("bart", "text-classification"): "is an encoder and a decoder",
    ("t5", "text-classification"): "is an encoder and a decoder",
    ("xlnet", "text-classification"): "its gradient mixes examples",
}
"""By family and task, for all targets. XLNet's layers see (tokens, examples, ...)."""

BaseOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    """The folder of a family's model, written once."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = save_family(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.task}-{case.targets}")
def test_a_private_step_is_that_of_a_loop_over_the_examples_as_the_page_says(case: Case, base_of: BaseOf) -> None:
    found, told = measured(case, base_of(case.family)), recorded()[case]

    assert (found.layers, found.values, found.refused) == (told.layers, told.values, told.refused)
    if reason := REFUSED.get((case.family, case.task)):
        assert reason in found.refused
        return
    assert not found.refused
    for result in (found, told):
        assert 0 < result.gradient <= TOLERANCE
        assert 0 < result.step <= TOLERANCE


def test_the_page_has_every_case_that_is_measured() -> None:
    told = recorded()

    assert set(told) == set(CASES)
    assert {case.family for case in CASES} == {*FAMILIES, *PICTURES, *SPEECH, *SOUNDS} == set(make_families.NAMES)
    assert make_families.TARGET.read_text(encoding="utf-8") == make_families.page()


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_language_model_is_measured_on_both_its_tasks(family: str) -> None:
    assert {case.task for case in CASES if case.family == family} == {"causal-lm", "text-classification"}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_decoder_whose_tokenizer_has_no_padding_token_trains_too(
    architecture: str, targets: str, small_bases: dict[str, Path]
) -> None:
    found = measured(Case(architecture, "text-classification", targets), small_bases[architecture])

    assert not found.refused
    assert 0 < found.gradient <= TOLERANCE
