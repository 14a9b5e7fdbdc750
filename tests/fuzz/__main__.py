"""`python -m fuzz --minutes N`: broken directories until the time is up; counts and findings as JSON.

With src, kernels and tests in PYTHONPATH. Exit status 1 where something was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fuzz import campaign, valid
from fuzz.worker import EXTRA_BYTES, SECONDS, Worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=valid.KINDS, help="again for several [all]")
    parser.add_argument("--out", type=Path, help="file for the counts, beside what is printed")
    parser.add_argument("--folder", type=Path, help="where directories are broken, in memory best [a temporary one]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qtip-fuzz-") as temporary:
        worker = Worker(arguments.folder or Path(temporary))

        def report(tally: campaign.Tally) -> None:
            print(
                f"{tally.seconds:.0f} s: {sum(tally.inputs.values())} inputs, {len(tally.findings)} findings", file=sys.stderr
            )
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(_figures(tally, arguments.seed), indent=1) + "\n")

        try:
            tally = campaign.run(worker, arguments.minutes * 60, arguments.seed, report, arguments.kind or valid.KINDS)
        finally:
            worker.close()
    print(json.dumps(_figures(tally, arguments.seed), indent=1))
    return int(bool(tally.findings))


def _figures(tally: campaign.Tally, seed: int) -> dict[str, object]:
    return {
        "seed": seed,
        "inputs": sum(tally.inputs.values()),
        "inputs_of": dict(tally.inputs),
        "seconds": round(tally.seconds, 1),
        "answers": dict(tally.answers),
        "slowest_seconds": round(tally.slowest, 2),
        "limits": {"seconds": SECONDS, "bytes": EXTRA_BYTES},
        "findings": [{"where": where, **found} for where, found in tally.findings.items()],
    }


if __name__ == "__main__":
    sys.exit(main())
