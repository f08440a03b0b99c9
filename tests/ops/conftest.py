"""What the tests of kernels share."""

import pytest
import torch


@pytest.fixture
def kernels(monkeypatch):
    """Kernels on any device; in the interpreter every address is checked."""
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    if not torch.cuda.is_available():
        from bounds import check_bounds

        check_bounds(monkeypatch)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """For the names of what a test launches; a call that starts anew, as its kernels had yet to be compiled, starts its names anew."""
    from subquad.ops import launcher

    names: list[str] = []
    prepared = launcher.prepared

    def anew(call, rehearsal):
        before = len(names)

        def counted():
            del names[before:]
            return call()

        return prepared(counted, rehearsal)

    monkeypatch.setattr(launcher, "prepared", anew)
    return names
