"""Sizes of memory in words, and what a recipe's limit comes to on a device."""

from __future__ import annotations

import pytest

from understudy.recipe.sizes import bytes_of, limited_bytes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("2GB", 2 * 10**9),
        ("512mib", 2**29),
        (" 1.5 TiB ", 3 * 2**39),
        ("7", 7),
        ("x", None),
        ("", None),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, size: int | None) -> None:
    assert bytes_of(text) == size


def test_a_limit_is_a_size_or_a_fraction_of_the_device() -> None:
    assert limited_bytes("2GiB", 80 * 2**30) == 2**31
    assert limited_bytes("2GiB", 0) == 2**31
    assert limited_bytes(0.5, 2**31) == 2**30
    assert limited_bytes(0.5, 0) is None
    assert limited_bytes(None, 2**31) is None
