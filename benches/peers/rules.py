"""Robust rules beside ByzFL (numpy and torch) and Flower, in one run on one machine.

usage: rules.py --ours theriac-aggregator --scripts PEERS_ROBUST [--sizes 100x100000,100x1000000] [--rules a,b] [--out t.json]

Every cell is the least of some repeats, in seconds of processor time of one thread (all threads of the process are counted, so
a shared machine does not flatter anybody); ours also with two threads by the clock. Ours and the peers take turns rule by
rule. Peers run in a child of their own, which is stopped after 100 s or at 9 GiB. PEERS_ROBUST holds `byzfl_loader.py`.
"""
import os
for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[k] = "1"
import argparse, json, multiprocessing as mp, platform, resource, subprocess, sys, tempfile, time
import numpy as np
import torch
torch.set_num_threads(1)

CAP_S, CAP_BYTES = 100, 9 << 30


def peers(agg, pre, fl, x, n, f):
    t = torch.from_numpy(x)
    fb = n // 5
    fw = lambda: [([x[i]], 1) for i in range(n)]
    table = {
        "mean": (lambda v: agg.Average()(v), lambda: fl.aggregate(fw())),
        "median": (lambda v: agg.Median()(v), lambda: fl.aggregate_median(fw())),
        "trimmed_mean": (lambda v: agg.TrMean(f)(v), lambda: fl.aggregate_trimmed_avg(fw(), f / n)),
        "meamed": (lambda v: agg.Meamed(f)(v), None),
        "krum": (lambda v: agg.Krum(f)(v), lambda: fl.aggregate_krum(fw(), f, 0)),
        "multi_krum": (lambda v: agg.MultiKrum(f)(v), lambda: fl.aggregate_krum(fw(), f, n - f)),
        "geometric_median": (lambda v: agg.GeometricMedian()(v), None),
        "geometric_median_converged": (lambda v: agg.GeometricMedian(nu=1e-9, T=100)(v), None),
        "centered_clipping": (lambda v: agg.CenteredClipping(tau=100.0)(v), None),
        "monna": (lambda v: agg.MoNNA(f)(v), None),
        "caf": (lambda v: agg.CAF(f)(v), None),
        "bulyan": (None, lambda: fl.aggregate_bulyan(fw(), fb, fl.aggregate_krum, to_keep=0)),
        "nnm": (lambda v: pre.NNM(f)(v), None),
        "nnm+trimmed_mean": (lambda v: agg.TrMean(f)(pre.NNM(f)(v)), None),
        "arc+nnm+trimmed_mean": (lambda v: agg.TrMean(f)(pre.NNM(f)(pre.ARC(f)(v.copy() if isinstance(v, np.ndarray) else v.clone()))), None),
        "bucketing_identity+mean": (lambda v: agg.Average()(pre.Bucketing(2)(v)), None),
    }
    for rule, (byz, flower) in table.items():
        calls = {}
        if byz:
            calls["byzfl-numpy"], calls["byzfl-torch"] = (lambda byz=byz: byz(x)), (lambda byz=byz: byz(t))
        if flower:
            calls["flower"] = flower
        yield rule, (fb if rule == "bulyan" else f), calls


def child(call, queue, repeats):
    resource.setrlimit(resource.RLIMIT_AS, (CAP_BYTES + (8 << 30),) * 2)
    try:
        best, end = 1e9, time.perf_counter() + 6
        for _ in range(repeats):
            t = time.process_time()
            call()
            best = min(best, time.process_time() - t)
            if time.perf_counter() > end:
                break
        queue.put({"cpu_s": best, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10})
    except BaseException as error:
        queue.put({"error": f"{type(error).__name__}: {error}"[:100]})


def peer(call, repeats):
    context = mp.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(call, queue, repeats))
    process.start()
    try:
        result = queue.get(timeout=CAP_S)
    except Exception:
        result = {"error": f"stopped after {CAP_S} s"}
        process.terminate()
    process.join()
    return result


