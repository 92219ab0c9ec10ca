"""The order of the suite."""

import pytest

SLOWEST = ("test_pipeline.py", "test_nothing_lost.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: begun last, it would keep one worker busy when the other is through."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
