from pathlib import Path

import pytest

from s2s_jax.data.items.titles import read_titles
from s2s_jax.errors import UserError

TITLES = {"1": "Café, the “first”", "2": "Naïve; or not"}
WINDOWS = {"1": "Café…", "2": "Two"}


@pytest.mark.parametrize(
    ("name", "text", "encoding", "expected"),
    [
        (
            "u.item",
            "1|Café|01-Jan-1995||x\n2|Two|01-Jan-1995||x\n",
            "latin-1",
            {"1": "Café", "2": "Two"},
        ),
        ("excel.csv", "id;title\r\n1;Café…\r\n2;Two\r\n", "cp1252", WINDOWS),
        (
            "unicode.txt",
            'id\ttitle\r\n1\t"Café, the “first”"\r\n2\tNaïve; or not\r\n',
            "utf-16",
            TITLES,
        ),
        ("big.txt", "1\tCafé…\r\n2\tTwo\r\n", "utf-16-be-mark", WINDOWS),
        ("a.csv", '1,"Café, the “first”"\n2,Naïve; or not\n', "utf-8-sig", TITLES),
        ("b.csv", '"1";"Café, the “first”"\n2;"Naïve; or not"\n', "utf-8", TITLES),
        ("movies.dat", "1::Café…::x\n2::Two::y\n", "cp1252", WINDOWS),
        ("lines.dat", "1::a\x85b\u2028c\x0bd::x\n", "utf-8", {"1": "a\x85b\u2028c\x0bd"}),
        ("odd.csv", "1,\x81é\n", "latin-1", {"1": "\x81é"}),
        ("quoted.csv", '1,"two\nlines"\n2,x\n', "utf-8", {"1": "two\nlines", "2": "x"}),
    ],
)
def test_titles_of_many_programs(tmp_path, name, text, encoding, expected):
    path: Path = tmp_path / name
    mark = encoding.endswith("-mark")
    path.write_bytes(b"\xfe\xff" * mark + text.encode(encoding.removesuffix("-mark")))
    found = read_titles(path)
    assert {item: found[item] for item in expected} == expected
    assert found.keys() - expected.keys() <= {"id"}


def test_a_file_without_titles(tmp_path):
    (tmp_path / "a.csv").write_text("1\n2\n")
    with pytest.raises(UserError, match="line 1: expected an item's id and its title"):
        read_titles(tmp_path / "a.csv")
