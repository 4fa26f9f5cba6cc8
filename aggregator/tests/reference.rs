//! Every rule against recorded values of `ByzFL`, Flower and NumPy, within the file's own tolerances: all cases through the
//! library, and a few of each rule through the program, whose contract they are.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a failed helper is a failed test"
)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use theriac_aggregator::npy::{Matrix, read_matrix, write_matrix};
use theriac_aggregator::robust::{Base, Composed, MatrixRows, Options, RuleName, Scalar};

/// Attacks are the laboratory's.
const RULE_CASES: usize = 184;

fn cases() -> Option<Vec<Case>> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/reference/robust_aggregation.json"
    );
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("left out: no recorded reference values beside the workspace");
        return None;
    };
    let reference: Value = serde_json::from_str(&text).unwrap();
    let cases = reference["cases"].as_array().unwrap().iter();
    let rules = cases.filter(|case| !case["rule"].as_str().unwrap().starts_with("attack:"));
    Some(rules.map(Case::read).collect())
}

struct Case {
    id: String,
    rule: RuleName,
    f: usize,
    options: Options,
    narrow: bool,
    input: Vec<Vec<f64>>,
    output: Vec<f64>,
    tolerance: f64,
}

impl Case {
    fn read(case: &Value) -> Self {
        let rule: RuleName = case["rule"].as_str().unwrap().parse().unwrap();
        let params = &case["params"];
        let count = |name: &str| params[name].as_u64().map(|value| usize::try_from(value).unwrap());
        let steps = count("L")
            .or(count("T"))
            .map(|steps| u32::try_from(steps).unwrap());
        let vector = |value: &Value| -> Vec<f64> {
            value
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_f64().unwrap())
                .collect()
        };
        let matrix =
            |value: &Value| -> Vec<Vec<f64>> { value.as_array().unwrap().iter().map(vector).collect() };
        let mut input = matrix(&case["input"]);
        // Recorded before the shuffle, although the file's conventions say after it: the outputs are those of the shuffled rows.
        if let Value::Array(order) = &params["permutation"] {
            let at = |index: &Value| input[usize::try_from(index.as_u64().unwrap()).unwrap()].clone();
            input = order.iter().map(at).collect();
        }
        let output = match &case["output"][0] {
            Value::Array(_) => matrix(&case["output"]).concat(),
            _ => vector(&case["output"]),
        };
        let narrow = case["dtype"] == "f32";
        let most = |values: &mut dyn Iterator<Item = &f64>| values.fold(0.0_f64, |most, v| most.max(v.abs()));
        let converged = rule.base() == Some(Base::GeometricMedianConverged);
        let tolerance = if narrow {
            2e-5 * most(&mut input.iter().flatten())
        } else {
            most(&mut output.iter()) * if converged { 1e-6 } else { 1e-9 }
        };
        Self {
            id: case["id"].to_string(),
            rule,
            f: count("f").unwrap_or(0),
            options: Options {
                tau: params["tau"].as_f64(),
                iterations: steps,
                nu: params["nu"].as_f64(),
                keep: count("keep"),
                clip: params["c"].as_f64(),
                bucket: count("s"),
                reference: count("idx"),
                ..Options::default()
            },
            narrow,
            input,
            output,
            tolerance,
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the case says that its values are f32"
    )]
    fn narrow_input(&self) -> Vec<Vec<f32>> {
        let row = |row: &Vec<f64>| row.iter().map(|v| *v as f32).collect();
        self.input.iter().map(row).collect()
    }

    fn agrees(&self, output: &[f64]) {
        assert_eq!(output.len(), self.output.len(), "{}", self.id);
        for (got, want) in output.iter().zip(&self.output) {
            let off = (got - want).abs();
            assert!(
                off <= self.tolerance,
                "{}: {got} is not {want}, off by {off:e}",
                self.id
            );
        }
    }
}

fn values<T: Scalar>(case: &Case, rows: &[Vec<T>]) -> Vec<f64> {
    let rule = Composed::new(case.rule, case.f, &case.options).unwrap();
    let rows = MatrixRows::from_rows(rows).unwrap();
    let values = match case.rule.base() {
        Some(_) => rule.values(&rows).unwrap().values,
        None => rule.mixed(&rows).unwrap().values,
    };
    values.into_iter().map(Into::into).collect()
}

