import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from kdhiera.report.tables import (
    Table,
    comparison_table,
    long_table,
    percent,
    result_table,
    to_csv,
    to_markdown,
    to_text,
)
from kdhiera.results import Comparison, Interval, Result


def _result(features, method, label, value):
    return Result(
        label=label,
        features=features,
        readout="mean",
        method=method,
        accuracy=Interval(value=value, low=value - 0.07, high=value + 0.07),
        chance=1 / 6 if label == "category" else 0.25,
        num_clips=360,
    )


RESULTS = (
    _result("student", "k-NN", "category", 0.6),
    _result("student", "k-NN", "direction", 0.7),
    _result("student", "linear probe", "category", 0.65),
    _result("teacher", "k-NN", "category", 0.8),
)


def test_results_down_labels_across():
    assert to_text(result_table(RESULTS)) == (
        "features  readout  method                     category              direction\n"
        "--------  -------  ------------  ---------------------  ---------------------\n"
        "student   mean     k-NN          60.0 % (53.0 to 67.0)  70.0 % (63.0 to 77.0)\n"
        "student   mean     linear probe  65.0 % (58.0 to 72.0)\n"
        "teacher   mean     k-NN          80.0 % (73.0 to 87.0)\n"
        "chance                                          16.7 %                 25.0 %\n"
    )


def test_markdown():
    table = Table(headers=("a|b", "n"), rows=(("x*\ny", "1"),), numeric=frozenset({1}))
    assert to_markdown(table) == "| a\\|b | n |\n| --- | ---: |\n| x\\*\\\\ny | 1 |\n"


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=5))
def test_no_cell_breaks_a_line(rows):
    table = Table(headers=("a", "b"), rows=tuple(rows))
    for text in (to_markdown(table), to_text(table)):
        assert len(text.splitlines()) == len(rows) + 2
        assert "\x1b" not in text


@given(
    st.lists(
        st.tuples(*(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=12),) * 2),
        max_size=5,
    )
)
def test_csv_reads_back(rows):
    table = Table(headers=("a", "b"), rows=tuple(rows))
    read = list(csv.reader(io.StringIO(to_csv(table), newline="")))
    assert read == [["a", "b"], *map(list, rows)]


def test_wide_letters_take_two_columns():
    table = Table(headers=("name", "n"), rows=(("動画", "1"), ("ab", "22")))
    assert to_text(table).splitlines()[2:] == ["動画  1", "ab    22"]


def test_differences_carry_their_sign():
    interval = Interval(value=0.051, low=-0.02, high=0.11)
    assert percent(interval, signed=True) == "+5.1 points (-2.0 to +11.0)"
    comparison = Comparison(
        label="category",
        features="student",
        baseline="random weights",
        readout="mean",
        method="k-NN",
        difference=interval,
        num_clips=360,
    )
    row = ("category", "student", "random weights", "mean", "k-NN", "+5.1 points (-2.0 to +11.0)")
    assert comparison_table([comparison]).rows == (row,)


def test_the_long_table_keeps_every_digit():
    (row,) = csv.DictReader(
        io.StringIO(to_csv(long_table([_result("s", "k-NN", "category", 1 / 3)])))
    )
    assert float(row["accuracy"]) == 1 / 3
    assert float(row["low"]) == 1 / 3 - 0.07
    assert float(row["chance"]) == 1 / 6
    assert row["num_clips"] == "360"
