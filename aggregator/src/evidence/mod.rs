//! Why each edge counted as it did in each round: records that explain a decision by themselves, and what follows from them.
//!
//! ```text
//! stored rows, combined values → measure → law → verdict ─┬→ Record, chained by hash          `rounds show`, `sites show`
//! refusals, declines, silence ────────────────────────────┴→ Reputation → quarantine          weight 0 in the next rounds
//! ```
//!
//! Everything here is a pure function of what is stored: rows, headers, the round's rule, and the reputations before it. `rounds replay`
//! holds the program to it. [`measure`] takes figures, [`law`] says what no honest row can be, [`reputation`] remembers,
//! [`words`] says it to people; this file puts one round together.

pub mod law;
pub mod measure;
pub mod reputation;
pub mod words;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use theriac_model::global::delta_layout;
use theriac_model::moments::MOMENTS_PER_CHANNEL;
use theriac_model::{LAG_COUNT, LAGS};
use theriac_protocol::message::{UpdateKind, UpdateV1};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{Digest, NodeId, Round};

use self::law::{Finding, PairSets, RowLaw, Verdict};
use self::measure::{LayerDeviation, Pairs, RowMeasure, Segment};
use self::reputation::{Changes, QuarantineLimits, Reputation, settle};
use crate::accumulate::Behind;
use crate::average::Stale;
use crate::layout::ModelSpec;
use crate::robust::{PayloadRows, RowEvidence, Rows as _};

/// Format of a record.
pub const FORMAT: u32 = 1;
/// Version of rules, measures and laws. It changes whenever the same stored round would give other bits. Since 3 `dedup` takes out a cover of near pairs and no
/// more than the rule can do without, and the rows of sites that count by earlier releases have figures.
pub const RULE_VERSION: u32 = 3;
/// Values of a channel's moments whose signs have a law: the squares and products `Σ p pᵀ`.
const SIGNED_MOMENTS: usize = 15;
/// Parts into which bare numbers are cut.
const RAW_PARTS: usize = 16;

/// What became of a site's part in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Its row went into the rule with weight 1.
    Combined,
    /// Its row was scored at weight 0: the site is in quarantine.
    Quarantined,
    /// Its row was left out by a screen.
    Screened,
    /// Its row is stored, and the round gave no model.
    NotCombined,
    /// Its update was refused for good.
    Refused,
    /// It took no part.
    Declined,
    /// It was asked and sent nothing that could be stored.
    Silent,
    /// Its update came after the round's end.
    Late,
    /// It sent nothing in the round, and counted by its earlier releases.
    Carried,
}

impl Decision {
    /// The word in records.
    pub fn word(self) -> &'static str {
        match self {
            Self::Combined => "combined",
            Self::Quarantined => "quarantined",
            Self::Screened => "screened",
            Self::NotCombined => "not_combined",
            Self::Refused => "refused",
            Self::Declined => "declined",
            Self::Silent => "silent",
            Self::Late => "late",
            Self::Carried => "carried",
        }
    }
}

/// The figures of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Features {
    /// Euclidean norm.
    pub norm: f64,
    /// The most that validation lets through.
    pub norm_bound: f64,
    /// Distance from the combined values.
    pub distance: f64,
    /// Cosine of the angle to them.
    pub cosine: f64,
    /// Distance to the nearest other row; absent with one row, or with too many to compare.
    pub nearest: Option<f64>,
    /// Whose row that is.
    pub nearest_site: Option<String>,
    /// Median distance to the other rows.
    pub neighbours_median: Option<f64>,
    /// Share of values outside what the rule kept; absent at weight 0.
    pub trimmed_share: Option<f64>,
    /// Kolmogorov–Smirnov distance from the noise's law; absent where a signal of unknown size lies under it.
    pub noise_distance: Option<f64>,
    /// Layers or channels in which the row deviates most from what is ordinary in the round.
    pub layers: Vec<LayerDeviation>,
}

/// The least, the quartiles and the largest of one figure over the rows of a round: `[min, 25 %, 50 %, 75 %, max]`.
pub type Quantiles = [f64; 5];

