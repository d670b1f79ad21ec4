"""Runs a part of the fuzzer, or all of it: `python -m tests.fuzz [operators|networks] --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .runner import run, run_one

PARTS = {"operators": 200 * 53, "networks": 500}
"""How many calls of each there are in a whole run."""


def main() -> int:
    options = _options()
    if options.only is not None:
        record = run_one(options.part[0], options.seed, options.only)
        print(json.dumps(record, indent=1).replace("\\n", "\n"))
        return int(record["result"] != "right")
    log = Path(options.log)
    code = _code()
    records = _read(log, options.seed, code) if options.resume else []
    if not options.resume:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    end = time.monotonic() + options.budget if options.budget else None
    for part in options.part:
        done = {record["i"] for record in records if record["part"] == part}
        count = PARTS[part] if options.count is None else options.count
        every = range(options.start, options.start + count)
        todo = (i for i in _chosen(part, every, options.operator) if i not in done)
        for record in run(part, options.seed, todo, options.processes, end):
            records.append(record)
            with log.open("a") as file:
                file.write(json.dumps(record | dict(code=code)) + "\n")
            if record["result"] != "right":
                print(f"{record['result']}: {record['operator']}, {record['why']}\n  {_repeat(record)}\n", flush=True)
    print(summary(records))
    return int(any(record["result"] != "right" for record in records))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], default=list(PARTS), help="what to run (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="calls of each part")
    parser.add_argument("--start", type=int, default=0, help="the first call")
    parser.add_argument("--operator", metavar="NAME", help="of the operators this one alone")
    parser.add_argument("--only", type=int, metavar="I", help="call I alone, in this process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no call after that")
    parser.add_argument("--log", default="build/fuzz.jsonl", help="a line of JSON for each call")
    parser.add_argument("--resume", action="store_true", help="run nothing again that the log has of the same code")
    options = parser.parse_args()
    if options.only is not None and len(options.part) != 1:
        parser.error("--only is for one part: operators or networks")
    return options


def _chosen(part: str, every: range, operator: str | None) -> range:
    """Those that draw an operator, which are as many calls apart as there are operators."""
    if operator is None or part != "operators":
        return every
    from .operators import NAMES

    first = every.start + (NAMES.index(operator) - every.start) % len(NAMES)
    return range(first, every.stop, len(NAMES))


def _code() -> str:
    """A hash of the code that is fuzzed and of the fuzzer, for what an older one gave says nothing."""
    root = Path(__file__).parents[2]
    files = sorted(file for folder in ("tritonconv", "kernels", "tests/fuzz") for file in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _read(log: Path, seed: int, code: str) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    records = map(json.loads, log.read_text().splitlines())
    return [record for record in records if (record["seed"], record["code"]) == (seed, code)]


def _repeat(record: dict[str, Any]) -> str:
    return f"python -m tests.fuzz {record['part']} --seed {record['seed']} --only {record['i']}"


def summary(records: list[dict[str, Any]]) -> str:
    """Tables in Markdown: calls, wrong results and crashes, by operator, dtype, layout and backend."""
    tables = []
    for column in ("operator", "dtype", "layout", "backend"):
        rows = [(record[column] or "none", record["result"]) for record in records]
        calls, found = Counter(value for value, _ in rows), Counter(rows)
        lines = [f"| {column} | calls | wrong | crashes |", "|---|---|---|---|"]
        lines += [f"| {v} | {calls[v]} | {found[v, 'wrong']} | {found[v, 'crash']} |" for v in sorted(calls)]
        tables.append("\n".join(lines))
    results = Counter(record["result"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    total = f"{len(records)} calls, {results['wrong']} wrong, {results['crash']} crashes, {seconds:.0f} CPU seconds"
    return "\n\n".join([*tables, total])


if __name__ == "__main__":
    sys.exit(main())
