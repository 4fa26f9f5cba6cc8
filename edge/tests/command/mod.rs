//! The command line in this process, and a directory for its files.

#![allow(dead_code, unreachable_pub, reason = "each test file uses what it needs")]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use theriac_command::problem::Problem;
use theriac_edge::commands::{Arguments, execute};

pub async fn command(words: &[&str]) -> (Result<ExitCode, Problem>, String) {
    let words = ["theriac-edge", "--format", "json"].iter().chain(words);
    let arguments = Arguments::try_parse_from(words).unwrap();
    let mut out = Vec::new();
    let result = Box::pin(execute(arguments, &mut out)).await;
    (result, String::from_utf8(out).unwrap())
}

/// The answer of a command that ends with this code.
pub async fn ended(words: &[&str], code: ExitCode) -> serde_json::Value {
    let (result, out) = command(words).await;
    assert_eq!(result.unwrap(), code, "{out}");
    serde_json::from_str(&out).unwrap()
}

pub async fn json(words: &[&str]) -> serde_json::Value {
    let (result, out) = command(words).await;
    result.unwrap();
    serde_json::from_str(&out).unwrap()
}

pub async fn problem(words: &[&str]) -> Problem {
    command(words).await.0.unwrap_err()
}

pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}
