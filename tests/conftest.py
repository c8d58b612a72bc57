"""Fixtures that several test files share."""
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared" / "data"


@pytest.fixture
def shared_data():
    if not SHARED.is_dir(): pytest.skip("the real recordings (../shared/data) are not on this machine")
    return SHARED
