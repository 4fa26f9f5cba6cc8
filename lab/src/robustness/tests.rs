use std::fs;

use clap::Parser;
use theriac_model::io::{write_npy_f32, write_npy_u8};

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn args(line: &str) -> Args {
    let words = std::iter::once("x").chain(line.split_whitespace());
    Cli::try_parse_from(words).unwrap().args
}

#[test]
fn pipelines_come_back_as_they_were_written() {
    for name in ["mean", "vet+law+copies+caf", "ema+nnm+trimmed_mean", "vet+mean"] {
        assert_eq!(name.parse::<Pipeline>().unwrap().to_string(), name);
    }
    for wrong in ["", "vet", "mean+vet", "vat+mean"] {
        assert!(wrong.parse::<Pipeline>().is_err(), "{wrong}");
    }
}

#[test]
fn a_made_fleet_in_two_rounds_gives_all_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let line = format!(
        "--out {} --rounds 2 --seeds 2 --rules mean,trimmed_mean --attacks none,nan,ipm-10,replay --privacy off",
        out.display()
    );
    let table = run(&args(&line)).unwrap();
    assert_eq!(table.entries.len(), 8);
    assert!(
        table
            .entries
            .iter()
            .all(|entry| entry.ratios.len() == 2 && entry.mean() > 0.4)
    );
    let of = |attack: &str| {
        let found = table
            .entries
            .iter()
            .find(|entry| entry.pipeline == "mean" && entry.attack == attack);
        found.unwrap().ratios.clone()
    };
    assert_eq!(of("nan"), of("replay"), "both leave the honest alone");
    for ratio in of("nan") {
        assert!(
            (ratio - 1.0).abs() < 1e-9,
            "the honest alone are the oracle: {ratio}"
        );
    }
    for file in ["robustness.csv", "robustness.md", "auroc.svg"] {
        assert!(fs::metadata(out.join(file)).unwrap().len() > 100, "{file}");
    }
}

#[test]
fn a_table_that_was_ended_goes_on_and_takes_more_seeds_in() {
    let dir = tempfile::tempdir().unwrap();
    let options = "--rounds 2 --rules mean,trimmed_mean --attacks none,nan,ipm-10 --privacy off";
    let line = |out: &str, rest: &str| format!("--out {} {options} {rest}", dir.path().join(out).display());
    let whole = run(&args(&line("whole", "--seeds 3"))).unwrap();
    run(&args(&line("parts", "--seeds 2"))).unwrap();
    // The second seed's line was cut off, and the first is told apart from one that is measured anew.
    let path = dir.path().join("parts/seeds.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let first: Vec<Vec<Value>> = serde_json::from_str(lines[1]).unwrap();
    let marked: Vec<Vec<Value>> = first
        .into_iter()
        .map(|values| values.into_iter().map(|of| Value { ratio: 7.0, ..of }).collect())
        .collect();
    let marked = serde_json::to_string(&marked).unwrap();
    let broken = [lines[0], &lines[1][..40], lines[2], ""].join("\n");
    fs::write(&path, &broken).unwrap();
    let error = run(&args(&line("parts", "--seeds 3 --resume"))).unwrap_err();
    assert!(error.is_usage(), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), broken, "left for a person");
    fs::write(&path, [lines[0], &marked, &lines[2][..40]].join("\n")).unwrap();
    let parts = run(&args(&line("parts", "--seeds 3 --resume"))).unwrap();
    for (whole, parts) in whole.entries.iter().zip(&parts.entries) {
        assert_eq!(
            (whole.ratios[1], whole.ratios[2]),
            (parts.ratios[1], parts.ratios[2]),
            "{whole:?}"
        );
        assert!((parts.ratios[0] - 7.0).abs() < 1e-9, "kept: {parts:?}");
    }
    // Of another table, and of none.
    for (from, to) in [
        ("none,nan,ipm-10", "none,nan"),
        ("--rounds 2", "--rounds 3"),
        ("--privacy off", ""),
    ] {
        let line = line("parts", "--seeds 3 --resume").replace(from, to);
        let error = run(&args(&line)).unwrap_err();
        assert!(
            error.is_usage() && error.to_string().contains("another table"),
            "{error}"
        );
    }
    let error = run(&args(&line("none", "--resume"))).unwrap_err();
    assert!(
        error.is_usage() && error.to_string().contains("no table"),
        "{error}"
    );
    assert!(
        fs::metadata(&path).unwrap().len() > 100,
        "what was measured is still there"
    );
}