/// One site in one round. Its JSON, one line, is what is hashed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Format of the record.
    pub format: u32,
    /// The round.
    pub round: u64,
    /// The site.
    pub site: String,
    /// What became of its part.
    pub decision: Decision,
    /// Word of a refusal, of a reason to decline, or of a screen.
    pub reason: Option<String>,
    /// 1 or 0; never more.
    pub weight: u8,
    /// The rule that combined the round.
    pub rule: String,
    /// Version of rule and measures.
    pub rule_version: u32,
    /// Assumed number of hostile edges.
    pub byzantine: u64,
    /// How many the rule was told to withstand among the rows that counted, where that is another number: few rows, or copies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withstood: Option<u64>,
    /// SHA-256 of the payload, when there is one.
    pub payload_digest: Option<String>,
    /// The figures of the row.
    pub features: Option<Features>,
    /// The same figures over the whole round.
    pub quantiles: BTreeMap<String, Quantiles>,
    /// What no honest row can be.
    pub findings: Vec<Finding>,
    /// What follows for the site.
    pub verdict: Verdict,
    /// What the site had earned before.
    pub before: Reputation,
    /// What it has earned now.
    pub after: Reputation,
    /// Whether it would be in quarantine if not as many as are assumed hostile were in already.
    pub held: bool,
    /// The update was made for the round before and came late: what it was multiplied by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale: Option<Stale>,
    /// The rule saw the mean of so many updates of the site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub averaged: Option<u64>,
    /// The rule saw the mean of so many releases, the one at hand among them unless the site was carried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<Behind>,
    /// Hash of the record before this one, of whatever site and round.
    pub previous: String,
}

impl Record {
    /// A record that says nothing yet but who, where and what; `standing` is what the site had earned and keeps.
    pub fn blank(round: Round, node: &NodeId, decision: Decision, standing: Reputation) -> Self {
        Self {
            format: FORMAT,
            round: round.0,
            site: node.to_string(),
            decision,
            reason: None,
            weight: u8::from(matches!(decision, Decision::Combined | Decision::Carried)),
            rule: String::new(),
            rule_version: RULE_VERSION,
            byzantine: 0,
            withstood: None,
            payload_digest: None,
            features: None,
            quantiles: BTreeMap::new(),
            findings: Vec::new(),
            verdict: Verdict::Neutral,
            before: standing,
            after: standing,
            held: false,
            stale: None,
            averaged: None,
            behind: None,
            previous: String::new(),
        }
    }

    /// The line that is stored and hashed.
    ///
    /// # Errors
    /// Never in practice: names and numbers always have a JSON form.
    pub fn to_line(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// SHA-256 of a line: the next record's `previous`.
    pub fn hash(line: &str) -> Digest {
        Digest::of(line.as_bytes())
    }
}

/// Named parts of an update of this kind: the channels of moments, the layers of a delta, sixteen equal parts of bare numbers.
pub fn segments(spec: &ModelSpec, kind: UpdateKind) -> Vec<Segment> {
    match (spec.channel_names(), kind) {
        (Some(names), UpdateKind::Moments) => names
            .into_iter()
            .enumerate()
            .map(|(channel, name)| Segment {
                name,
                range: channel * MOMENTS_PER_CHANNEL..(channel + 1) * MOMENTS_PER_CHANNEL,
            })
            .collect(),
        (Some(names), UpdateKind::Gradient) => lag_segments(names.len()),
        (Some(names), UpdateKind::Delta) => delta_layout(names.len())
            .iter()
            .map(|(name, _, range)| Segment {
                name: name.to_owned(),
                range,
            })
            .collect(),
        (None, _) => {
            let values = usize::try_from(spec.values()).unwrap_or(usize::MAX);
            let part = values.div_ceil(RAW_PARTS).max(1);
            (0..values)
                .step_by(part)
                .map(|start| {
                    let range = start..(start + part).min(values);
                    Segment {
                        name: format!("values {} to {}", range.start, range.end - 1),
                        range,
                    }
                })
                .collect()
        }
    }
}

/// A stored update that takes part in a round's evidence.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredRow {
    /// Whose it is.
    pub node: NodeId,
    /// Its header.
    pub header: UpdateV1,
    /// For a late update of the round before: how it counts.
    pub stale: Option<Stale>,
}

/// A row and everything measured about it.
#[derive(Debug, Clone, PartialEq)]
pub struct RowAccount {
    /// Whose it is.
    pub node: NodeId,
    /// SHA-256 of its payload.
    pub payload_digest: Digest,
    /// Whether it was left out, and how.
    pub decision: Decision,
    /// Why it was screened.
    pub reason: Option<String>,
    /// Its figures.
    pub features: Features,
    /// What no honest row can be.
    pub findings: Vec<Finding>,
    /// For a late update of the round before: how it counted.
    pub stale: Option<Stale>,
    /// Updates of the site in the average that the rule saw; 1: its update as it came.
    pub averaged: u64,
    /// Where earlier releases are added: what was in the mean that the rule saw.
    pub behind: Option<Behind>,
}

