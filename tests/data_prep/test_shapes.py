"""Which of several sizes footage is put into, how sizes are written, and clips counted by shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trfpp.data_prep.shapes import Shape, Size, counted, nearest_size, parse_size

WIDE, TALL, SMALL_WIDE, SQUARE = Size(576, 1024), Size(1024, 576), Size(320, 576), Size(768, 768)


@pytest.mark.parametrize(
    ("source", "sizes", "fit", "chosen"),
    [
        (Size(1080, 1920), [TALL, WIDE, SQUARE], "crop", WIDE),
        (Size(1920, 1080), [WIDE, TALL, SQUARE], "crop", TALL),
        (Size(1440, 1440), [WIDE, TALL, SQUARE], "crop", SQUARE),
        (Size(960, 1280), [WIDE, SQUARE], "crop", WIDE),  # 4:3 is exactly between 1:1 and 16:9, of one area: the first
        (Size(960, 1240), [WIDE, SQUARE], "crop", SQUARE),
        (Size(960, 1320), [SQUARE, WIDE], "crop", WIDE),
        (Size(1080, 1920), [SMALL_WIDE, WIDE], "crop", WIDE),  # 1.8 and 1.78 count as one ratio
        (Size(540, 960), [WIDE, SMALL_WIDE], "crop", SMALL_WIDE),  # the other one would enlarge it
        (Size(240, 400), [WIDE, SMALL_WIDE], "crop", SMALL_WIDE),  # both would
        (Size(560, 1024), [WIDE, SMALL_WIDE], "crop", SMALL_WIDE),
        (Size(560, 1024), [WIDE, SMALL_WIDE], "pad", WIDE),  # padded to 576, not enlarged
        (Size(1000, 1000), [TALL, WIDE], "crop", TALL),  # as near to both, and as large: the first
        (Size(1000, 1000), [WIDE, TALL], "crop", WIDE),
    ],
)
def test_the_nearest_aspect_then_the_largest_without_enlarging(source, sizes, fit, chosen):
    assert nearest_size(source, sizes, fit) == chosen


SIZES = st.builds(Size, st.integers(16, 2000), st.integers(16, 2000))


@given(source=SIZES, sizes=st.lists(SIZES, min_size=1, max_size=6, unique=True), factor=st.integers(1, 4))
def test_turning_everything_turns_the_choice(source, sizes, factor):
    chosen = nearest_size(source, sizes, "crop")
    turned = nearest_size(Size(*source[::-1]), [Size(*size[::-1]) for size in sizes], "crop")
    assert turned == Size(*chosen[::-1])
    if chosen.height <= source.height and chosen.width <= source.width:  # more pixels: never a smaller one
        larger = nearest_size(Size(source.height * factor, source.width * factor), sizes, "crop")
        assert larger.height * larger.width >= chosen.height * chosen.width


def test_sizes_are_written_width_first():
    assert parse_size("1024x576") == Size(height=576, width=1024)
    assert str(Size(576, 1024)) == "1024x576"
    assert str(Shape(25, 576, 1024)) == "25 frames of 1024x576"


@pytest.mark.parametrize("text", ["1024", "1024 x 576", "0x576", "1024x576x25", "-1x5", "", 1024])
def test_other_spellings_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match="write WIDTHxHEIGHT, such as 1024x576"):
        parse_size(text)


def test_most_clips_come_first_then_the_larger_shape():
    one, two, three = Shape(8, 32, 64), Shape(12, 32, 64), Shape(12, 64, 32)
    assert list(counted([one, two, three, one]).items()) == [(one, 2), (three, 1), (two, 1)]
