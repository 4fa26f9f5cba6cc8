//! The recorded rows of Google's dp-accounting 0.6.0: σ, q, steps and δ with ε of its RDP accountant and of its privacy loss distributions.

use serde_json::Value;
use theriac_protocol::units::{Delta, NoiseMultiplier};

use super::{Job, SamplingRate, SubsampledGaussian, pld_epsilon};

struct Row {
    job: Job,
    delta: Delta,
    sigma: f64,
    rdp: f64,
    rdp_order: f64,
    /// Optimistic and pessimistic bounds; absent where the table has none.
    pld: Option<(f64, f64)>,
    exact: Option<f64>,
}

/// The rows, or a word that they are not here.
fn rows() -> Option<Vec<Row>> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/reference/dp_accounting_epsilon.json"
    );
    let Ok(text) = std::fs::read_to_string(path) else {
        eprintln!("left out: the 306 recorded dp-accounting rows are not here ({path})");
        return None;
    };
    let table: Value = serde_json::from_str(&text).unwrap();
    let rows: Vec<Row> = table["rows"].as_array().unwrap().iter().map(row).collect();
    assert_eq!(rows.len(), 306);
    Some(rows)
}

fn row(value: &Value) -> Row {
    let number = |key: &str| value[key].as_f64();
    let sigma = number("sigma").unwrap();
    let mechanism = SubsampledGaussian::new(
        NoiseMultiplier::new(sigma).unwrap(),
        SamplingRate::new(number("q").unwrap()).unwrap(),
    );
    Row {
        job: Job {
            mechanism,
            steps: value["steps"].as_u64().unwrap(),
        },
        delta: Delta::new(number("delta").unwrap()).unwrap(),
        sigma,
        rdp: number("eps_rdp").unwrap(),
        rdp_order: number("rdp_order").unwrap(),
        pld: number("eps_pld_low").zip(number("eps_pld")),
        exact: number("eps_exact_q1"),
    }
}

/// What whole orders may cost against the table's fractional ones, from section 8 of the privacy design: as a part of ε, by σ and ε. `None`:
/// the best order lies between 1 and 2, where no promise is made.
fn price_of_whole_orders(row: &Row) -> Option<f64> {
    match (row.sigma, row.rdp) {
        (sigma, epsilon) if sigma >= 1.5 => (epsilon < 10.0).then_some(0.0165),
        (sigma, epsilon) if sigma >= 0.9 => (epsilon < 10.0).then_some(0.0335),
        (sigma, epsilon) if sigma >= 0.75 => (epsilon < 10.0).then_some(0.0675),
        (sigma, epsilon) if sigma >= 0.65 => (epsilon < 10.0).then_some(0.0905),
        (_, epsilon) if epsilon < 5.0 => Some(0.135),
        (_, epsilon) if epsilon < 10.0 => Some(0.365),
        _ => None,
    }
}

#[test]
fn the_ledgers_figure_is_sound_and_near_the_table_in_every_row() {
    for row in rows().into_iter().flatten() {
        let found = row.job.rdp().epsilon(row.delta).epsilon;
        if let Some((low, _)) = row.pld {
            assert!(found >= low, "{found} is below {low} in {:?}", row.job);
        }
        if let Some(exact) = row.exact {
            assert!(found >= exact, "{found} is below {exact} in {:?}", row.job);
        }
        if let Some(price) = price_of_whole_orders(&row) {
            assert!(
                found <= row.rdp * (1.0 + price),
                "{found} is more than {price} above {} in {:?}",
                row.rdp,
                row.job
            );
        }
    }
}

/// At the table's own order, where that is one of ours, our curve gives the table's figure.
#[test]
fn the_tables_order_gives_the_tables_figure() {
    let mut compared = 0;
    for row in rows().into_iter().flatten() {
        let (curve, full) = (row.job.rdp(), row.job.mechanism.rate().is_full());
        let at = super::ORDERS
            .iter()
            .position(|order| (f64::from(*order) - row.rdp_order).abs() < 1e-12);
        let Some(index) = at else { continue };
        let pair = std::iter::once((row.rdp_order, curve.values()[index]));
        let (found, _) = super::rdp::least_epsilon(pair, row.delta.value());
        // A curve of tiny values has few digits in the table's own series, not in ours.
        let tolerance = if full { 1e-12 } else { 1e-9 };
        assert!(
            (found / row.rdp - 1.0).abs() < tolerance,
            "{found}, table {} in {:?}",
            row.rdp,
            row.job
        );
        compared += 1;
    }
    eprintln!("{compared} rows have an order of ours");
}

#[test]
fn the_closed_form_at_full_rate_is_the_tables_for_its_own_orders() {
    let orders = || (11..=110).map(|tenth| f64::from(tenth) / 10.0);
    let whole = || (12..=63).map(f64::from).chain([128.0, 256.0, 512.0, 1024.0]);
    for row in rows()
        .into_iter()
        .flatten()
        .filter(|row| row.job.mechanism.rate().is_full())
    {
        let sigma = row.job.mechanism.ratio();
        let curve = orders()
            .chain(whole())
            .map(|a| (a, row.job.steps as f64 * a / (2.0 * sigma * sigma)));
        let (found, _) = super::rdp::least_epsilon(curve, row.delta.value());
        assert!(
            (found / row.rdp - 1.0).abs() < 1e-12,
            "{found}, table {} in {:?}",
            row.rdp,
            row.job
        );
    }
}

#[test]
fn the_second_figure_is_sound_and_tight_in_every_row() {
    let mut without = 0;
    for row in rows().into_iter().flatten() {
        let found = pld_epsilon(&[row.job], row.delta);
        let rdp = row.job.rdp().epsilon(row.delta).epsilon;
        assert!(
            found.is_finite() && found <= rdp,
            "{found} is above {rdp} in {:?}",
            row.job
        );
        match row.pld {
            Some((low, high)) => {
                assert!(found >= low, "{found} is below {low} in {:?}", row.job);
                assert!(found <= 1.01 * high, "{found} is above {high} in {:?}", row.job);
            }
            // The table has no bound here; ours exists all the same.
            None => without += 1,
        }
        if let Some(exact) = row.exact {
            assert!(
                (found - exact).abs() <= 1.1e-4 * exact.max(1.0),
                "{found}, exact {exact} in {:?}",
                row.job
            );
        }
    }
    eprintln!("{without} rows have no recorded distribution bound");
}
