"""The campaign of `make torture`, with a few cases of each kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "mutated recipe": 150, "mutated labels": 60, "mutated template": 60, "mutated data": 150, "hostile template": 31, "text": 100,
    "kill train": 1, "kill predict": 1, "pair train": 1, "damaged run": 8, "damaged checkpoint": 1, "pickle": 1, "other base model": 1,
}  # fmt: skip


def torture(folder, cases):
    words = [str(folder), "--all", "0", "--cases", ",".join(f"{name}={n}" for name, n in cases.items())]
    return subprocess.run(
        [sys.executable, "-m", "torture", *words],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_few_cases_of_each_campaign_have_no_problem(tmp_path):
    done = torture(tmp_path, CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({(entry["campaign"], entry["case"]) for entry in results}) == len(results) == sum(CASES.values())
    assert f"| all | {len(results)} | 0 | |" in done.stdout
