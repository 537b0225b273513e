"""Folders appear whole or not at all."""

import errno
import json
import os
import stat

import pytest

from tcsp_hf import TCSPError
from tcsp_hf.files import check_output_file, check_output_folder, json_text, new_folder
from tcsp_hf.loading import resolve_name


def everything(folder) -> dict[str, str]:
    """Path -> content of every file below, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "" for path in sorted(folder.rglob("*"))
    }


def test_a_new_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "below" / "out"
    with new_folder(target) as staging:
        (staging / "a.txt").write_text("a")
        (staging / "sub").mkdir()
        assert not target.exists()
        assert staging.parent == target.parent, "on the same disk, so that it can be moved in one step"
    assert everything(tmp_path / "deep" / "below") == {"out": "", "out/a.txt": "a", "out/sub": ""}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as staging:
        (staging / "a.txt").write_text("a")
    assert everything(tmp_path) == {"out": "", "out/a.txt": "a"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [None, {}, {"old.txt": "old"}])
def test_a_failure_leaves_nothing_behind(tmp_path, failure, existing):
    """And what was there before is as it was."""
    target = tmp_path / "out"
    if existing is not None:
        target.mkdir()
        for name, content in existing.items():
            (target / name).write_text(content)
    before = everything(tmp_path)
    with pytest.raises(failure), new_folder(target, overwrite=True) as staging:
        (staging / "half.txt").write_text("half")
        raise failure("stop")
    assert everything(tmp_path) == before


def test_a_folder_that_is_filled_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(TCSPError, match="the result is in") as stop, new_folder(target) as staging:
        (staging / "mine.txt").write_text("mine")
        target.mkdir()
        (target / "theirs.txt").write_text("theirs")
    assert everything(target) == {"theirs.txt": "theirs"}
    aside = str(stop.value).rpartition("the result is in ")[2].rstrip(".")
    assert (tmp_path / aside / "mine.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    """As a container's volume: its content could change, but not the folder itself."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
    with pytest.raises(TCSPError, match="is a mount point, so it cannot be replaced: name a folder below it"):
        check_output_folder(tmp_path / "out", overwrite=True)
    check_output_folder(tmp_path / "out" / "below", overwrite=True)


@pytest.mark.parametrize("existing", [None, {}, {"old.txt": "old"}])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_loses_nothing(tmp_path, monkeypatch, existing, failing):
    """Neither what was there nor the result."""
    target, calls, replace = tmp_path / "out", [], os.replace
    if existing is not None:
        target.mkdir()
        for name, content in existing.items():
            (target / name).write_text(content)
    elif failing == 2:
        pytest.skip("a new folder is put there at one go")
    before = everything(tmp_path)

    def busy(source, place):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, place)

    monkeypatch.setattr(os, "replace", busy)
    said = r"cannot be replaced.*the result is in"
    with pytest.raises(TCSPError, match=said) as stop, new_folder(target, overwrite=True) as staging:
        (staging / "mine.txt").write_text("mine")
    aside = tmp_path / str(stop.value).rpartition("the result is in ")[2].rstrip(".")
    assert (aside / "mine.txt").read_text() == "mine"
    (aside / "mine.txt").unlink()
    aside.rmdir()
    assert everything(tmp_path) == before


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "old.png").write_text("old")
    for name, said in (("old.png", "exists"), ("none/x.png", "not a writable folder"), ("x.foo", r"\.png, \.svg")):
        with pytest.raises(TCSPError, match=said):
            check_output_file(tmp_path / name, "--plot", (".png", ".svg"))
    check_output_file(tmp_path / "new.png", "--plot", (".png", ".svg"))


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    said = r"is not empty: name another one, or pass overwrite=True \(--overwrite\)"
    with pytest.raises(TCSPError, match=said), new_folder(target):
        pytest.fail("the block must not start")
    assert everything(tmp_path) == {"out": "", "out/old.txt": "old"}


def test_a_hidden_file_counts(tmp_path):
    (tmp_path / ".keep").write_text("")
    with pytest.raises(TCSPError, match="is not empty"):
        check_output_folder(tmp_path, overwrite=False)


def test_overwrite_replaces_the_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with new_folder(target, overwrite=True) as staging:
        (staging / "new.txt").write_text("new")
        assert everything(target) == {"old.txt": "old"}, "until the end the old one is there"
    assert everything(tmp_path) == {"out": "", "out/new.txt": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way(tmp_path, overwrite):
    target = tmp_path / "out"
    target.write_text("a file")
    with pytest.raises(TCSPError, match="is not a folder"):
        check_output_folder(target, overwrite)
    with pytest.raises(TCSPError, match="is not a writable folder"):
        check_output_folder(target / "below", overwrite)
    assert target.read_text() == "a file"


def test_a_link_is_not_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(TCSPError, match="is not a folder"):
        check_output_folder(tmp_path / "link", True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TCSPError, match="cannot be written"):
        check_output_folder(tmp_path / "out", False)


def test_rights_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out") as staging:
        (staging / "a").touch()
    plain, made = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out"))
    assert made == plain


def test_relative_paths_and_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("out") as staging:
        (staging / "a.txt").write_text("a")
        monkeypatch.chdir("/")
    assert everything(tmp_path) == {"out": "", "out/a.txt": "a"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch, overwrite):
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for place in (".", tmp_path / "here" / "deep") + (("..", tmp_path) if overwrite else ()):
        with pytest.raises(TCSPError, match=r"holds the current directory, .* name a folder below it"):
            check_output_folder(place, overwrite)
    with new_folder("out", overwrite) as staging:
        (staging / "a.txt").write_text("a")
    assert everything(tmp_path) == {"here": "", "here/deep": "", "here/deep/out": "", "here/deep/out/a.txt": "a"}


def test_the_home_directory_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    with new_folder("~/out") as staging:
        (staging / "a.txt").write_text("a")
    assert everything(tmp_path) == {"home": "", "home/out": "", "home/out/a.txt": "a"}
    assert resolve_name("~/out") == str(tmp_path / "home" / "out") and resolve_name("a/~b") == "a/~b"


def test_checking_touches_nothing(tmp_path):
    assert check_output_folder(tmp_path / "new" / "out", False) == tmp_path / "new" / "out"
    assert everything(tmp_path) == {}


def test_json_of_a_number_that_is_none():
    found = json_text({"kl": float("nan"), "rows": [(1.5, float("-inf"))], "name": "é"})
    assert json.loads(found, parse_constant=pytest.fail) == {"kl": None, "rows": [[1.5, None]], "name": "é"}
