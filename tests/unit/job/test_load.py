"""Job files: every mistake in one readable line with its place; what changes a table's identity and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipray.errors import JobError
from clipray.job import STEPS, EmbedImages, Job, Model
from clipray.job.load import changes, dump_job, fingerprint, load_job, parse_job, step_kind, steps_of

GOOD = """\
name: hens
output: runs/hens
model:
  name: RN50
  pretrained: openai
steps:
  - embed_images:
      manifest: hens.parquet
      features:
        clip:
          layer: output
"""
LAST = GOOD.count("\n")  # GOOD's last line; what a test appends stands below it


def mistakes(text: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(text, "j.yaml")
    return str(caught.value).splitlines()


def with_setting(line: str) -> str:
    return f"{GOOD}      {line}\n"


def test_a_good_job() -> None:
    job = parse_job(GOOD)
    assert job.model == Model(name="RN50", pretrained="openai")
    (step,) = steps_of(job)
    assert step.manifest == "hens.parquet"
    assert step.features["clip"].layer == "output"
    assert step_kind(step) == "embed_images"


def test_a_relative_output_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/hen")
    outputs = {
        "runs/hens": f"{tmp_path}/runs/hens",
        "./runs/../hens/": f"{tmp_path}/hens",
        "/somewhere": "/somewhere",
        "~/runs": "/home/hen/runs",
        "file:///somewhere/": "/somewhere",
        "s3://bucket/runs": "s3://bucket/runs",
    }
    for given, expected in outputs.items():
        assert parse_job(GOOD.replace("runs/hens", given)).output == expected


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nothing\.yaml: no such job file"):
        load_job(str(tmp_path / "nothing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot be read"):
        load_job(str(tmp_path / "binary.yaml"))
    with pytest.raises(JobError, match="cannot be read"):
        load_job(str(tmp_path))
    with pytest.raises(JobError, match="cannot be opened"):
        load_job("nosuchscheme://a/job.yaml")


def test_a_dumped_job_is_read_back(tmp_path: Path) -> None:
    values = {
        "name": "hüte",
        "output": str(tmp_path),
        "model": {"name": "ViT-B-32", "pretrained": "random", "seed": 1},
        "steps": [{"embed_images": {"manifest": "m.parquet", "keep": ["label"], "actors": [1, 2]}}],
    }
    (tmp_path / "job.yaml").write_bytes(dump_job(values))
    job = load_job(str(tmp_path / "job.yaml"))
    assert job == Job(**values)
    assert steps_of(job)[0].actors == (1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("outptu: a\n" + GOOD, "j.yaml:1: outptu: unknown key; did you mean `output`?"),
        (
            GOOD.replace("  name: RN50", "  name: RN50\n  pretraned: x"),
            "j.yaml:5: model.pretraned: unknown key; did you mean `pretrained`?",
        ),
        (
            with_setting("rows_per_fil: 3"),
            f"j.yaml:{LAST + 1}: steps[0].embed_images.rows_per_fil: unknown key; did you mean `rows_per_file`?",
        ),
        (
            GOOD.replace("layer: output", "layer: output\n          layr: x"),
            f"j.yaml:{LAST + 1}: steps[0].embed_images.features.clip.layr: unknown key; did you mean `layer`?",
        ),
        (
            GOOD.replace("  - embed_images:", "  - embed_image:"),
            "j.yaml:7: unknown step 'embed_image'; did you mean `embed_images`?",
        ),
        (GOOD.replace("  - embed_images:", "  - 1:"), f"j.yaml:7: unknown step 1; known: {', '.join(STEPS)}"),
        (
            "xyzzy: a\n" + GOOD,
            "j.yaml:1: xyzzy: unknown key; known: name, output, model, address, steps",
        ),
    ],
)
def test_an_unknown_key_with_the_nearest_known_one(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("actors: many", "actors: expected 'auto', an integer >= 1 or [min, max], found 'many'"),
        ("actors: 0", "actors: expected 'auto', an integer >= 1 or [min, max], found 0"),
        ("actors: [1, 2, 3]", "actors: expected 'auto', an integer >= 1 or [min, max], found [1, 2, 3]"),
        ("actors: [0, x]", "actors: expected 'auto', an integer >= 1 or [min, max], found [0, 'x']"),
        ("actors: {a: 1}", "actors: expected 'auto', an integer >= 1 or [min, max], found {'a': 1}"),
        ("actors:", "actors: expected 'auto', an integer >= 1 or [min, max], found nothing"),
        ("actors: [3, 1]", "actors: [min, max] with min=3 > max=1, found [3, 1]"),
        ("gpus_per_actor: -1", "gpus_per_actor: expected 'auto' or a number >= 0, found -1"),
        ("cpus_per_actor: 0", "cpus_per_actor: expected 'auto' or a number > 0, found 0"),
        ("batch_size: big", "batch_size: expected 'auto' or an integer >= 1, found 'big'"),
        ("decode_in: threads", "decode_in: expected 'auto', 'tasks' or 'actors', found 'threads'"),
        ("decode: quick", "decode: expected 'exact' or 'fast', found 'quick'"),
        ("max_reject_rate: 2", "max_reject_rate: expected less than or equal to 1, found 2"),
        ("max_bytes: 0", "max_bytes: expected greater than or equal to 1, found 0"),
        ("max_bytes: much", "max_bytes: expected an integer, found 'much'"),
        ("rows_per_file: 1.5", "rows_per_file: expected an integer, found 1.5"),
        ("fetch_timeout_s: soon", "fetch_timeout_s: expected a number, found 'soon'"),
        (
            'user_agent: "a\\r\\nb: c"',
            "user_agent: expected printable ASCII, such as mybot/1.0 (+https://example.org/bot), found 'a\\r\\nb: c'",
        ),
        ("connections_per_host: 0", "connections_per_host: expected greater than or equal to 1, found 0"),
        (
            "disallowed_header_directives: [no-ai]",
            "disallowed_header_directives[0]: expected 'noai', 'noimageai', 'noindex' or 'noimageindex', found 'no-ai'",
        ),
        ("keep: label", "keep: expected a list, found 'label'"),
        ("keep: [1]", "keep[0]: expected a string, found 1"),
        ("schemes: s3", "schemes: expected a list, found 's3'"),
        ("name: a/b", "name: String should match pattern '^[A-Za-z][A-Za-z0-9_-]*$', found 'a/b'"),
    ],
)
def test_a_wrong_value_is_one_line_with_expected_and_found(setting: str, expected: str) -> None:
    assert mistakes(with_setting(setting)) == [f"j.yaml:{LAST + 1}: steps[0].embed_images.{expected}"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            "5",
            "manifest: expected a string, a list of strings or a mapping of `path`, `tars`, `columns`, `image`, found 5",
        ),
        (
            "[a, 5]",
            "manifest: expected a string, a list of strings or a mapping of `path`, `tars`, `columns`, `image`, found ['a', 5]",
        ),
        ("{uri: URL}", "manifest: expected `path`, of Parquet, or `tars`"),
        ("{path: m, tars: t}", "manifest: expected `path`, of Parquet, or `tars`"),
        ("{path: m, image: jpg}", "manifest: `image` goes with `tars`"),
        ("{path: m, columns: [a]}", "manifest: `columns` goes with `tars`"),
        ("{tars: t, columns: [uri]}", "manifest: the column name 'uri' is taken: drop it from `columns`"),
        (
            "{tars: t, image: a/b}",
            "manifest.image: expected what follows the first dot in a file's name, such as txt or seg.png, found 'a/b'",
        ),
        ("{path: m, uri: 5}", "manifest.uri: expected a string or a mapping of `from`, found 5"),
        ("{path: m, image_id: {from: rows}}", "manifest.image_id.from: expected 'row' or 'content', found 'rows'"),
        ("{path: m, image_id: {from: row, of: a}}", "manifest.image_id.of: unknown key; known: from"),
    ],
)
def test_a_wrong_manifest(value: str, expected: str) -> None:
    assert mistakes(GOOD.replace("hens.parquet", value)) == [f"j.yaml:8: steps[0].embed_images.{expected}"]


def test_a_long_value_is_cut() -> None:
    (line,) = mistakes(with_setting(f"actors: {'many' * 100}"))
    assert line.endswith("…")
    assert len(line) < 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "j.yaml: expected a mapping with `output`, `model` and `steps`, found NoneType"),
        ("- a\n", "j.yaml: expected a mapping with `output`, `model` and `steps`, found list"),
        ("a: b: c\n", "j.yaml:1: not valid YAML: mapping values are not allowed in this context"),
        ("a: 1\nb: [1,\n", "j.yaml:3: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "j.yaml:2: not valid YAML: "),
        ("a: &a [*a]\n", "j.yaml: not valid YAML: an alias that holds itself"),
        ("? [a]\n: b\n", "j.yaml:1: not valid YAML: found unhashable key"),
        ("a: 2001-99-99\n", "j.yaml: not valid YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [x]\n", "j.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: \0\n", "j.yaml: not valid YAML: unacceptable character #x0000"),
    ],
)
def test_text_that_is_no_job(text: str, expected: str) -> None:
    (line,) = mistakes(text)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("output: runs/hens", "output: 5", "j.yaml:2: output: expected a string, found 5"),
        ("output: runs/hens\n", "", "j.yaml:1: output: is missing"),
        ("  name: RN50\n", "", "j.yaml:3: model.name: is missing"),
        ("      manifest: hens.parquet\n", "", "j.yaml:7: steps[0].embed_images.manifest: is missing"),
        ("pretrained: openai", "seed: 1", "j.yaml:3: model: `seed` goes with `pretrained: random` only"),
        ("pretrained: openai", "pretrained: random", "j.yaml:3: model: `pretrained: random` needs a `seed`"),
        ("layer: output", "layer: stem", "j.yaml:10: steps[0].embed_images.features.clip: layer 'stem' is a map: it needs `pooling`: mac, spoc, gem or rmac"),
        ("          layer: output\n", "", "j.yaml:10: steps[0].embed_images.features.clip: expected a mapping, found nothing"),
        ("clip:", "uri:", "j.yaml:7: steps[0].embed_images: the column name 'uri' is taken"),
    ],
)  # fmt: skip
def test_a_mistake_elsewhere(before: str, after: str, expected: str) -> None:
    assert GOOD.count(before) == 1
    (line,) = mistakes(GOOD.replace(before, after))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("embed_images", "a step is one name and its settings, `- embed_images: {...}`; found 'embed_images'"),
        ("{}", "a step is one name and its settings, `- embed_images: {...}`; found {}"),
        ("embed_images: 3", "embed_images needs settings as a mapping, found 3"),
        ("embed_images: [a]", "embed_images needs settings as a mapping, found ['a']"),
    ],
)
def test_a_step_that_is_none(step: str, expected: str) -> None:
    assert mistakes(f"{GOOD}  - {step}\n") == [f"j.yaml:{LAST + 1}: {expected}"]


def test_a_step_without_settings_lacks_its_manifest() -> None:
    assert mistakes(f"{GOOD}  - embed_images:\n") == [
        f"j.yaml:{LAST + 1}: steps[1].embed_images.manifest: is missing"
    ]  # fmt: skip


def test_two_steps_may_not_write_one_table() -> None:
    second = "  - embed_images: {manifest: other.parquet%s}\n"
    assert mistakes(GOOD + second % "") == ["j.yaml: two steps write a table 'images': give one another `name`"]
    assert [step.name for step in steps_of(parse_job(GOOD + second % ", name: others"))] == ["images", "others"]


@pytest.mark.parametrize("name", ["metrics", "rejects", "Rejects"])
def test_names_of_our_own_folders_are_taken(name: str) -> None:
    assert mistakes(f"{GOOD}  - embed_images: {{manifest: m, name: {name}}}\n") == [
        f"j.yaml: a step writes a table {name!r}, whose place is taken by clipray's own: give it another `name`"
    ]


def test_two_tables_that_differ_in_case_only() -> None:
    assert mistakes(f"{GOOD}  - embed_images: {{manifest: m, name: Images}}\n") == [
        "j.yaml: tables 'Images' and 'images' are the same to file systems that ignore case: rename one"
    ]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\\\b", "..", "", " ", "a\\nb", "a\\u001b[31m"])
def test_a_feature_that_names_no_column(name: str) -> None:
    (mistake,) = mistakes(f'{GOOD}  - embed_images: {{manifest: m, name: x, features: {{"{name}": {{}}}}}}\n')
    assert "names no column: expected a name without slashes and control characters" in mistake
    assert "\x1b" not in mistake


@pytest.mark.parametrize("name", ["conv-1", "conv.1", "ü x", "名前"])
def test_a_feature_may_have_any_other_name(name: str) -> None:
    job = parse_job(f'{GOOD}  - embed_images: {{manifest: m, name: x, features: {{"{name}": {{}}}}}}\n')
    assert list(steps_of(job)[1].features) == [name]  # type: ignore[attr-defined]


def test_a_key_that_appears_twice() -> None:
    assert mistakes(GOOD + "output: b\n") == [f"j.yaml:{LAST + 1}: key 'output' appears twice"]
    assert mistakes(with_setting("manifest: b")) == [
        f"j.yaml:{LAST + 1}: key 'steps[0].embed_images.manifest' appears twice"
    ]  # fmt: skip
    quoted = GOOD.replace("  pretrained: openai", "  'name': RN101\n  pretrained: openai")
    assert mistakes(quoted) == ["j.yaml:5: key 'model.name' appears twice"]


def test_several_mistakes_are_told_at_once() -> None:
    text = """\
