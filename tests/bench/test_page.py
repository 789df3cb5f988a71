"""No figure of the benchmarks is typed: README and docs/benchmarks.md are what ``python -m bench.page`` writes."""

import re

from bench import page


def test_the_page_is_what_the_records_say():
    assert page.PAGE.read_text() == page.page(), "run python -m bench.page"


def test_readme_has_the_table_of_the_record():
    text = page.README.read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1
    assert text == page.readme(text), "run python -m bench.page"


def test_every_record_is_on_the_page_with_its_command_machine_and_date():
    text = page.PAGE.read_text()
    for path, data in page.records():
        assert path.name in text
        assert data["configuration"]["command"] in text
        assert data["machine"]["cpu"] in text and data["machine"]["date"][:10] in text
    assert {path for path, _ in page.records()} == {*page.RECORDS.glob("*.json")}


def test_readme_has_no_figure_beside_those_of_its_tables():
    """Ratios have two decimal places; the versions and arguments that README names have one."""
    outside = re.sub(r"<!-- from (.*?)<!-- end.*?-->", "", page.README.read_text(), flags=re.S)
    assert not re.findall(r"(?<!Python )(?<!torch )\b\d+\.\d\d|\d ?×", outside)


def test_readme_has_the_fine_tune_of_the_page_on_the_papers():
    """The page is what the reproduction printed; README takes its table and what it cost to have it."""
    _, _, rest = page.README.read_text().partition("<!-- from reproduce finetune -->")
    shown = [line for line in rest.partition("<!-- end of finetune -->")[0].splitlines() if line.startswith("|")]
    _, _, report = (page.PAGE.parent / "papers.md").read_text().partition("<!-- from reproduce finetune -->")
    assert len(shown) == 6 and "\n".join(shown) in report
