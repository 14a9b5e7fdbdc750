"""`python -m fuzz.parsers PARSER --seconds N`: a parser under atheris, which mutates bytes towards code not reached before.

atheris is no dependency: `pip install atheris` into any folder in PYTHONPATH. Everything a parser may raise is QtipError (or
ValueError, where its docstring says so); anything else ends the run with the input in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COUNTED = 100
"""Inputs between two writings of the count."""

Parser = Callable[[bytes], object]


def parsers(folder: Path) -> dict[str, Parser]:
    """Name -> what is given bytes. folder: a directory of the parser's own."""
    from qtipcli.errors import QtipError
    from qtipcli.hub import card
    from qtipcli.hub.config import QtipConfig
    from qtipcli.hub.tensors import _read_headers
    from qtipcli.job.directory import RunDirectory
    from qtipcli.job.header import read_header
    from qtipcli.job.ledger import Ledger
    from qtipcli.model.source import index_weight_map
    from qtipcli.stages.pack import read_record
    from qtipcli.untrusted import parse_json

    def kept(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def header(data: bytes) -> None:
        """What our reader takes, safetensors' own takes too or refuses by an error of ours; and both see the same tensors."""
        path = kept("a.safetensors", data)
        tensors = read_header(path).tensors
        theirs = _read_headers([path])
        assert {name: entry[:2] for name, entry in theirs.items()} == {
            name: (entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()
        }

    def config(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            fields = parse_json(data)
            if isinstance(fields, dict):
                QtipConfig.from_dict(fields).layouts()

    def job(data: bytes) -> None:
        kept("job.json", data)
        RunDirectory.load(folder)

    def front_matter(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            card.inherited(card.front_matter(data.decode(errors="replace")))

    every: dict[str, Parser] = {
        "header": header,
        "tensors": lambda data: _read_headers([kept("b.safetensors", data)]),
        "ledger": lambda data: Ledger(kept("ledger", data)).mend(),
        "job": job,
        "config": config,
        "index": lambda data: index_weight_map(kept("index", data)),
        "record": lambda data: read_record(kept("qtip.json", data).parent),
        "card": front_matter,
    }

    def refusing(parser: Parser) -> Parser:
        def given(data: bytes) -> None:
            with contextlib.suppress(QtipError):
                parser(data)

        return given

    return {name: refusing(parser) for name, parser in every.items()}


def seeds(valid: Path) -> dict[str, list[bytes]]:
    """Parser -> valid inputs, from the directories of fuzz.valid."""
    config = json.loads((valid / "packed" / "config.json").read_bytes())["quantization_config"]
    shard = next((valid / "packed").glob("*.safetensors")).read_bytes()
    small = b'\x48\0\0\0\0\0\0\0{"__metadata__":{"a":"b"},"c":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    return {
        "header": [small.replace(b"\x48", bytes([len(small) - 8])) + b"ab", shard[:20_000]],
        "tensors": [small.replace(b"\x48", bytes([len(small) - 8])) + b"ab"],
        "ledger": [(valid / "job" / "ledger.jsonl").read_bytes()],
        "job": [(valid / "job" / "job.json").read_bytes()],
        "config": [json.dumps(config).encode()],
        "index": [(valid / "packed" / "model.safetensors.index.json").read_bytes()],
        "record": [(valid / "packed" / "qtip.json").read_bytes()],
        "card": [(valid / "packed" / "README.md").read_bytes(), b"---\nlicense: mit\nlanguage: [en, no]\n---\n"],
    }


def main() -> None:
    import atheris

    own = argparse.ArgumentParser(prog="python -m fuzz.parsers", description=__doc__)
    own.add_argument("parser")
    own.add_argument("--seconds", type=int, default=60)
    own.add_argument("--valid", type=Path, required=True, help="where fuzz.valid made its directories")
    own.add_argument("--keep", type=Path, required=True, help="folder for inputs that end a run")
    arguments = own.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qtip-parser-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(arguments.valid)[arguments.parser]):
        (corpus / str(number)).write_bytes(data)
    arguments.keep.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["qtipcli", "yaml", "json"], enable_loader_override=False):
        parser = parsers(folder)[arguments.parser]
    count, started = 0, time.monotonic()
    figures = arguments.keep / f"{arguments.parser}.json"

    def once(data: bytes) -> None:
        nonlocal count
        count += 1
        if count % COUNTED == 0:  # libFuzzer ends the process by itself, without a word to Python
            figures.write_text(json.dumps({"inputs": count, "seconds": round(time.monotonic() - started, 1)}) + "\n")
        parser(data)

    limits = [f"-max_total_time={arguments.seconds}", "-rss_limit_mb=4096", "-timeout=20", "-max_len=65536", "-verbosity=0"]
    atheris.Setup(["fuzz", *limits, f"-artifact_prefix={arguments.keep}/{arguments.parser}-", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
