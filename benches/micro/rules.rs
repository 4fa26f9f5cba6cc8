//! Rules over the int8 rows of a round, with evidence, as the aggregator runs them.

use std::error::Error;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use theriac_aggregator::robust::{Options, PayloadRows, Row, rule};
use theriac_benches::Numbers;
use theriac_protocol::compress::encode_int8;

/// One of each kind, and what the pipeline ships.
const RULES: [&str; 8] = [
    "mean",
    "median",
    "trimmed_mean",
    "multi_krum",
    "geometric_median_converged",
    "caf",
    "bulyan",
    "dedup+nnm+trimmed_mean",
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("rules");
    group.sample_size(20);
    for (updates, dimension) in [(10_usize, 10_000_u32), (50, 100_000)] {
        let rows = round(updates, dimension)?;
        group.throughput(Throughput::Elements(updates as u64 * u64::from(dimension)));
        for name in RULES {
            let rule = rule(name.parse()?, updates / 6, &Options::default())?;
            let id = BenchmarkId::new(name, format!("{updates} x {dimension}"));
            group.bench_with_input(id, &rows, |bencher, rows| {
                bencher.iter(|| rule.combine(black_box(rows)));
            });
        }
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// The rows of one round.
fn round(updates: usize, dimension: u32) -> Result<PayloadRows, Box<dyn Error>> {
    let mut numbers = Numbers::new(3);
    let rows = (0..updates).map(|_| {
        let values = numbers.signed(usize::try_from(dimension)?);
        let (encoding, payload) = encode_int8(&values, || numbers.draw());
        Ok::<_, std::num::TryFromIntError>(Row {
            encoding,
            payload: payload.into(),
        })
    });
    Ok(PayloadRows::new(rows.collect::<Result<_, _>>()?, dimension)?)
}