#[test]
fn every_recorded_case_comes_out() {
    let Some(cases) = cases() else { return };
    assert_eq!(cases.len(), RULE_CASES);
    for case in cases {
        let output = if case.narrow {
            values(&case, &case.narrow_input())
        } else {
            values(&case, &case.input)
        };
        case.agrees(&output);
    }
}

/// As many cases of each rule and type as `THERIAC_REFERENCE_CASES` says, 1 without it; 8 are all of them.
#[test]
fn the_program_gives_what_is_recorded() {
    let Some(cases) = cases() else { return };
    let most = std::env::var("THERIAC_REFERENCE_CASES").map_or(1, |most| most.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut run = std::collections::BTreeMap::<(RuleName, bool), usize>::new();
    for case in cases {
        let seen = run.entry((case.rule, case.narrow)).or_default();
        *seen += 1;
        if *seen <= most {
            case.agrees(&by_program(&case, dir.path()));
        }
    }
}

fn by_program(case: &Case, dir: &Path) -> Vec<f64> {
    let (input, output) = (dir.join("u.npy"), dir.join("a.npy"));
    if case.narrow {
        write_matrix(&input, &case.narrow_input().concat(), case.input.len()).unwrap();
    } else {
        write_matrix(&input, &case.input.concat(), case.input.len()).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_theriac-aggregator"));
    command
        .args([
            "aggregate",
            "--rule",
            &case.rule.to_string(),
            "--byzantine",
            &case.f.to_string(),
            "--input",
        ])
        .arg(&input)
        .arg("--output")
        .arg(&output);
    let options = &case.options;
    let numbers = [
        ("--tau", options.tau),
        ("--nu", options.nu),
        ("--clip", options.clip),
    ];
    let counts = [
        ("--iterations", options.iterations.map(|steps| steps as usize)),
        ("--keep", options.keep),
        ("--bucket", options.bucket),
        ("--reference", options.reference),
    ];
    for (option, value) in numbers {
        command.args(
            value
                .iter()
                .flat_map(|value| [option.to_owned(), value.to_string()]),
        );
    }
    for (option, value) in counts {
        command.args(
            value
                .iter()
                .flat_map(|value| [option.to_owned(), value.to_string()]),
        );
    }
    let ran = command.output().unwrap();
    let says = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{}: {says}", case.id);
    let printed: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(printed["rule"], case.rule.to_string());
    assert_eq!(printed["n"], case.input.len());
    assert!(printed["seconds"][0].as_f64().unwrap() >= 0.0);
    assert!(printed["peak_rss_bytes"].as_u64().unwrap() > 0);
    read_vector(&output)
}

/// `[d]` and `[n, d]` alike.
fn read_vector(path: &Path) -> Vec<f64> {
    let bytes = std::fs::read(path).unwrap();
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = String::from_utf8_lossy(&bytes[10..header]).into_owned();
    let data = &bytes[header..];
    if text.contains("<f4") {
        let (values, rest) = data.as_chunks::<4>();
        assert!(rest.is_empty());
        values
            .iter()
            .map(|bytes| f64::from(f32::from_le_bytes(*bytes)))
            .collect()
    } else {
        assert!(text.contains("<f8"), "{text}");
        let (values, rest) = data.as_chunks::<8>();
        assert!(rest.is_empty());
        values.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
    }
}

#[test]
fn rows_of_a_pre_aggregation_are_a_matrix_again() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("u.npy"), dir.path().join("a.npy"));
    write_matrix(&input, &[0.0_f32, 0.0, 0.2, 0.0, 9.0, 9.0], 3).unwrap();
    let ran = Command::new(env!("CARGO_BIN_EXE_theriac-aggregator"))
        .args(["aggregate", "--rule", "nnm", "--byzantine", "1", "--input"])
        .arg(&input)
        .arg("--output")
        .arg(&output)
        .status()
        .unwrap();
    assert!(ran.success());
    let expected = MatrixRows::new(vec![0.1_f32, 0.0, 0.1, 0.0, 4.6, 4.5], 3, 2).unwrap();
    let Matrix::F32(rows) = read_matrix(&output).unwrap() else {
        panic!("f32 stays f32")
    };
    assert_eq!(rows, expected);
}
