"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from elo_engine.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (from 0) out of `steps`: linear warm-up, then cosine to `final` x peak (or
    constant).

    The first step already learns (warm-up counts from 1), the last one runs at `final` x peak.
    """
    warmup = math.ceil(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.decay == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
