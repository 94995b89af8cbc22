"""The cache: made for this user alone, and nothing is loaded from one that another could have written."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from kbitc.cache import check_private, make_private
from kbitc.errors import BackendUnavailable
from kbitc.kernels.cpu.build import BuildRecipe, build, find_compiler


@pytest.fixture
def library(tmp_path, monkeypatch):
    try:
        find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("KBITC_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    recipe = BuildRecipe(sources=((source, ()),), flags=("-fPIC", "-O0"))
    return recipe, build(recipe)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_private(library):
    _, path = library
    assert mode(path.parent.parent) == mode(path.parent) == 0o700
    assert {mode(file) for file in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("up", [0, 1, 2])
@pytest.mark.parametrize("bits", [0o002, 0o020])
def test_what_others_can_write_is_not_loaded(up, bits, library):
    recipe, path = library
    place = (path, *path.parents)[up]
    place.chmod(mode(place) | bits)
    with pytest.raises(BackendUnavailable, match=f"{place}: other users may write to it .*chmod go-w"):
        build(recipe)
    place.chmod(mode(place) & ~bits)
    assert build(recipe) == path


@pytest.mark.parametrize("up", [0, 1, 2])
def test_what_another_user_owns_is_not_loaded(up, library, monkeypatch):
    recipe, path = library
    place = (path, *path.parents)[up]
    owner = os.geteuid() + 1
    if os.geteuid() == 0:
        os.chown(place, 4711, -1)
        owner = 4711
    else:
        # Who runs the test may not give files away: let everything else be root's, which is trusted.
        about = type(place).stat

        def owned(self, **options):
            found = list(about(self, **options))
            found[stat.ST_UID] = owner if self == place else 0
            return os.stat_result(found)

        monkeypatch.setattr(type(place), "stat", owned)
    with pytest.raises(
        BackendUnavailable, match=f"{place}: belongs to another user .id {owner}.*KBITC_CACHE"
    ):
        build(recipe)


def test_a_new_folder_is_checked_with_the_one_around_it(tmp_path):
    assert mode(make_private(tmp_path / "new" / "part")) == 0o700
    tmp_path.chmod(0o777)
    with pytest.raises(BackendUnavailable, match="mode 777"):
        make_private(tmp_path / "part")
    with pytest.raises(FileNotFoundError):
        check_private(tmp_path / "absent")


def test_measurements_in_such_a_cache_are_made_again(tmp_path, monkeypatch, caplog):
    from kbitc.compiler.calibrator import Calibrator

    monkeypatch.setenv("KBITC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Calibrator, "_key", lambda *_: "key")
    calibrator = Calibrator(None)
    calibrator.remembered(lambda: {"x": torch.ones(1)})
    assert calibrator.remembered(dict)["x"] == 1
    (path,) = (tmp_path / "cache" / "moments").iterdir()
    assert mode(path) == 0o600
    path.chmod(0o666)
    assert calibrator.remembered(lambda: {"x": torch.zeros(1)})["x"] == 0
    assert "other users may write to it" in caplog.text
