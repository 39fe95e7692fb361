"""What is said of a pass where no terminal shows a bar."""

import pytest

from analysis.latents.progress import PassProgress


def test_a_line_with_the_time_left() -> None:
    progress = PassProgress(total=1000, done=100)
    progress._done = 400
    assert progress.line(30) == "40% of 1000 tokens, 10 tokens/s, 01:00 left"  # 300 in 30 s, 600 to go


def test_nothing_done_yet() -> None:
    assert PassProgress(total=1000, done=0).line(5).endswith("? left")


def test_lines_are_a_minute_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("analysis.latents.progress.time.monotonic", lambda: now[0])
    with PassProgress(total=1000, done=0) as progress:
        for second in range(0, 150, 10):
            now[0] = second
            progress.update(second)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["6%", "12%"]


def test_a_pass_that_goes_on_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with PassProgress(total=1000, done=250):
        pass
    assert capsys.readouterr().err == "latents: goes on after 25% of 1000 tokens\n"
