#!/usr/bin/env python3
"""Reads a detector (NAME.safetensors, format version 1) and scores a metrics file, with numpy alone.

    python3 docs/read_model.py MODEL.safetensors METRICS.csv|.npy SCORES.npy

It gives what `theriac-edge score` gives: one score a row. It shows how to read the file, and checks the program from outside.
"""
import csv, hashlib, json, struct, sys
from datetime import datetime
import numpy as np

LAGS = [1, 2, 3, 5, 10]


def read_model(path):
    """Card and tensors by name. A safetensors file: length of the header, header (JSON), bytes of the tensors."""
    data = open(path, "rb").read()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    card = json.loads(header.pop("__metadata__")["theriac"])
    if card["format_version"] != 1:
        sys.exit(f"{path} has format version {card['format_version']}, this script reads 1")
    digest, tensors = hashlib.sha256(), {}
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        shape = "[" + ", ".join(map(str, entry["shape"])) + "]"
        digest.update(f"{name}\t{entry['dtype']}\t{shape}\n".encode() + body[begin:end])
        kind = {"F32": "<f4", "F64": "<f8"}[entry["dtype"]]
        tensors[name] = np.frombuffer(body[begin:end], kind).reshape(entry["shape"])
    if digest.hexdigest() != card["tensors_sha256"]:
        sys.exit(f"{path} is damaged: its tensors are not those of its card")
    return card, tensors


def read_rows(path, features):
    """Rows [time, channel] as float32, in the order of the card; a missing value is NaN. And their times in seconds, where the file has any."""
    if path.endswith(".npy"):
        return np.load(path).astype(np.float32), None
    names, *rows = csv.reader(open(path, newline=""))
    columns = [names.index(feature["name"]) for feature in features]
    times = [row[0] for row in rows]
    try:
        times = np.array(times, float)
    except ValueError:
        times = np.array([datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() for time in times])
    return np.array([[float(row[c] or "nan") for c in columns] for row in rows], np.float32), times


def scaled(rows, times, card, t):
    """Rows in units of their own spread, holes filled with the last value; and which values count in the score."""
    features = card["profile"]["features"]
    log = np.array([feature["transform"] == "log1p" for feature in features])
    with np.errstate(all="ignore"):
        rows = np.where(log, np.log1p(np.where(rows < 0, np.float32(0), rows)), rows)
        x = np.clip((rows - t["normaliser.location"]) / t["normaliser.scale"], -50, 50)
    x[~np.isfinite(rows)] = np.nan
    last, run, mute, seen = (np.zeros(x.shape[1], kind) for kind in (np.float32, int, int, bool))
    counts = np.empty(x.shape, bool)
    # More than eleven steps after the row before, what was before says nothing.
    gaps = np.zeros(len(x), bool)
    if times is not None:
        gaps[1:] = np.round(np.diff(times) * 1000) > 11 * card["step_seconds"] * 1000
    for row, here, gap in zip(x, counts, gaps):
        mute = np.full_like(mute, 11) if gap else mute
        missing = np.isnan(row)
        seen |= ~missing
        run = np.where(missing, run + 1, 0)
        # Missing from the beginning or for more than ten rows: silent until all lags are there again.
        mute = np.where(missing, np.where(~seen | (run > 10), 11, mute), np.maximum(mute - 1, 0))
        row[missing] = last[missing]
        last = row.copy()
        here[:] = (mute == 0) & (t["normaliser.seen"] > 0)
    return x, counts


def forecasts(x, t):
    """What each row from the eleventh on should be: from each channel's own lags, and from all lags of all channels."""
    n, c = x.shape
    lags = np.concatenate([x[10 - lag : n - lag] for lag in LAGS], axis=1)
    own = np.broadcast_to(t["forecast.own.weight"][:, 5], (n - 10, c)).copy()
    for lag in range(5):
        own += t["forecast.own.weight"][:, lag] * lags[:, lag * c : (lag + 1) * c]
    full = own.copy()  # above 128 channels there are no weights on all lags
    if "forecast.full.weight" in t and t["forecast.full.weight"].size:
        full = np.broadcast_to(t["forecast.full.weight"][-1], (n - 10, c)).copy()
        for column, weights in zip(lags.T, t["forecast.full.weight"]):
            full += column[:, None] * weights
    if "network.values" in t:  # hidden bias [8], hidden weight [8, 5c], output bias [c], output weight [c, 8]
        u, U, v, V = np.split(t["network.values"], np.cumsum([8, 40 * c, c]))
        full += v + np.tanh(u + np.clip(lags, -8, 8) @ U.reshape(8, -1).T) @ V.reshape(c, 8).T
    return {"own": own, "full": full}


def scores(rows, times, card, t):
    """One score a row; the first ten rows get that of the eleventh. NaN where no channel counts."""
    x, counts = scaled(rows, times, card, t)
    n, c = x.shape
    if n <= 10:
        return np.full(n, np.nan, np.float32)
    # Not below one and three rows: a smoothing shorter than a row is none, and two equal ones are one.
    half_lives = np.maximum(np.array(card["half_lives_seconds"]) / max(card["step_seconds"], 1e-3), [1, 3])
    total = np.zeros(n - 10)
    for path, forecast in forecasts(x, t).items():
        if path not in {"own-full": ("own", "full"), "own": ("own",)}[card["arm"]]:
            continue
        z = np.where(counts[10:], np.abs(x[10:] - forecast) / t[f"head.{path}.base"], np.float32(0)).astype(float)
        *levels, overall = t[f"head.{path}.level"]
        ratios = []
        for half_life, level in zip(half_lives, levels):
            y, alpha, means, started = np.zeros(c), 1 - 0.5 ** (1 / half_life), [], False
            for row, counting in zip(z, counts[10:].any(axis=1)):
                if counting:  # a row in which nothing counts changes nothing; the first that does is the start
                    y, started = y + (alpha if started else 1) * (row - y), True
                means.append(np.sort(y)[-max(c // 6, 1) :].mean())
            ratios.append(np.array(means) / level)
        total += np.maximum(*ratios) / overall
    total[~counts[10:].any(axis=1)] = np.nan
    return np.concatenate([np.full(10, total[0]), total]).astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    card, tensors = read_model(sys.argv[1])
    rows, times = read_rows(sys.argv[2], card["profile"]["features"])
    np.save(sys.argv[3], scores(rows, times, card, tensors))
