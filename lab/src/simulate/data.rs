//! The sites: recorded machines.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;
use theriac_model::feature::FeatureSchema;
use theriac_model::global::{OwnLagWeights, moments_layout};
use theriac_model::gradient::{BlockRows, LocalDescent};
use theriac_model::io::{ReadError, read_series};
use theriac_model::linear::FullWeights;
use theriac_model::moments::{self, BLOCK_ROWS};
use theriac_model::series::Series;
use theriac_privacy::windows::BlockWindows;
use theriac_protocol::units::NodeId;

use crate::attack::{Kind, poison};

const TRAIN: &str = ".train.npy.gz";
const TEST: &str = ".test.npy.gz";

/// Why there is nothing to train on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The directory cannot be listed.
    #[error("cannot list --data {path}: {source}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No file has a fitting name.
    #[error("no NAME{TRAIN} in {path}: give the directory that holds the recorded machines")]
    NoSites {
        /// Where.
        path: PathBuf,
    },
    /// A site that was asked for is not there.
    #[error("no site `{name}` in {path}; there are: {known}")]
    UnknownSite {
        /// What was asked for.
        name: String,
        /// Where.
        path: PathBuf,
        /// What is there.
        known: String,
    },
    /// A file's name is no site's name.
    #[error("{path}: `{name}` is no site name: use 1 to 63 characters of a-z, 0-9 and -")]
    Name {
        /// Where.
        path: PathBuf,
        /// What was found.
        name: String,
    },
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Sites that cannot learn together.
    #[error(
        "site `{site}` has {found} channels in its {part} part, `{first}` has {expected}: all must agree"
    )]
    Channels {
        /// Which.
        site: NodeId,
        /// `train` or `test`.
        part: &'static str,
        /// Its channels.
        found: usize,
        /// The first site.
        first: NodeId,
        /// Channels of the first site.
        expected: usize,
    },
}

/// One recorded machine.
#[derive(Debug)]
pub struct Site {
    /// Its name.
    pub name: NodeId,
    /// What it learns from.
    pub train: Series,
    /// What is scored.
    pub test: Series,
    /// Moments of every whole block, unclipped; made when first needed.
    blocks: OnceLock<Vec<Vec<f32>>>,
    /// Rows of the same blocks, for gradients; made when first needed.
    block_rows: OnceLock<Vec<BlockRows>>,
    /// All of them summed up, for local steps.
    descent: OnceLock<LocalDescent>,
}

impl Site {
    /// A site of these rows.
    pub fn new(name: NodeId, train: Series, test: Series) -> Self {
        Self {
            name,
            train,
            test,
            blocks: OnceLock::new(),
            block_rows: OnceLock::new(),
            descent: OnceLock::new(),
        }
    }

    /// The same machine with rows spoilt as `kind` says.
    #[must_use]
    pub fn poisoned(&self, kind: Kind, seed: u64) -> Self {
        let train = poison::rows(kind, &self.train, seed);
        Self::new(self.name.clone(), train, Series::empty(self.train.channels()))
    }

    /// Moments of the blocks of 60 rows, in the order of time; an incomplete last one is left out.
    pub fn blocks(&self, schema: &FeatureSchema) -> &[Vec<f32>] {
        self.blocks.get_or_init(|| {
            let values = moments::public_values(schema, &self.train);
            let values = values.chunks_exact(BLOCK_ROWS * schema.channels().max(1));
            values.map(|block| moments::block(block, BLOCK_ROWS)).collect()
        })
    }

    /// The same blocks as rows that gradients are taken of.
    pub fn block_rows(&self, schema: &FeatureSchema) -> &[BlockRows] {
        self.block_rows.get_or_init(|| {
            let values = moments::public_values(schema, &self.train);
            let values = values.chunks_exact(BLOCK_ROWS * schema.channels().max(1));
            values.map(|block| BlockRows::new(block, BLOCK_ROWS)).collect()
        })
    }

    /// What local steps of all those rows come to; see [`LocalDescent::descend`].
    pub fn local(
        &self,
        schema: &FeatureSchema,
        weights: &FullWeights,
        steps: u32,
        proximal: f32,
    ) -> Vec<f32> {
        self.equations(schema).descend(weights, steps, proximal)
    }

