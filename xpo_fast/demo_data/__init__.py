"""The packaged preference pairs; README.md beside this file tells what they are."""

from pathlib import Path

PAIRS = Path(__file__).with_name("pairs.jsonl")
