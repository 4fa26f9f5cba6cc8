use super::*;

/// Three seeds: enough failures for a spread well below what is asked for, in a few seconds.
fn measured(foresight: Foresight, cost_s: f64, failures: u32) -> Cell {
    let args = Args {
        mtbf: Duration::from_hours(1),
        costs: vec![cost_s],
        failures,
        runs: 3,
        seed: 1,
        format: Format::Human,
    };
    let cell = cell(&args, 3_600.0, cost_s, foresight).unwrap();
    println!("seeds 1 to 3: {cell:?}");
    cell
}

const FAIR: Foresight = Foresight::Fair {
    recall: 0.7,
    precision: 0.7,
};

#[test]
fn a_fair_predictor_saves_a_fifth_against_daly_and_three_tenths_against_300_s() {
    for cost_s in [3.1, 30.0] {
        let cell = measured(FAIR, cost_s, 4_000);
        assert!(cell.against_daly <= -0.20, "{cell:?}");
        assert!(cell.against_fixed <= -0.30, "{cell:?}");
    }
}

#[test]
fn a_useless_predictor_costs_no_more_than_a_fiftieth_above_daly() {
    for foresight in Foresight::all()
        .into_iter()
        .filter(|foresight| foresight.is_useless())
    {
        for cost_s in [3.1, 30.0] {
            let cell = measured(foresight, cost_s, 4_000);
            assert!(cell.against_daly <= 0.02, "{cell:?}");
        }
    }
}

#[test]
fn the_competitors_waste_what_renewal_theory_says() {
    for (cost_s, period_s, daly_s) in [(3.1, 300.0, 149.4 + 3.1), (30.0, 300.0, 464.8 + 30.0)] {
        let cell = measured(Foresight::None, cost_s, 20_000);
        let expected = |period: f64| {
            let taken = 1.0 / ((period / 3_600.0_f64).exp() - 1.0);
            (taken * cost_s + 3_600.0 - taken * period + 6.0) / 3_606.0
        };
        assert!(
            (cell.fixed_300s / expected(period_s) - 1.0).abs() < 0.02,
            "{cell:?}"
        );
        assert!((cell.daly / expected(daly_s) - 1.0).abs() < 0.02, "{cell:?}");
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let args = Args {
        mtbf: Duration::from_secs(1),
        costs: vec![3.1],
        failures: 100,
        runs: 1,
        seed: 1,
        format: Format::Human,
    };
    assert!(matches!(
        run(&args),
        Err(ScheduleError::Option { option: "mtbf", .. })
    ));
    let args = Args {
        mtbf: Duration::from_hours(1),
        costs: vec![0.0],
        ..args
    };
    assert!(matches!(
        run(&args),
        Err(ScheduleError::Option { option: "costs", .. })
    ));
}