/// A site that sent nothing and counted by its earlier releases.
#[derive(Debug, Clone, PartialEq)]
pub struct CarriedAccount {
    /// Which.
    pub node: NodeId,
    /// What was in its row.
    pub behind: Behind,
    /// Why its releases together are no moments of a series, so that it did not count.
    pub finding: Option<Finding>,
    /// The figures of that row. Nothing is said of pairs: its distance from single updates, with all their noise, cannot be set beside theirs.
    pub features: Features,
}

/// A site that is carried, before its row is measured.
#[derive(Debug, Clone, PartialEq)]
pub struct CarriedFacts {
    /// Which.
    pub node: NodeId,
    /// What is in its row.
    pub behind: Behind,
    /// Why it does not count.
    pub finding: Option<Finding>,
    /// What the rule said of its row, where it counted.
    pub by_rule: Option<RowEvidence>,
}

/// All rows of a round, measured.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundAccount {
    /// One for each stored update, by name.
    pub rows: Vec<RowAccount>,
    /// Sites without a stored update that counted, or would have, by name.
    pub carried: Vec<CarriedAccount>,
    /// Figures over the whole round.
    pub quantiles: BTreeMap<String, Quantiles>,
    /// Hostile rows that the rule was told to withstand among those that counted.
    pub withstood: usize,
}

impl RoundAccount {
    /// Sites without a stored update that counted.
    pub fn carried_that_count(&self) -> usize {
        self.carried.iter().filter(|site| site.finding.is_none()).count()
    }
}

/// What is known of a round before its rows are measured.
#[derive(Debug)]
pub struct RoundFacts<'a> {
    /// Whose rows, by name.
    pub stored: &'a [StoredRow],
    /// For each row what was decided: [`Decision::Combined`], [`Decision::Quarantined`] or [`Decision::Screened`] with its reason.
    pub decisions: &'a [(Decision, Option<String>)],
    /// What the rule said of the rows that it combined, in their order.
    pub by_rule: &'a [RowEvidence],
    /// What the rule made.
    pub combined: &'a [f32],
    /// Named parts of an update.
    pub segments: &'a [Segment],
    /// What the round collects.
    pub kind: UpdateKind,
    /// Norm bound of validation.
    pub norm_bound: f64,
    /// Assumed number of hostile edges.
    pub byzantine: usize,
    /// Standard deviation of the noise that the round's terms ask for: what a site claims is believed only where it is more.
    pub noise: f64,
    /// Hostile rows that the rule was told to withstand among those that counted.
    pub withstood: usize,
    /// For each row how many updates of its site are in the average that the rule saw.
    pub averaged: &'a [u64],
    /// For each row, where earlier releases are added, what is in the mean that the rule saw.
    pub behind: &'a [Option<Behind>],
    /// For each row why the releases in that mean are no moments of a series, where they are none.
    pub of_mean: &'a [Option<Finding>],
    /// The rows of sites that are carried, and whose they are, in the same order; `None`: there are none.
    pub carried: Option<(&'a PayloadRows, &'a [CarriedFacts])>,
}

/// The parts of a gradient `[5C + 1, channel]`: one for each lag, over all channels, and the constant.
fn lag_segments(channels: usize) -> Vec<Segment> {
    let part = channels * channels;
    let lags = LAGS.iter().enumerate().map(|(index, lag)| Segment {
        name: format!("lag {lag}"),
        range: index * part..(index + 1) * part,
    });
    let constant = Segment {
        name: "constant".to_owned(),
        range: LAG_COUNT * part..LAG_COUNT * part + channels,
    };
    lags.chain([constant]).collect()
}

