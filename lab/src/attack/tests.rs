use std::collections::BTreeSet;

use super::statistics::{distance_squared, moved, norm};
use super::*;

/// `count` rows around a mean that is far from zero, different in every coordinate.
fn rows(count: usize, length: usize, seed: u64) -> Vec<Vec<f32>> {
    (0..count)
        .map(|row| {
            let mut noise = Gaussian::new(seed, Round(9), row);
            (0_u16..)
                .take(length)
                .map(|i| 3.0 * (f32::from(i) / 7.0).sin() + noise.draw())
                .collect()
        })
        .collect()
}

fn mean_rule(honest: &[Vec<f32>], hostile: &[Vec<f32>]) -> Vec<f32> {
    let all: Vec<Vec<f32>> = honest.iter().chain(hostile).cloned().collect();
    Spread::of(&all).mean
}

fn craft(name: &str, honest: &[Vec<f32>], own: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let deployed = |hostile: &[Vec<f32>]| Some(mean_rule(honest, hostile));
    let scene = Scene {
        honest,
        own,
        round: Round(3),
        seed: 11,
        previous: None,
        bound: 500.0,
        deployed: &deployed,
    };
    name.parse::<Attack>().unwrap().craft(&scene)
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && distance_squared(a, b).sqrt() <= 1e-4 * (1.0 + norm(b))
}

#[test]
fn every_attack_has_a_name_of_its_own_and_is_described_in_one_line() {
    let all = Attack::all();
    let names: BTreeSet<String> = all.iter().map(|attack| attack.name()).collect();
    assert_eq!(names.len(), all.len());
    assert!(all.len() > 60, "{}", all.len());
    for attack in all {
        assert_eq!(attack.name().parse(), Ok(attack));
        assert!(!attack.description().is_empty() && !attack.description().contains('\n'));
    }
    let refused = "sign_flip".parse::<Attack>().unwrap_err().to_string();
    assert!(refused.contains("sign-flip"), "{refused}");
}

#[test]
fn every_attack_gives_as_many_rows_as_long_and_the_same_every_time() {
    let (honest, own) = (rows(8, 40, 1), rows(4, 40, 2));
    let bits = |rows: &[Vec<f32>]| {
        rows.iter()
            .flatten()
            .map(|value| value.to_bits())
            .collect::<Vec<u32>>()
    };
    for attack in Attack::all() {
        let name = attack.name();
        let once = craft(&name, &honest, &own);
        assert!(
            once.len() == 4 && once.iter().all(|row| row.len() == 40),
            "{name}"
        );
        assert_eq!(bits(&once), bits(&craft(&name, &honest, &own)), "{name}");
        let lonely = craft(&name, &[], &own[..1]);
        assert!(lonely.len() == 1 && lonely[0].len() == 40, "{name}");
        let empty = craft(&name, &vec![Vec::new(); 3], &vec![Vec::new(); 2]);
        assert_eq!(empty, vec![Vec::<f32>::new(); 2], "{name}");
    }
}

#[test]
fn colluders_send_copies_and_jittered_twins_do_not() {
    let (honest, own) = (rows(8, 300, 3), rows(4, 300, 4));
    let spread = norm(&Spread::of(&honest).deviation);
    for attack in Attack::all().into_iter().filter(|attack| attack.kind.colludes()) {
        let sent = craft(&attack.name(), &honest, &own);
        for other in &sent[1..] {
            let apart = distance_squared(&sent[0], other).sqrt() / spread;
            if attack.jittered {
                assert!((1.2..1.7).contains(&apart), "{attack}: {apart} spreads apart");
            } else {
                assert_eq!(&sent[0], other, "{attack}");
            }
        }
    }
}

