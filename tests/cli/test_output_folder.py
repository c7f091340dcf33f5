"""The folder of `--output` is replaced whole, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraga._atomic_files import atomic_folder


def filled(path: Path, content: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(content)
    return path


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_the_new_folder_takes_the_place_of_the_old(there, tmp_path):
    if there:
        filled(tmp_path / "out", "old")
    with atomic_folder(tmp_path / "out") as folder:
        filled(folder, "new")
        assert tree(tmp_path / "out") == ({"adapter_config.json": "old"} if there else {})
    assert tree(tmp_path) == {"out/adapter_config.json": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_an_old_folder_is_moved_back_where_the_new_one_cannot_be_put(there, error, tmp_path, monkeypatch):
    if there:
        filled(tmp_path / "out", "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise error("cannot be renamed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(error, match="cannot be renamed"), atomic_folder(tmp_path / "out") as folder:
        filled(folder, "new")
    assert tree(tmp_path) == ({"out/adapter_config.json": "old"} if there else {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there  # nothing is left beside it
