//! One sample through a fitted detector (what an edge pays every second), a fit, and a whole series.

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use theriac_benches::{calm_host, recorded_host};
use theriac_model::detector::{Detector, FitOptions, Scorer};
use theriac_model::sample::Sample;

fn main() -> Result<(), Box<dyn Error>> {
    let (schema, series) = calm_host(1_200)?;
    let options = FitOptions::new(Duration::from_secs(1));
    let detector = Arc::new(Detector::fit(&schema, &series, &options)?);
    let samples: Vec<Sample> = (0_u64..)
        .zip(series.iter_rows())
        .map(|(second, row)| Sample {
            at_ms: second * 1_000,
            values: row.to_vec(),
        })
        .collect();

    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("score");
    group.throughput(Throughput::Elements(1));
    let mut scorer = Scorer::new(Arc::clone(&detector));
    let mut stream = samples.iter().cycle();
    group.bench_function("one sample", |bencher| {
        bencher.iter(|| {
            stream
                .next()
                .map(|sample| black_box(scorer.push(black_box(sample)).score))
        });
    });
    group.throughput(Throughput::Elements(series.rows() as u64));
    group.bench_function("1200 rows", |bencher| {
        bencher.iter(|| detector.score_series(black_box(&series)));
    });
    group.bench_function("fit on 1200 rows", |bencher| {
        bencher.iter(|| Detector::fit(&schema, black_box(&series), &options));
    });
    // The bars of the recorded servers: 38 channels, a history of 28 000 rows.
    let (wide, history) = recorded_host(28_000, 38)?;
    let options = FitOptions::new(Duration::from_mins(1));
    let mut scorer = Scorer::new(Arc::new(Detector::fit(&wide, &history.tail(2_000), &options)?));
    let samples: Vec<Sample> = history
        .iter_rows()
        .take(2_000)
        .map(|row| Sample {
            at_ms: 0,
            values: row.to_vec(),
        })
        .collect();
    let mut stream = samples.iter().cycle();
    group.throughput(Throughput::Elements(1));
    group.bench_function("one sample, 38 channels", |bencher| {
        bencher.iter(|| {
            stream
                .next()
                .map(|sample| black_box(scorer.push(black_box(sample)).score))
        });
    });
    group.sample_size(10);
    group.throughput(Throughput::Elements(history.rows() as u64));
    group.bench_function("fit on 28000 rows, 38 channels", |bencher| {
        bencher.iter(|| Detector::fit(&wide, black_box(&history), &options));
    });
    group.finish();
    criterion.final_summary();
    Ok(())
}
