"""Own data: a folder, a table or tars of videos with their captions, found by what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.sources.member import ArchiveError
from dalle2_video.data.sources.source import Catalogue
from dalle2_video.data.sources.table import ColumnError
from dalle2_video.data.store.shard import StoreError
from dalle2_video.data.store.store import ClipStore
from tests.helpers.files import pack, write_files, write_tar
from tests.helpers.media import captions, clip_id, grey_steps, write_video
from tests.helpers.stores import SPLITS, config, manifest, skipped, tree

VIDEO = write_video(grey_steps(15))
TOO_MANY = "has more cells than the header: put texts with commas into double quotes"


def lines(root: Path, **changes) -> dict[str, dict[str, list[str]]]:
    """clip -> category -> captions, of the store that preprocess makes without being told how."""
    made = config(root, layout=None, out=str(root.parent / "store"), **changes)
    preprocess(made, log=lambda text: None)
    store = ClipStore.open(made.store, SPLITS)
    return {
        clip: {name: [line.text for line in some] for name, some in store.lines(i).items()}
        for i, clip in enumerate(store.clip_ids)
    }


def causes(catalogue: Catalogue) -> dict[str, str]:
    return {problem.member: problem.cause for problem in catalogue.problems}


def groups(root: Path) -> dict[str, str]:
    return {k: v for source in find_sources(root).sources for k, v in source.groups.items()}


# ---------------------------------------------------------------- folder


def test_a_folder_of_videos_with_texts_beside_them(tmp_path: Path) -> None:
    root = write_files(
        tmp_path / "my videos",
        {
            "IMG_0001.MOV": VIDEO,
            "IMG_0001.txt": "A cat, asleep.\nA sleeping cat.\n",
            "trip (1)/día 1/a.b=c.mp4": VIDEO,
            "trip (1)/día 1/a.b=c.txt": "\ufeffA beach.",
            "with its suffix.mp4": VIDEO,
            "with its suffix.mp4.txt": "A dog.",
        },
    )
    assert lines(root) == {
        "IMG_0001": {"text": ["A cat, asleep.", "A sleeping cat."]},
        "trip (1)/día 1/a.b=c": {"text": ["A beach."]},
        "with its suffix": {"text": ["A dog."]},
    }
    assert skipped(tmp_path / "store") == {}
    assert groups(root) == {clip: clip for clip in lines(root)}, "each clip is a group"


def test_what_has_no_partner_is_listed(tmp_path: Path) -> None:
    root = write_files(
        tmp_path / "data",
        {
            "a.mp4": VIDEO,
            "a.txt": "A cat.",
            "a.jpg": b"a thumbnail",
            "a.webm": b"the same clip again",
            "b.mp4": VIDEO,
            "a.mp4.txt": "Another text.",
            "README.txt": "what this is",
            "a.2.txt": "of a clip that is not here",
            "notes.pdf": b"",
            "photo.heic": b"",
        },
    )
    assert list(lines(root)) == ["a"]
    out = tmp_path / "store"
    assert skipped(out) == {
        "a.2.txt": "a text without a video or image of the same name",
        "README.txt": "a text without a video or image of the same name",
        "a.txt": "a second text: a.mp4.txt is used",
        "a.jpg": "an image beside the video of the same name",
        "a.webm": "a second copy: a.mp4 is used",
        "b.mp4": "without text: no category has a usable file",
        "photo.heic": "a format that is not read: convert it to mp4, jpg or png",
    }
    assert manifest(out)["ignored"] == {".pdf": 1}


def test_an_archive_holds_what_its_unpacked_folder_holds(tmp_path: Path) -> None:
    files: dict[str, bytes] = {
        f"{folder}/{name}{suffix}": data
        for folder in ("x", "y/z")
        for name in "ab"
        for suffix, data in ((".mp4", VIDEO), (".txt", b"A cat."))
    }
    folder = write_files(tmp_path / "folder" / "in", files)
    packed = tmp_path / "packed" / "in"
    write_tar(packed / "x.tar", {k[2:]: v for k, v in files.items() if k[0] == "x"})
    write_tar(packed / "y.tgz", {k[2:]: v for k, v in files.items() if k[0] == "y"}, "w:gz")
    assert lines(folder) == lines(packed) and len(lines(folder)) == 4
    assert set(lines(folder)) == {"x/a", "x/b", "y/z/a", "y/z/b"}


def test_the_folder_itself_as_root(tmp_path: Path, monkeypatch) -> None:
    """`data.root=.`; and an error beside a store is an error, not the end of the data."""
    root = write_files(tmp_path / ".hidden", {"a.mp4": VIDEO, "a.txt": "A cat."})
    monkeypatch.chdir(root)
    made = config(Path("."), layout=None, out=str(tmp_path / "store"))
    assert preprocess(made, log=lambda text: None).clips == 1
    assert ClipStore.open(made.store, SPLITS).clip_ids == ["a"]
    for name in ("b.zip", "b.tar"):
        (root / name).write_bytes(pack(name, {"c.mp4": VIDEO, "c.txt": b"C."}))
    with pytest.raises(ArchiveError, match="have one name: rename one"):
        preprocess(made, log=lambda text: None)


def test_many_folders_of_one_clip_are_few_shards(tmp_path: Path) -> None:
    files = {f"person {k}/{name}": b"x" for k in range(50) for name in ("a.mp4", "a.txt")}
    (source,) = find_sources(write_files(tmp_path / "people", files)).sources
    assert source.name == "people" and len(source.videos) == 50


def test_a_second_run_does_not_read_its_own_store(tmp_path: Path) -> None:
    root = write_files(tmp_path / "data", {"videos/a.mp4": VIDEO, "videos/a.txt": "A cat."})
    made = config(root, layout=None)
    assert preprocess(made, log=lambda text: None).clips == 1
    before = tree(root)
    summary = preprocess(made, log=lambda text: None)
    assert summary.made == 0 and summary.skipped == {} and summary.ignored == {}
    before.pop("manifest.json"), (after := tree(root)).pop("manifest.json")
    assert after == before


# ---------------------------------------------------------------- table


TABLE = (
    'file_name,text,Emotion,group,seconds\na.mp4,"A man, talking.",calm,p1,3\nb/c.mp4,A cat.,,,4\n'
)


@pytest.mark.parametrize("kind", ["csv", "semicolons", "tsv", "jsonl", "windows", "other name"])
def test_every_kind_of_table(tmp_path: Path, kind: str) -> None:
    """Each column of words is a category; empty cells are no caption."""
    rows = [
        {"file_name": "a.mp4", "text": "A man, talking.", "Emotion": "calm", "group": "p1"},
        {"file_name": "b/c.mp4", "text": ["A cat."], "seconds": 4},
    ]
    table = {
        "csv": ("metadata.csv", TABLE),
        "semicolons": (
            "metadata.csv",
            "file_name;text;Emotion;group\na.mp4;A man, talking.;calm;p1\nb/c.mp4;A cat.;;\n",
        ),
        "tsv": (
            "metadata.tsv",
            "file_name\ttext\tEmotion\tgroup\na.mp4\tA man, talking.\tcalm\tp1\n"
            "b/c.mp4\tA cat.\t\t\n",
        ),
        "jsonl": ("metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
        "windows": ("metadata.csv", "\ufeff" + TABLE.replace("/", "\\").replace("\n", "\r\n")),
        "other name": ("my clips.csv", TABLE),
    }[kind]
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, "b/c.mp4": VIDEO, table[0]: table[1]})
    assert lines(root) == {
        "a": {"Emotion": ["calm"], "text": ["A man, talking."]},
        "b/c": {"text": ["A cat."]},
    }
    assert groups(root) == {"a": "p1", "b/c": "b/c"}
    assert skipped(tmp_path / "store") == {}


def test_a_videofolder_of_hugging_face(tmp_path: Path) -> None:
    """A table per split, file names relative to it."""
    row = '{{"file_name": "{}", "text": "{}"}}\n'
    root = write_files(
        tmp_path / "data",
        {
            "train/a.mp4": VIDEO,
            "train/metadata.jsonl": row.format("a.mp4", "A cat."),
            "test/a.mp4": VIDEO,
            "test/metadata.jsonl": row.format("a.mp4", "A dog."),
        },
    )
    assert lines(root) == {"test/a": {"text": ["A dog."]}, "train/a": {"text": ["A cat."]}}


def test_rows_of_one_file_are_its_captions(tmp_path: Path) -> None:
    text = 'id,path,caption\n1,a,One.\n2,a,"Two.\nThree."\n3,./b/../a.mp4,Four.\n'
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, "metadata.csv": text})
    assert lines(root) == {"a": {"caption": ["One.", "Two.", "Three.", "Four."]}}


def test_a_corrected_cell_of_the_same_length_is_noticed(tmp_path: Path) -> None:
    table = "file_name,text\na.mp4,A cat.\n"
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, "metadata.csv": table})
    assert lines(root) == {"a": {"text": ["A cat."]}}
    write_files(root, {"metadata.csv": table.replace("cat", "dog")})
    assert lines(root) == {"a": {"text": ["A dog."]}}


def test_columns_may_be_named(tmp_path: Path) -> None:
    text = "clip_file,de,en,person\na.mp4,Ein Mann.,A man.,7\nb.mp4,Eine Katze.,A cat.,7\n"
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, "b.mp4": VIDEO, "clips.csv": text})
    (problem,) = (p for p in find_sources(root).problems if p.member == "clips.csv")
    assert "no column names the files" in problem.cause and "clip_file" in problem.cause
    found = lines(root, file_column="clip_file", caption_columns=["en"], group_column="person")
    assert found == {"a": {"en": ["A man."]}, "b": {"en": ["A cat."]}}
    index = json.loads((tmp_path / "store" / "index" / "data.json").read_text())
    assert {clip["group"] for clip in index["clips"]} == {"7"}


def test_a_column_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """The user named it, so nothing else is taken instead."""
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, "metadata.csv": "file,Text\na.mp4,A.\n"})
    for key in ("file_column", "group_column", "caption_columns"):
        value = ["nope"] if key == "caption_columns" else "nope"
        said = rf"data\.{key}: no column nope in metadata\.csv, it has file, Text"
        with pytest.raises(ColumnError, match=said):
            lines(root, **{key: value})
    assert lines(root, caption_columns=["text"]) == {"a": {"Text": ["A."]}}
    with pytest.raises(ColumnError, match="no column nope"):
        lines(root, caption_columns=["nope"])  # and with a store that is there


def test_a_name_in_either_form_of_unicode(tmp_path: Path) -> None:
    """macOS writes e and an accent, everybody else one letter."""
    root = write_files(
        tmp_path / "data",
        {"cafe\u0301.mp4": VIDEO, "metadata.csv": "file_name,text\ncaf\u00e9.mp4,A cup.\n"},
    )
    assert list(lines(root).values()) == [{"text": ["A cup."]}]


def test_bad_rows_are_listed_by_line(tmp_path: Path) -> None:
    text = (
        "file_name,text,group\na.mp4,Good.,g\nnowhere.mp4,Text.,\n,Text.,\n"
        "a.mp4,A man, smiling.,g,\n../../secret.mp4,Text.,\n/etc/passwd,Text.,\na.mp4,More.,other\n"
    )
    write_files(tmp_path, {"secret.mp4": VIDEO})
    root = write_files(
        tmp_path / "in" / "data", {"a.mp4": VIDEO, "extra.mp4": VIDEO, "metadata.csv": text}
    )
    assert lines(root) == {"a": {"text": ["Good.", "More."]}}
    assert skipped(tmp_path / "in" / "store") == {
        "metadata.csv:3": "nowhere.mp4 is not there",
        "metadata.csv:4": "names no file in its column file_name",
        "metadata.csv:5": TOO_MANY,
        "metadata.csv:6": "../../secret.mp4 is not there",
        "metadata.csv:7": "/etc/passwd is not there",
        "metadata.csv:8": "puts a into group other, a row before it into g",
        "extra.mp4": "no row of a table names it",
    }


def test_two_files_of_one_id_in_a_table(tmp_path: Path) -> None:
    """A poster beside a video: the caption of one must not reach the other."""
    text = "file_name,text\na.mp4,A film.\na.jpg,A poster.\nb,By its id.\n"
    names = ("a.jpg", "a.mp4", "b.jpg", "b.mp4")
    root = write_files(tmp_path / "data", {**dict.fromkeys(names, VIDEO), "metadata.csv": text})
    assert lines(root) == {"a": {"text": ["A film."]}, "b": {"text": ["By its id."]}}
    assert skipped(tmp_path / "store") == {
        "metadata.csv:3": "a.jpg and a.mp4 have one id: rename one of them",
        "a.jpg": "no row of a table names it",
        "b.jpg": "no row of a table names it",
    }


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        (("metadata.csv", "file_name,text\na.mp4,\xe9".encode("latin1")), "not UTF-8 at byte 21"),
        (("metadata.csv", "file_name,text\na.mp4,x".encode("utf-16")), "not UTF-8 at byte 0"),
        (("metadata.csv", b"a.mp4,A man.\n"), "no column names the files"),
        (("metadata.csv", b""), "no column names the files"),
        (("metadata.csv", b"file_name,text,text\na.mp4,x,y\n"), "two columns have one name"),
        (("metadata.csv", b'file_name,text\na.mp4,"A man\n'), "line 2: unexpected end of data"),
        (("metadata.jsonl", b'{"file_name": "a.mp4"'), "line 1 is no JSON"),
        (("metadata.jsonl", b'["a.mp4"]'), "line 1 is no JSON object"),
        (("metadata.jsonl", b"[" * 100_000), "line 1 is no JSON"),
    ],
)
def test_a_table_that_cannot_be_read_is_listed(
    tmp_path: Path, table: tuple[str, bytes], cause: str
) -> None:
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, table[0]: table[1]})
    assert cause in causes(find_sources(root))[table[0]]


# ---------------------------------------------------------------- webdataset


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_tars_of_pairs(tmp_path: Path, form: str) -> None:
    root = tmp_path / "data"
    mode = "w" if form == "tar" else "w:gz"
    note = {"caption": "A cat.", "url": "elsewhere", "width": 32, "sha256": "ab", "tags": ["Grey."]}
    write_tar(
        root / f"00000.{form}",
        {
            "0001.mp4": VIDEO,
            "0001.txt": b"A man.\nA person.",
            "0001.json": b'{"caption": "A man."}',
            "0002.mp4": VIDEO,
            "0002.json": json.dumps(note).encode(),
            "0003.cls": b"1",
        },
        mode,
    )
    write_tar(root / f"00001.{form}", {"0001.v1.mp4": VIDEO, "0001.txt": b"A dog."}, mode)
    assert find_sources(root).layout == "webdataset"
    assert lines(root) == {
        "00000/0001": {"text": ["A man.", "A person."]},
        "00000/0002": {"caption": ["A cat."], "tags": ["Grey."]},
        "00001/0001": {"text": ["A dog."]},
    }
    assert manifest(tmp_path / "store")["ignored"] == {".cls": 1, ".json": 1}


@pytest.mark.parametrize(
    ("text", "cause"),
    [(b"{", "no JSON"), (b"[1]", "no key of the JSON"), (b'{"url": "x"}', "no key of the JSON")],
)
def test_a_json_without_a_caption_is_listed(tmp_path: Path, text: bytes, cause: str) -> None:
    root = tmp_path / "data"
    write_tar(root / "0.tar", {"a.mp4": VIDEO, "a.txt": b"A.", "b.mp4": VIDEO, "b.json": text})
    assert list(lines(root)) == ["0/a"]
    (note,) = manifest(tmp_path / "store")["texts_left_out"]
    assert cause in note["cause"] and note["clip"] == "0/b"


# ---------------------------------------------------------------- finding the layout


def test_which_layout_is_found(tmp_path: Path) -> None:
    clip = clip_id(1)
    celebvtext = {f"videos/{clip}.mp4": VIDEO, f"texts/emotion/{clip}.txt": b"Calm."}
    cases: dict[str, dict[str, bytes | str]] = {
        "celebvtext": celebvtext,
        "folder": {f"{clip}.mp4": VIDEO, f"{clip}.txt": b"Named as in CelebV-Text."},
        "table": {**celebvtext, "metadata.csv": "file_name,text\nvideos/x.mp4,A.\n"},
    }
    for layout, files in cases.items():
        assert find_sources(write_files(tmp_path / layout, files)).layout == layout
    write_tar(tmp_path / "tars" / "celebvtext.tar", celebvtext)
    assert find_sources(tmp_path / "tars").layout == "celebvtext"


def test_the_layout_is_said(tmp_path: Path) -> None:
    root = write_files(tmp_path / "data", {"a.mp4": VIDEO, "a.txt": "A cat.", "b.mp4": VIDEO})
    said: list[str] = []
    preprocess(config(root, layout=None), log=said.append)
    assert said == [
        f"{root}: 2 videos and images, 1 of them with texts, read as data.layout=folder"
    ]


def test_celebvtext_keeps_its_categories_and_groups(tmp_path: Path) -> None:
    clip = clip_id(1)
    files = {f"texts/{name}/{clip}.txt": text for name, text in captions(clip).items()}
    root = write_files(tmp_path / "data", {f"videos/{clip}.mp4": VIDEO, **files})
    (source,) = find_sources(root).sources
    assert source.groups == {} and len(source.texts[clip]) == 6 and len(source.categories) == 6


def test_a_folder_that_grows_becomes_many_shards_and_back(tmp_path: Path, monkeypatch) -> None:
    """No clip twice, none lost, and a changed caption is noticed after it."""
    monkeypatch.setattr("dalle2_video.data.sources.source.FOLDER_SHARD", 4)
    files = {f"{k}{suffix}": VIDEO if suffix == ".mp4" else f"Number {k}." for k in range(7)
             for suffix in (".mp4", ".txt")}  # fmt: skip
    few = {name: data for name, data in files.items() if int(name[0]) < 4}
    root = write_files(tmp_path / "data", few)
    assert len(lines(root)) == 4
    other = tmp_path / "store" / "index" / "data-99.json"  # of an archive that is gone
    before = json.loads((tmp_path / "store" / "index" / "data.json").read_text())
    write_files(root, files | {"0.txt": "Changed."})
    found = lines(root)
    assert len(found) == 7 and found["0"] == {"text": ["Changed."]}
    assert not (tmp_path / "store" / "index" / "data.json").exists()
    for name in files.keys() - few.keys():
        (root / name).unlink()
    other.write_text(json.dumps({**before, "archive": "data-99.zip", "clips": []}))
    made = config(root, layout=None, out=str(tmp_path / "store"))
    with pytest.raises(StoreError, match=r"data-99\.h5 is missing"):
        preprocess(made, log=lambda text: None)
    names = sorted(path.name for path in other.parent.iterdir())
    assert names == ["data-99.json", "data.json"], "the shard of the other archive stays"


def test_another_layout_is_no_silent_mixture(tmp_path: Path) -> None:
    """The same clips under other ids beside the old ones would be in the data twice."""
    files = {
        "videos/a.mp4": VIDEO,
        "videos/a.txt": "A cat.",
        "more/b.mp4": VIDEO,
        "more/b.txt": "B",
    }
    root = write_files(tmp_path / "data", files)
    made = config(root, layout=None, out=str(tmp_path / "store"))
    assert preprocess(made, log=lambda text: None).clips == 2
    write_files(root, {"metadata.csv": "file_name,text\nvideos/a.mp4,A dog.\n"})
    said: list[str] = []
    assert preprocess(made, log=said.append).clips == 1
    assert any("another data.layout" in line for line in said)
    clip = clip_id(1)
    (root / "metadata.csv").unlink()
    for path in [*root.rglob("*.txt"), *root.rglob("*.mp4")]:
        path.unlink()
    write_files(root, {f"videos/{clip}.mp4": VIDEO, f"texts/emotion/{clip}.txt": "Calm."})
    with pytest.raises(StoreError, match=r"was read as data\.layout=table, now it is celebvtext"):
        preprocess(made, log=lambda text: None)
