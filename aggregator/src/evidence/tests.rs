//! A fleet over many rounds: who is caught, who never is.

use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{Encoding, PrivacyClaimV1};
use theriac_protocol::units::{Delta, Epsilon, L2Norm, NoiseMultiplier};

use super::law::Finding;
use super::reputation::left_out;
use super::*;
use crate::robust::{Options, Row, RuleName, rule};

const LIMITS: QuarantineLimits = QuarantineLimits {
    enabled: true,
    enter_below: 0.4,
    leave_at: 0.7,
};
const CHANNELS: usize = 10;
const MOMENTS: usize = CHANNELS * MOMENTS_PER_CHANNEL;
const DELTA: usize = 1_000;
const SIGMA: f64 = 1.27;
const BLOCKS: u32 = 60;

/// Normal numbers from a seed (`SplitMix64`, Box–Muller).
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// What a site is like for ever: nothing that another one is.
struct Site {
    /// Where its gradient points, norm 1.
    direction: Vec<f64>,
    /// How its channels move: from hardly to a hundred times as much as others.
    scale: Vec<f64>,
    /// Blocks that it has a round.
    blocks: u32,
}

impl Site {
    /// `decades` is how far the scales of its channels lie apart.
    fn new(random: &mut Random, decades: f64) -> Self {
        let direction: Vec<f64> = (0..DELTA).map(|_| random.normal()).collect();
        let norm = direction.iter().map(|value| value * value).sum::<f64>().sqrt();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 1 and the most blocks"
        )]
        let blocks = 1 + (random.uniform() * f64::from(BLOCKS - 1)) as u32;
        Self {
            direction: direction.iter().map(|value| value / norm).collect(),
            scale: (0..CHANNELS)
                .map(|_| 10.0_f64.powf(decades * (random.uniform() - 0.5)))
                .collect(),
            blocks,
        }
    }

    /// An honest update of clip norm 1: what the site learnt, clipped, and noise.
    fn update(&self, kind: UpdateKind, random: &mut Random) -> Vec<f64> {
        let mut values = match kind {
            UpdateKind::Delta => self.direction.clone(),
            // Every block at the clipping norm, all the same way.
            UpdateKind::Gradient => self
                .direction
                .iter()
                .map(|v| v * f64::from(self.blocks))
                .collect(),
            UpdateKind::Moments => {
                let mut sum = vec![0.0; MOMENTS];
                for _ in 0..self.blocks {
                    let block = self.block(random);
                    let norm = block
                        .iter()
                        .map(|value| value * value)
                        .sum::<f64>()
                        .sqrt()
                        .max(1.0);
                    sum.iter_mut()
                        .zip(block)
                        .for_each(|(sum, value)| *sum += value / norm);
                }
                sum
            }
        };
        for value in &mut values {
            *value += SIGMA * random.normal();
        }
        values
    }

    /// Moments of a short series: squares and products of five lags with √2 off the diagonal, products with the target.
    fn block(&self, random: &mut Random) -> Vec<f64> {
        let mut block = vec![0.0; MOMENTS];
        for (sums, scale) in block.chunks_exact_mut(MOMENTS_PER_CHANNEL).zip(&self.scale) {
            for _ in 0..4 {
                let lags: Vec<f64> = (0..5).map(|_| scale * random.normal()).collect();
                let mut at = 0;
                for (one, left) in lags.iter().enumerate() {
                    for (other, right) in lags.iter().enumerate().skip(one) {
                        sums[at] += left
                            * right
                            * if one == other {
                                1.0
                            } else {
                                std::f64::consts::SQRT_2
                            };
                        at += 1;
                    }
                }
                let target = scale * random.normal();
                for (sum, lag) in sums[SIGNED_MOMENTS..].iter_mut().zip(&lags) {
                    *sum += lag * target;
                }
            }
        }
        block
    }
}

struct Fleet {
    kind: UpdateKind,
    sites: Vec<Site>,
    byzantine: usize,
    reputations: BTreeMap<NodeId, Reputation>,
    random: Random,
    round: u64,
}

fn name(site: usize) -> NodeId {
    NodeId::new(format!("site-{site:02}")).unwrap()
}

impl Fleet {
    fn new(kind: UpdateKind, sites: usize, byzantine: usize, decades: f64, seed: u64) -> Self {
        let mut random = Random(seed);
        Self {
            kind,
            sites: (0..sites).map(|_| Site::new(&mut random, decades)).collect(),
            byzantine,
            reputations: BTreeMap::new(),
            random,
            round: 0,
        }
    }

    fn values(&self) -> usize {
        match self.kind {
            UpdateKind::Delta | UpdateKind::Gradient => DELTA,
            UpdateKind::Moments => MOMENTS,
        }
    }

