"""Figures, tables and verdicts of the loading comparison, from its rows."""

from __future__ import annotations

import statistics
from typing import Any

from elo_engine.measure.meter import spread

# What the engine is held to, and against whom. Its other methods and the ceilings are no peers.
READ_BOUND, WHOLE_MODEL_BOUND, CEILING_BOUND = 1.02, 5.0, 0.9
NOT_PEERS = ("engine", "ceiling", "transformers")


def summarise(rows: list[dict[str, Any]], arms: list[str], wanted_bytes: int) -> dict[str, dict[str, Any]]:
    """{state: {arm: figures, or {"failed": reason}}}. Ratios: the arm's seconds over the engine's, round by round."""
    summary: dict[str, dict[str, Any]] = {}
    for state in ("cold", "warm"):
        of_state = [row for row in rows if row["state"] == state]
        engine = {row["round"]: row["seconds"] for row in of_state if row["arm"] == "engine" and "failed" not in row}
        figures: dict[str, Any] = {}
        for arm in arms:
            mine = [row for row in of_state if row["arm"] == arm]
            good = [row for row in mine if "failed" not in row]
            reason = next((row["failed"] for row in mine if "failed" in row), None)
            if not good:
                if reason is not None:
                    figures[arm] = {"failed": reason}
                continue
            ratios = [row["seconds"] / engine[row["round"]] for row in good if row["round"] in engine]
            ceiling = arm.startswith("ceiling")

            def middle(key: str, good: list[dict[str, Any]] = good) -> float:
                return statistics.median(row[key] or 0 for row in good)

            seconds = spread([row["seconds"] for row in good])
            over_engine = spread(ratios)
            assert seconds is not None
            figures[arm] = {
                "seconds": vars(seconds), "over_engine": vars(over_engine) if over_engine else None,
                "wanted_bytes_per_s": wanted_bytes / seconds.median,
                "call_bytes_over_wanted": middle("call_bytes") / wanted_bytes,
                "disk_bytes_over_wanted": middle("disk_bytes") / wanted_bytes,
                "peak_rss_bytes": middle("peak_rss_bytes"), "peak_gpu_bytes": middle("peak_gpu_bytes"),
                "mapped": bool(middle("mapped_bytes")), "keeps": not ceiling, "partly_failed": reason,
            }  # fmt: skip
        summary[state] = figures
    return summary


def _times(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})" if ratio else "-"


def table(figures: dict[str, Any]) -> str:
    """One state as Markdown, fastest first, failures last."""
    lines = [
        "| arm | seconds, median (p10 to p90) | x the engine, by round | GB/s of wanted bytes | read / wanted | "
        "from disk / wanted | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    ran = {arm: row for arm, row in figures.items() if "seconds" in row}
    for arm, row in sorted(ran.items(), key=lambda item: item[1]["seconds"]["median"]):
        s = row["seconds"]
        name = arm + (" (mapped)" if row["mapped"] else "") + (" (failed later)" if row["partly_failed"] else "")
        lines.append(
            f"| {name} | {s['median']:.3f} ({s['p10']:.3f} to {s['p90']:.3f}) | {_times(row['over_engine'])} | "
            f"{row['wanted_bytes_per_s'] / 1e9:.2f} | {row['call_bytes_over_wanted']:.3f} | "
            f"{row['disk_bytes_over_wanted']:.3f} | {row['peak_rss_bytes'] / 1e6:.0f} |"
        )
    for arm, row in figures.items():
        if "failed" in row:
            lines.append(f"| {arm} | not measured: {row['failed'].replace('|', '/')} | | | | | |")
    return "\n".join(lines)


def verdicts(state: str, figures: dict[str, Any], device: str = "cpu") -> list[str]:
    """What was promised, and whether this run shows it; a bound is held when the median of the rounds holds it."""
    ran = {arm: row for arm, row in figures.items() if "seconds" in row}
    engine = ran.get("engine")
    if engine is None:
        return [f"{state}: the engine was not measured"]

    def say(held: bool, text: str) -> str:
        return f"{state}: {'yes' if held else '**no**'}: {text}"

    found = []
    read = max(engine["call_bytes_over_wanted"], engine["disk_bytes_over_wanted"])
    found.append(say(read <= READ_BOUND, f"the engine reads {read:.3f} of the wanted bytes (bound {READ_BOUND})"))
    for arm in ("transformers", "transformers_own"):
        whole = ran.get(arm, {}).get("over_engine")
        if whole:
            text = f"the whole model ({arm}) takes {_times(whole)} times as long (bound {WHOLE_MODEL_BOUND:g})"
            found.append(say(whole["median"] >= WHOLE_MODEL_BOUND, text))
    peers = {arm: row for arm, row in ran.items() if not arm.startswith(NOT_PEERS) and row["over_engine"]}
    if peers:
        best = min(peers, key=lambda arm: peers[arm]["over_engine"]["median"])
        ratio = peers[best]["over_engine"]
        text = f"no peer is faster; the fastest, {best}, takes {_times(ratio)} times as long"
        found.append(say(ratio["median"] >= 1, text))
        faster = [arm for arm in peers if peers[arm]["over_engine"]["median"] < 1]
        if faster:
            found.append(f"{state}: faster than the engine: {', '.join(sorted(faster))}")
    # A ceiling's seconds over the engine's: the share of it that the engine reaches.
    shares = {arm: row["over_engine"]["median"] for arm, row in ran.items() if row["over_engine"]}
    shares = {arm: share for arm, share in shares.items() if arm.startswith("ceiling")}
    found += [f"{state}: the engine reaches {100 * share:.0f} % of {arm}" for arm, share in shares.items()]
    if device != "cpu":
        cached = [share for arm, share in shares.items() if arm.startswith("ceiling_page_cache")]
        best = min(cached, default=0.0)  # with one thread or several, whichever is faster
        bound = max(best, *(shares.get(arm, 0.0) for arm in ("ceiling_link", "ceiling_disk")))
        if bound:
            text = f"the engine reaches {100 * bound:.0f} % of the slowest part (bound {100 * CEILING_BOUND:.0f} %)"
            found.append(say(bound >= CEILING_BOUND, text))
    return found


def conditions_text(described: dict[str, Any]) -> str:
    """What was loaded from where, against whom."""
    total, wanted = described["checkpoint_bytes"] / 1e9, described["wanted_bytes"] / 1e9
    peers = ", ".join(f"{name} {version}" for name, version in described["peers"].items())
    return (
        f"{wanted:.2f} GB of a {total:.2f} GB checkpoint ({described['model']}) to {described['device']} of "
        f"{described['device_name']}: {described['tensors']} tensors in {described['ranges']} ranges of "
        f"{described['shards']} shards on {described['filesystem']}; {described['rounds']} rounds, arms interleaved, a "
        f"fresh process each{f'; {peers}' if peers else ''}."
    )


def explanation(described: dict[str, Any]) -> str:
    """What the columns of the tables are."""
    return (
        "Read: bytes returned by read calls, in which mappings and io_uring do not appear. From disk: bytes the block "
        "layer fetched for the process, read-ahead included. Peak memory: growth of the resident size, mapped file "
        f"pages included. ceiling_page_cache_n uses {described['ceiling_threads']} threads, ceiling_disk 16. "
        f"Fresh memory was {'' if described['memory_primed'] else 'not '}primed. "
        "(mapped): what the arm returns is still a mapping of the file."
    )
