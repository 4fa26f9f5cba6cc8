//! What the program answers to matrices and options that cannot be: a typed error with the reason, or a number within the honest ones. Never a panic, never a
//! value that is not finite.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use theriac_aggregator::npy::{Matrix, read_matrix, write_matrix};
use theriac_aggregator::robust::Rows as _;

/// Rules of every way to combine: one pass, sorted columns, pairs, pairs and columns.
const RULES: [&str; 12] = [
    "mean",
    "median",
    "trimmed_mean",
    "meamed",
    "krum",
    "multi_krum",
    "geometric_median_converged",
    "mda",
    "monna",
    "caf",
    "nnm+trimmed_mean",
    "dedup+nnm+trimmed_mean",
];

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn matrix(&self, rows: &[Vec<f32>]) -> PathBuf {
        let path = self.path("rows.npy");
        write_matrix(&path, &rows.concat(), rows.len()).unwrap();
        path
    }

    fn run(&self, input: &Path, rule: &str, more: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_theriac-aggregator"))
            .args(["aggregate", "--rule", rule, "--input"])
            .arg(input)
            .arg("--output")
            .arg(self.path("out.npy"))
            .args(more)
            .output()
            .unwrap()
    }

    /// The error's code, after checking that it is an error of ours and that it gives a reason.
    fn refused(&self, input: &Path, rule: &str, more: &[&str], reason: &str) {
        let output = self.run(input, rule, more);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            matches!(output.status.code(), Some(1 | 2)),
            "{rule} {more:?}: {:?} {said}",
            output.status
        );
        assert!(
            said.contains("error[TH-E07") && said.contains(reason),
            "{rule} {more:?}: {said}"
        );
    }

    /// The combined values.
    fn combined(&self, input: &Path, rule: &str, more: &[&str]) -> Vec<f32> {
        let output = self.run(input, rule, more);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{rule} {more:?}: {said}");
        // Behind a header whose length stands in bytes 8 and 9.
        let bytes = std::fs::read(self.path("out.npy")).unwrap();
        let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let values: Vec<f32> = bytes[start..]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect();
        assert!(values.iter().all(|value| value.is_finite()), "{rule}: {values:?}");
        values
    }
}

fn rows(count: usize, dimension: usize) -> Vec<Vec<f32>> {
    (0..count)
        .map(|row| {
            (0..dimension)
                .map(|at| ((row * 31 + at * 17) % 13) as f32 / 13.0)
                .collect()
        })
        .collect()
}

/// A header as NumPy writes it and nothing behind it.
fn header(shape: &str, kind: &str) -> Vec<u8> {
    let text = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
    let padded = format!("{text:117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&u16::try_from(padded.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(padded.as_bytes());
    bytes
}

#[test]
fn a_row_that_is_not_finite_leaves_the_former_result_alone_also_where_rows_stay_in_their_file() {
    let bench = Bench::new();
    let mut rows = vec![vec![1.0_f32; 7]; 9];
    rows[4][2] = f32::NAN;
    let input = bench.matrix(&rows);
    for more in [&[][..], &["--spill"]] {
        for rule in ["mean", "trimmed_mean", "caf", "nnm"] {
            std::fs::write(bench.path("out.npy"), "the result of yesterday").unwrap();
            let output = bench.run(&input, rule, more);
            assert!(!output.status.success(), "{rule} {more:?}");
            let left = std::fs::read_to_string(bench.path("out.npy")).unwrap_or_default();
            assert_eq!(left, "the result of yesterday", "{rule} {more:?}");
        }
    }
}

#[test]
fn half_and_more_hostile_rows_are_refused_by_every_rule() {
    let bench = Bench::new();
    let input = bench.matrix(&rows(6, 5));
    for rule in RULES.into_iter().chain(["nnm+mean", "arc+mean"]) {
        for f in ["3", "6", "50", "18446744073709551615"] {
            bench.refused(&input, rule, &["--byzantine", f], "hostile");
        }
    }
}

#[test]
fn no_rows_no_columns_and_ragged_files_are_refused_with_the_reason() {
    let bench = Bench::new();
    let input = bench.path("odd.npy");
    let cases: [(Vec<u8>, &str); 9] = [
        (header("(0, 5)", "<f4"), "update"),
        (header("(5, 0)", "<f4"), "value"),
        (header("(0, 0)", "<f4"), ""),
        (header("(5,)", "<f4"), "shape"),
        (header("(2, 2, 2)", "<f4"), "shape"),
        (header(")(1, 1)", "<f4"), ""),
        (header("(2, 2)", "<i4"), ""),
        // Fewer values than the shape says: what a ragged matrix would be.
        ([header("(2, 3)", "<f4"), vec![0; 20]].concat(), ""),
        (b"a,b,c\n1,2,3\n".to_vec(), ""),
    ];
    for (bytes, reason) in cases {
        std::fs::write(&input, bytes).unwrap();
        for rule in ["mean", "trimmed_mean", "caf", "nnm+trimmed_mean"] {
            bench.refused(&input, rule, &[], reason);
        }
    }
    std::fs::write(&input, []).unwrap();
    bench.refused(&input, "mean", &[], "");
}

#[test]
fn one_row_is_its_own_result_and_equal_rows_are_theirs() {
    let bench = Bench::new();
    let one = rows(1, 7);
    let input = bench.matrix(&one);
    for rule in RULES {
        assert_eq!(
            bench.combined(&input, rule, &["--byzantine", "0"]),
            one[0],
            "{rule}"
        );
    }
    let same = vec![one[0].clone(); 9];
    let input = bench.matrix(&same);
    for rule in RULES {
        for f in ["0", "4"] {
            let found = bench.combined(&input, rule, &["--byzantine", f]);
            let close = found
                .iter()
                .zip(&one[0])
                .all(|(found, value)| (found - value).abs() < 1e-6);
            assert!(close, "{rule}: {found:?}");
        }
    }
}

#[test]
fn values_that_are_no_numbers_are_refused_wherever_they_stand() {
    let bench = Bench::new();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (row, at) in [(0, 0), (3, 2), (6, 4)] {
            let mut all = rows(7, 5);
            all[row][at] = bad;
            let input = bench.matrix(&all);
            for rule in RULES {
                bench.refused(&input, rule, &["--byzantine", "2"], "finite");
            }
        }
    }
}