nam: hens
output: 5
model: {name: RN50, precision: fp64}
steps:
  - embed_images:
      manifest: a.parquet
      actors: many
      features: {clip: {layr: output}}
  - embed_image: {}
"""
    assert mistakes(text) == [
        "j.yaml:2: output: expected a string, found 5",
        "j.yaml:3: model.precision: expected 'auto', 'fp32', 'bf16' or 'fp16', found 'fp64'",
        "j.yaml:1: nam: unknown key; did you mean `name`?",
        "j.yaml:7: steps[0].embed_images.actors: expected 'auto', an integer >= 1 or [min, max], found 'many'",
        "j.yaml:8: steps[0].embed_images.features.clip.layr: unknown key; did you mean `layer`?",
        "j.yaml:9: unknown step 'embed_image'; did you mean `embed_images`?",
    ]


def test_the_line_is_that_of_the_file_with_comments_and_anchors() -> None:
    text = GOOD.replace("name: hens\n", "# a job\n\nname: hens  # its name\n") + "      actors: &n many\n"
    assert mistakes(text)[0].startswith(f"j.yaml:{LAST + 3}: steps[0].embed_images.actors:")
    merged = GOOD.replace("      manifest: hens.parquet", "      <<: {actors: many}\n      manifest: hens.parquet")
    assert mistakes(merged) == [
        "j.yaml:7: steps[0].embed_images.actors: expected 'auto', an integer >= 1 or [min, max], found 'many'"
    ]


# --- identity

BASE = {"manifest": "a.parquet"}
EXECUTION = {
    "manifest": ["b.parquet"], "max_bytes": 9, "max_pixels": 9, "fetch_timeout_s": 9, "schemes": ["s3"],
    "max_reject_rate": 0.5, "actors": [1, 2], "gpus_per_actor": 0.5, "cpus_per_actor": 2, "decode_in": "tasks",
    "batch_size": 7, "rows_per_block": 7, "rows_per_file": 7, "flush_s": 7, "name": "others", "encode_on": {"tier": "gpu"},
    "decode_on": {"tier": "cpu"}, "device": "cpu", "check_sources": "size_mtime",
    "user_agent": "mybot/1.0", "connections_per_host": 2, "disallowed_header_directives": ["noai"],
    "model": {"name": "RN50"},
}  # fmt: skip
DECIDING = {
    "features": {"other": {}}, "keep": ["label"], "decode": "fast", "normalize": "none",
    "vector_type": "float16", "preprocess": "keep_aspect", "regions_name": "parts",
}  # fmt: skip


def test_every_setting_is_known_to_these_tests() -> None:
    assert EXECUTION.keys() | DECIDING.keys() | {"long_side_px"} == EmbedImages.model_fields.keys()


@pytest.mark.parametrize("setting", EXECUTION)
def test_how_a_step_runs_is_no_part_of_its_identity(setting: str) -> None:
    other = EmbedImages(**{**BASE, setting: EXECUTION[setting]})
    assert other != EmbedImages(**BASE)
    assert fingerprint(other.identity()) == fingerprint(EmbedImages(**BASE).identity())


@pytest.mark.parametrize("setting", DECIDING)
def test_what_a_step_writes_is_its_identity(setting: str) -> None:
    other = EmbedImages(**{**BASE, setting: DECIDING[setting]})
    assert fingerprint(other.identity()) != fingerprint(EmbedImages(**BASE).identity())


def test_the_fingerprint_is_of_values_not_of_their_order() -> None:
    assert fingerprint({"a": 1, "b": {"c": [1, 2], "d": "ü"}}) == fingerprint({"b": {"d": "ü", "c": [1, 2]}, "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint({"a": "1"}) != fingerprint({"a": 1})
    # sha256 of the text {"a":1}, so that tables of earlier versions stay valid
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2d"


def test_changes_are_phrases() -> None:
    before = {"model": {"name": "RN50", "seed": 1}, "keep": [], "decode": "exact"}
    now = {"model": {"name": "ViT-B-32"}, "keep": ["label"], "decode": "exact", "vector_type": "float16"}
    assert changes(before, now) == [
        "keep was [], is ['label']",
        "model.name was 'RN50', is 'ViT-B-32'",
        "model.seed was 1, is 'not set'",
        "vector_type was 'not set', is 'float16'",
    ]
    assert changes(before, before) == []


# --- features and regions


FEATURES = """\
output: runs/hens
model: {name: RN50, pretrained: openai}
steps:
  - embed_images:
      manifest: hens.parquet
      features:
        clip: {}
        conv: %s
