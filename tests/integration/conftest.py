"""No picture is drawn where no test looks at it."""

import pytest

from tests.conftest import draw_nothing


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        draw_nothing(monkeypatch)