#[test]
fn ipm_points_against_the_mean_and_alie_stays_within_its_bound() {
    let (honest, own) = (rows(8, 60, 5), rows(4, 60, 6));
    let spread = Spread::of(&honest);
    for (name, tau) in [
        ("ipm-0.1", 0.1),
        ("ipm-0.5", 0.5),
        ("ipm-1", 1.0),
        ("ipm-3", 3.0),
        ("ipm-10", 10.0),
    ] {
        let expected: Vec<f32> = spread.mean.iter().map(|mean| -tau * mean).collect();
        assert!(close(&craft(name, &honest, &own)[0], &expected), "{name}");
    }
    for (name, z) in [
        ("alie-up-0.25", 0.25),
        ("alie-up-3", 3.0),
        ("alie-down-1.5", -1.5),
        ("alie-down-0.5", -0.5),
    ] {
        for (index, value) in craft(name, &honest, &own)[0].iter().enumerate() {
            let away = (value - spread.mean[index]) / spread.deviation[index];
            assert!((away - z).abs() < 1e-3, "{name}: {away}");
        }
    }
}

#[test]
fn min_max_and_min_sum_go_as_far_as_honest_updates_lie_and_no_farther() {
    let (honest, own) = (rows(8, 60, 7), rows(4, 60, 8));
    let spread = Spread::of(&honest);
    let all = |a: &[f32]| {
        honest
            .iter()
            .map(|b| distance_squared(a, b))
            .collect::<Vec<f64>>()
    };
    let largest = |a: &[f32]| all(a).into_iter().fold(0.0, f64::max);
    let sum = |a: &[f32]| all(a).iter().sum::<f64>();
    for along in ["std", "sign", "unit"] {
        let row = &craft(&format!("min-max-{along}"), &honest, &own)[0];
        let limit = honest.iter().map(|row| largest(row)).fold(0.0, f64::max);
        assert!(
            largest(row) <= limit && largest(row) > 0.999 * limit,
            "{along}: {} of {limit}",
            largest(row)
        );
        let row = &craft(&format!("min-sum-{along}"), &honest, &own)[0];
        let limit = honest.iter().map(|row| sum(row)).fold(0.0, f64::max);
        assert!(
            sum(row) <= limit && sum(row) > 0.999 * limit,
            "{along}: {} of {limit}",
            sum(row)
        );
        assert!(distance_squared(row, &spread.mean) > 0.0);
    }
}

#[test]
fn the_search_finds_the_top_of_a_hill_and_is_never_worse_than_its_start() {
    let top = optimise::line_search(|x| -(x - 37.0).powi(2));
    assert!((top - 37.0).abs() < 4.0, "{top}");
    let edge = optimise::line_search(|x| f64::from(u8::from(x < 0.8)) * x);
    assert!((0.3..0.8).contains(&edge), "{edge}");
    assert!(optimise::line_search(|x| -x).abs() < 1e-9);
}

#[test]
fn optimised_attacks_move_the_deployed_rule_at_least_as_far_as_no_strength() {
    let (honest, own) = (rows(8, 60, 9), rows(4, 60, 10));
    let mean = Spread::of(&honest).mean;
    let harm = |hostile: &[Vec<f32>]| distance_squared(&mean_rule(&honest, hostile), &mean).sqrt();
    for (optimised, fixed) in [("opt-ipm", "ipm-3"), ("opt-alie", "alie-up-3")] {
        let (optimised, fixed) = (craft(optimised, &honest, &own), craft(fixed, &honest, &own));
        // A mean follows any strength, so the search goes far.
        assert!(harm(&optimised) > 10.0 * harm(&fixed));
        assert!(harm(&optimised) > 0.0);
    }
}

