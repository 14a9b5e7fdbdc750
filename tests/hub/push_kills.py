"""Pushes a large packed directory to the loopback server, kills the push within files, counts what was sent twice.

    PYTHONPATH=src:kernels:tests python -m hub.push_kills --megabytes 200 --kills 5

The directory is the tiny model's with shards of random numbers beside it, in the index and among the checksums. Each kill is a
SIGKILL while a shard is under way, at a byte drawn at random; then the same command is given again. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hub.clients import Clients
from hub.loopback import Loopback
from safetensors.torch import save_file

from qtipcli.job.files import sha256_file

NAME = "writer/large"
SHARD_MEGABYTES = 20


def enlarge(directory: Path, megabytes: int) -> None:
    """Add shards of random numbers to a packed directory."""
    index_file, record_file = directory / "model.safetensors.index.json", directory / "qtip.json"
    index, record = json.loads(index_file.read_text()), json.loads(record_file.read_text())
    generator = torch.Generator().manual_seed(0)
    for number in range(-(-megabytes // SHARD_MEGABYTES)):
        name, file = f"extra.{number}", f"extra-{number:05d}.safetensors"
        size = SHARD_MEGABYTES * 1_000_000
        save_file({name: torch.randint(256, (size,), dtype=torch.uint8, generator=generator)}, directory / file)
        index["weight_map"][name] = file
        record["sha256"][file] = sha256_file(directory / file)
    index_file.write_text(json.dumps(index))
    record_file.write_text(json.dumps(record))


def run(directory: Path, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Push `directory`, killed so many times, then to its end. folder: for the client's own files."""
    draw = random.Random(seed)
    started = time.monotonic()
    with Loopback() as hub:
        clients = Clients(hub.environment(folder / "home"), folder)
        try:
            for _ in range(kills):
                hub.hold(draw.randrange(1, SHARD_MEGABYTES * 1_000_000), upload=draw.randrange(2))
                clients.start("push", directory, NAME)
                if not hub.held.wait(300):
                    raise AssertionError("the push ended before it could be killed")
                clients.kill()
                hub.resume.set()
            last = clients.qtip("push", directory, NAME, "--json")
            again = clients.qtip("push", directory, NAME, "--json")
        finally:
            clients.close()
        local = {file.name: file for file in directory.iterdir() if file.is_file() and not file.name.startswith(".")}
        tree = hub.tree(NAME)
        complete = Counter(upload.oid for upload in hub.uploads if upload.complete)
        return {
            "bytes": sum(file.stat().st_size for file in local.values()),
            "kills": kills,
            "statuses": [last.status, again.status],
            "commits": len(hub.commits),
            "large_files": len(complete),
            "files_sent_twice": sum(count > 1 for count in complete.values()),
            "small_files_in_commits": len(hub.commits[0].small),
            "bytes_sent_to_completion": sum(upload.bytes for upload in hub.uploads if upload.complete),
            "bytes_cut_off": sum(upload.bytes for upload in hub.uploads if not upload.complete),
            "cut_off_uploads": sum(not upload.complete for upload in hub.uploads),
            "equal_files": sum(
                tree[name][0] == file.read_bytes() for name, file in local.items() if name in tree and name != "README.md"
            ),
            "files": len(local),
            "seconds": round(time.monotonic() - started, 1),
        }


def main() -> None:
    from stages.tiny import FAST_OPTIONS, save_model, save_text

    from qtipcli.cli.main import _run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = save_model("llama", folder / "model"), save_text(folder / "text.txt")
        said = ("quantize", model, *FAST_OPTIONS, "--data", text, "--out", folder / "out", "--hessians", folder / "hessians")
        if _run([str(part) for part in said]) != 0:
            raise SystemExit(1)
        enlarge(folder / "out", arguments.megabytes)
        print(json.dumps(run(folder / "out", arguments.kills, folder, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
