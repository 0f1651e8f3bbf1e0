"""Settings of the study, and one smallest study that ran through."""

import pytest
from accelerate.state import AcceleratorState

from trfpp.configs.load import command_line
from trfpp.configs.studying import StudyConfig
from trfpp.study.runs import study


@pytest.fixture(scope="session")
def settings(tiny_model):
    """`settings(recipe, output, *words)`: as the command line makes them."""

    def make(recipe, output, *words):
        return command_line(StudyConfig, "study", [recipe, f"output={output}", f"model={tiny_model}", *words])

    return make


@pytest.fixture(scope="session")
def do():
    """Does a study in this process, as one process."""

    def run(config):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            study(config)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.fixture(scope="session")
def finished(settings, do, tmp_path_factory):
    """The smoke recipe, all of it; a test that changes something there puts it back."""
    config = settings("smoke", tmp_path_factory.mktemp("study") / "out")
    do(config)
    return config
