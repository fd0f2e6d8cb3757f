"""Finding clips and texts in zips, tars and folders of every known spelling; what is left out."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from dalle2_video.data.config import CATEGORIES
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.sources.member import ArchiveError
from dalle2_video.data.sources.source import Catalogue
from tests.helpers.files import write_tar
from tests.helpers.media import captions, clip_id, write_zip

A, B, C = clip_id(1), clip_id(2), clip_id(3)
find = partial(find_sources, layout="celebvtext")


def layout(clips: list[str], videos: str = "videos/celebvtext_6", texts: str = "texts") -> dict:
    """Member names and contents as CelebV-Text lays them out."""
    members = {f"{videos}/{clip}.mp4": f"video of {clip}".encode() for clip in clips}
    for clip in clips:
        for category, text in captions(clip).items():
            members[f"{texts}/{category}/{clip}.txt"] = text
    return members


def contents(catalogue: Catalogue) -> dict[str, dict[str, bytes]]:
    """shard -> clip -> the bytes of its video, however the source gives them."""
    return {
        source.name: {
            clip: member.read() if data is None else data for clip, member, data in source.stream()
        }
        for source in catalogue.sources
    }


def causes(catalogue: Catalogue) -> dict[str, str]:
    return {problem.member: problem.cause for problem in catalogue.problems}


def check_whole(catalogue: Catalogue, clips: list[str]) -> None:
    assert catalogue.problems == []
    (source,) = catalogue.sources
    assert contents(catalogue) == {source.name: {c: f"video of {c}".encode() for c in clips}}
    for clip in clips:
        assert sorted(source.texts[clip]) == sorted(CATEGORIES)
        assert source.texts[clip]["light_color_temp"].read() == b"Warm light.\n"
        assert source.texts[clip]["emotion"].read() == captions(clip)["emotion"]


# ---------------------------------------------------------------- forms and spellings


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz", "tgz", "tar.xz", "folder"])
def test_every_form(tmp_path: Path, form: str) -> None:
    members = layout([A, B])
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "sp_0001.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
    elif form == "folder":
        for name, data in members.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    else:
        compression = {"tar": "", "tar.gz": ":gz", "tgz": ":gz", "tar.xz": ":xz"}[form]
        write_tar(tmp_path / f"sp_0001.{form}", members, f"w{compression}")
    catalogue = find(tmp_path)
    check_whole(catalogue, [A, B])
    expected = "videos__celebvtext_6" if form == "folder" else "sp_0001"
    assert catalogue.sources[0].name == expected
    assert not list(tmp_path.glob("**/*.mp4")) or form == "folder", "something was extracted"


@pytest.mark.parametrize(
    ("videos", "texts"),
    [
        ("videos/celebvtext_6", "texts"),
        ("Videos", "descripitions"),
        ("video", "CelebV-Text/descriptions"),
        ("celebvtext_6", "data/texts"),
        ("a/b/videos/celebvtext_6", "Texts"),
        (".", "."),
    ],
)
def test_every_spelling_of_the_roots(tmp_path: Path, videos: str, texts: str) -> None:
    write_tar(tmp_path / "x.tar", layout([A], videos, texts))
    check_whole(find(tmp_path), [A])


@pytest.mark.parametrize(
    "folder", ["face40_details", "face40_details_new", "face40_details/face40_details_new"]
)
def test_every_spelling_of_the_categories(tmp_path: Path, folder: str) -> None:
    members = {f"videos/{A}.mp4": b"v", f"texts/{folder}/{A}.txt": b"hair"}
    members[f"texts/Light_Color_Temp/{A}.txt"] = b"warm"
    write_tar(tmp_path / "x.tar", members)
    (source,) = find(tmp_path).sources
    assert {c: m.read() for c, m in source.texts[A].items()} == {
        "face40_details": b"hair",
        "light_color_temp": b"warm",
    }


def test_texts_beside_the_videos(tmp_path: Path) -> None:
    """Videos in zips, some texts in their own archive, some in an extracted folder."""
    write_zip(tmp_path / "zips" / "sp_0001.zip", {A: b"a"}, {})
    write_zip(tmp_path / "zips" / "sp_0002.zip", {B: b"b"}, {B: {"emotion": b"own"}})
    write_tar(
        tmp_path / "texts.tar",
        {f"emotion/{A}.txt": b"from the tar", f"emotion/{B}.txt": b"not this one"},
    )
    folder = tmp_path / "descripitions" / "light_dir"
    folder.mkdir(parents=True)
    (folder / f"{A}.txt").write_bytes(b"from the folder")
    catalogue = find(tmp_path)
    assert [source.name for source in catalogue.sources] == ["zips__sp_0001", "zips__sp_0002"]
    one, two = catalogue.sources
    assert one.texts[A]["emotion"].read() == b"from the tar"
    assert one.texts[A]["light_dir"].read() == b"from the folder"
    assert two.texts[B]["emotion"].read() == b"own"
    assert catalogue.problems == []


def test_one_archive_as_root_and_a_folder_of_clips_as_root(tmp_path: Path) -> None:
    write_zip(tmp_path / "in" / "sp.zip", {A: f"video of {A}".encode()})
    check_whole(find(tmp_path / "in" / "sp.zip"), [A])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{B}.mp4").write_bytes(b"b")
    (source,) = find(tmp_path / "mine").sources
    assert source.name == "mine" and source.videos[B].read() == b"b" and source.texts[B] == {}


def test_a_large_folder_becomes_many_shards_that_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dalle2_video.data.sources.source.FOLDER_SHARD", 50)
    folder = tmp_path / "videos"
    folder.mkdir()
    for person in range(60):
        if person == 50:
            assert [s.name for s in find(tmp_path).sources] == ["videos"]
        (folder / f"{clip_id(person)}.mp4").write_bytes(b"v")
    before = {c: s.name for s in find(tmp_path).sources for c in s.videos}
    assert len(before) == 60 and len(set(before.values())) > 20
    for person in range(60, 90):
        (folder / f"{clip_id(person)}.mp4").write_bytes(b"v")
    after = {c: s.name for s in find(tmp_path).sources for c in s.videos}
    assert len(after) == 90 and {clip: after[clip] for clip in before} == before
    # Stores of users have these names: a change here would make their shards again.
    assert [after[clip_id(person)][-2:] for person in range(5)] == ["20", "15", "52", "52", "23"]


def test_a_large_archive_is_one_shard(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dalle2_video.data.sources.source.FOLDER_SHARD", 2)
    write_zip(tmp_path / "sp.zip", {clip: b"v" for clip in (A, B, C)})
    assert [source.name for source in find(tmp_path).sources] == ["sp"]


def test_a_linked_folder_is_followed_and_a_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / f"{A}.mp4").write_bytes(b"a")
    root = tmp_path / "root"
    root.mkdir()
    (root / "videos").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(root)
    (source,) = find(root).sources
    assert list(source.videos) == [A]


def test_clip_names_have_one_or_two_numbers(tmp_path: Path) -> None:
    good = ["_-a_b-c_d_e_0", "M2Ohb0FAaJU_12_3"]
    bad = ["M2Ohb0FAaJU", "M2Ohb0FAaJU_1_2_3", "M2Ohb0FAaJ_1", "M2Ohb0FAaJU_x"]
    write_zip(tmp_path / "x.zip", {name: b"v" for name in good + bad}, {})
    catalogue = find(tmp_path)
    assert sorted(catalogue.sources[0].videos) == sorted(good)
    assert sorted(Path(name).stem for name in causes(catalogue)) == sorted(bad)


def test_a_zip_under_the_name_of_a_tar_is_read(tmp_path: Path) -> None:
    write_zip(tmp_path / "sp.zip", {A: f"video of {A}".encode()})
    (tmp_path / "sp.zip").rename(tmp_path / "sp.tar")
    check_whole(find(tmp_path), [A])


def test_other_files_are_no_concern(tmp_path: Path) -> None:
    write_zip(tmp_path / "sp.zip", {A: f"video of {A}".encode()})
    for name in ("README.txt", "videos/old.h5", "texts/old.pt", ".hidden.zip", "notes/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"something else")
    with zipfile.ZipFile(tmp_path / "sp.zip", "a") as file:
        file.writestr(f"__MACOSX/videos/._{A}.mp4", b"resource fork")
        file.writestr("license.txt", b"non-commercial")
    check_whole(find(tmp_path), [A])


# ---------------------------------------------------------------- what is left out, and why


@pytest.mark.parametrize("name", [f"../{B}.mp4", f"videos/../../{B}.mp4", f"/etc/{B}.mp4"])
@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_a_member_that_points_outside_is_listed(tmp_path: Path, form: str, name: str) -> None:
    members = {**layout([A]), name: b"outside"}
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
            for member, data in members.items():
                file.writestr(member, data)
    else:
        write_tar(tmp_path / f"x.{form}", members, "w" if form == "tar" else "w:gz")
    catalogue = find(tmp_path)
    (problem,) = catalogue.problems
    assert problem.archive == str(tmp_path / f"x.{form}") and problem.member == name
    assert "points outside the archive" in problem.cause
    assert list(catalogue.sources[0].videos) == [A]


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_a_member_too_large_to_be_a_clip_is_never_read(
    tmp_path: Path, monkeypatch, form: str
) -> None:
    """Damage, or a bomb: it is refused by the size that its archive gives."""
    members = {f"videos/{A}.mp4": bytes(101), f"videos/{B}.mp4": bytes(100)}
    if form == "zip":
        write_zip(tmp_path / "x.zip", {A: bytes(101), B: bytes(100)}, {})
    else:
        write_tar(tmp_path / f"x.{form}", members, "w" if form == "tar" else "w:gz")
    for module in ("member", "source"):
        monkeypatch.setattr(f"dalle2_video.data.sources.{module}.MOST_BYTES", 100)
    (source,) = find(tmp_path).sources
    found = {clip: (member, data) for clip, member, data in source.stream()}
    assert (found[B][1] or found[B][0].read()) == bytes(100)
    assert found[A][1] is None
    with pytest.raises(ArchiveError, match="too large"):
        found[A][0].read()


@pytest.mark.parametrize("name", [f"C:\\videos\\{B}.mp4", f"..\\{B}.mp4"])
def test_names_of_windows_are_no_way_out(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", {**layout([A]), name: b"outside"})
    assert "points outside" in causes(find(tmp_path))[name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_links_and_devices_in_a_tar_are_listed(tmp_path: Path, kind: bytes, form: str) -> None:
    path = tmp_path / f"x.{form}"
    with tarfile.open(path, "w" if form == "tar" else "w:gz") as tar:
        video = tarfile.TarInfo(f"videos/{A}.mp4")
        video.size = 1
        tar.addfile(video, io.BytesIO(b"a"))
        link = tarfile.TarInfo(f"videos/{B}.mp4")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    catalogue = find(tmp_path)
    assert list(catalogue.sources[0].videos) == [A]
    cause = causes(catalogue)[f"videos/{B}.mp4"]
    assert cause == "is no plain file" or cause == "is a link to /etc/passwd, which is not followed"


def test_a_sparse_member_of_a_tar_is_listed(tmp_path: Path) -> None:
    """Its bytes do not lie end to end, so they cannot be read by their offset."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(f"videos/{A}.mp4")
        info.size = 4
        info.pax_headers = {"GNU.sparse.map": "0,2,998,2", "GNU.sparse.size": "1000"}
        tar.addfile(info, io.BytesIO(b"abcd"))
    catalogue = find(tmp_path)
    assert causes(catalogue) == {f"videos/{A}.mp4": "is no plain file"}


