//! Against the reference evaluator (Python, numpy 2.4), whose values stand in `reference.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use theriac_model::io::{read_npy, write_npy_f32, write_npy_u8};

use super::*;

#[path = "reference.rs"]
mod reference;

const TOLERANCE: f64 = 1e-6;

/// The generator of the reference values: Numerical Recipes' linear congruential one, its upper 24 bits as a uniform.
fn uniform(seed: u32, count: usize) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / 16_777_216.0
    };
    (0..count).map(|_| next()).collect()
}

/// 1 500 samples; events at both ends of a touching gap, of one sample, and up to the last sample.
fn labels() -> Vec<bool> {
    let events = [
        (40, 44),
        (200, 260),
        (290, 300),
        (700, 700),
        (900, 1000),
        (1490, 1499),
    ];
    (0..1500)
        .map(|at| events.iter().any(|(a, b)| (*a..=*b).contains(&at)))
        .collect()
}

/// `u` uniform of seed 7, `y` the labels; each case as in the reference program.
fn scores(case: &str) -> Vec<f64> {
    let y: Vec<f64> = labels().iter().map(|y| f64::from(u8::from(*y))).collect();
    let u = uniform(7, 1500);
    (0..1500)
        .map(|t| match case {
            // Labels three samples late.
            "mixed" => 0.5 * u[t] * u[t] + 0.4 * u[t] * y[(t + 1500 - 3) % 1500],
            "coarse" => (8.0 * (0.6 * u[t] + 0.4 * y[t])).floor(),
            "gaps" if t % 17 == 0 => f64::NAN,
            "gaps" if t == 50 => f64::INFINITY,
            "gaps" if t == 60 => f64::NEG_INFINITY,
            "gaps" => 0.5 * u[t] + 0.5 * y[t],
            "constant" => 3.0,
            _ => f64::NAN,
        })
        .collect()
}

const USUAL: Settings = Settings {
    step_seconds: 60.0,
    window: 100,
    budget: 1.0,
    merge_gap: 5,
};

fn measured(case: &str, settings: Settings) -> Measures {
    let train: Vec<f64> = uniform(8, 1000).into_iter().map(|t| 0.5 * t * t).collect();
    let given = Given {
        scores: scores(case),
        train: Some(train),
        alarms: None,
    };
    measure(labels(), given, settings)
}

#[track_caller]
fn agrees(found: &Measures, expected: &[(&str, f64)]) {
    for (name, expected) in expected {
        let value = found.get(name).unwrap();
        assert!(
            (value - expected).abs() <= TOLERANCE || (value.is_nan() && expected.is_nan()),
            "{name}: {value}, reference {expected}"
        );
    }
    assert_eq!(found.columns.len(), expected.len());
}

#[test]
fn every_measure_is_that_of_the_reference_evaluator() {
    agrees(&measured("mixed", USUAL), reference::MIXED);
    agrees(&measured("coarse", USUAL), reference::COARSE);
}

#[test]
fn missing_infinite_and_constant_scores_are_measured_as_the_reference_does() {
    agrees(&measured("gaps", USUAL), reference::GAPS);
    agrees(&measured("constant", USUAL), reference::CONSTANT);
    agrees(&measured("nan", USUAL), reference::NAN);
}

#[test]
fn step_window_budget_and_gap_count_as_in_the_reference() {
    let settings = Settings {
        step_seconds: 30.0,
        window: 7,
        budget: 2.0,
        merge_gap: 0,
    };
    agrees(&measured("mixed", settings), reference::OTHER_SETTINGS);
}