    fn header(&self, payload: &[u8]) -> UpdateV1 {
        UpdateV1 {
            round: Round(self.round),
            nonce: 0,
            kind: self.kind,
            base_digest: Digest::default(),
            layout_digest: Digest::default(),
            values: u32::try_from(self.values()).unwrap(),
            encoding: Encoding::F32,
            payload_digest: Digest::of(payload),
            blocks_bound: BLOCKS,
            privacy: PrivacyClaimV1 {
                clip_norm: L2Norm::new(1.0).unwrap(),
                noise_multiplier: NoiseMultiplier::new(SIGMA).unwrap(),
                epsilon_spent: Epsilon::new(1.0).unwrap(),
                delta: Delta::new(1e-6).unwrap(),
                ledger_head: Digest::default(),
                ledger_records: 1,
            },
        }
    }

    /// One round of all sites; `lie` changes the honest updates of those that lie.
    fn round(&mut self, lie: impl Fn(&mut Vec<Vec<f64>>)) -> (Vec<Record>, Changes) {
        self.round += 1;
        let mut updates = Vec::new();
        for site in &self.sites {
            updates.push(site.update(self.kind, &mut self.random));
        }
        lie(&mut updates);
        let (mut stored, mut rows) = (Vec::new(), Vec::new());
        for (site, update) in updates.iter().enumerate() {
            #[expect(clippy::cast_possible_truncation, reason = "a value of a test")]
            let narrow: Vec<f32> = update.iter().map(|value| *value as f32).collect();
            let payload = encode_f32(&narrow);
            stored.push(StoredRow {
                node: name(site),
                header: self.header(&payload),
                stale: None,
            });
            rows.push(Row {
                encoding: Encoding::F32,
                payload: payload.into(),
            });
        }
        let trusts: Vec<Option<u64>> = stored
            .iter()
            .map(|row| {
                self.reputations
                    .get(&row.node)
                    .filter(|site| site.is_quarantined())
            })
            .map(|site| site.map(Reputation::trust_millionths))
            .collect();
        let out = left_out(&trusts, self.byzantine, 0, 0);
        let kept = rows
            .iter()
            .zip(&out)
            .filter(|(_, out)| !**out)
            .map(|(row, _)| row.clone());
        let values = u32::try_from(self.values()).unwrap();
        let kept = PayloadRows::new(kept.collect(), values).unwrap();
        let combined = rule(RuleName::TRIMMED_MEAN, self.byzantine, &Options::default())
            .unwrap()
            .combine(&kept)
            .unwrap();
        let decisions: Vec<_> = out
            .iter()
            .map(|out| {
                if *out {
                    Decision::Quarantined
                } else {
                    Decision::Combined
                }
            })
            .map(|decision| (decision, None))
            .collect();
        let all = PayloadRows::new(rows, values).unwrap();
        let account = account(
            &all,
            &RoundFacts {
                stored: &stored,
                decisions: &decisions,
                by_rule: &combined.evidence,
                combined: &combined.values,
                segments: &[],
                kind: self.kind,
                norm_bound: 100.0,
                byzantine: self.byzantine,
                averaged: &[],
                behind: &[],
                of_mean: &[],
                carried: None,
                noise: 0.0,
                withstood: self.byzantine,
            },
        );
        let closing = Closing {
            round: Round(self.round),
            rule: "trimmed_mean".into(),
            byzantine: self.byzantine,
            limits: LIMITS,
        };
        conclude(&closing, account, Vec::new(), &mut self.reputations)
    }

    fn inside(&self) -> Vec<String> {
        let inside = self.reputations.iter().filter(|(_, site)| site.is_quarantined());
        inside.map(|(node, _)| node.to_string()).collect()
    }
}

/// The condition for quarantine being on by default: sites of which no two have anything in common, 200 rounds, and nobody is ever in.
#[test]
fn honest_sites_that_differ_in_everything_are_never_in_quarantine() {
    for (kind, seeds) in [
        (UpdateKind::Delta, [1, 2]),
        (UpdateKind::Moments, [3, 4]),
        (UpdateKind::Gradient, [9, 10]),
    ] {
        for seed in seeds {
            let mut fleet = Fleet::new(kind, 12, 3, 2.0, seed);
            for _ in 0..200 {
                let (records, changes) = fleet.round(|_| {});
                let found: Vec<_> = records
                    .iter()
                    .filter(|record| !record.findings.is_empty())
                    .collect();
                assert!(
                    found.is_empty() && changes == Changes::default(),
                    "{kind:?}, seed {seed}, round {}: {found:?}",
                    fleet.round
                );
            }
            assert!(
                fleet.reputations.values().all(|site| site.trust() > 0.9),
                "seed {seed}: {:?}",
                fleet.reputations
            );
        }
    }
}

