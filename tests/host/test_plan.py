"""csrc/lora/plan.h: how a problem is cut up, for any number of features."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

features = st.sampled_from([0, 1, 63, 64, 65, 1023, 1024, 1025, 4096, 11008, 2**31, 2**40]) | st.integers(0, 2**40)
NARROWEST, WIDEST = 128, 256


def panels(features: int, width: int) -> int:
    return -(-features // width)


@given(features)
def test_gradient_panel(features):
    """Whole cache lines, and the narrowest width that makes at most 16 panels, within the bounds."""
    width = _C.lora_gradient_panel(features)
    assert width % 64 == 0 and NARROWEST <= width <= WIDEST
    assert panels(features, width) <= 16 or width == WIDEST
    assert panels(features, width - 64) > 16 or width == NARROWEST


@given(features, features)
def test_gradient_panel_grows_with_the_features(a, b):
    assert _C.lora_gradient_panel(min(a, b)) <= _C.lora_gradient_panel(max(a, b))
