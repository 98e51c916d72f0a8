"""Outputs of the command `nbl` are whole or absent, and nothing of others is replaced."""

import json
from pathlib import Path

import pytest
from command import nbl, refusal_of
from nbl_cli.output import new_folder, write_file, write_record

pytestmark = pytest.mark.usefixtures("offline")


def test_an_existing_target_is_refused_and_kept(tiny, book, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    command = ["calibrate", tiny, "--text", book, "-o", out]
    assert "is not empty" in refusal_of(*command)
    assert "did not write 'thesis.tex'" in refusal_of(*command, "--overwrite")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    assert nbl(*command).exit_code == 0  # an empty folder is taken
    assert "is not empty" in refusal_of(*command)
    assert nbl(*command, "--overwrite").exit_code == 0
    (out / "notes.txt").write_text("mine")
    assert "did not write 'notes.txt'" in refusal_of(*command, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and (out / "nbl_report.json").is_file()
    assert "is a file" in refusal_of(*command[:-1], out / "notes.txt", "--overwrite")
    assert "existing folder" in refusal_of(*command[:-1], tmp_path / "no" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_report_keeps_files_of_others(calibrated, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert "exists" in refusal_of("report", calibrated, "-o", page)
    assert page.read_text() == "mine"
    assert nbl("report", calibrated, "-o", page, "--overwrite").exit_code == 0
    assert nbl("report", calibrated, "-o", page).exit_code == 0  # its own page is replaced


# ---- outputs are whole or absent -----------------------------------------------------------------


def test_a_failed_block_leaves_nothing(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_replacing_swaps_whole_folders(tmp_path):
    for round_ in ("first", "second"):
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / round_).mkdir()
            (folder / round_ / "data").write_text(round_)
            write_record(folder, {"score": float("nan"), "path": Path("x")})
            if round_ == "second":
                assert (tmp_path / "out" / "first" / "data").read_text() == "first"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["nbl_report.json", "second"]
    record = json.loads((tmp_path / "out" / "nbl_report.json").read_text())
    assert record == {"score": None, "path": "x", "files": ["nbl_report.json", "second/data"]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(FileExistsError), new_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]


def test_a_file_is_written_whole(tmp_path):
    write_file(tmp_path / "a", b"nbl report 1")
    write_file(tmp_path / "a", b"nbl report 2")
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write_file(tmp_path / "no" / "a", b"")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"nbl report 2")]
