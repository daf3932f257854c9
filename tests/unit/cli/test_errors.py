"""The command and a user's mistakes: one line that says what is wrong, an exit code, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.main import get_command

from clipray.cli import app, main
from clipray.tables import table_names

JOB = {
    "output": "out",
    "model": {"name": "RN50", "pretrained": "random", "seed": 1},
    "steps": [{"embed_images": {"manifest": "m.parquet"}}],
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a picture, its manifest and files that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("photos").mkdir()
    Path("empty").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    pq.write_table(pa.table({"image_id": ["a"], "uri": ["photos/a.png"]}), "m.parquet")
    pq.write_table(pa.table({"id": [1], "uri": ["photos/a.png"]}), "ids.parquet")
    Path("torn.parquet").write_bytes(b"PAR1 and no more")
    Path("broken.json").write_text("{")
    Path("broken.yaml").write_text("output: [out\n")
    Path("empty.yaml").write_text("")
    Path("list.yaml").write_text("- a\n")
    job("unknown-key", typo=1)
    job("no-manifest", manifest="nothing.parquet")
    job("int-ids", manifest="ids.parquet")
    job("torn", manifest="torn.parquet")
    job("keep", keep=["label"])
    job("many", actors="many")
    job("no-weights", model={"name": "RN50"})
    job("no-seed", model={"name": "RN50", "pretrained": "random"})
    job("no-model", model={"name": "RN5O", "pretrained": "openai"})
    job("no-folder", model={"name": "local-dir:nowhere"})
    job("no-config", model={"name": "broken.json", "pretrained": "random", "seed": 1})
    job("no-storage", output="nosuchscheme://out")
    job("away", output="s3://bucket/out", manifest="s3://bucket/m.parquet")
    job("good")


def job(name: str, *, model: dict[str, object] | None = None, output: str = "out", **settings: object) -> None:
    step = {"embed_images": {"manifest": "m.parquet", **settings}}
    Path(f"{name}.yaml").write_text(
        yaml.safe_dump({**JOB, "output": output, "model": model or JOB["model"], "steps": [step]})
    )


SERVER = ["--address", "http://127.0.0.1:1"]
MISTAKES: list[tuple[list[str], str]] = [
    (["run", "nothing.yaml"], "nothing.yaml: no such job file"),
    (["plan", "nothing.yaml"], "nothing.yaml: no such job file"),
    (["run", "photos"], "photos: cannot be read"),
    (["run", "m.parquet"], "m.parquet: cannot be read"),
    (["run", "broken.yaml"], "broken.yaml:2: not valid YAML"),
    (["run", "empty.yaml"], "empty.yaml: expected a mapping"),
    (["run", "list.yaml"], "list.yaml: expected a mapping"),
    (["run", "unknown-key.yaml"], "steps[0].embed_images.typo: unknown key"),
    (["run", "many.yaml"], "actors: expected 'auto', an integer >= 1 or [min, max], found 'many'"),
    (["plan", "no-weights.yaml"], "model.pretrained is missing for RN50"),
    (["run", "no-seed.yaml"], "`pretrained: random` needs a `seed`"),
    (["plan", "no-model.yaml"], "open_clip has no model 'RN5O'; nearest: RN50"),
    (["plan", "no-folder.yaml"], "expected a folder with open_clip_config.json or timm's config.json, and weights"),
    (["plan", "no-config.yaml"], "not an open_clip config"),
    (["run", "no-storage.yaml"], "nosuchscheme://out: this storage cannot be opened"),
    (["run", "good.yaml", "--fresh", "pictures"], "--fresh pictures: the job makes no such table; it makes: images"),
    (["plan", "no-manifest.yaml"], "nothing.parquet: no manifest there"),
    (["plan", "int-ids.yaml"], "ids.parquet: no column 'image_id'; found: id, uri"),
    (["plan", "torn.yaml"], "torn.parquet: not a readable Parquet file"),
    (["plan", "keep.yaml"], "m.parquet: `keep`: no column 'label'; found: image_id, uri"),
    (["status", "nothing"], "nothing: no run there"),
    (["status", "photos"], "photos: no run there"),
    (["status", "m.parquet"], "m.parquet: no run there"),
    (["schema", "imgaes"], f"no table 'imgaes'; there are: {', '.join(table_names())}"),
    (["manifest", "photos", "out.csv"], "out.csv: a manifest's name ends in .parquet"),
    (["manifest", "empty", "out.parquet"], "empty: no images there"),
    (["manifest", "nothing", "out.parquet"], "nothing: no images there"),
    (["manifest", "photos/*.tiff", "out.parquet"], "photos/*.tiff: no images there"),
    (["manifest", "photos", "out.parquet", "--label", "(a"], "--label '(a': expected `folder` or a regular expression"),
    (["manifest", "photos", "m.parquet/out.parquet"], "m.parquet/out.parquet could not be written"),
    (["manifest", "nosuchscheme://photos", "out.parquet"], "nosuchscheme://photos: this storage cannot be opened"),
    (["ground-truth", "nothing", "out.parquet"], "nothing: nothing there: expected gnd_*.pkl"),
    (["ground-truth", "empty", "out.parquet"], "empty: no *_query.txt there"),
    (["ground-truth", "torn.parquet", "out.parquet"], "torn.parquet: "),
    (["ground-truth", "empty", "out.csv"], "out.csv: the name of a ground truth ends in .parquet"),
    (["ground-truth", "", "out.parquet"], "expected a path or a URL, found ''; is a variable not set?"),
    (["schema", ""], "no table ''"),
    (["schema", "../images"], "no table '../images'"),
    (["status", ""], "expected a path or a URL, found ''"),
    (["manifest", "", "out.parquet"], "expected a path or a URL, found ''"),
    (["plan", "m.parquet"], "m.parquet: cannot be read"),
    (["verify", "nothing"], "nothing: no run there"),
    (["verify", "photos"], "photos: no run there"),
    (["verify", "m.parquet"], "m.parquet: no run there"),
    (["verify", ""], "expected a path or a URL, found ''"),
    (["report", "nothing"], "nothing: no run there: expected the `output` folder of a job"),
    (["report", "photos"], "photos: no run there"),
    (["atlas", "nothing"], "nothing: no run there: expected the `output` folder of a job"),
    (["atlas", "photos"], "photos: no run there"),
    (["atlas", ""], "expected a path or a URL, found ''"),
    (["report", "nosuchscheme://out"], "nosuchscheme://out: this storage cannot be opened"),
    (["demo", "m.parquet"], "m.parquet"),
    (["demo", "m.parquet/below"], "m.parquet/below"),
    (["demo", "s3://bucket/demo"], "s3://bucket/demo: expected a folder on this machine"),
    (["demo", ""], "expected a path or a URL, found ''"),
    (["submit", "nothing.yaml", *SERVER], "nothing.yaml: no such job file"),
    (["submit", "unknown-key.yaml", *SERVER], "steps[0].embed_images.typo: unknown key"),
    (["submit", "good.yaml", *SERVER], "output: out is a path in this folder; nodes of a cluster need a URL"),
    (["submit", "away.yaml", *SERVER], "http://127.0.0.1:1: no answer from a Ray job server"),
    (["stop", "out", *SERVER], "http://127.0.0.1:1: no answer from a Ray job server"),
    (["stop", "out", "--address", "ray://127.0.0.1:1"], "ray://127.0.0.1:1: expected the job server of a Ray head"),
    (["stop", "", *SERVER], "expected a path or a URL, found ''"),
    (["layers", "RN5O"], "open_clip has no model 'RN5O'; nearest: RN50"),
    (["layers", "local-dir:photos"], "expected a folder with open_clip_config.json or timm's config.json, and weights"),
    (["layers", "broken.json"], "broken.json: not an open_clip config"),
    (["search", "photos", "a dog"], "photos: no finished index there"),
    (["search", "m.parquet", "a dog"], "m.parquet: no finished index there"),
    (["search", "out"], "expected a query: words, --image PATH or --like ID"),
    (["serve", "nothing"], "nothing: expected the output folder of a run with a finished table, found none"),
    (["serve", "m.parquet"], "m.parquet: expected the output folder of a run with a finished table, found none"),
    (["serve", ""], "expected a path or a URL, found ''"),
    (["label", "photos", "--classes", "nothing.yaml"], "nothing.yaml: no such class file"),
    (["label", "photos", "--classes", "broken.yaml"], "broken.yaml:2: not valid YAML"),
    (["label", "nothing", "--classes", "a dog, a cat"], "nothing: no such image"),
    (["label", "photos", "--classes", "a dog, a dog"], "--classes: class 'a dog' stands twice"),
    (["label", "photos", "--classes", "a, b", "--template", "c"], "--template: the template 'c' has no `{}`"),
    (["embed", "", "out"], "expected a path or a URL, found ''"),
    (["embed", "empty", "out"], "no images there"),
    (["embed", "nothing", "out"], "no images there"),
    (["embed", "photos", "out", "--pretrained", "random"], "`pretrained: random` needs a `seed`"),
    (["embed", "photos", "out", "--label", "("], "--label '(': expected `folder` or a regular expression"),
]  # fmt: skip


def called(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["clipray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = called(arguments, monkeypatch)
    out, err = capfd.readouterr()
    assert code == 2
    assert "Traceback" not in out + err
    (line,) = err.splitlines()
    assert line.startswith("clipray: ")
    assert words in line
    assert out == ""


def test_every_verb_is_given_mistakes() -> None:
    counts = Counter(arguments[0] for arguments, _ in MISTAKES)
    assert counts.keys() == get_command(app).commands.keys()  # type: ignore[attr-defined]
    assert min(counts.values()) >= 3


def test_nothing_is_written_by_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["embed", "empty", "out"], ["manifest", "empty", "out.parquet"], ["status", "nothing"]):
        called(arguments, monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before


def test_several_mistakes_of_a_job_are_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job("two", typo=1, actors="many")
    assert called(["run", "two.yaml"], monkeypatch) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("clipray: two.yaml:")
    assert lines[1].startswith("two.yaml:")


def test_a_message_with_brackets_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    called(["status", "[bold]nothing[/bold]" + "x" * 200], monkeypatch)
    assert "[bold]nothing[/bold]" + "x" * 200 in capfd.readouterr().err


@pytest.mark.parametrize("run", [["-m", "clipray"], None])
def test_in_a_process_of_its_own(run: list[str] | None) -> None:
    command = [sys.executable, *run] if run else [str(Path(sys.executable).parent / "clipray")]
    done = subprocess.run([*command, "run", "nothing.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "clipray: nothing.yaml: no such job file\n"
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("clipray 0.")


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        (["schema"], lambda out: all(name in out for name in ("image_manifest", "images", "rejects"))),
        (["schema", "rejects"], lambda out: "worker_died" in out),
        (["schema", "images", "--json"], lambda out: yaml.safe_load(out)["key"] == "image_id"),
        (["manifest", "photos", "new/out.parquet"], lambda out: out == "1 images in new/out.parquet\n"),
    ],
)
def test_what_is_right_says_so(
    arguments: list[str],
    check: Callable[[str], bool],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert called(arguments, monkeypatch) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert check(out), out
