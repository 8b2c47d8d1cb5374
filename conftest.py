"""How cells of notebooks are compared, and how pytest-xdist spreads the tests over processes."""

import os
import signal

import pytest

if "DFQS_OUTPUTS" in os.environ:  # a folder for each process: a test never meets what another one wrote
    os.environ["DFQS_OUTPUTS"] += os.environ.get("PYTEST_XDIST_WORKER", "")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; but tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Notebooks that `make run` has just executed are not executed once more."""
    if config.getoption("nbval", False):
        import nbval_replay

        nbval_replay.install()


def pytest_report_header(config: pytest.Config) -> str:
    """Say whether notebooks are executed."""
    if not config.getoption("nbval", False):
        return ""
    import nbval_replay

    return nbval_replay.where()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cells of notebooks are compared as their tags say."""
    for item in items:
        if type(item).__name__ == "IPyNbCell":
            from nbval_close import allow

            allow(item)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A file of tests stays in one process, for its fixtures; all notebooks stay in one, in their order.

    They must: each notebook reads what the notebooks before it wrote.
    """
    from xdist.scheduler import LoadFileScheduling

    class NotebooksTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "notebooks" if nodeid.startswith("notebooks/") else super()._split_scope(nodeid)

    return NotebooksTogether(config, log)