/// Three of ten rows hold the largest and the smallest numbers there are: the result stays within ten diameters of the honest.
#[test]
fn huge_and_subnormal_rows_are_outvoted() {
    let bench = Bench::new();
    for bad in [
        1e38,
        -1e38,
        1e30,
        f32::MAX,
        f32::from_bits(1),
        -f32::from_bits(1),
        f32::MIN_POSITIVE,
    ] {
        let mut all = rows(10, 6);
        for row in [0, 4, 9] {
            all[row] = vec![bad; 6];
        }
        let input = bench.matrix(&all);
        for rule in RULES.into_iter().filter(|rule| *rule != "mean") {
            // MoNNA withstands nobody when the row that it trusts is hostile.
            let trusted: &[&str] = if rule == "monna" {
                &["--reference", "1"]
            } else {
                &[]
            };
            let found = bench.combined(&input, rule, &[&["--byzantine", "3"], trusted].concat());
            assert!(
                found.iter().all(|value| value.abs() < 25.0),
                "{rule} {bad:e}: {found:?}"
            );
        }
    }
}

/// All rows are hostile: whatever comes, it is a finite number or an error.
#[test]
fn rows_that_are_all_huge_give_a_number_or_an_error() {
    let bench = Bench::new();
    let mut all = vec![vec![f32::MAX; 4]; 5];
    all[1] = vec![-f32::MAX; 4];
    all[3] = vec![f32::MAX, -f32::MAX, 1e38, -1e38];
    let input = bench.matrix(&all);
    for rule in RULES {
        let output = bench.run(&input, rule, &["--byzantine", "2"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            bench.combined(&input, rule, &["--byzantine", "2"]);
        } else {
            assert!(said.contains("error[TH-E07"), "{rule}: {said}");
        }
    }
}

#[test]
fn unknown_rules_and_options_that_no_part_takes_are_refused_with_the_reason() {
    let bench = Bench::new();
    let input = bench.matrix(&rows(7, 5));
    let cases: [(&str, &[&str], &str); 13] = [
        ("best", &[], "best"),
        ("", &[], ""),
        ("median+nnm", &[], "last"),
        ("median", &["--tau", "1"], "--tau"),
        ("caf", &["--keep", "2"], "--keep"),
        ("median", &["--bucket", "2"], "--bucket"),
        ("centered_clipping", &[], "--tau"),
        ("centered_clipping", &["--tau", "nan"], "--tau"),
        ("centered_clipping", &["--tau=-1"], "--tau"),
        ("krum", &["--private"], "noise"),
        ("multi_krum", &["--private", "--keep", "1"], "noise"),
        ("bulyan", &["--byzantine", "2"], "4f + 3"),
        ("monna", &["--reference", "7"], "reference"),
    ];
    for (rule, more, reason) in cases {
        let output = bench.run(&input, rule, more);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{rule} {more:?}: {said}");
        assert!(
            said.contains("error") && said.contains(reason),
            "{rule} {more:?}: {said}"
        );
    }
    // There is no option for weights: every row has the same, so none can be negative or no number.
    let output = bench.run(&input, "mean", &["--weights=-1"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_good_matrix_comes_back_as_it_was_written() {
    let bench = Bench::new();
    let all = rows(3, 4);
    let input = bench.matrix(&all);
    let Matrix::F32(read) = read_matrix(&input).unwrap() else {
        panic!("another type")
    };
    assert_eq!((read.count(), read.dimension()), (3, 4));
    assert_eq!(bench.combined(&input, "mean", &["--byzantine", "0"]).len(), 4);
}
