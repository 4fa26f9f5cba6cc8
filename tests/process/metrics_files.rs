//! `train` and `score` on files as people really have them.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::child::{Ended, run, text};

/// A table of a few slow waves, one row a minute; `cell` may spoil a value.
fn table(columns: &[&str], rows: u32, cell: impl Fn(u32, usize) -> Option<&'static str>) -> String {
    let mut text = format!("time,{}\n", columns.join(","));
    for row in 0..rows {
        write!(text, "{}", 1_700_000_000 + row * 60).unwrap();
        for (index, _) in columns.iter().enumerate() {
            let wave =
                (f64::from(row) * 0.1 * (index + 1) as f64).sin() * 0.2 + f64::from(row * 7 % 13) * 0.01;
            match cell(row, index) {
                Some(spoilt) => write!(text, ",{spoilt}").unwrap(),
                None => write!(text, ",{wave:.4}").unwrap(),
            }
        }
        text.push('\n');
    }
    text
}

struct Desk {
    root: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn train(&self, input: &Path) -> Ended {
        let model = self.path("model.safetensors");
        run(
            "edge",
            &[
                "train",
                "--input",
                text(input),
                "--model",
                text(&model),
                "--format",
                "json",
            ],
        )
    }

    fn score(&self, input: &Path) -> Ended {
        let (model, output) = (self.path("model.safetensors"), self.path("scores.npy"));
        run(
            "edge",
            &[
                "score",
                "--model",
                text(&model),
                "--input",
                text(input),
                "--output",
                text(&output),
                "--format",
                "json",
            ],
        )
    }

    /// The scores that were written: bytes after the header of the .npy file.
    fn scores(&self) -> Vec<f32> {
        let bytes = fs::read(self.path("scores.npy")).unwrap();
        let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        bytes[header..]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect()
    }
}

const COLUMNS: [&str; 3] = ["load", "latency", "errors"];

#[test]
fn gaps_and_missing_values_are_counted_and_scored_around() {
    let desk = Desk::new();
    let trained = desk
        .train(&desk.write("good.csv", table(&COLUMNS, 600, |_, _| None)))
        .expect_done()
        .json();
    assert_eq!(
        (&trained["rows"], &trained["missing"], &trained["gaps"]),
        (&600.into(), &0.into(), &0.into())
    );

    let spoilt = table(&COLUMNS, 300, |row, column| match (row, column) {
        (50..60, 1) => Some("NaN"),
        (100, 0) => Some(""),
        (150, 2) => Some("inf"),
        _ => None,
    });
    // Half an hour is missing altogether.
    let gap: Vec<&str> = spoilt
        .lines()
        .enumerate()
        .filter(|(line, _)| !(200..230).contains(line))
        .map(|(_, line)| line)
        .collect();
    let found = desk
        .score(&desk.write("spoilt.csv", gap.join("\n") + "\n"))
        .expect_done()
        .json();
    assert_eq!(
        (&found["rows"], &found["missing"], &found["gaps"]),
        (&270.into(), &12.into(), &1.into())
    );
    let scores = desk.scores();
    assert_eq!(scores.len(), 270);
    // After half an hour without rows nothing is known until the lags are there again; a missing value costs no score.
    let unknown: Vec<usize> = (0..scores.len())
        .filter(|row| !scores[*row].is_finite())
        .collect();
    assert_eq!(unknown, (199..209).collect::<Vec<_>>());

    // A model can be fitted on such a file as well, and one without a single number is refused.
    let found = desk
        .train(&desk.write("spoilt.csv", &spoilt))
        .expect_done()
        .json();
    assert_eq!(found["missing"], Value::from(12));
    let nothing = table(&COLUMNS, 600, |_, _| Some("NaN"));
    desk.train(&desk.write("nothing.csv", nothing)).expect_problem(
        1,
        &["TH-E0322", "nothing.csv", "check that the columns hold numbers"],
    );
    desk.train(&desk.write("short.csv", table(&COLUMNS, 5, |_, _| None)))
        .expect_problem(1, &["TH-E0322", "short.csv", "5 rows", "record longer"]);
}

