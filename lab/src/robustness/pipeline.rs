//! What stands between the updates of a round and its result, by name: screens, then a rule, as in `vet+law+copies+caf`.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use theriac_aggregator::average::{Mean, SiteAverage};
use theriac_aggregator::copies::{Copies, copies};
use theriac_aggregator::robust::{MatrixRows, Options, PayloadRows, Row, RuleError, RuleName, rule};
use theriac_aggregator::validate::{RawUpdate, validate_with};
use theriac_aggregator::vet::Screens;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding, PrivacyClaimV1, UpdateV1};
use theriac_protocol::units::{Delta, Digest, Epsilon, NodeId, UnitError};

/// How much each round before counts in an edge's mean.
const MEMORY: f64 = 0.9;

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
    /// Rules see the mean of each edge's last updates, weighted by their age, as an aggregator with `site_average` does.
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

/// The last updates of each edge with their rounds, newest last, where a pipeline takes means of them.
#[derive(Debug, Clone, Default)]
pub struct Memory(Vec<VecDeque<(u64, Arc<Row>)>>);

impl Pipeline {
    /// What comes of these rows; `None` stands for one that did not come in time. At most `f` of the rows that pass validation
    /// are hostile; copies no longer count. `memory` is read, and the means after this round are given back.
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
        // As at an aggregator: copies that are hostile for sure are of the f, a refusal proves nothing about the rest.
        let mut found = Copies::default();
        let left: Vec<usize> = (0..rows.len())
            .filter(|index| refused[*index].is_none())
            .collect();
        if self.copies {
            let noise = terms.noise_multiplier.value() * terms.clip_norm.value();
            let values: Vec<&[f32]> = left.iter().filter_map(|index| rows[*index].as_deref()).collect();
            found = copies(&MatrixRows::from_rows(&values).ok()?, noise);
        }
        let (found, hostile) = found.in_force(self.rule, f, &Options::default(), left.len());
        for (copy, _) in &found.removed {
            refused[left[*copy]] = Some("copy");
        }
        let average = SiteAverage::new(MEMORY).unwrap_or(SiteAverage::OFF);
        let mut after = memory.clone();
        after.0.resize(rows.len(), VecDeque::new());
        let mut kept: Vec<Row> = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            let Some(row) = row.as_ref().filter(|_| refused[index].is_none()) else {
                continue;
            };
            let encoded = Row {
                encoding: Encoding::F32,
                payload: encode_f32(row).into(),
            };
            if !self.memory {
                kept.push(encoded);
                continue;
            }
            let past = &mut after.0[index];
            let age = |round: &u64| terms.round.0.saturating_sub(*round);
            while past
                .front()
                .is_some_and(|(round, _)| age(round) >= average.rounds())
            {
                past.pop_front();
            }
            let mut mean = Mean::new(row.len());
            mean.add(&encoded, 1.0, 1.0);
            for (round, update) in past.iter().rev() {
                mean.add(update, average.weight(age(round)), 1.0);
            }
            kept.push(mean.into_row());
            past.push_back((terms.round.0, Arc::new(encoded)));
        }
        let rule = rule(self.rule, hostile, &Options::default()).ok()?;
        let count = kept.len();
        let values = rule
            .combine(&PayloadRows::new(kept, terms.values).ok()?)
            .ok()?
            .values;
        let combined = Combined {
            values,
            rows: count,
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
