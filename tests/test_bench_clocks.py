"""The SM clock while something is timed: which reading belongs to what."""

from __future__ import annotations

import threading

from bench.clocks import SmClock
from bench.harness import measure


class TestClock:
    def test_readings_belong_to_what_runs(self):
        values = {"a": 1500, "b": 900}
        with SmClock(read=lambda: values[clock._name]) as clock:
            for name in ("a", "b", "a"):
                clock.mark(name)
                clock.wait_for_reading()
            clock.mark(None)
        assert clock.take() == {"a": 1500, "b": 900}
        assert clock.take() == {}

    def test_a_reading_that_spans_two_names_is_dropped(self):
        done = threading.Event()

        def read():
            clock.mark(None)
            done.set()
            return 7

        with SmClock(read=read) as clock:
            clock.mark("first")
            assert done.wait(timeout=5)
        assert clock.take() == {}

    def test_without_a_reader(self, monkeypatch):
        monkeypatch.setattr("bench.clocks.find_reader", lambda: None)
        with SmClock() as clock:
            clock.mark("a")
        assert clock.take() == {}

    def test_a_reader_that_fails_ends_quietly(self):
        def read():
            raise RuntimeError("gone")

        with SmClock(read=read) as clock:
            clock.mark("a")
            clock._thread.join(timeout=5)
            assert not clock._thread.is_alive()
        assert clock.take() == {}

    def test_the_harness_says_what_it_samples(self):
        log = []
        measure(
            {"a": lambda i: log.append("run a"), "b": lambda i: log.append("run b")},
            repeats=2,
            warmup_s=0,
            clock="host",
            on_sample=log.append,
        )
        turn = ["a", "run a", "b", "run b"]
        assert log == ["run a"] * 2 + ["run b"] * 2 + turn * 2 + [None]
