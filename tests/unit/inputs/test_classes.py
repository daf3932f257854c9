"""Classes from jobs, files and built-in lists, and what is wrong with them in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

from clipray.errors import ClipRayError
from clipray.inputs.classes import cifar100, imagenet, openai_templates, prompt_styles
from clipray.job import Classes, Style


def no_tokens(_text: str) -> int:
    return 0


def test_built_in_names_and_templates() -> None:
    assert len(set(cifar100())) == 100
    assert cifar100() == sorted(cifar100())
    assert len(set(imagenet())) == 1000
    assert sum(a != b for a, b in zip(imagenet(), IMAGENET_CLASSNAMES, strict=True)) == 2  # that stand twice there
    assert [t.replace("{}", "hen") for t in openai_templates()] == [f("hen") for f in OPENAI_IMAGENET_TEMPLATES]
    (style,) = prompt_styles("cifar100")
    assert style.texts(0, no_tokens, 9) == ["a photo of a apple"]
    (style,) = prompt_styles("imagenet", {"e": Style(templates="openai")})
    assert len(style.texts(5, no_tokens, 9)) == 80
    (style,) = prompt_styles(["hen"], {"own": Style(templates="photo")})
    assert all("hen" in text for text in style.texts(0, no_tokens, 9))


def test_a_file_with_a_name_a_line_and_a_yaml_list(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("red hen\n\n cock \n")
    (tmp_path / "c.yaml").write_text("- red hen\n- cock\n")
    (tmp_path / "windows.TXT").write_bytes(b"\xef\xbb\xbfred hen\r\ncock\r\n")
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbf- red hen\r\n- cock\r\n")
    (tmp_path / "c.csv").write_bytes(b"label\r\nred hen\r\ncock\r\n")
    (tmp_path / "windows.csv").write_bytes(b'\xef\xbb\xbfid,label\r\n1,"red hen"\r\n2,cock\r\n')
    for name in ("c.txt", "c.yaml", "windows.TXT", "windows.yaml", "c.csv", "windows.csv"):
        assert prompt_styles(str(tmp_path / name))[0].labels == ("red hen", "cock")


def test_a_csv_file_is_as_a_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('label,style,prompt\nhen,a,"a hen, red"\nhen,a,2\ncock,a,3\n')
    (style,) = prompt_styles(str(tmp_path / "c.csv"))
    assert (style.labels, style.texts(0, no_tokens, 9)) == (("hen", "cock"), ["a hen, red", "2"])
    (tmp_path / "c.csv").write_text("label,description\nhen,a bird\n")
    (style,) = prompt_styles(str(tmp_path / "c.csv"), ["description"])
    assert style.texts(0, no_tokens, 9) == ["a bird"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hen\ncock\n", "expected a header with one column `label`; found: hen"),
        ("", "expected a header with one column `label`"),
        ("label,label\na,b\n", "expected a header with one column `label`; found: label, label"),
        ("label,description\nhen\n", "the row of 'hen' has another number of values than the header, 2"),
        ("label\nhen,a bird\n", "the row of 'hen' has another number of values"),
        ('label\n"hen" x\n', "not valid CSV"),
        ("label\n", "names: List should have at least 1 item"),
    ],
)
def test_what_is_no_csv_of_classes(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(ClipRayError, match=message):
        prompt_styles(str(tmp_path / "c.csv"))


def test_each_style_may_have_descriptions_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "raw.yaml").write_text("hen: It lays eggs.\ncock: [It crows., It struts.]\n")
    classes = Classes(names=["hen", "cock"], descriptions={"hen": "a bird", "cock": "a bird, too"})
    raw, own = prompt_styles(
        classes,
        {
            "raw": Style(prompt="description", descriptions=str(tmp_path / "raw.yaml")),
            "own": Style(prompt="name_is_description"),
        },
    )
    assert raw.texts(1, no_tokens, 9) == ["It crows.", "It struts."]
    assert own.texts(1, no_tokens, 9) == ["cock is a bird, too"]
    assert raw.digest() != own.digest()


def test_prompts_themselves_in_parquet(tmp_path: Path) -> None:
    rows = {"label": ["hen", "hen", "cock", "hen"], "style": ["a", "a", "a", "b"], "prompt": ["1", "2", "3", "4"]}
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    a, b = prompt_styles(str(tmp_path / "p.parquet"))
    assert (a.labels, a.texts(0, no_tokens, 9), b.labels) == (("hen", "cock"), ["1", "2"], ("hen",))
    assert [s.name for s in prompt_styles(str(tmp_path / "p.parquet"), ["b"])] == ["b"]


@pytest.mark.parametrize(
    ("content", "styles", "message"),
    [
        ("names: [a, b, a]", None, r"c\.yaml: names: class 'a' stands twice; a class file has `names`"),
        ("names: [a, ' ']", None, "class 1 has an empty name"),
        ("names: []", None, "names: List should have at least 1 item"),
        ("nams: [a]", None, "c.yaml: "),
        ("names: [a]\ntemplates: [x]", None, r"templates: the template 'x' has no `\{\}`"),
        ("names: [a", None, "not valid YAML"),
        ("names: [a]\ndescriptions: {a: x, b: y}", ["description"], "style description: descriptions of no class: 'b'"),
        ("names: [a]\ndescriptions: {a: x}", ["descriptions"], "style 'descriptions': expected template, description,"),
        ({"name": ["a"]}, None, "no column 'label'; found: name"),
        ({"label": [1]}, None, "column 'label': expected strings, found int64"),
        ({"label": ["a", None]}, None, "column 'label' has 1 nulls"),
        ({"label": ["a", "a"]}, None, "class 'a' stands twice"),
        ({"label": ["a"], "style": ["s"], "prompt": ["x"]}, ["t"], "no style 't'; there are: s"),
        ({"label": ["a"], "prompt": ["x"]}, {"s": Style()}, "holds the prompts themselves"),
    ],
)
def test_what_is_no_class_file(tmp_path: Path, content: Any, styles: Any, message: str) -> None:
    path = tmp_path / ("c.yaml" if isinstance(content, str) else "c.parquet")
    if isinstance(content, str):
        path.write_text(content)
    else:
        pq.write_table(pa.table(content), path)
    with pytest.raises(ClipRayError, match=message) as caught:
        prompt_styles(str(path), styles)
    assert "\n" not in str(caught.value)