/// Machines of three channels with slow swings, and a jump in the test part.
pub(super) fn recorded(dir: &std::path::Path, machines: u8) {
    for machine in 0..machines {
        let mut state = u32::from(machine) + 1;
        let mut shock = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        };
        let name = char::from(b'a' + machine);
        for part in ["train", "test"] {
            let mut level = [0.5_f32; 3];
            let mut values = Vec::new();
            for row in 0..1_200 {
                for level in &mut level {
                    *level = 0.5 + 0.95 * (*level - 0.5) + 0.1 * shock();
                    let jump = part == "test" && (700..740).contains(&row);
                    values.push(*level + if jump { 0.8 } else { 0.0 });
                }
            }
            let path = dir.join(format!("{name}.{part}.npy"));
            write_npy_f32(&path, &[1_200, 3], &values).unwrap();
            zip(&path);
        }
        let labels: Vec<u8> = (0..1_200)
            .map(|row| u8::from((700..740).contains(&row)))
            .collect();
        let path = dir.join(format!("{name}.label.npy"));
        write_npy_u8(&path, &[1_200], &labels).unwrap();
        zip(&path);
    }
}

fn zip(path: &std::path::Path) {
    let target = fs::File::create(path.with_extension("npy.gz")).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(target, flate2::Compression::fast());
    io::copy(&mut fs::File::open(path).unwrap(), &mut encoder).unwrap();
    encoder.finish().unwrap();
    fs::remove_file(path).unwrap();
}

#[test]
fn recorded_machines_are_measured_with_and_without_noise() {
    let dir = tempfile::tempdir().unwrap();
    recorded(dir.path(), 6);
    for privacy in ["off", "block"] {
        let out = dir.path().join(privacy);
        let line = format!(
            "--out {} --workload smd --data {} --malicious 1 --seeds 1 --privacy {privacy} --rules mean,vet+mean \
             --attacks none,huge,poison-negate",
            out.display(),
            dir.path().display()
        );
        let table = run(&args(&line)).unwrap();
        let of = |pipeline: &str, attack: &str, measure: &str| {
            let found = table.entries.iter().find(|entry| {
                entry.pipeline == pipeline && entry.attack == attack && entry.measure == measure
            });
            found.unwrap().mean()
        };
        assert_eq!(table.entries.len(), 2 * 3 * 5);
        assert!((of("mean", "huge", "loss") - 1.0).abs() < 1e-9);
        assert!((of("mean", "huge", "vus_120") - 1.0).abs() < 1e-9);
        assert!(of("mean", "none", "loss") > 0.9);
        if privacy == "off" {
            assert!(
                (of("vet+mean", "poison-negate", "loss") - 1.0).abs() < 1e-9,
                "the vet stops them"
            );
            assert!(of("mean", "poison-negate", "loss") < 1.0 - 1e-6);
        }
    }
}

#[test]
fn validators_turn_down_what_harms_and_let_the_honest_through() {
    let dir = tempfile::tempdir().unwrap();
    recorded(dir.path(), 6);
    let out = dir.path().join("out");
    let line = format!(
        "--out {} --workload smd --data {} --malicious 1 --validators 2 --seeds 1 --privacy off --loss-only --rules mean \
         --attacks none,poison-negate",
        out.display(),
        dir.path().display()
    );
    let table = run(&args(&line)).unwrap();
    let of = |attack: &str, measure: &str| {
        let found = table
            .entries
            .iter()
            .find(|entry| entry.attack == attack && entry.measure == measure);
        found.unwrap().mean()
    };
    assert_eq!(table.entries.len(), 2 * 5);
    assert_eq!((of("none", "published"), of("none", "harmful")), (1.0, 0.0));
    let text = table.table();
    assert!(
        of("poison-negate", "harmful") > 0.9 && of("poison-negate", "harmful_published") < 0.1,
        "{text}"
    );
    assert!(of("poison-negate", "loss") < 0.9 && of("poison-negate", "loss_validated") > 0.95);
    let text = fs::read_to_string(out.join("robustness.md")).unwrap();
    assert!(text.contains("2 of the honest validators") && text.contains("## harmful_published"));
}

#[test]
fn what_makes_no_sense_is_a_wrong_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    for line in ["--attacks nonsense", "--rules nonsense", "--rules vet+nonsense"] {
        let error = run(&args(&format!("--out {out} {line}"))).unwrap_err();
        assert!(error.is_usage(), "{error}");
    }
    recorded(dir.path(), 3);
    let data = dir.path().display();
    let error = run(&args(&format!(
        "--out {out} --workload smd --data {data} --malicious 1"
    )))
    .unwrap_err();
    assert!(
        matches!(error, RobustnessError::TooFewSites { found: 3, needed: 4 }),
        "{error}"
    );
}
