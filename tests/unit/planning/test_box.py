from __future__ import annotations

import pytest

from lading.planning.box import Box


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


@pytest.mark.parametrize(("starts", "sizes"), [((0,), (1, 2)), ((-1,), (1,)), ((0,), (-1,))])
def test_nonsense_is_refused(starts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        Box(starts, sizes)


def test_columns_of_a_matrix_are_one_group_of_rows() -> None:
    assert list(Box((1, 2), (3, 4)).rows((8, 10))) == [(12, 10, 4, 3)]


def test_dims_that_are_whole_join_the_group() -> None:
    assert list(Box((0, 0, 1), (2, 3, 2)).rows((2, 3, 4))) == [(1, 4, 2, 6)]
    assert list(Box((1, 0, 1), (1, 3, 2)).rows((2, 3, 4))) == [(13, 4, 2, 3)]
    assert list(Box((0, 2, 0), (2, 1, 4)).rows((2, 3, 4))) == [(8, 12, 4, 2)]


def test_other_dims_make_a_group_each() -> None:
    assert list(Box((0, 1, 1), (2, 2, 2)).rows((2, 4, 4))) == [(5, 4, 2, 2), (21, 4, 2, 2)]


def test_one_run_is_a_group_of_one() -> None:
    assert list(Box((2, 0), (3, 5)).rows((8, 5))) == [(10, 15, 15, 1)]
    assert list(Box.whole(()).rows(())) == [(0, 1, 1, 1)]