    /// All rows of those blocks as equations of the full linear model.
    pub fn equations(&self, schema: &FeatureSchema) -> &LocalDescent {
        self.descent.get_or_init(|| {
            let mut descent = LocalDescent::new(schema.channels());
            self.block_rows(schema)
                .iter()
                .for_each(|block| descent.add(block));
            descent
        })
    }

    /// Publicly scaled rows of every window of a block, `[row, channel]`; none for a block that is not there.
    fn windows(&self, schema: &FeatureSchema, block: u64, windows: BlockWindows) -> Vec<Vec<f32>> {
        let first = usize::try_from(block)
            .unwrap_or(usize::MAX)
            .saturating_mul(BLOCK_ROWS);
        let row = |row: u32| usize::try_from(row).unwrap_or(usize::MAX);
        if first.saturating_add(BLOCK_ROWS) > self.train.rows() {
            return Vec::new();
        }
        (0..windows.count())
            .map(|window| {
                let begin = first + row(window * windows.stride());
                let rows = self.train.slice(begin..begin + row(windows.window()));
                moments::public_values(schema, &rows)
            })
            .collect()
    }

    /// Moments of every window of these blocks.
    pub fn window_moments(
        &self,
        schema: &FeatureSchema,
        blocks: &[u64],
        windows: BlockWindows,
    ) -> Vec<Vec<f32>> {
        let rows = usize::try_from(windows.window()).unwrap_or(usize::MAX);
        let cut = blocks
            .iter()
            .flat_map(|block| self.windows(schema, *block, windows));
        cut.map(|values| moments::block(&values, rows)).collect()
    }

    /// The same as rows that gradients are taken of.
    pub fn window_rows(
        &self,
        schema: &FeatureSchema,
        blocks: &[u64],
        windows: BlockWindows,
    ) -> Vec<BlockRows> {
        let rows = usize::try_from(windows.window()).unwrap_or(usize::MAX);
        let cut = blocks
            .iter()
            .flat_map(|block| self.windows(schema, *block, windows));
        cut.map(|values| BlockRows::new(&values, rows)).collect()
    }

    /// Ids of the charged units of round `round` (from 0) of `rounds`: `each` blocks, so that the last round has the newest ones, or without that an equal part of what
    /// there is; in the order of time, disjoint from those of every other round.
    pub fn units(&self, block_rows: usize, round: u64, rounds: u64, each: Option<u64>) -> Range<u64> {
        let all = (self.train.rows() / block_rows.max(1)) as u64;
        let first = each.map(|each| all.saturating_sub(rounds.saturating_mul(each)));
        let at = |round: u64| match (each, first) {
            (Some(each), Some(first)) => (first + round.min(rounds).saturating_mul(each)).min(all),
            _ => all * round.min(rounds) / rounds.max(1),
        };
        at(round)..at(round + 1)
    }
}

/// All sites, in the order of their names, and what their channels mean.
#[derive(Debug)]
pub struct Fleet {
    /// The sites.
    pub sites: Vec<Site>,
    /// Their common profile.
    pub schema: FeatureSchema,
}

/// Reads the sites called `wanted`, or all when it is empty. Labels are never opened.
///
/// # Errors
/// [`DataError`]
pub fn load(path: &Path, wanted: &[String]) -> Result<Fleet, DataError> {
    let known = names(path)?;
    let wanted: BTreeSet<String> = if wanted.is_empty() {
        known.clone()
    } else {
        wanted.iter().cloned().collect()
    };
    for name in &wanted {
        if !known.contains(name) {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            return Err(DataError::UnknownSite {
                name: name.clone(),
                path: path.to_owned(),
                known,
            });
        }
    }
    let wanted: Vec<String> = wanted.into_iter().collect();
    let read = |name: &String| {
        let node = NodeId::new(name.as_str()).map_err(|_| DataError::Name {
            path: path.to_owned(),
            name: name.clone(),
        })?;
        let train = read_series(&path.join(format!("{name}{TRAIN}")))?;
        let test = read_series(&path.join(format!("{name}{TEST}")))?;
        Ok::<_, DataError>(Site::new(node, train, test))
    };
    let sites: Vec<Site> = wanted.par_iter().map(read).collect::<Result<_, _>>()?;
    let Some(first) = sites.first() else {
        return Err(DataError::NoSites {
            path: path.to_owned(),
        });
    };
    let expected = first.train.channels();
    for site in &sites {
        for (part, series) in [("train", &site.train), ("test", &site.test)] {
            if series.channels() != expected {
                let (site, first) = (site.name.clone(), first.name.clone());
                return Err(DataError::Channels {
                    site,
                    part,
                    found: series.channels(),
                    first,
                    expected,
                });
            }
        }
    }
    let schema = FeatureSchema::recorded("recorded-v1", expected);
    Ok(Fleet { sites, schema })
}