#[test]
fn a_backdoor_reverses_one_tenth_and_keeps_the_norm_bound() {
    let (honest, own) = (rows(8, 60, 12), rows(4, 60, 13));
    let mean = Spread::of(&honest).mean;
    let row = &craft("backdoor", &honest, &own)[0];
    assert!(norm(row) <= 500.0);
    assert!(close(&row[..54], &mean[..54]));
    // With 4 of 12 rows: (8 mean + 4 row) / 12 = −mean.
    let averaged = mean_rule(&honest, &vec![row.clone(); 4]);
    for (value, mean) in averaged[54..].iter().zip(&mean[54..]) {
        assert!((value + mean).abs() < 1e-3, "{value} {mean}");
    }
    let scene = |bound| Scene {
        honest: &honest,
        own: &own,
        round: Round(1),
        seed: 1,
        previous: None,
        bound,
        deployed: &|_| None,
    };
    assert!(norm(&Attack::plain(Kind::Backdoor).craft(&scene(2.0))[0]) <= 2.0);
}

#[test]
fn a_history_aware_step_stands_across_the_last_result() {
    let (honest, own) = (rows(8, 200, 14), rows(4, 200, 15));
    let previous = &honest[2];
    let scene = Scene {
        honest: &honest,
        own: &own,
        round: Round(2),
        seed: 5,
        previous: Some(previous),
        bound: 1e9,
        deployed: &|_| None,
    };
    let mean = Spread::of(&honest).mean;
    let row = &Attack::plain(Kind::HistoryAware).craft(&scene)[0];
    let step: Vec<f32> = row.iter().zip(&mean).map(|(a, b)| a - b).collect();
    let inner: f64 = step
        .iter()
        .zip(previous)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum();
    assert!(inner.abs() < 1e-3 * norm(&step) * norm(previous), "{inner}");
    let honest_step = honest
        .iter()
        .map(|row| distance_squared(row, &mean).sqrt())
        .sum::<f64>()
        / 8.0;
    assert!((norm(&step) / honest_step - 1.0).abs() < 1e-3);
}

#[test]
fn a_drift_is_the_same_in_every_round() {
    let (honest, own) = (rows(8, 60, 16), rows(4, 60, 17));
    let spread = Spread::of(&honest);
    let at = |round| {
        let scene = Scene {
            honest: &honest,
            own: &own,
            round,
            seed: 5,
            previous: None,
            bound: 1e9,
            deployed: &|_| None,
        };
        Attack::plain(Kind::Drift).craft(&scene)
    };
    assert_eq!(at(Round(1)), at(Round(2)));
    for (index, value) in at(Round(1))[0].iter().enumerate() {
        let away = (value - spread.mean[index]).abs() / spread.deviation[index];
        assert!((away - 0.5).abs() < 1e-3);
    }
}

#[test]
fn lone_attacks_do_what_they_say() {
    let own = rows(4, 340, 18);
    let sent = |name: &str| craft(name, &own, &own).swap_remove(0);
    assert!(
        sent("sign-flip")
            .iter()
            .zip(&own[0])
            .all(|(a, b)| (a + 5.0 * b).abs() < 1e-4)
    );
    assert_eq!(sent("nan").iter().filter(|v| v.is_nan()).count(), 20);
    assert_eq!(sent("infinite")[0].to_bits(), f32::INFINITY.to_bits());
    assert_eq!(
        sent("negative-infinite")[0].to_bits(),
        f32::NEG_INFINITY.to_bits()
    );
    assert!(sent("huge")[0] > 9e29);
    assert!(sent("subnormal").iter().all(|v| v.is_subnormal()));
    assert!(sent("free-rider-zero").iter().all(|v| v.to_bits() == 0));
    let ratio = norm(&sent("scaled-noise")) / norm(&own[0]);
    assert!((ratio - 20.0).abs() < 0.01, "noise is {ratio} times as strong");
    let honest_norm = own.iter().map(|row| norm(row)).sum::<f64>() / 4.0;
    assert!((norm(&sent("gaussian")) / honest_norm - 1.0).abs() < 1e-3);
    assert_eq!(sent("mimic"), own[0]);
    for name in ["poison-negate", "wrong-length", "replay", "duplicate", "late"] {
        assert_eq!(
            sent(name),
            own[0],
            "{name}: the values are those of an honest site"
        );
    }
}

