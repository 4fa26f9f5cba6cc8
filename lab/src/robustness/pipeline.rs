//! What stands between the updates of a round and its result, by name: screens, then a rule, as in `vet+law+copies+caf`.

use std::fmt;
use std::str::FromStr;

use theriac_aggregator::copies::copies;
use theriac_aggregator::robust::{MatrixRows, Options, RuleError, RuleName, rule};
use theriac_aggregator::validate::{RawUpdate, validate_with};
use theriac_aggregator::vet::Screens;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding, PrivacyClaimV1, UpdateV1};
use theriac_protocol::units::{Delta, Digest, Epsilon, NodeId, UnitError};

/// How much of the last rounds' mean an edge's exponential mean keeps.
const MEMORY: f32 = 0.9;

/// Screens and a rule.
#[expect(clippy::struct_excessive_bools, reason = "four switches, each of its own")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pipeline {
    /// Moments must look like a time series.
    pub vet: bool,
    /// Updates must have the agreed noise.
    pub law: bool,
    /// Of copies that share their noise one is kept.
    pub copies: bool,
    /// Rules see each edge's exponential mean over the rounds.
    pub memory: bool,
    /// The rule.
    pub rule: RuleName,
}

/// No name of a pipeline.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("`{name}` is no pipeline: {source}; before the rule may stand vet+, law+, copies+ and ema+")]
pub struct PipelineError {
    name: String,
    source: RuleError,
}

impl FromStr for Pipeline {
    type Err = PipelineError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let (mut vet, mut law, mut copies, mut memory) = (false, false, false, false);
        let mut rest = name;
        while let Some((word, tail)) = rest.split_once('+') {
            match word {
                "vet" => vet = true,
                "law" => law = true,
                "copies" => copies = true,
                "ema" => memory = true,
                _ => break,
            }
            rest = tail;
        }
        let rule = rest.parse().map_err(|source| PipelineError {
            name: name.to_owned(),
            source,
        })?;
        Ok(Self {
            vet,
            law,
            copies,
            memory,
            rule,
        })
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            ("vet+", self.vet),
            ("law+", self.law),
            ("copies+", self.copies),
            ("ema+", self.memory),
        ];
        for (word, on) in words {
            if on {
                f.write_str(word)?;
            }
        }
        write!(f, "{}", self.rule)
    }
}

/// What came of a round.
#[derive(Debug, Clone, PartialEq)]
pub struct Combined {
    /// The combined values.
    pub values: Vec<f32>,
    /// How many rows the rule saw.
    pub rows: usize,
    /// What stopped a row, in the order of the rows; `None` for those that the rule saw.
    pub refused: Vec<Option<&'static str>>,
}

/// Each edge's exponential mean, where a pipeline has one.
#[derive(Debug, Clone, Default)]
pub struct Memory(Vec<Option<Vec<f32>>>);

impl Pipeline {
    /// What comes of these rows; `None` stands for one that did not come in time. At most `f` of all rows are hostile; those that are
    /// stopped no longer count. `memory` is read, and the means after this round are given back.
    pub fn combine(
        &self,
        rows: &[Option<Vec<f32>>],
        f: usize,
        terms: &AnnounceV1,
        memory: &Memory,
    ) -> Option<(Combined, Memory)> {
        let screens = Screens {
            vet: self.vet,
            noise_law: self.law,
        };
        let mut refused: Vec<Option<&'static str>> = rows
            .iter()
            .map(|row| match row {
                None => Some("round_closed"),
                Some(row) => {
                    let raw = raw(row, terms).ok()?;
                    validate_with(raw, terms, screens)
                        .err()
                        .map(|error| error.code().word())
                }
            })
            .collect();
        if self.copies {
            let noise = terms.noise_multiplier.value() * terms.clip_norm.value();
            let left: Vec<usize> = (0..rows.len())
                .filter(|index| refused[*index].is_none())
                .collect();
            let values: Vec<&[f32]> = left.iter().filter_map(|index| rows[*index].as_deref()).collect();
            for copy in copies(&MatrixRows::from_rows(&values).ok()?, noise) {
                refused[left[copy]] = Some("copy");
            }
        }
        let mut after = memory.clone();
        after.0.resize(rows.len(), None);
        let mut kept = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            let Some(row) = row.as_ref().filter(|_| refused[index].is_none()) else {
                continue;
            };
            if self.memory {
                let zero = vec![0.0; row.len()];
                let before = after.0[index].as_ref().unwrap_or(&zero);
                let mean: Vec<f32> = before
                    .iter()
                    .zip(row)
                    .map(|(before, row)| MEMORY * before + (1.0 - MEMORY) * row)
                    .collect();
                kept.push(mean.clone());
                after.0[index] = Some(mean);
            } else {
                kept.push(row.clone());
            }
        }
        let stopped = rows.len() - kept.len();
        let hostile = f.saturating_sub(stopped).min(kept.len().saturating_sub(1) / 2);
        let hostile = self.rule.withstands(hostile);
        let rule = rule(self.rule, hostile, &Options::default()).ok()?;
        let values = rule.combine(&MatrixRows::from_rows(&kept).ok()?).ok()?.values;
        let combined = Combined {
            values,
            rows: kept.len(),
            refused,
        };
        Some((combined, after))
    }
}

/// A row as an update on its way.
fn raw(row: &[f32], terms: &AnnounceV1) -> Result<RawUpdate, UnitError> {
    let payload = encode_f32(row);
    Ok(RawUpdate {
        node: NodeId::new("site")?,
        header: UpdateV1 {
            round: terms.round,
            nonce: terms.nonce,
            kind: terms.kind,
            base_digest: terms.base_digest,
            layout_digest: terms.layout_digest,
            values: u32::try_from(row.len()).unwrap_or(u32::MAX),
            encoding: Encoding::F32,
            payload_digest: Digest::of(&payload),
            blocks_bound: terms.blocks_max,
            privacy: PrivacyClaimV1 {
                clip_norm: terms.clip_norm,
                noise_multiplier: terms.noise_multiplier,
                epsilon_spent: Epsilon::new(1.0)?,
                delta: Delta::new(1e-6)?,
                ledger_head: Digest::default(),
                ledger_records: 0,
            },
        },
        payload: payload.into(),
    })
}