def test_a_link_in_a_zip_is_listed(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", {A: b"a"})
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as file:
        info = zipfile.ZipInfo(f"videos/{B}.mp4")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    assert "is a link" in causes(find(tmp_path))[f"videos/{B}.mp4"]


@pytest.mark.parametrize("name", ["bad.zip", "bad.tar", "bad.tar.gz"])
@pytest.mark.parametrize("data", [b"", b"an error page of a web site" * 50])
def test_an_archive_that_is_none_is_listed(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    write_zip(tmp_path / "good.zip", {A: b"a"})
    catalogue = find(tmp_path)
    (problem,) = catalogue.problems
    assert problem.archive == str(tmp_path / name) and problem.member == ""
    assert problem.cause.startswith("no whole archive: ")
    assert [source.name for source in catalogue.sources] == ["good"]


def test_a_truncated_zip_is_listed(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", {A: bytes(5000)})
    os.truncate(tmp_path / "x.zip", 4000)
    assert causes(find(tmp_path))[""].startswith("no whole archive")


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_a_truncated_tar_gives_what_is_whole(tmp_path: Path, form: str) -> None:
    noise = {clip: os.urandom(20_000) for clip in (A, B, C)}
    members = {f"videos/{clip}.mp4": noise[clip] for clip in noise}
    path = tmp_path / f"x.{form}"
    write_tar(path, members, "w" if form == "tar" else "w:gz")
    os.truncate(path, int(path.stat().st_size * (0.55 if form == "tar" else 0.5)))
    catalogue = find(tmp_path)
    assert causes(catalogue)[""].startswith("no whole archive")
    (source,) = catalogue.sources
    assert A in source.videos
    found = {clip: (member, data) for clip, member, data in source.stream()}
    assert list(found) == [A, B]
    assert (found[A][0].read() if form == "tar" else found[A][1]) == noise[A]
    assert found[B][1] is None
    with pytest.raises(ArchiveError, match="truncated: its archive ends"):
        found[B][0].read()


def test_a_damaged_or_encrypted_member_is_named(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", {A: b"payload of the video"})
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"payload", b"damaged"))
    (source,) = find(tmp_path).sources
    with pytest.raises(ArchiveError, match=r"unreadable in its archive: Bad CRC"):
        source.videos[A].read()
    encrypted = bytearray(data)
    encrypted[6] |= 1  # the flag of the first member's local header
    central = encrypted.index(b"PK\x01\x02")
    encrypted[central + 8] |= 1
    (tmp_path / "y.zip").write_bytes(encrypted)
    (tmp_path / "x.zip").unlink()
    (source,) = find(tmp_path).sources
    with pytest.raises(ArchiveError, match="encrypted"):
        source.videos[A].read()


def test_odd_names_copies_and_unknown_texts_are_listed(tmp_path: Path) -> None:
    members = layout([A])
    members |= {
        "videos/trailer.mp4": b"no clip name",
        f"videos/more/{A}.mp4": b"a second copy",
        f"texts/hairstyle/{A}.txt": b"no known category",
        f"texts/hairstyle/{B}.txt": b"the folder is listed once",
    }
    write_tar(tmp_path / "x.tar", members)
    catalogue = find(tmp_path)
    found = causes(catalogue)
    assert found["videos/trailer.mp4"].startswith("its name is no clip name")
    assert found[f"videos/more/{A}.mp4"].startswith("a second copy: videos/celebvtext_6")
    assert found["texts/hairstyle"].startswith("texts of no known category")
    assert len(found) == len(catalogue.problems) == 3


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        find(tmp_path / "nowhere")
    with pytest.raises(ArchiveError, match="holds no clips: expected videos with a text"):
        find(tmp_path)


def test_two_archives_of_one_name(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", {A: b"a"})
    write_tar(tmp_path / "x.tar", layout([B]))
    with pytest.raises(ArchiveError, match="have one name: rename one"):
        find(tmp_path)


def test_the_fingerprint_follows_videos_and_texts(tmp_path: Path) -> None:
    def fingerprint(videos: dict, texts: dict | None = None) -> str:
        write_zip(tmp_path / "x.zip", videos, texts)
        return find(tmp_path).sources[0].fingerprint()

    first = fingerprint({A: b"aa", B: b"bb"})
    assert fingerprint({B: b"bb", A: b"aa"}) == first
    others = [
        fingerprint({A: b"aa"}),
        fingerprint({A: b"aa", B: b"bbb"}),
        fingerprint({A: b"aa", B: b"bb"}, {A: {"emotion": b"x"}}),
    ]
    assert len({first, *others}) == 4
