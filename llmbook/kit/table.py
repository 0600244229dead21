"""Measurements in plain text: a run's headline, a row at a time, and how it ended."""

from typing import Any

Row = dict[str, Any]

LATE = "not run: the time for this chapter was used up"


def describe(run: Row) -> str:
    """A record as a table in plain text."""
    return "\n".join([headline(run), *map(describe_case, [*run["cases"], *run.get("without", [])])])


def headline(run: Row) -> str:
    return (
        f"{run['device']} ({run['capability']}), driver {run['driver']}, torch {run['torch']}, "
        f"triton {run['triton']}, {run['date']}, commit {run['commit']}"
    )


def describe_case(row: Row) -> str:
    """One row: a line for ours and each peer, or the one why there are none."""
    sizes = ", ".join(f"{key}={value}" for key, value in row["sizes"].items())
    lines = [f"{row['name']} ({sizes})"]
    if "status" in row:
        return f"{lines[0]}: {row['status']}: {row['why']}"
    lines += [f"  {key}: {value}" for key, value in row.get("notes", {}).items()]
    for name, result in {"ours": row, **row["peers"]}.items():
        if "ms" in result:
            told = (
                f"{result['ms']:9.4f} ms  [{result['ms_p10']:.4f}, {result['ms_p90']:.4f}]  "
                f"{result['tflops']:8.1f} TFLOP/s  {result['gbs']:8.0f} GB/s"
            )
        else:
            told = "; ".join(f"{status}: {why}" for status, why in result.items())
        lines.append(f"  {name:24} {told}")
    return "\n".join(lines)


def verdict(timed: list[Row], without: list[Row]) -> str:
    """How a run ended, in one line."""
    ends = [row["status"] for row in without]
    kinds = ("skipped", "left out", "wrong", "failed")
    counts = [f"{ends.count(status)} {status}" for status in kinds if status in ends]
    return f"{len(timed) + len(without)} cases: " + ", ".join([f"{len(timed)} timed", *counts]) + "."
