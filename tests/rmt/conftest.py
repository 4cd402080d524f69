"""Fixtures of the tests of the Marchenko-Pastur module."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine the threads of an eigenvalue solver wait for one another: 5 s instead of 1 ms was observed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def randn():
    """``torch.randn`` from a seeded generator."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)
