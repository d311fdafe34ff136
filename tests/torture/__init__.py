"""A campaign against the promises of docs/security.md: kills, pairs, damage, full disks, hostile and broken input.

    make torture [CASES="train=100 cv=100"] [JOBS=2]

It drives the real commands on a tiny model. `make test` runs a few cases of each campaign (tests/test_torture.py).
Each case is made from its number, so that it can be run again alone, and finished cases are not repeated.
"""
