from __future__ import annotations

import pytest

from lading.box import Box


def test_a_box_of_whole_rows_is_one_run() -> None:
    assert list(Box((2, 0, 0), (3, 4, 5)).runs((8, 4, 5))) == [(40, 60)]


def test_a_box_of_columns_is_a_run_per_row() -> None:
    assert list(Box((1, 2), (2, 3)).runs((4, 8))) == [(10, 3), (18, 3)]


def test_a_scalar_is_one_element() -> None:
    box = Box.whole(())
    assert box.numel == 1
    assert list(box.runs(())) == [(0, 1)]
    assert box.covers(())


def test_an_empty_box_has_no_runs() -> None:
    assert list(Box((0, 0), (0, 3)).runs((4, 3))) == []
    assert list(Box.whole((0, 3)).runs((0, 3))) == []


def test_boxes_that_only_touch_share_nothing() -> None:
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None


@pytest.mark.parametrize(("starts", "sizes"), [((0,), (1, 2)), ((-1,), (1,)), ((0,), (-1,))])
def test_nonsense_is_refused(starts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        Box(starts, sizes)
