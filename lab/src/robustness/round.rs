//! One round under attack: honest rows, what hostile sites make of theirs, and what the pipeline makes of all.

use theriac_aggregator::validate::norm_bound;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::units::Round;

use super::pipeline::{Combined, Memory, Pipeline};
use crate::attack::{Attack, Kind, Scene};

/// What a round is made of. Hostile sites come first by name: where a screen keeps the first of several, that is the worst case.
#[derive(Debug, Clone, Copy)]
pub struct Battle<'a> {
    /// The screens and the rule.
    pub pipeline: &'a Pipeline,
    /// The round's terms.
    pub terms: &'a AnnounceV1,
    /// Each edge's exponential mean so far.
    pub memory: &'a Memory,
    /// Seed of whatever is random in the attack.
    pub seed: u64,
    /// What the last round gave.
    pub previous: Option<&'a [f32]>,
}

impl Battle<'_> {
    /// The result with `own.len()` hostile sites that would have sent `own` but carry out `attack`; as many are assumed.
    pub fn fight(
        &self,
        honest: &[Vec<f32>],
        own: &[Vec<f32>],
        attack: Option<Attack>,
    ) -> Option<(Combined, Memory)> {
        let run = |hostile: &[Vec<f32>]| {
            let rows: Vec<Option<Vec<f32>>> = hostile
                .iter()
                .map(|row| sent(attack, row))
                .chain(honest.iter().cloned().map(Some))
                .collect();
            self.pipeline.combine(&rows, own.len(), self.terms, self.memory)
        };
        let Some(attack) = attack else {
            return run(own);
        };
        let hostile = attack.craft(&Scene {
            honest,
            own,
            round: Round(self.terms.round.0),
            seed: self.seed,
            previous: self.previous,
            bound: norm_bound(self.terms),
            deployed: &|rows| run(rows).map(|(combined, _)| combined.values),
        });
        run(&hostile)
    }
}

/// What reaches the aggregator of a row, `None` when nothing does in time: replays and late updates are refused by the round
/// itself, of duplicates the first stays (`simulate` sends all of them for real).
fn sent(attack: Option<Attack>, row: &[f32]) -> Option<Vec<f32>> {
    match attack.map(|attack| attack.kind) {
        Some(Kind::Replay | Kind::Late) => None,
        Some(Kind::WrongLength) => Some(row[..row.len().saturating_sub(1)].to_vec()),
        _ => Some(row.to_vec()),
    }
}
