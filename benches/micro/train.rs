//! What a round costs an edge: moments of one block, their solution, and gradient steps of the network.

use std::error::Error;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion};
use theriac_benches::calm_host;
use theriac_model::global::GlobalModel;
use theriac_model::{moments, train};

fn main() -> Result<(), Box<dyn Error>> {
    let (schema, series) = calm_host(600)?;
    let channels = schema.channels();
    let values = moments::public_values(&schema, &series);
    let rows = moments::BLOCK_ROWS;
    let sum = moments::block(&values[..rows * channels], rows);
    let global = GlobalModel::initial(channels, 1);

    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("train");
    group.bench_function("moments of a block", |bencher| {
        bencher.iter(|| moments::block(black_box(&values[..rows * channels]), rows));
    });
    group.bench_function("solve moments", |bencher| {
        bencher.iter(|| moments::solve(black_box(&sum), 5, 1.27, moments::BLOCK_CLIP_NORM, channels));
    });
    group.sample_size(20);
    for steps in [1_usize, 10] {
        group.bench_with_input(
            BenchmarkId::new("gradient steps", steps),
            &steps,
            |bencher, steps| {
                bencher.iter(|| train::delta(&global, &schema, black_box(&series), *steps, 1));
            },
        );
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
