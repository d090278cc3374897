"""Which processes hold a run up, from what each said last."""

from __future__ import annotations

import re
from collections.abc import Mapping

from finetune.run.beat import Beat

_GONE = re.compile("process is|silent|no longer answers")


def suspects(heard: Mapping[int, tuple[Beat, float]], now: float, mute: bool, silent: float) -> dict[int, str]:
    """Ranks that the others wait for, each with why it is one.

    Args:
        heard: the newest word of each rank, and when it came.
        now: the time, by the same clock.
        mute: whether nothing is heard of anyone, since the store does not answer.
        silent: seconds without a word after which a rank is suspected.
    """
    found = {}
    for rank, (beat, at) in heard.items():
        state = beat.state()
        if state in ("dead", "stopped"):
            found[rank] = f"its process is {state}"
        elif mute and rank == 0 and state == "":
            found[rank] = "it no longer answers"
        elif not mute and now - at > silent:
            found[rank] = f"it has been silent for {now - at:.0f} s"
    if not found:
        stuck = {rank: beat for rank, (beat, _) in heard.items() if not beat.waits}
        if len(stuck) < len(heard):
            words = "it has done nothing for {:.0f} s but its own work"
            found = {rank: words.format(beat.age) for rank, beat in stuck.items()}
    if not found:
        least = min((beat.step for beat, _ in heard.values()), default=0)
        late = {rank for rank, (beat, _) in heard.items() if beat.step == least}
        if len(late) < len(heard):
            found = dict.fromkeys(late, "it is a step behind the others")
    return dict(sorted(found.items()))


def gone(found: Mapping[int, str]) -> dict[int, str]:
    """Suspects that do not just dawdle, with why."""
    return {rank: why for rank, why in found.items() if _GONE.search(why)}


def named(found: Mapping[int, str], heard: Mapping[int, tuple[Beat, float]]) -> str:
    """The suspects in a sentence, with what each said last."""
    return " | ".join(
        f"rank {rank}: {why}; {heard[rank][0].told() if rank in heard else 'nothing is known of it'}"
        for rank, why in sorted(found.items())
    )