fn recorded(path: &Path) -> Option<Vec<f64>> {
    if !path.exists() {
        println!("left out: no {}", path.display());
        return None;
    }
    let array = read_npy(path).unwrap();
    let channels = array.shape.get(1).copied().unwrap_or(1);
    let rows: Vec<&[f32]> = array.values.chunks_exact(channels).collect();
    let step = |a: &[f32], b: &[f32]| {
        let steps = a
            .iter()
            .zip(b)
            .map(|(a, b)| (f64::from(*b) - f64::from(*a)).abs());
        steps.fold(0.0, f64::max)
    };
    let mut scores: Vec<f64> = rows.windows(2).map(|pair| step(pair[0], pair[1])).collect();
    scores.insert(0, scores[0]);
    Some(scores)
}

/// Scores: the largest change of any channel since the row before.
#[test]
fn recorded_servers_are_measured_as_the_reference_does() {
    let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data"));
    for (name, expected) in [
        ("smd/machine-1-6", reference::MACHINE_1_6),
        ("smd/machine-3-2", reference::MACHINE_3_2),
        ("smd/machine-2-8", reference::MACHINE_2_8),
    ] {
        let Some(scores) = recorded(&data.join(format!("{name}.test.npy.gz"))) else {
            return;
        };
        let labels = read_mask(&data.join(format!("{name}.label.npy.gz")), None).unwrap();
        let train = recorded(&data.join(format!("{name}.train.npy.gz")));
        let given = Given {
            scores,
            train,
            alarms: None,
        };
        agrees(&measure(labels, given, USUAL), expected);
    }
    let name = "nab/ec2_cpu_utilization_fe7f93";
    let scores = recorded(&data.join(format!("{name}.value.npy.gz"))).unwrap();
    let labels = read_mask(&data.join(format!("{name}.label.npy.gz")), None).unwrap();
    let given = Given {
        scores,
        ..Given::default()
    };
    let settings = Settings {
        step_seconds: 300.0,
        ..USUAL
    };
    agrees(&measure(labels, given, settings), reference::EC2_CPU);
}

/// A folder of labels and scores of three machines: found out, without anomaly, without scores.
struct Folders {
    dir: tempfile::TempDir,
}

