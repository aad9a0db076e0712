"""The model card."""

from __future__ import annotations

import pytest

from calibrate.report import of_parent


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, ""),
        ("# no front matter", ""),
        ("---\nlicense: [unclosed\n---\n", ""),
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# It\n", 'license: "apache-2.0"\n'),
        ("---\nlicense_name: 2026-01-31\n---\n", 'license_name: "2026-01-31"\n'),
        (
            "---\nlanguage:\n- en\n- de\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\n---\n",
            'license: "other"\nlicense_name: "some-licence"\nlicense_link: "LICENSE"\nlanguage: ["en", "de"]\n',
        ),
    ],
    ids=["no card", "no front matter", "no YAML", "licence", "a date", "all of them"],
)
def test_the_licence_of_the_parent_holds_for_what_is_made_of_it(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert of_parent(tmp_path) == expected