/// What three colluders send who know all honest updates: the sum of those, turned around, as long as the norm bound lets them.
fn turn_around(updates: &mut [Vec<f64>], liars: usize, length: f64) {
    let d = updates[0].len();
    let sum: Vec<f64> = (0..d)
        .map(|at| updates[liars..].iter().map(|row| row[at]).sum())
        .collect();
    let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
    for update in &mut updates[..liars] {
        // Each with half of its own noise, so that they are no copies of one another.
        for (value, sum) in update.iter_mut().zip(&sum) {
            *value = 0.5 * *value - length * sum / norm;
        }
    }
}

#[test]
fn persistent_liars_are_caught_soon_and_come_back_when_they_behave() {
    for (kind, length, seed) in [
        (UpdateKind::Delta, SIGMA * (DELTA as f64).sqrt(), 5),
        (UpdateKind::Moments, f64::from(BLOCKS), 6),
    ] {
        let mut fleet = Fleet::new(kind, 12, 3, 0.5, seed);
        for _ in 0..30 {
            fleet.round(|_| {});
        }
        let mut caught = None;
        for round in 1..=12 {
            let (records, _) = fleet.round(|updates| turn_around(updates, 3, length));
            for record in &records[3..] {
                assert!(
                    record.findings.is_empty(),
                    "{kind:?}, seed {seed}: an honest site: {record:?}"
                );
            }
            if fleet.inside().len() == 3 && caught.is_none() {
                caught = Some(round);
            }
        }
        assert_eq!(
            fleet.inside(),
            ["site-00", "site-01", "site-02"],
            "{kind:?}, seed {seed}"
        );
        let caught = caught.unwrap();
        assert!(caught <= 6, "{kind:?}, seed {seed}: caught after {caught} rounds");
        let (records, _) = fleet.round(|updates| turn_around(updates, 3, length));
        assert!(
            records[..3]
                .iter()
                .all(|record| record.decision == Decision::Quarantined && record.weight == 0)
        );
        assert!(
            records[..3].iter().all(|record| record.features.is_some()),
            "a site in quarantine is still scored"
        );
        let mut left = None;
        for round in 1..=25 {
            fleet.round(|_| {});
            if fleet.inside().is_empty() && left.is_none() {
                left = Some(round);
            }
        }
        assert!(
            left.is_some_and(|round| round <= 19),
            "{kind:?}, seed {seed}: left after {left:?}"
        );
    }
}

#[test]
fn more_liars_than_are_assumed_neither_fill_the_quarantine_nor_overflow_it() {
    let mut fleet = Fleet::new(UpdateKind::Delta, 12, 2, 0.0, 7);
    let mut held = 0;
    for _ in 0..20 {
        let (_, changes) = fleet.round(|updates| turn_around(updates, 4, SIGMA * (DELTA as f64).sqrt()));
        held += changes.held;
        assert!(fleet.inside().len() <= 2, "seed 7: {:?}", fleet.inside());
    }
    assert!(held > 0, "seed 7: the bound never held anybody back");
}

#[test]
fn refused_updates_count_against_a_site_and_absence_does_not() {
    let closing = Closing {
        round: Round(1),
        rule: "median".into(),
        byzantine: 1,
        limits: LIMITS,
    };
    let empty = || RoundAccount {
        rows: Vec::new(),
        carried: Vec::new(),
        quantiles: BTreeMap::new(),
        withstood: 1,
    };
    let absent = |site, decision, reason: &str| Absent {
        node: name(site),
        decision,
        reason: Some(reason.to_owned()),
        detail: None,
    };
    let mut reputations = BTreeMap::new();
    let gone = vec![
        absent(0, Decision::Refused, "non_finite"),
        absent(1, Decision::Refused, "round_closed"),
        absent(2, Decision::Declined, "budget_spent"),
        absent(3, Decision::Silent, ""),
    ];
    let (records, _) = conclude(&closing, empty(), gone, &mut reputations);
    let verdicts: Vec<Verdict> = records.iter().map(|record| record.verdict).collect();
    assert_eq!(
        verdicts,
        [
            Verdict::Inconsistent,
            Verdict::Neutral,
            Verdict::Neutral,
            Verdict::Neutral
        ]
    );
    assert!(
        matches!(&records[0].findings[..], [Finding::Refused { code, .. }] if code == "non_finite"),
        "{records:?}"
    );
    assert_eq!(reputations[&name(3)], Reputation::default());
}

#[test]
fn a_record_comes_back_from_its_line_with_the_same_line() {
    let mut fleet = Fleet::new(UpdateKind::Delta, 5, 1, 0.0, 8);
    let (records, _) = fleet.round(|updates| updates[1] = updates[0].clone());
    let line = records[0].to_line().unwrap();
    assert!(line.len() < 2_500, "{} bytes", line.len());
    let back: Record = serde_json::from_str(&line).unwrap();
    assert_eq!(back.to_line().unwrap(), line);
    assert!(line.contains("near_copy") && line.contains("site-01"), "{line}");
}
