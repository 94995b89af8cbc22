"""Tiny artifacts, and the classrooms that tune them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import Calibrator
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.training.classroom import teach
from kbitc.training.preparing import classroom, traced


@pytest.fixture
def schooled(tiny_model, tmp_path):
    """``schooled(family, spec, count)``: model, artifact, classroom and ``count`` lessons of 7 tokens."""

    def make(family: str, spec: str, count: int = 2) -> SimpleNamespace:
        model = tiny_model(family)
        compile_to(model, tmp_path / "packed", Request.of(spec=spec, calibrate="none"))
        artifact = Artifact.open(tmp_path / "packed")
        is_text = family != "roberta"
        ids = torch.randint(101, (count, 7), generator=torch.Generator().manual_seed(1))
        source = Calibrator(open_checkpoint(model), ids)
        feeds = source.feeds()
        program = traced(source, feeds[0])
        lessons = teach(program, source.read, feeds, classes=101, is_text=is_text)
        room = classroom(artifact, source, program)
        return SimpleNamespace(model=model, artifact=artifact, room=room, lessons=lessons, source=source)

    return make