impl Folders {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["labels", "scores", "alarms", "other"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let folders = Self { dir };
        let mask: Vec<u8> = labels().iter().map(|y| u8::from(*y)).collect();
        write_npy_u8(&folders.path("labels/a.label.npy"), &[1500], &mask).unwrap();
        write_npy_u8(&folders.path("labels/quiet.label.npy"), &[1500], &[0; 1500]).unwrap();
        write_npy_u8(&folders.path("labels/unscored.label.npy"), &[1500], &mask).unwrap();
        #[expect(clippy::cast_possible_truncation, reason = "test data")]
        let values: Vec<f32> = scores("mixed").iter().map(|s| *s as f32).collect();
        for name in ["scores/a.npy", "scores/quiet.npy"] {
            write_npy_f32(&folders.path(name), &[1500], &values).unwrap();
        }
        write_npy_f32(&folders.path("other/a.npy"), &[1500], &[0.5; 1500]).unwrap();
        let alarms: Vec<u8> = (0..1500)
            .map(|t| u8::from(t % 500 == 0 || t == 702 || t == 950))
            .collect();
        write_npy_u8(&folders.path("alarms/a.npy"), &[1500], &alarms).unwrap();
        folders
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn args(&self) -> Args {
        Args {
            scores: self.path("scores"),
            labels: self.path("labels"),
            train_scores: None,
            alarms: Some(self.path("alarms")),
            against: Some(self.path("other")),
            step_seconds: 60.0,
            window: 100,
            budget: 1.0,
            merge_gap: 5,
            seed: 1,
            format: Format::Human,
        }
    }
}

#[test]
fn tells_what_it_left_out_and_compares_two_folders() {
    let folders = Folders::new();
    let evaluation = run(&folders.args()).unwrap();
    assert_eq!(evaluation.machines.len(), 1);
    assert_eq!(evaluation.missing, ["unscored"]);
    assert_eq!(evaluation.without_anomaly, ["quiet"]);
    let pr = &evaluation.paired[0];
    assert_eq!((pr.measure, pr.machines, pr.wins), ("vus_pr", 1, 1));
    let expected = evaluation.machines[0].measures.get("vus_pr").unwrap() - reference::CONSTANT[6].1;
    assert!((pr.mean - expected).abs() < TOLERANCE);
    let table = evaluation.table();
    for words in ["VUS-PR", "no scores for: unscored", "left out: quiet", "1 of 1"] {
        assert!(table.contains(words), "{words} is missing:\n{table}");
    }
}

#[test]
fn given_alarms_are_judged_as_they_are() {
    let folders = Folders::new();
    let machine = run(&folders.args()).unwrap().machines.remove(0);
    let get = |name: &str| machine.measures.get(name).unwrap();
    // Alarms at 0 and 500 touch no label, nor does 702; 950 and 1000 lie in one event.
    let quiet_days = (1500.0 - 189.0) / 1440.0;
    assert!((get("alarm_fa_per_day") - 3.0 / quiet_days).abs() < 1e-9);
    assert!((get("alarm_event_recall") - 1.0 / 6.0).abs() < 1e-9);
    assert!((get("alarm_delay_s") - 3000.0).abs() < 1e-9);
    assert!((get("alarm_quiet_share") - 3.0 / 1311.0).abs() < 1e-9);
}

#[test]
fn wrong_input_is_refused_with_the_file_that_is_wrong() {
    let folders = Folders::new();
    let refused = || run(&folders.args()).unwrap_err().to_string();
    write_npy_f32(&folders.path("scores/a.npy"), &[3], &[0.0; 3]).unwrap();
    let error = refused();
    assert!(
        error.contains("a.npy has 3 samples") && error.contains("1500"),
        "{error}"
    );
    fs::remove_file(folders.path("scores/a.npy")).unwrap();
    fs::write(folders.path("scores/a.csv"), "time,score\n1,0.5\n2,high\n").unwrap();
    assert!(refused().contains("line 3"), "{}", refused());
    fs::remove_file(folders.path("scores/a.csv")).unwrap();
    assert!(refused().contains("3 machines have labels"), "{}", refused());
    write_npy_u8(&folders.path("labels/a.label.npy"), &[2], &[0, 2]).unwrap();
    write_npy_f32(&folders.path("scores/a.npy"), &[2], &[0.0; 2]).unwrap();
    assert!(refused().contains("sample 1 is 2"), "{}", refused());
    let args = Args {
        budget: 2000.0,
        ..folders.args()
    };
    assert!(run(&args).unwrap_err().to_string().contains("--budget 2000"));
}

#[test]
fn tables_of_scores_are_read_with_or_without_header() {
    let folders = Folders::new();
    for (name, text, expected) in [
        (
            "h.csv",
            "time,score\n1,0.5\n2,\n\n3,nan\n",
            vec![0.5, f64::NAN, f64::NAN],
        ),
        ("n.csv", "0.25\n-1e3\n", vec![0.25, -1000.0]),
    ] {
        fs::write(folders.path(name), text).unwrap();
        let values = read_values(&folders.path(name)).unwrap();
        assert_eq!(format!("{values:?}"), format!("{expected:?}"));
    }
}

#[test]
fn one_sample_and_labels_everywhere_have_defined_measures() {
    let one = |labelled: Vec<bool>| {
        let scores = (0..labelled.len()).map(|at| at as f64).collect();
        let given = Given {
            scores,
            ..Given::default()
        };
        measure(labelled, given, USUAL)
    };
    let all = one(vec![true; 50]);
    assert!(all.get("vus_pr").unwrap().is_nan() && all.get("auc_pr").unwrap().is_nan());
    assert!((all.get("oracle_range_f1").unwrap() - 1.0).abs() < 1e-12);
    assert!(one(vec![true]).get("vus_pr").unwrap().is_nan());
    assert!((one(vec![false, true]).get("auc_pr").unwrap() - 1.0).abs() < 1e-12);
}