/// Measures all rows of a round against what the rule made of those that counted. CPU work.
pub fn account(rows: &PayloadRows, facts: &RoundFacts<'_>) -> RoundAccount {
    let laws: Vec<RowLaw> = facts
        .stored
        .iter()
        .map(|row| RowLaw::of(&row.header, facts.noise))
        .collect();
    let names: Vec<String> = facts.stored.iter().map(|row| row.node.to_string()).collect();
    let std: Vec<Option<f64>> = laws.iter().map(RowLaw::tested_std).collect();
    let beside = facts.carried.map(|(rows, _)| rows);
    let (measures, of_carried) = measure::rows_beside(rows, beside, facts.combined, facts.segments, &std);
    let all = measure::pairs(rows, &|_| true);
    let signed = match facts.kind {
        UpdateKind::Moments => measure::pairs(rows, &|index| index % MOMENTS_PER_CHANNEL < SIGNED_MOMENTS),
        UpdateKind::Delta => all.clone(),
        UpdateKind::Gradient => None,
    };
    let pairs = PairSets { all, signed };
    let findings = law::findings(
        &names,
        &laws,
        &measures,
        rows.dimension(),
        &pairs,
        facts.byzantine,
    );
    let mut by_rule = facts.by_rule.iter();
    let rows: Vec<RowAccount> = measures
        .into_iter()
        .zip(findings)
        .enumerate()
        .map(|(at, (measure, mut findings))| {
            findings.extend(facts.of_mean.get(at).cloned().flatten());
            let (decision, reason) = facts.decisions[at].clone();
            let ruled = (decision == Decision::Combined).then(|| by_rule.next()).flatten();
            RowAccount {
                node: facts.stored[at].node.clone(),
                payload_digest: facts.stored[at].header.payload_digest,
                decision,
                reason,
                stale: facts.stored[at].stale,
                averaged: facts.averaged.get(at).copied().unwrap_or(1),
                behind: facts.behind.get(at).copied().flatten(),
                features: features(at, measure, pairs.all.as_ref(), &names, ruled, facts.norm_bound),
                findings,
            }
        })
        .collect();
    let sites = facts.carried.map_or(&[][..], |(_, sites)| sites);
    let carried = sites
        .iter()
        .zip(of_carried)
        .map(|(site, measure)| CarriedAccount {
            node: site.node.clone(),
            behind: site.behind,
            finding: site.finding.clone(),
            features: features(0, measure, None, &[], site.by_rule.as_ref(), facts.norm_bound),
        })
        .collect();
    RoundAccount {
        // Of updates of the round alone: means of releases have less noise, and quartiles of both kinds would be those of neither.
        quantiles: quantiles(&rows),
        rows,
        carried,
        withstood: facts.withstood,
    }
}

fn features(
    at: usize,
    measure: RowMeasure,
    pairs: Option<&Pairs>,
    names: &[String],
    ruled: Option<&RowEvidence>,
    norm_bound: f64,
) -> Features {
    let mut nearest: Option<(f64, usize)> = None;
    let mut distances = Vec::new();
    if let Some(pairs) = pairs {
        for other in (0..names.len()).filter(|other| *other != at) {
            let distance = pairs.distance(at, other);
            distances.push(distance);
            if nearest.is_none_or(|(least, _)| distance < least) {
                nearest = Some((distance, other));
            }
        }
    }
    Features {
        norm: measure.norm,
        norm_bound,
        distance: measure.distance,
        cosine: measure.cosine,
        nearest: nearest.map(|(distance, _)| distance),
        nearest_site: nearest.map(|(_, other)| names[other].clone()),
        neighbours_median: (!distances.is_empty()).then(|| measure::median(distances)),
        trimmed_share: ruled.map(|ruled| ruled.trimmed_share),
        noise_distance: measure.noise_distance,
        layers: measure.layers,
    }
}

fn quantiles(rows: &[RowAccount]) -> BTreeMap<String, Quantiles> {
    type Figure = fn(&Features) -> Option<f64>;
    let figures: [(&str, Figure); 7] = [
        ("norm", |row| Some(row.norm)),
        ("distance", |row| Some(row.distance)),
        ("cosine", |row| Some(row.cosine)),
        ("nearest", |row| row.nearest),
        ("neighbours_median", |row| row.neighbours_median),
        ("trimmed_share", |row| row.trimmed_share),
        ("noise_distance", |row| row.noise_distance),
    ];
    let mut quantiles = BTreeMap::new();
    for (name, figure) in figures {
        let mut values: Vec<f64> = rows.iter().filter_map(|row| figure(&row.features)).collect();
        values.sort_unstable_by(f64::total_cmp);
        let Some(last) = values.len().checked_sub(1) else {
            continue;
        };
        // Nearest rank below: always a value that a row really has.
        quantiles.insert(
            name.to_owned(),
            [0, last / 4, last / 2, 3 * last / 4, last].map(|at| values[at]),
        );
    }
    quantiles
}

/// The word of a refusal that is on record with its figures and counts for and against nobody.
const IMPLAUSIBLE: &str = "implausible";

/// Refusals that say something about a site: what its update held no program of ours sends. All others (late, busy, another base, a full disk)
/// happen to honest sites, and so does `implausible`: the vet's bounds are those of recorded hosts, and a host whose every metric is white noise lies outside
/// them.
pub fn tells(code: &str) -> bool {
    const TELLING: [RefusalCode; 4] = [
        RefusalCode::NonFinite,
        RefusalCode::NormExceeded,
        RefusalCode::WrongLength,
        RefusalCode::DigestMismatch,
    ];
    TELLING.iter().any(|telling| telling.word() == code)
}