#[test]
fn a_file_of_other_columns_does_not_fit_and_is_told_which() {
    let desk = Desk::new();
    desk.train(&desk.write("good.csv", table(&COLUMNS, 600, |_, _| None)))
        .expect_done();
    // One column of three that is gone counts as missing and is named; with two it is another kind of file.
    let less = table(&COLUMNS[..2], 100, |_, _| None);
    let told = desk.score(&desk.write("less.csv", less)).expect_done().json();
    assert_eq!(
        (&told["absent"][0], &told["missing"]),
        (&json!("errors"), &json!(100))
    );
    desk.score(&desk.write("least.csv", table(&COLUMNS[..1], 100, |_, _| None)))
        .expect_problem(
            1,
            &[
                "TH-E0323",
                "2 of the 3 columns",
                "`latency`",
                "missing",
                "the file has: load",
                "its card lists them",
            ],
        );
    // A column too many, and another order, are no trouble.
    let more = table(&["errors", "extra", "latency", "load"], 100, |_, _| None);
    desk.score(&desk.write("more.csv", more)).expect_done();

    for (name, content, words) in [
        (
            "odd.csv",
            "time,load,latency,errors\n0,1,2,3\n60,1,x,3\n",
            ["line 3", "`latency`"],
        ),
        (
            "back.csv",
            "time,load,latency,errors\n60,1,2,3\n0,1,2,3\n",
            ["line 3", "time"],
        ),
        ("twice.csv", "time,load,load\n0,1,2\n", ["`load`", "twice"]),
        ("empty.csv", "", ["empty.csv", "header"]),
        ("odd.npy", "\u{93}NUMPY", ["odd.npy", "NumPy"]),
        ("odd.txt", "1 2 3", ["odd.txt", ".csv"]),
    ] {
        desk.score(&desk.write(name, content))
            .expect_problem(1, &[&["TH-E0320", name], &words[..]].concat());
    }
    desk.score(&desk.path("nowhere.csv"))
        .expect_problem(1, &["TH-E0320", "nowhere.csv", "No such file"]);
}

#[test]
fn a_model_that_is_cut_swapped_or_of_another_layout_is_refused() {
    let desk = Desk::new();
    let wide = desk.write("wide.csv", table(&["a", "b", "c", "d", "e"], 600, |_, _| None));
    let input = desk.write("good.csv", table(&COLUMNS, 600, |_, _| None));
    let (model, card) = (desk.path("model.safetensors"), desk.path("model.json"));
    desk.train(&wide).expect_done();
    let other = fs::read(&model).unwrap();
    // The model of five columns on a file of three.
    desk.score(&input)
        .expect_problem(1, &["TH-E0323", "`a`", "its card lists them"]);
    desk.train(&input).expect_done();
    let good = fs::read(&model).unwrap();
    let refused = |words: &[&str]| {
        let words = [&["TH-E0321", "model", "theriac-edge train"], words].concat();
        desk.score(&input).expect_problem(1, &words);
    };

    for length in [0, 4, 100, good.len() / 2, good.len() - 1] {
        fs::write(&model, &good[..length]).unwrap();
        refused(&[]);
    }
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&model, flipped).unwrap();
    refused(&[]);
    // Another model beside this card: what counts is the card inside the model's file.
    fs::write(&model, other).unwrap();
    desk.score(&input).expect_problem(1, &["TH-E0323", "`a`"]);
    fs::write(&model, &good).unwrap();
    fs::remove_file(&card).unwrap();
    desk.score(&input).expect_done();
    // A name that is no model's.
    let odd = desk.path("model.bin");
    run("edge", &["train", "--input", text(&input), "--model", text(&odd)])
        .expect_problem(2, &["TH-E0324", "NAME.safetensors"]);
}
