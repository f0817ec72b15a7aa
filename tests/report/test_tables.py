import csv
import io
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kdhiera.report.tables import (
    Table,
    comparison_table,
    long_table,
    per_class_tables,
    percent,
    result_table,
    result_tables,
    to_csv,
    to_markdown,
    to_text,
)
from kdhiera.results import ClassCount, Comparison, Interval, Measure, PerClass, Result


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
    assert row["std"] == row["top5"] == row["labels_per_class"] == ""


def test_fewer_labels_top5_and_seeds_are_shown_where_there_are_any():
    fewer = replace(RESULTS[0], labels_per_class=5, num_seeds=3, std=0.012)
    whole = replace(RESULTS[0], top5=Interval(value=0.9, low=0.8, high=1.0))
    assert to_text(result_table([whole, fewer])) == (
        "features  readout  method  labels                        category   top-5\n"
        "--------  -------  ------  ---------  ---------------------------  ------\n"
        "student   mean     k-NN    all              60.0 % (53.0 to 67.0)  90.0 %\n"
        "student   mean     k-NN    5 a class  60.0 ± 1.2 % (53.0 to 67.0)\n"
        "chance                                                     16.7 %\n"
    )


def test_labels_share_a_table_while_they_fit():
    labels = ("category", "direction", "colour", "size")
    results = [_result("student", "k-NN", label, 0.5) for label in labels]
    tables = result_tables(results, width=100)
    assert [table.headers[3:] for table in tables] == [labels[:3], labels[3:]]
    assert all(len(line) <= 100 for t in tables for line in to_text(t).splitlines())
    narrow = result_tables(results, width=10)
    assert [table.headers[3:] for table in narrow] == [(label,) for label in labels]


def _per_class(features, method, readout, counts, **changes):
    measure = Measure(
        label="category", features=features, readout=readout, method=method, labels_per_class=None
    )
    return PerClass(
        measure=replace(measure, **changes),
        num_seeds=2,
        classes=tuple(ClassCount(name=n, correct=c, total=t) for n, c, t in counts),
    )


def _compared(method, readout):
    return Comparison(
        label="category", features="student", baseline="random", readout=readout, method=method,
        difference=Interval(value=0, low=0, high=0), num_clips=9,
    )  # fmt: skip


def test_classes_of_the_main_measures_stand_side_by_side():
    tables = [
        _per_class("student", "k-NN", "mean", [("cat", 1, 4), ("dog", 2, 4)]),
        _per_class("student", "linear probe", "slots", [("cat", 3, 4), ("dog", 4, 8)]),
        _per_class("student", "linear probe", "slots", [("cat", 0, 4)], labels_per_class=5),
        _per_class("random", "linear probe", "slots", [("cat", 0, 4), ("dog", 2, 8)]),
    ]
    compared = [_compared("k-NN", "mean"), _compared("linear probe", "slots")]
    ((title, table),) = per_class_tables(tables, compared)
    assert title == "category, linear probe (slots), class by class:"
    assert table.headers == ("category", "clips", "student", "random")
    assert table.rows == (("cat", "2", "75.0 %", "0.0 %"), ("dog", "4", "50.0 %", "25.0 %"))
    ((title, _),) = per_class_tables(tables[:1], compared[:1])
    assert title.startswith("category, k-NN (mean)")


def test_of_many_classes_the_worst_are_shown():
    counts = [(f"c{i}", i * 7 % 30, 30) for i in range(30)]
    tables = [_per_class("student", "fine-tuning", "mean", counts)]
    ((title, table),) = per_class_tables(tables, [_compared("fine-tuning", "mean")])
    assert title.endswith("the worst 20 of 30:")
    assert [row[0] for row in table.rows] == [n for n, *_ in sorted(counts, key=lambda c: c[1])][
        :20
    ]