/// Sites of a round without a stored row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absent {
    /// Who.
    pub node: NodeId,
    /// [`Decision::Refused`], [`Decision::Declined`] or [`Decision::Silent`].
    pub decision: Decision,
    /// The refusal's or the decline's word.
    pub reason: Option<String>,
    /// What was found in a refused update, beside what was expected.
    pub detail: Option<String>,
}

/// How a round is recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Closing {
    /// The round.
    pub round: Round,
    /// Word of the rule.
    pub rule: String,
    /// Assumed number of hostile edges.
    pub byzantine: usize,
    /// When sites enter and leave quarantine.
    pub limits: QuarantineLimits,
}

/// The records of a round, by name and without their `previous` (of a site that was carried two, where it was asked as well), and how the quarantine changed. `reputations` holds every site that may be in
/// quarantine; it is brought up to date.
pub fn conclude(
    closing: &Closing,
    account: RoundAccount,
    absent: Vec<Absent>,
    reputations: &mut BTreeMap<NodeId, Reputation>,
) -> (Vec<Record>, Changes) {
    let blank = |node: &NodeId, decision, reason: Option<String>| Record {
        reason,
        rule: closing.rule.clone(),
        byzantine: closing.byzantine as u64,
        ..Record::blank(closing.round, node, decision, Reputation::default())
    };
    let withstood = Some(account.withstood as u64).filter(|f| *f != closing.byzantine as u64);
    let mut records = BTreeMap::new();
    for row in account.rows {
        let verdict = match row.decision {
            Decision::NotCombined => Verdict::Neutral,
            _ => Verdict::of(&row.findings),
        };
        let record = Record {
            payload_digest: Some(row.payload_digest.to_string()),
            features: Some(row.features),
            quantiles: account.quantiles.clone(),
            verdict,
            findings: row.findings,
            stale: row.stale,
            averaged: Some(row.averaged).filter(|updates| *updates > 1),
            behind: row.behind,
            withstood,
            ..blank(&row.node, row.decision, row.reason)
        };
        records.insert(row.node, record);
    }
    for Absent {
        node,
        decision,
        reason,
        detail,
    } in absent
    {
        let telling = reason
            .clone()
            .filter(|code| decision == Decision::Refused && (tells(code) || code == IMPLAUSIBLE));
        let findings: Vec<Finding> = telling
            .into_iter()
            .map(|code| Finding::Refused {
                code,
                detail: detail.clone(),
            })
            .collect();
        let record = Record {
            verdict: if findings.is_empty() {
                Verdict::Neutral
            } else {
                Verdict::of(&findings)
            },
            findings,
            ..blank(&node, decision, reason)
        };
        records.entry(node).or_insert(record);
    }
    // It says nothing about what the site did in this round, and what it sent was judged where it came: what it had earned stays.
    let carried: Vec<Record> = account
        .carried
        .into_iter()
        .map(
            |CarriedAccount {
                 node,
                 behind,
                 finding,
                 features,
             }| {
                let standing = reputations.get(&node).copied().unwrap_or_default();
                Record {
                    behind: Some(behind),
                    features: Some(features),
                    quantiles: account.quantiles.clone(),
                    withstood,
                    weight: u8::from(finding.is_none()),
                    findings: finding.into_iter().collect(),
                    before: standing,
                    after: standing,
                    ..blank(&node, Decision::Carried, None)
                }
            },
        )
        .collect();
    for (node, record) in &mut records {
        let reputation = reputations.entry(node.clone()).or_default();
        record.before = *reputation;
        *reputation = reputation.observe(record.verdict);
    }
    let mut sites: Vec<&mut Reputation> = reputations.values_mut().collect();
    let changes = settle(&mut sites, closing.round.0, closing.byzantine, &closing.limits);
    for (node, record) in &mut records {
        record.after = reputations.get(node).copied().unwrap_or_default();
        let low = record.after.trust() < closing.limits.enter_below;
        record.held = closing.limits.enabled && low && !record.after.is_quarantined();
    }
    // Before what else is recorded of the same site, whose standing after the round is the last word.
    let mut all: Vec<Record> = carried.into_iter().chain(records.into_values()).collect();
    all.sort_by(|one, other| one.site.cmp(&other.site));
    (all, changes)
}

#[cfg(test)]
mod tests;