fn names(path: &Path) -> Result<BTreeSet<String>, DataError> {
    let directory = |source| DataError::Directory {
        path: path.to_owned(),
        source,
    };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(directory)? {
        let name = entry.map_err(directory)?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(TRAIN)) {
            names.insert(name.to_owned());
        }
    }
    if names.is_empty() {
        return Err(DataError::NoSites {
            path: path.to_owned(),
        });
    }
    Ok(names)
}

/// Sum of all blocks of some sites, as it is: what a centre would compute that had all rows.
pub fn pooled<'a>(sites: impl IntoIterator<Item = &'a Site>, schema: &FeatureSchema) -> Vec<f32> {
    let mut sum = vec![0.0_f64; moments_layout(schema.channels()).len()];
    for block in sites.into_iter().flat_map(|site| site.blocks(schema)) {
        sum.iter_mut()
            .zip(block)
            .for_each(|(sum, value)| *sum += f64::from(*value));
    }
    #[expect(clippy::cast_possible_truncation, reason = "the sum is rounded once, here")]
    let sum = sum.into_iter().map(|value| value as f32).collect();
    sum
}

/// The full linear model of all rows of some sites in one place, leaning on the public constant with `lambda`.
pub fn pooled_linear<'a>(
    sites: impl IntoIterator<Item = &'a Site>,
    schema: &FeatureSchema,
    lambda: f64,
) -> Option<FullWeights> {
    let constant = OwnLagWeights::public_constant(schema.channels());
    let mut equations = LocalDescent::new(schema.channels());
    for site in sites {
        equations.merge(site.equations(schema));
    }
    equations.least_squares(&FullWeights::of_own_lag(&constant), lambda)
}

#[cfg(test)]
mod tests {
    use theriac_privacy::windows::RecordWindows;

    use super::*;

    fn site(rows: usize) -> Site {
        let series = Series::new(1, vec![0.5; rows]).unwrap();
        Site::new(NodeId::new("a").unwrap(), series.clone(), series)
    }

    #[test]
    fn every_block_belongs_to_exactly_one_round() {
        for (rows, rounds) in [(600, 1), (600, 3), (601, 7), (59, 2)] {
            let site = site(rows);
            let units: Vec<u64> = (0..rounds)
                .flat_map(|round| site.units(BLOCK_ROWS, round, rounds, None))
                .collect();
            assert_eq!(units, (0..(rows / BLOCK_ROWS) as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn rounds_of_few_blocks_read_the_newest_ones_each_once() {
        let site = site(600);
        let of = |round| site.units(BLOCK_ROWS, round, 3, Some(2));
        assert_eq!([of(0), of(1), of(2)], [4..6, 6..8, 8..10]);
        let of = |round| site.units(BLOCK_ROWS, round, 4, Some(3));
        assert_eq!(
            [of(0), of(3), of(4)],
            [0..3, 9..10, 10..10],
            "fewer than asked for"
        );
    }

    #[test]
    fn windows_lie_inside_their_blocks() {
        let site = site(130);
        let windows = RecordWindows::new(25, 20).unwrap().in_block(60).unwrap();
        let schema = FeatureSchema::recorded("t", 1);
        assert_eq!(windows.count(), 2);
        assert_eq!(site.window_moments(&schema, &[0, 1], windows).len(), 4);
        assert_eq!(site.window_rows(&schema, &[1], windows).len(), 2);
        assert!(
            site.window_moments(&schema, &[2], windows).is_empty(),
            "no whole block"
        );
    }

    #[test]
    fn missing_directories_and_sites_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = load(&dir.path().join("none"), &[]).unwrap_err();
        assert!(matches!(error, DataError::Directory { .. }));
        assert!(matches!(
            load(dir.path(), &[]).unwrap_err(),
            DataError::NoSites { .. }
        ));
        std::fs::write(dir.path().join("a.train.npy.gz"), b"").unwrap();
        let error = load(dir.path(), &["b".to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("no site `b`") && error.contains("there are: a"),
            "{error}"
        );
        assert!(matches!(load(dir.path(), &[]).unwrap_err(), DataError::Read(_)));
    }
}