#[test]
fn one_edge_alone_can_do_only_what_needs_nobody() {
    assert!(alone("sign-flip").is_ok() && alone("nan").is_ok());
    for name in ["ipm-1", "mimic-jittered", "poison-scale", "replay", "nonsense"] {
        assert!(alone(name).is_err(), "{name}");
    }
    let flipped = Attack::SIGN_FLIP.apply(Round(1), vec![1.0, -2.0]);
    assert_eq!(flipped, [-5.0, 10.0]);
}

#[test]
fn poison_spoils_targets_and_nothing_else() {
    let mut block: Vec<f32> = (0_u16..44).map(f32::from).collect();
    let honest = block.clone();
    poison::moments(Kind::PoisonNegate, &mut block);
    for (index, (now, then)) in block.iter().zip(&honest).enumerate() {
        let factor = if (15..20).contains(&(index % 22)) {
            -1.0
        } else {
            1.0
        };
        assert!((now - factor * then).abs() < 1e-6, "{index}");
    }
    let series = theriac_model::series::Series::new(2, (0_u16..200).map(f32::from).collect()).unwrap();
    let shuffled = poison::rows(Kind::PoisonShuffle, &series, 4);
    assert_ne!(shuffled, series);
    let sorted = |series: &theriac_model::series::Series| {
        let mut rows: Vec<Vec<u32>> = series
            .iter_rows()
            .map(|row| row.iter().map(|v| v.to_bits()).collect())
            .collect();
        rows.sort();
        rows
    };
    assert_eq!(sorted(&shuffled), sorted(&series), "whole rows change places");
    assert_eq!(poison::rows(Kind::PoisonScale, &series, 4), series);
}

/// The recorded attacks of `ByzFL` (minus the mean, IPM, ALIE) against ours, within the file's tolerance for `f32`; of `mimic` the row is the attacker's choice.
#[test]
fn recorded_attacks_come_out_as_ours() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/reference/robust_aggregation.json"
    );
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("left out: no recorded reference values beside the workspace");
        return;
    };
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f32> {
        let values = value.as_array().unwrap().iter();
        values
            .map(|value| statistics::narrow(value.as_f64().unwrap()))
            .collect()
    };
    let mut seen = 0;
    for case in reference["cases"].as_array().unwrap() {
        let Some(attack) = case["rule"].as_str().unwrap().strip_prefix("attack:") else {
            continue;
        };
        let honest: Vec<Vec<f32>> = case["input"].as_array().unwrap().iter().map(numbers).collect();
        let expected = numbers(&case["output"]);
        let tau = case["params"]["tau"].as_f64().unwrap_or(1.0);
        let spread = Spread::of(&honest);
        let zero = vec![0.0; expected.len()];
        let ours = match attack {
            "sign_flip" | "ipm" => moved(&zero, -tau, &spread.mean),
            "alie" => moved(&spread.mean, tau, &spread.deviation),
            "mimic" => {
                assert!(honest.contains(&craft("mimic", &honest, &honest[..1])[0]));
                honest[usize::try_from(case["params"]["epsilon"].as_u64().unwrap()).unwrap()].clone()
            }
            other => panic!("unknown attack {other}"),
        };
        // What the deployed attack of this name sends, where it has this strength.
        let name = match attack {
            "sign_flip" => "ipm-1".to_owned(),
            "ipm" => format!("ipm-{tau}"),
            "alie" => format!("alie-up-{tau}"),
            _ => String::new(),
        };
        if name.parse::<Attack>().is_ok() {
            assert_eq!(craft(&name, &honest, &honest[..1])[0], ours, "{name}");
            seen += 1;
        }
        let largest = honest
            .iter()
            .flatten()
            .fold(0.0_f32, |max, value| max.max(value.abs()));
        for (ours, expected) in ours.iter().zip(&expected) {
            assert!(
                (ours - expected).abs() <= 2e-5 * largest,
                "{}: {ours} is not {expected}",
                case["id"]
            );
        }
    }
    assert!(seen >= 5, "{seen} recorded attacks are among ours by name");
}
