#!/usr/bin/env python3
"""A private step of ours and of Opacus, taking turns in one run: CPU time of one thread, medians in milliseconds.

usage: private_step.py --ours PROGRAM [--rounds 5] [--steps 40]

PROGRAM is our benchmark, as `cargo bench -p theriac-benches --bench private_step --no-run` names it. In each round it runs first, then plain torch and
three ways of Opacus, each on the same two autoencoders (38W-64-16-64-38W for W = 1 and 10, tanh, batch 256, single precision, SGD). What slows
one side then slows the other. Prints one JSON line a round, and the least, middle and largest ratio over the rounds. Needs torch and opacus.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
import warnings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[name] = "1"

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

BATCH, RATE = 256, 1e-6


def network(width):
    sizes = [width, 64, 16, 64, width]
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


class RowLoss(torch.nn.Module):
    """Mean over the features: one loss a row, as ghost clipping wants it."""

    reduction = "mean"

    def forward(self, found, wanted):
        rows = ((found - wanted) ** 2).mean(1)
        return rows if self.reduction == "none" else rows.mean()


def plain(width, rows):
    model = network(width)
    optimiser = torch.optim.SGD(model.parameters(), RATE)

    def step():
        optimiser.zero_grad()
        RowLoss()(model(rows), rows).backward()
        optimiser.step()

    return step


def sampled(wrap):
    def build(width, rows):
        model = wrap(network(width))
        optimiser = DPOptimizer(
            torch.optim.SGD(model.parameters(), RATE), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH
        )

        def step():
            optimiser.zero_grad()
            RowLoss()(model(rows), rows).backward()
            optimiser.step()

        return step

    return build


def ghost(width, rows):
    model = GradSampleModuleFastGradientClipping(network(width), max_grad_norm=1.0, use_ghost_clipping=True)
    optimiser = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), RATE), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH
    )
    loss = DPLossFastGradientClipping(model, optimiser, RowLoss(), loss_reduction="mean")

    def step():
        optimiser.zero_grad()
        loss(model(rows), rows).backward()
        optimiser.step()

    return step


KINDS = {
    "torch_plain": plain,
    "opacus_hooks": sampled(GradSampleModule),
    "opacus_expanded_weights": sampled(GradSampleModuleExpandedWeights),
    "opacus_ghost": ghost,
}


def median_ms(step, steps):
    times = []
    for turn in range(steps + 5):
        begun = time.process_time()
        step()
        times.append(time.process_time() - begun)
    return 1e3 * statistics.median(times[5:])


def ours(program, steps):
    environment = dict(os.environ, THERIAC_BENCH_TURNS=str(steps))
    printed = subprocess.run([program, "--bench"], env=environment, capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    networks = {line["network"]: line for line in lines if "network" in line}
    return {width: networks[f"autoencoder {width}-64-16-64-{width}"] for width in (38, 380)}


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--ours", required=True)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=40)
    arguments = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = []
    for _ in range(arguments.rounds):
        found = {}
        for width, line in ours(arguments.ours, arguments.steps).items():
            rows = torch.randn(BATCH, width)
            times = {"ours_plain": line["plain_ms"], "ours_private": line["private_ms"], "ours_noised": line["noised_ms"]}
            for name, build in KINDS.items():
                times[name] = round(median_ms(build(width, rows), arguments.steps), 3)
            found[width] = times
        rounds.append(found)
        print(json.dumps(found), flush=True)
    for width in (38, 380):
        for peer in list(KINDS):
            ratios = sorted(one[width][peer] / one[width]["ours_noised"] for one in rounds)
            low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
            print(json.dumps({"width": width, "over_ours_noised": peer, "least": round(low, 2), "middle": round(middle, 2), "most": round(high, 2)}))


if __name__ == "__main__":
    main()
