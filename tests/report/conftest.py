from pathlib import Path

import pytest
from report_results import Results, make_results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return make_results(tmp_path)
