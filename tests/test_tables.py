"""The one table writer."""

from dpfast import tables


def test_cells_stay_as_they_are_and_columns_line_up():
    """Figures are texts: no zero is dropped, and no version number is taken for one."""
    head, rule, *rows = tables.plain([("1.10", "a"), ("2e-05", "long")], ("first", "second")).splitlines()
    assert [line.split() for line in (head, *rows)] == [["first", "second"], ["1.10", "a"], ["2e-05", "long"]]
    assert head.index("second") == rows[0].index("a") == rows[1].index("long") and set(rule) == {"-", " "}
    assert tables.plain([("a", "b"), ("cc", "d")]) == "a   b\ncc  d"


def test_markdown():
    lines = tables.markdown(["a", "b|c"], [["1.0", "x | y"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].strip("|-") == ""
    assert lines[2].replace(" ", "") == r"|1.0|x\|y|"


def test_nothing_to_show():
    assert tables.markdown(["a"], []).splitlines()[0].replace(" ", "") == "|a|" and tables.plain([]) == ""
