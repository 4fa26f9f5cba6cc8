#!/usr/bin/env python3
"""Time of Python detectors on one recorded machine, beside `cargo bench -p theriac-benches --bench score`.

usage: detection.py --data DIR [--machine machine-2-7]

Fits on NAME.train.npy.gz and scores NAME.test.npy.gz. Prints wall time (one thread) of the fit, of scoring the first 2 000
test rows at once, and the median of scoring rows one by one as they arrive, in microseconds a row. Needs numpy and scikit-learn.
"""

import argparse
import gzip
import io
import os
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

LAGS, LAG_MAX = (1, 2, 3, 5, 10), 10


def load(path):
    return np.load(io.BytesIO(gzip.open(path, "rb").read())).astype(np.float64)


def design(rows):
    return np.concatenate([rows[LAG_MAX - lag : len(rows) - lag] for lag in LAGS], axis=1)


class Forest:
    name = "scikit-learn IsolationForest, 100 trees"

    def fit(self, rows):
        self.model = IsolationForest(n_estimators=100, random_state=0).fit(rows)

    def score(self, rows):
        return -self.model.score_samples(rows)

    def one(self, rows, t):
        return self.score(rows[t : t + 1])


class Components:
    name = "scikit-learn PCA 90 %, squared error"

    def fit(self, rows):
        self.model = PCA(0.9, svd_solver="full").fit(rows)

    def score(self, rows):
        return ((rows - self.model.inverse_transform(self.model.transform(rows))) ** 2).sum(1)

    def one(self, rows, t):
        return self.score(rows[t : t + 1])


class Neighbours:
    name = "scikit-learn nearest neighbour, every 10th train row"

    def fit(self, rows):
        self.model = NearestNeighbors(n_neighbors=1).fit(rows[::10])

    def score(self, rows):
        return self.model.kneighbors(rows)[0][:, 0]

    def one(self, rows, t):
        return self.score(rows[t : t + 1])


class AllLags:
    name = "scikit-learn Ridge on all lags, residuals only"

    def fit(self, rows):
        self.model = Ridge(alpha=10.0).fit(design(rows), rows[LAG_MAX:])

    def score(self, rows):
        return np.abs(rows[LAG_MAX:] - self.model.predict(design(rows))).mean(1)

    def one(self, rows, t):
        return self.score(rows[t - LAG_MAX : t + 1])


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--machine", default="machine-2-7")
    parser.add_argument("--single-rows", type=int, default=50)
    arguments = parser.parse_args()
    train, test = (load(f"{arguments.data}/{arguments.machine}.{part}.npy.gz") for part in ("train", "test"))
    print(f"{arguments.machine}: {train.shape[0]} train rows, {test.shape[0]} test rows, {train.shape[1]} channels")
    print(f"{'detector':55s}{'fit s':>9s}{'batch us/row':>14s}{'single us/row':>15s}")
    for detector in (Forest(), Components(), Neighbours(), AllLags()):
        fit = timed(lambda: detector.fit(train))
        batch = min(timed(lambda: detector.score(test[:2000])) for _ in range(3)) * 1e6 / 2000
        rows = range(LAG_MAX, LAG_MAX + arguments.single_rows)
        single = np.median([timed(lambda t=t: detector.one(test, t)) for t in rows]) * 1e6
        print(f"{detector.name:55s}{fit:9.2f}{batch:14.1f}{single:15.0f}", flush=True)


if __name__ == "__main__":
    main()