def ours(binary, rule, f, path, threads, repeats, extra):
    out = path + ".out"
    command = [binary, "aggregate", "--rule", rule, "--byzantine", str(f), "--input", path, "--output", out,
               "--threads", str(threads), "--repeat", str(repeats)] + extra
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return {"error": ran.stderr.strip()[:100]}
    got = json.loads(ran.stdout)
    seconds, cpu = sorted(got["seconds"]), sorted(got["cpu_seconds"])
    return {"wall_s": seconds[0], "wall_median_s": seconds[len(seconds) // 2], "cpu_s": cpu[0],
            "cpu_median_s": cpu[len(cpu) // 2], "peak_mib": got["peak_rss_bytes"] >> 20}


def stream(x):
    """Least processor seconds to read the matrix once: the limit of any rule."""
    best = 1e9
    for _ in range(7):
        t = time.process_time()
        np.add.reduce(x, axis=None)
        best = min(best, time.process_time() - t)
    return best


def main():
    parse = argparse.ArgumentParser()
    parse.add_argument("--ours", required=True)
    parse.add_argument("--scripts", required=True)
    parse.add_argument("--sizes", default="100x100000,100x1000000")
    parse.add_argument("--rules")
    parse.add_argument("--skip-peers", default="", help="rule:peer pairs that are known not to end, joined by commas")
    parse.add_argument("--repeats", type=int, default=5)
    parse.add_argument("--out")
    args = parse.parse_args()
    sys.path.insert(0, args.scripts)
    import byzfl_loader
    agg, pre, _, version = byzfl_loader.load()
    fl = byzfl_loader.load_flower()
    rows, skip = [], set(args.skip_peers.split(","))
    print(f"byzfl {version}, numpy {np.__version__}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    for size in args.sizes.split(","):
        n, d = map(int, size.split("x"))
        f = 3 * n // 10
        x = np.random.default_rng(7).standard_normal((n, d), dtype=np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "u.npy")
            np.save(path, x)
            limit = stream(x)
            print(f"\nn = {n}, d = {d}, f = {f}; reading once {limit * 1e3:.1f} ms\n")
            print("| rule | ours, 1 thread, ms of processor | 2 threads, ms by the clock | peak MiB over the input | "
                  "ByzFL numpy | ByzFL torch | Flower | fastest peer / ours | ours / reading once |")
            print("|---|---|---|---|---|---|---|---|---|")
            for rule, f_rule, calls in peers(agg, pre, fl, x, n, f):
                if args.rules and rule not in args.rules.split(","):
                    continue
                extra = ["--tau", "100"] if rule.startswith("centered") else []
                if rule == "geometric_median_converged":
                    extra = ["--iterations", "100"]
                one = ours(args.ours, rule, f_rule, path, 1, args.repeats, extra)
                got = {name: peer(call, 3) for name, call in calls.items() if f"{rule}:{name}" not in skip}
                two = ours(args.ours, rule, f_rule, path, 2, args.repeats, extra)
                again = ours(args.ours, rule, f_rule, path, 1, args.repeats, extra)
                if "error" in one or "error" in two:
                    print(rule, one, two)
                    continue
                one["cpu_s"] = min(one["cpu_s"], again["cpu_s"])
                rows.append({"rule": rule, "n": n, "d": d, "f": f_rule, "ours_1": one, "ours_2": two, "peers": got})
                cell = lambda name: ("" if name not in got else
                                     f"{got[name]['cpu_s'] * 1e3:.0f}" if "cpu_s" in got[name] else got[name]["error"][:24])
                best = min((r["cpu_s"] for r in got.values() if "cpu_s" in r), default=None)
                ratio = f"{best / one['cpu_s']:.1f}" if best else ""
                over = two["peak_mib"] - (x.nbytes >> 20)
                print(f"| {rule} | {one['cpu_s'] * 1e3:.1f} | {two['wall_s'] * 1e3:.1f} | {over} | {cell('byzfl-numpy')} | "
                      f"{cell('byzfl-torch')} | {cell('flower')} | {ratio} | {one['cpu_s'] / limit:.1f} |", flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=1)


main()
