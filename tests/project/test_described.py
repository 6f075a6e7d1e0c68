"""docs/design.md says of the ops what their descriptions say."""

from tests.project.described import DESIGN, rewritten


def test_the_tables_are_those_of_the_descriptions():
    text = DESIGN.read_text()
    assert text == rewritten(text), "python -m tests.project.described rewrites them"
