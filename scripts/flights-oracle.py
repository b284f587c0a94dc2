#!/usr/bin/env python3
"""Departures and delays per hour, origin and carrier, computed without Testudo.

    scripts/flights-oracle.py INPUT.csv > out.csv

The flights example must give exactly these rows. One row per (time_hour, origin, carrier) that has
flights, sorted. A flight whose dep_time is NA was cancelled; all others departed. Delays are
whole minutes over the departed flights: their sum (0 if none departed) and their maximum (empty
if none departed). Nothing here is clever, so that it can be believed: one pass, one dictionary.
"""

import csv
import sys

HEADER = "window_start,origin,carrier,departures,cancelled,dep_delay_sum,dep_delay_max"


def totals(rows):
    """The groups: (hour, origin, carrier) to [departures, cancelled, sum, maximum]."""
    groups = {}
    for row in rows:
        key = (row["time_hour"], row["origin"], row["carrier"])
        group = groups.setdefault(key, [0, 0, 0, ""])
        if row["dep_time"] == "NA":
            group[1] += 1
            continue
        delay = int(row["dep_delay"])
        group[0] += 1
        group[2] += delay
        group[3] = delay if group[3] == "" else max(group[3], delay)
    return groups


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: scripts/flights-oracle.py INPUT.csv > out.csv")
    with open(sys.argv[1], newline="", encoding="utf-8") as file:
        groups = totals(csv.DictReader(file))
    print(HEADER)
    for key in sorted(groups):
        print(*key, *groups[key], sep=",")


if __name__ == "__main__":
    main()
