"""The order of the suite."""

import pytest

SLOWEST = (
    "test_pipeline.py",
    "test_nothing_lost.py",
    "test_processes.py",
    "test_sharing.py",
    "test_tracking.py",
    "test_ablation.py",
    "test_loop.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: begun last, it would keep one worker busy when the other is through."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