"""


def with_feature(settings: str, more: str = "") -> str:
    return FEATURES % settings + more


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{layer: stem, pooling: mac, levels: 0}", ".levels: expected greater than or equal to 1, found 0"),
        ("{layer: stem, pooling: rmac, levels: two}", ".levels: expected an integer, found 'two'"),
        ("{layer: stem, pooling: rmac, levels: 17}", ".levels: expected less than or equal to 16, found 17"),
        ("{layer: stem, pooling: rmac, overlap: 1}", ".overlap: expected less than 1, found 1"),
        ("{layer: stem, pooling: gem, p: 0}", ".p: expected greater than 0, found 0"),
        ("{layer: stem, pooling: max}", ".pooling: expected 'mac', 'spoc', 'gem' or 'rmac', found 'max'"),
        ("{layer: stem, pooling: mac, l2_before: 7}", ".l2_before: expected true or false, found 7"),
        ("{layer: stem, pooling: mac, l2_after: often}", ".l2_after: expected true or false, found 'often'"),
        ("{layer: stem, pooling: mac, regions: box}", ".regions: expected true, false, 'grid' or 'boxes', found 'box'"),
        ("{layer: stem, pooling: mac, regions: [1]}", ".regions: expected true, false, 'grid' or 'boxes', found [1]"),
        ("{layer: stem, pooling: mac, level: 2}", ".level: unknown key; did you mean `levels`?"),
        ("{layer: stem}", ": layer 'stem' is a map: it needs `pooling`: mac, spoc, gem or rmac"),
        ("{pooling: mac}", ": layer 'output' is one vector, no map: it has no `pooling` and no `regions`; `clipray layers MODEL` lists the maps"),
        ("{regions: true}", ": layer 'output' is one vector, no map: it has no `pooling` and no `regions`; `clipray layers MODEL` lists the maps"),
    ],
)  # fmt: skip
def test_a_wrong_feature_is_one_line_with_its_place(settings: str, expected: str) -> None:
    assert mistakes(with_feature(settings)) == [f"j.yaml:8: steps[0].embed_images.features.conv{expected}"]


LOCAL = "{layer: stem, pooling: mac, regions: true}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            with_feature(LOCAL, "        other: {layer: conv1, pooling: mac, regions: grid}\n"),
            "j.yaml:4: steps[0].embed_images: one feature of a step can write regions, found conv, other: put the other in a second embed_images step",
        ),
        (
            with_feature(LOCAL, "      regions_name: images\n"),
            "j.yaml:4: steps[0].embed_images: `name` and `regions_name` are both 'images': the tables need two names",
        ),
        (
            with_feature(LOCAL, "      name: regions\n"),
            "j.yaml:4: steps[0].embed_images: `name` and `regions_name` are both 'regions': the tables need two names",
        ),
        (
            with_feature(LOCAL).replace("conv:", "regions:"),
            "j.yaml:4: steps[0].embed_images: the column name 'regions' is taken: rename the feature or drop it from `keep`",
        ),
        (
            with_feature(LOCAL).replace("conv:", "scale:"),
            "j.yaml:4: steps[0].embed_images: the column name 'scale' is taken in the regions table: rename the feature",
        ),
        (
            with_feature("{}", "      long_side_px: 96\n"),
            "j.yaml:4: steps[0].embed_images: `long_side_px` goes with `preprocess: keep_aspect`",
        ),
        (
            with_feature("{}", "      preprocess: keep_aspect\n      long_side_px: 0\n"),
            "j.yaml:10: steps[0].embed_images.long_side_px: expected greater than or equal to 1, found 0",
        ),
        (
            with_feature("{}", "      preprocess: whole\n"),
            "j.yaml:9: steps[0].embed_images.preprocess: expected 'model' or 'keep_aspect', found 'whole'",
        ),
        (
            with_feature("{}", "      regions_name: 5\n"),
            "j.yaml:9: steps[0].embed_images.regions_name: expected a string, found 5",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


def test_names_that_are_taken_only_where_regions_are_written() -> None:
    plain = with_feature("{layer: stem, pooling: mac}").replace("conv:", "scale:")
    (step,) = steps_of(parse_job(plain + "      regions_name: images\n"))
    assert (step.tables, step.region_feature) == (("images",), None)
    (step,) = steps_of(parse_job(with_feature(LOCAL, "      regions_name: parts\n")))
    assert (step.tables, step.region_feature) == (("images", "parts"), "conv")


def test_two_steps_may_not_write_one_regions_table() -> None:
    second = f"  - embed_images: {{name: others, manifest: m, features: {{c: {LOCAL}}}%s}}\n"
    assert mistakes(with_feature(LOCAL) + second % "") == [
        "j.yaml: two steps write a table 'regions': give one another `regions_name`"
    ]
    steps = steps_of(parse_job(with_feature(LOCAL) + second % ", regions_name: parts"))
    assert [step.tables for step in steps] == [("images", "regions"), ("others", "parts")]
    plain = "  - embed_images: {name: regions, manifest: m}\n"
    assert mistakes(with_feature(LOCAL) + plain) == [
        "j.yaml: two steps write a table 'regions': give one another `regions_name`"
    ]


CONV: dict[str, object] = {"layer": "stem", "pooling": "rmac"}


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "conv1"}, {"pooling": "mac"}, {"levels": 3}, {"overlap": 0.5}, {"p": 2.0}, {"l2_before": False},
        {"l2_after": False}, {"regions": True}, {"regions": "grid"}, {"regions": "boxes"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_of_a_feature_is_its_identity(change: dict[str, object]) -> None:
    plain, other = (EmbedImages(**BASE, features={"f": f}) for f in (CONV, {**CONV, **change}))
    assert fingerprint(plain.identity()) != fingerprint(other.identity())
    if change == {"regions": True}:
        again = EmbedImages(**BASE, features={"f": {**CONV, "regions": "boxes"}})
        assert fingerprint(again.identity()) != fingerprint(other.identity())


def test_the_long_side_is_identity() -> None:
    small, large = (EmbedImages(**BASE, preprocess="keep_aspect", long_side_px=n) for n in (96, 128))
    assert fingerprint(small.identity()) != fingerprint(large.identity())
