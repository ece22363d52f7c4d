"""What importing the public API costs and offers."""

import subprocess
import sys

import fedloom.api as fl


def loaded(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"]
    return set(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())


def test_a_run_is_described_without_torch() -> None:
    """Nor pandas: both take seconds, and a mistake should not have to wait for them."""
    code = "import fedloom.api as fl; fl.Run(model='x', task=fl.CausalLM(), train=fl.Train(steps=1, sampling_rate=1))"

    assert not loaded(code) & {"torch", "transformers", "peft", "opacus", "pandas", "matplotlib"}


def test_every_name_is_documented() -> None:
    for name in fl.__all__:
        assert (getattr(fl, name).__doc__ or "").strip(), name
