"""Labels of one's own files, and groups of files that are held out whole."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sami_fast.cli import main
from sami_fast.config import load_config
from sami_fast.data import ImageFolder, VideoFolder, open_dataset
from sami_fast.data.labels import MAX_CATEGORIES, held_out_files, read_labels
from sami_fast.errors import UserError
from sami_fast.evaluation import evaluate
from sami_fast.report import write_report
from sami_fast.train import train

FILES = [f"{person}/{number}.png" for person in ("ann", "bob", "cem", "dee") for number in range(6)]
HAIR = ("black", "brown", "red")


def row_of(number: int) -> dict[str, object]:
    return {
        "file": FILES[number],
        "age": 20 + 0.5 * number,
        "smiling": 2 * (number % 2) - 1,
        "glasses": str(number % 3 == 0),
        "hair": HAIR[number % 3],
        "sex": ("female", "male")[number // 12],
        "person": FILES[number].partition("/")[0],
        "note": f"image {number}",
        "camera": 7,
    }


ROWS = [row_of(number) for number in range(len(FILES))]
NAMES = ("age", "smiling", "glasses", "hair=black", "hair=brown", "hair=red", "sex=male")


def write_csv(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def without(*columns: str) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name not in columns} for row in ROWS]


@pytest.fixture
def photos(tmp_path):
    """A folder whose image n is of brightness 10 n."""
    for number, name in enumerate(FILES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 10 * number, np.uint8)).save(path)
    return tmp_path / "photos"


def opened(photos: Path, **settings) -> ImageFolder:
    return ImageFolder(
        str(photos), **{"image_size": 8, "decoder": "torch", "cache_dir": str(photos.parent / "cache"), "workers": 1} | settings
    )


def numbers(source: ImageFolder) -> list[int]:
    return (source.pixels(torch.arange(source.size))[:, 0, 0, 0] // 10).tolist()


def expected(rows) -> np.ndarray:
    """[N, F], as `row_of` makes them."""
    return np.array([[20 + 0.5 * n, n % 2, n % 3 == 0, n % 3 == 0, n % 3 == 1, n % 3 == 2, n >= 12] for n in rows], np.float32)


# Values


def test_factors_and_attributes_of_a_table(tmp_path):
    found = read_labels(write_csv(tmp_path / "labels.csv", ROWS[::-1]), FILES, group="person")
    assert found.names == NAMES
    assert found.attributes == set(NAMES) - {"age"}
    assert found.values.dtype == np.float32
    assert (found.values == expected(range(24))).all()
    assert found.groups == [name.partition("/")[0] for name in FILES]
    assert found.unscored == ("note", "camera")


@pytest.mark.parametrize("key", ["image_id", "filename", "picture"])
def test_the_column_of_the_files(tmp_path, key):
    rows = [{"age": row["age"], key: f"./{row['file']}"} for row in ROWS]
    if key == "picture":  # not a name we know: then it has to be the first
        rows = [{key: row[key], "age": row["age"]} for row in rows]
    found = read_labels(write_csv(tmp_path / "labels.csv", rows), FILES)
    assert found.names == ("age",)
    assert (found.values[:, 0] == expected(range(24))[:, 0]).all()


def test_tables_of_spreadsheets(tmp_path):
    """A mark at the beginning, other line ends, spaces, quotes, an empty line at the end, backslashes."""
    text = '\ufefffile, age ,hair\r\n"a\\1.png", 3 ,"dark, brown"\r\n2.png,4.5e0,red\r\n\r\n'
    (tmp_path / "labels.csv").write_bytes(text.encode())
    found = read_labels(str(tmp_path / "labels.csv"), ["2.png", "a/1.png"])
    assert found.names == ("age", "hair=red")
    assert found.values.tolist() == [[1.0, 1.0], [0.0, 0.0]]  # two ages are an attribute: the larger is 1


def test_what_a_column_becomes(tmp_path):
    def become(cells: list[object]) -> tuple[tuple[str, ...], bool]:
        rows = [{"file": f"{n}.png", "known": n, "it": cell} for n, cell in enumerate(cells)]
        found = read_labels(write_csv(tmp_path / "labels.csv", rows), [row["file"] for row in rows])
        return found.names[1:], set(found.names[1:]) <= found.attributes

    assert become([0, 1, 2]) == (("it",), False)
    assert become([0, 1, 1]) == become([-1, 1, 1]) == become([3.5, 10, 3.5]) == (("it",), True)
    assert become(["true", "FALSE", "True"]) == (("it",), True)
    assert become([5, 5, 5]) == become(["x", "x", "x"]) == become(["true", "true", "true"]) == ((), True)
    assert become(["b", "a", "c"]) == (("it=a", "it=b", "it=c"), True)
    assert become([f"t{n}" for n in range(MAX_CATEGORIES)])[0] == tuple(sorted(f"it=t{n}" for n in range(MAX_CATEGORIES)))
    assert become([f"t{n}" for n in range(MAX_CATEGORIES + 1)]) == ((), True)


def test_parquet_is_read_like_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'sami-fast[parquet]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row | {"glasses": row["glasses"] == "True", "__index_level_0__": n} for n, row in enumerate(ROWS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "labels.parquet")
    found, plain = read_labels(str(tmp_path / "labels.parquet"), FILES), read_labels(write_csv(tmp_path / "labels.csv", ROWS), FILES)
    assert found.names == plain.names
    assert (found.values == plain.values).all()
    (tmp_path / "labels.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"data.labels: .*labels.parquet is not a readable .parquet file"):
        read_labels(str(tmp_path / "labels.parquet"), FILES)


# Images


def test_images_keep_their_labels(photos, tmp_path):
    table = write_csv(tmp_path / "labels.csv", without("person"))
    shown = []
    for split in (0, 1):
        source = opened(photos, labels=table, holdout=0.25, split=split)
        assert source.factor_names == NAMES
        shown.append(numbers(source))
        assert (source.factors(torch.arange(source.size)).numpy() == expected(shown[-1])).all()
    assert sorted(shown[0] + shown[1]) == list(range(24))
    assert len(shown[1]) == 6


def test_without_labels_nothing_is_known(photos):
    source = opened(photos)
    assert source.factor_names == ()
    assert source.attribute_names == frozenset()
    assert source.factors(torch.arange(3)).shape == (3, 0)


@pytest.mark.parametrize("by", ["folder", "person"])
def test_people_of_evaluation_are_never_in_training(photos, tmp_path, by):
    table = write_csv(tmp_path / "labels.csv", ROWS)
    settings = {"holdout_by": by, "holdout": 0.4, "labels": table}
    training, evaluation = (opened(photos, split=split, **settings) for split in (0, 1))
    people = [{number // 6 for number in numbers(source)} for source in (training, evaluation)]
    assert people[0] | people[1] == {0, 1, 2, 3}
    assert not people[0] & people[1]
    assert (training.size, evaluation.size) == (12, 12)  # 0.4 of four people is two
    assert evaluation.held_out
    assert evaluation.facts()["held out by"] == f"{by}, 4 groups"
    assert ("person=ann" in evaluation.factor_names) == (by == "folder")
    assert training.fingerprint != opened(photos, holdout=0.4).fingerprint


def test_folders_hold_out_without_a_table(photos):
    evaluation = opened(photos, holdout_by="folder", split=1, holdout=0.01)
    assert len({number // 6 for number in numbers(evaluation)}) == 1
    assert evaluation.size == 6
    assert opened(photos, holdout_by="folder", split=1, holdout=0.0).size == 24


def test_groups_of_any_sizes():
    files, groups = [f"{n}" for n in range(60)], [f"g{int(n**0.5)}" for n in range(60)]
    training, evaluation = (held_out_files(files, groups, 0.3, split) for split in (0, 1))
    assert sorted([*training, *evaluation]) == list(range(60))
    assert not {groups[n] for n in training} & {groups[n] for n in evaluation}
    assert len({groups[n] for n in evaluation}) == 2  # 0.3 of eight


def test_labels_of_videos(tmp_path):
    pytest.importorskip("av", reason="needs PyAV: pip install 'sami-fast[feed]'")
    from benchmarks.write_video import write_video

    files = [f"{person}/{n}.mp4" for person in ("ann", "bob", "cem") for n in range(2)]
    for number, name in enumerate(files):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "videos" / name, np.full((3, 16, 16, 3), 40 * number, np.uint8), codec="mpeg4")
    table = write_csv(tmp_path / "labels.csv", [{"file": name, "age": 30 + number} for number, name in enumerate(files)])
    options = {
        "image_size": 8,
        "decoder": "torch",
        "cache_dir": str(tmp_path / "cache"),
        "labels": table,
        "holdout_by": "folder",
        "workers": 1,
    }
    training, evaluation = (VideoFolder(str(tmp_path / "videos"), split=split, holdout=0.3, **options) for split in (0, 1))
    for source in (training, evaluation):
        index = torch.arange(source.size)
        videos = [files.index(name) for name in source.sources(index)["files"]]
        assert source.factors(index)[:, 0].tolist() == [30 + video for video in videos]
    names = [{name.partition("/")[0] for name in s.sources(torch.arange(s.size))["files"]} for s in (training, evaluation)]
    assert len(names[1]) == 1
    assert not names[0] & names[1]


# A whole run


def test_one_s_own_factors_are_scored(photos, tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        name, brightness = f"p{number % 6}/{number}.png", int(rng.integers(0, 256))
        (photos / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), brightness, np.uint8)).save(photos / name)
        rows.append({"file": name, "brightness": brightness, "light": brightness > 128, "person": f"p{number % 6}"})
    for name in FILES:
        (photos / name).unlink()
    table = write_csv(tmp_path / "labels.csv", rows)
    settings = [
        f"data.path={photos}",
        f"data.labels={table}",
        "data.holdout_by=person",
        "data.holdout=0.5",
        f"data.cache_dir={tmp_path}/cache",
    ]
    config = load_config(
        "tests/tiny.yaml", [f"runs_dir={tmp_path}", "data.kind=image_folder", "data.channels=1", "method=diffae", *settings]
    )
    folder = train(config)
    scores = evaluate(folder, baselines=False).scores
    assert scores["linear_r2"].keys() == {"brightness"}
    assert scores["attributes_scored"] == 1
    report = write_report(folder).read_text()
    assert "were labelled with" in report
    assert "Latent quality" in report


# Mistakes


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "data.labels: no file {table}"),
        ("", "data.labels: no rows in {table}"),
        ("file,age\n", "data.labels: no rows in {table}"),
        ("file,age\na.png,1,2\n", "data.labels: expected 2 values, as {table} has column names, found 3 in line 2"),
        ("file,age,age\na.png,1,2\n", "data.labels: {table} has more than one column 'age'"),
        ("file,age\na.png,1\na.png,2\n", "data.labels: a.png is more than once in column 'file' of {table}"),
        (
            "file,age\na.png,1\nb.png,2\nc.png,3\nd.png,3\n",
            "data.labels: column 'file' of {table} names 1 file(s) that are not in the folder, such as d.png",
        ),
        ("file,age\na.png,1\n", "data.labels: 2 of 3 files have no row in {table}, such as b.png"),
        ("file,age\na.png,1\nb.png,old\nc.png,3\n", "data.labels: expected a number in column 'age' of {table} for b.png, found 'old'"),
        ("file,age\na.png,1\nb.png,\nc.png,3\n", "data.labels: expected a number in column 'age' of {table} for b.png, found ''"),
        ("file,age\na.png,1\nb.png,nan\nc.png,3\n", "data.labels: expected a number in column 'age' of {table} for b.png, found 'nan'"),
        ("file,hair\na.png,red\nb.png,\nc.png,red\n", "data.labels: expected a text in column 'hair' of {table} for b.png, found none"),
        (
            "file,age\na.png,1\nb.png,1\nc.png,1\n",
            "data.labels: no column of {table} has different numbers, true and false, or 2 to 20 different texts",
        ),
        ('file,age\na.png,"1\n', "data.labels: {table} is not a readable .csv file (unexpected end of data)"),
    ],
)
def test_a_table_that_does_not_fit_gets_one_sentence(tmp_path, content, sentence):
    table = tmp_path / "labels.csv"
    if content is not None:
        table.write_text(content)
    with pytest.raises(UserError) as error:
        read_labels(str(table), ["a.png", "b.png", "c.png"])
    assert str(error.value) == sentence.format(table=table)


def test_other_mistakes_of_tables(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"file,age\n\xff\xfe,1\n")
    with pytest.raises(UserError, match=r"is not a readable .csv file"):
        read_labels(str(tmp_path / "labels.csv"), ["a.png"])
    (tmp_path / "labels.txt").write_text("file age")
    with pytest.raises(UserError, match=r"data.labels: expected a .csv or .parquet file, found .*labels.txt"):
        read_labels(str(tmp_path / "labels.txt"), ["a.png"])
    table = write_csv(tmp_path / "labels.csv", without("person"))
    with pytest.raises(UserError, match=r"data.holdout_by: no column 'person' in .*, which has file, age, smiling"):
        read_labels(table, FILES, group="person")
    with pytest.raises(UserError, match=r"data.holdout_by: expected two groups of files or more, found all 2 in 'a'"):
        held_out_files(["1", "2"], ["a", "a"], 0.1, 0)
    assert held_out_files(["1", "2"], ["a", "a"], 0.0, 0).tolist() == [0, 1]


def test_rows_of_unreadable_images_are_no_mistake(photos, tmp_path):
    (photos / "ann" / "broken.png").write_bytes(b"no image")
    table = write_csv(tmp_path / "labels.csv", [*ROWS, ROWS[0] | {"file": "ann/broken.png", "age": 99.0}])
    source = opened(photos, labels=table, max_bad=0.1)
    assert source.index.bad.keys() == {"ann/broken.png"}
    assert source.factors(torch.arange(source.size))[:, 0].max() < 32


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "labels.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"labels.parquet needs pyarrow, which is not installed; `pip install 'sami-fast\[parquet\]'`"):
        read_labels(str(tmp_path / "labels.parquet"), FILES)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["data.kind=celeba", "data.labels=x.csv"],
            "data.labels: has no effect with data.kind celeba; it is for image_folder, video_folder",
        ),
        (["data.kind=celeba", "data.holdout_by=folder"], "data.holdout_by: has no effect with data.kind celeba"),
        (["data.holdout_by=person"], "data.holdout_by: expected folder, or a column of data.labels, which is empty; found person"),
        (["data.labels={tmp}/none.csv"], "data.labels: no file {tmp}/none.csv"),
        (["data.labels={tmp}/labels.csv", "data.holdout_by=nobody"], "data.holdout_by: no column 'nobody' in {tmp}/labels.csv"),
        (["data.labels={tmp}/few.csv"], "data.labels: 23 of 24 files have no row in {tmp}/few.csv, such as ann/1.png"),
    ],
)
def test_mistakes_on_the_command_line_get_one_sentence(photos, tmp_path, capsys, settings, sentence):
    write_csv(tmp_path / "labels.csv", ROWS)
    write_csv(tmp_path / "few.csv", ROWS[:1])
    given = [f"data.path={photos}", "data.cache_dir={tmp}/cache", *settings]
    assert main(["data", "images", *(one.format(tmp=tmp_path) for one in given), "--seconds", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("sami-fast:") == 1
    assert sentence.format(tmp=tmp_path) in error


def test_what_is_known_is_said(photos, tmp_path, capsys):
    table = write_csv(tmp_path / "labels.csv", ROWS)
    given = [f"data.path={photos}", f"data.labels={table}", "data.holdout_by=person", f"data.cache_dir={tmp_path}/cache"]
    assert main(["data", "images", *given, "--seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "age, smiling, glasses, hair=black, hair=brown, hair=red, sex=male" in printed
    assert "person, 4 groups" in printed
    assert "note, camera" in printed


def test_a_saved_config_finds_its_table_from_any_folder(photos, tmp_path, monkeypatch):
    write_csv(tmp_path / "labels.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    config = load_config("images", ["data.path=photos", "data.labels=labels.csv", f"data.cache_dir={tmp_path}/cache"])
    monkeypatch.chdir("/")
    assert config.data.labels == str(tmp_path / "labels.csv")
    assert "age" in open_dataset(config.data, 0).factor_names
