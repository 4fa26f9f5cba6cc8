//! Seeds that were measured, on disk as soon as each is, so that a table that was ended goes on where it was, or takes more seeds in.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{RobustnessError, Value};

/// What every seed of a table has in common; seeds of another one are not mixed in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The program, with the version of its rules.
    pub(super) program: String,
    /// The options that change a figure, as text.
    pub(super) options: String,
    pub(super) pipelines: Vec<String>,
    pub(super) attacks: Vec<String>,
}

/// Of every pipeline and attack, in the plan's order, what was measured.
pub(super) type Seed = Vec<Vec<Value>>;

/// Seeds from 1 on, one a line after the plan.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Begins in `out`, and gives the seeds that are there already; none unless `resume`. A line that was cut off is measured again.
    pub(super) fn open(out: &Path, plan: &Plan, resume: bool) -> Result<(Self, Vec<Seed>), RobustnessError> {
        let path = out.join("seeds.jsonl");
        let failed = |source| RobustnessError::Write {
            path: path.clone(),
            source,
        };
        let mut seeds = Vec::new();
        std::fs::create_dir_all(out).map_err(failed)?;
        let before = File::open(&path).ok();
        if let Some(Err(std::fs::TryLockError::WouldBlock)) = before.as_ref().map(File::try_lock) {
            return Err(RobustnessError::InUse(path));
        }
        if !resume && before.is_some() {
            // Hours of work are not written over.
            let former = (1..1_000)
                .map(|number: u32| out.join(format!("seeds.before-{number}.jsonl")))
                .find(|former| !former.exists());
            if let Some(former) = former {
                std::fs::rename(&path, former).map_err(failed)?;
            }
        }
        if resume {
            let text = std::fs::read_to_string(&path).map_err(|source| RobustnessError::NothingToResume {
                path: path.clone(),
                source,
            })?;
            let mut lines = text.lines();
            let before = lines
                .next()
                .and_then(|line| serde_json::from_str::<Plan>(line).ok());
            if before.as_ref() != Some(plan) {
                return Err(RobustnessError::AnotherTable(path));
            }
            let cells = plan.pipelines.len() * plan.attacks.len();
            // Only the end of the file may have been cut off.
            let (whole, _cut) = text.rsplit_once('\n').unwrap_or_default();
            for line in whole.lines().skip(1) {
                match serde_json::from_str::<Seed>(line) {
                    Ok(seed) if seed.len() == cells => seeds.push(seed),
                    _ => return Err(RobustnessError::Damaged(path, 2 + seeds.len())),
                }
            }
        }
        // What was there stays until the new file is whole.
        let partial = path.with_extension("partial");
        let mut file = File::create(&partial).map_err(failed)?;
        file.lock().map_err(failed)?;
        append(&mut file, plan).map_err(failed)?;
        for seed in &seeds {
            append(&mut file, seed).map_err(failed)?;
        }
        std::fs::rename(&partial, &path).map_err(failed)?;
        Ok((Self { path, file }, seeds))
    }

    /// One more seed.
    pub(super) fn take(&mut self, seed: &Seed) -> Result<(), RobustnessError> {
        append(&mut self.file, seed).map_err(|source| RobustnessError::Write {
            path: self.path.clone(),
            source,
        })
    }
}

fn append(file: &mut File, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)?;
    file.sync_data()
}
