#!/usr/bin/env python3
"""Quality and time of Python detectors and of theriac-edge on the same recorded machines, one after the other in one run.

usage: quality.py --data DIR --out OUT --edge theriac-edge [--only NAME,...] [--machines 1-2,1-3]

Every detector is fitted on NAME.train.npy.gz alone and scores NAME.test.npy.gz, causally, with one setting for all machines.
Writes OUT/DETECTOR/NAME.npy for `theriac-lab evaluate --scores OUT/DETECTOR --labels DIR` and prints seconds of processor and of wall
time (median and extremes over machines) for the fit and for all test rows at once, reading and writing of files left out for
Python and included for theriac-edge. Needs numpy, scikit-learn and torch; one thread.
"""

import argparse
import glob
import gzip
import io
import os
import resource
import subprocess
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest

torch.set_num_threads(1)
WINDOW, STEPS, BATCH = 10, 1500, 256


def load(path):
    return np.load(io.BytesIO(gzip.open(path, "rb").read())).astype(np.float32)


class Scaler:
    def __init__(self, rows):
        low, high = np.quantile(rows, (0.05, 0.95), axis=0)
        self.m = np.median(rows, axis=0)
        self.s = np.maximum(np.maximum((high - low) / 3.29, 0.25 * rows.std(0)), 0.01)

    def __call__(self, rows):
        return np.clip((rows - self.m) / self.s, -8, 8).astype(np.float32)


class Head:
    """Residuals over their 99 % quantile, exponential mean of half-life 3 rows, mean of the largest sixth: the published head."""

    def __init__(self, residuals):
        b = np.quantile(residuals, 0.99, axis=0)
        self.b = np.maximum(np.maximum(b, 0.05 * b.max()), 1e-3)

    def __call__(self, residuals):
        z, alpha = residuals / self.b, 1 - 2 ** (-1 / 3)
        y = np.empty_like(z)
        y[0] = z[0]
        for t in range(1, len(z)):
            y[t] = y[t - 1] + alpha * (z[t] - y[t - 1])
        return np.sort(y, axis=1)[:, -max(1, z.shape[1] // 6):].mean(1)


class Forest:
    def fit(self, rows):
        self.model = IsolationForest(n_estimators=100, random_state=0).fit(rows)

    def score(self, rows):
        return -self.model.score_samples(rows)


class Components:
    def fit(self, rows):
        self.model = PCA(0.9, svd_solver="full").fit(rows)

    def score(self, rows):
        return ((rows - self.model.inverse_transform(self.model.transform(rows))) ** 2).sum(1)


def windows(x):
    """Window t holds the rows up to t; the first ones repeat the first row."""
    padded = np.concatenate([np.repeat(x[:1], WINDOW - 1, axis=0), x])
    view = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=0)
    return np.ascontiguousarray(view.transpose(0, 2, 1))


class Network:
    def fit(self, rows):
        torch.manual_seed(0)
        self.scale = Scaler(rows)
        x = self.scale(rows)
        self.build(x.shape[1])
        inputs, targets = self.pairs(x)
        adam = torch.optim.Adam(self.net.parameters(), 2e-3)
        draw = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            at = torch.randint(0, len(inputs), (BATCH,), generator=draw)
            loss = torch.nn.functional.huber_loss(self.net(inputs[at]), targets[at])
            adam.zero_grad()
            loss.backward()
            adam.step()
        self.head = Head(self.residuals(x))

    def residuals(self, x):
        inputs, _ = self.pairs(x)
        with torch.no_grad():
            out = torch.cat([self.net(part) for part in inputs.split(4096)])
        return np.abs(x - self.last(out).numpy())

    def score(self, rows):
        return self.head(self.residuals(self.scale(rows)))


class Autoencoder(Network):
    """Window of 10 rows through 32 units and back."""

    def build(self, channels):
        n = self.channels = channels
        nn = torch.nn
        self.net = nn.Sequential(nn.Linear(n * WINDOW, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, n * WINDOW))

    def pairs(self, x):
        flat = torch.from_numpy(windows(x).reshape(len(x), -1))
        return flat, flat

    def last(self, out):
        return out[:, -self.channels:]


class Convolution(Network):
    """Forecast of a row from the 10 before it: two convolutions of 32, then a linear layer."""

    def build(self, channels):
        nn = torch.nn
        self.net = nn.Sequential(nn.Conv1d(channels, 32, 3), nn.ReLU(), nn.Conv1d(32, 32, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * (WINDOW - 6), channels))

    def pairs(self, x):
        before = np.concatenate([x[:1], x[:-1]])
        return torch.from_numpy(windows(before).transpose(0, 2, 1).copy()), torch.from_numpy(x)

    def last(self, out):
        return out


class Edge:
    """The program itself, as a user runs it."""

    def __init__(self, program, out):
        self.program, self.model = program, os.path.join(out, "edge.safetensors")

    def run(self, *words):
        subprocess.run([self.program, *words], check=True, stdout=subprocess.DEVNULL)

    def fit_file(self, path):
        self.run("train", "--input", path, "--model", self.model)

    def score_file(self, path, output):
        self.run("score", "--model", self.model, "--input", path, "--output", output)


DETECTORS = {"theriac": None, "forest": Forest, "pca": Components, "torch-autoencoder": Autoencoder, "torch-convolution": Convolution}


def timed(work):
    usage = lambda: sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    wall, processor = time.perf_counter(), usage()
    result = work()
    return result, usage() - processor, time.perf_counter() - wall


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--edge", default="theriac-edge")
    parser.add_argument("--only", default=",".join(DETECTORS))
    parser.add_argument("--machines", default="")
    a = parser.parse_args()
    paths = sorted(glob.glob(os.path.join(a.data, "*.train.npy.gz")))
    names = [os.path.basename(p)[: -len(".train.npy.gz")] for p in paths]
    names = [n for n in names if not a.machines or any(n.endswith("-" + m) for m in a.machines.split(","))]
    times = {d: [] for d in a.only.split(",")}
    for name in names:
        train, test = (os.path.join(a.data, f"{name}.{part}.npy.gz") for part in ("train", "test"))
        for label in times:
            os.makedirs(os.path.join(a.out, label), exist_ok=True)
            output = os.path.join(a.out, label, name + ".npy")
            if label == "theriac":
                edge = Edge(a.edge, a.out)
                fit = timed(lambda: edge.fit_file(train))
                score = timed(lambda: edge.score_file(test, output))
            else:
                detector, rows, judged = DETECTORS[label](), load(train), load(test)
                fit = timed(lambda: detector.fit(rows))
                score = timed(lambda: detector.score(judged))
                np.save(output, score[0].astype(np.float32))
            times[label].append((fit[1], fit[2], score[1], score[2]))
    for label, rows in times.items():
        low, median, high = np.min(rows, 0), np.median(rows, 0), np.max(rows, 0)
        part = lambda i: f"{median[i]:.2f} ({low[i]:.2f}-{high[i]:.2f})"
        print(f"{label:18} fit {part(0)} s of processor, {part(1)} s of wall; score {part(2)} s, {part(3)} s")


if __name__ == "__main__":
    main()
