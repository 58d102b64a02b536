"""Print what this machine's primitives can do (docs/benchmarks.md): `python bench/primitives.py [--output json]`."""

import argparse
import json

from core.limits import cpu_count
from datastore.primitives import measure_each


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of hashing, checksums, compression and encryption, one thread.")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.add_argument("--runs", type=int, default=7, help="measurements of which the median counts")
    arguments = parser.parse_args()
    results = []
    for primitive in measure_each(max(1, arguments.runs)):
        results.append(primitive.to_json())
        if arguments.output == "text":
            print(f"{primitive.text:<55}{primitive.rate / 1e6:>8.0f} MB/s{'   in use' if primitive.used else ''}")
    if arguments.output == "json":
        print(json.dumps({"cores": cpu_count(), "primitives": results}, indent=2))


if __name__ == "__main__":
    main()
