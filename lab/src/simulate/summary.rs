//! What a simulation leaves behind: `summary.json` and `rounds.jsonl`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use theriac_protocol::units::NodeId;

use super::args::Settings;
use super::center::{PUBLISHED, RoundRecord};
use super::federation::Traffic;

/// One line of `rounds.jsonl`.
#[derive(Debug, Serialize)]
pub struct RoundLine<'a> {
    /// The new site of this federation, in a cold start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub newcomer: Option<&'a NodeId>,
    /// The round.
    #[serde(flatten)]
    pub record: &'a RoundRecord,
    /// Bytes from and to each site.
    pub bytes: BTreeMap<&'a NodeId, Bytes>,
}

/// Bytes in both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Bytes {
    /// From the site.
    pub up: u64,
    /// To the site.
    pub down: u64,
}

/// What is kept of one federation once its models are in use.
#[derive(Debug)]
pub struct FederationReport {
    /// The new site, in a cold start.
    pub newcomer: Option<NodeId>,
    /// The rounds.
    pub records: Vec<RoundRecord>,
    /// Bytes by round and site.
    pub traffic: BTreeMap<(u64, NodeId), Traffic>,
    /// ε spent by each site; `None` without noise.
    pub epsilon: BTreeMap<NodeId, Option<f64>>,
    /// Hostile sites.
    pub hostile: BTreeSet<NodeId>,
}

impl FederationReport {
    /// The lines of `rounds.jsonl`.
    pub fn lines(&self) -> impl Iterator<Item = RoundLine<'_>> {
        self.records.iter().map(|record| {
            let traffic = self
                .traffic
                .iter()
                .filter(|((round, _), _)| *round == record.round);
            let bytes = traffic
                .map(|((_, site), t)| {
                    (
                        site,
                        Bytes {
                            up: t.up,
                            down: t.down,
                        },
                    )
                })
                .collect();
            RoundLine {
                newcomer: self.newcomer.as_ref(),
                record,
                bytes,
            }
        })
    }

    /// Sites that were refused or stood out: who, in which round, how.
    fn caught(&self) -> impl Iterator<Item = Caught> {
        self.records.iter().flat_map(|record| {
            let caught = |site: &NodeId, how| Caught {
                site: site.clone(),
                round: record.round,
                how,
                newcomer: self.newcomer.clone(),
                hostile: self.hostile.contains(site),
            };
            let refused = record
                .refused
                .iter()
                .map(move |refused| caught(&refused.site, refused.reason));
            let outvoted = record.evidence.iter().filter(|evidence| evidence.outvoted);
            refused
                .chain(outvoted.map(move |evidence| caught(&evidence.site, "outvoted")))
                .collect::<Vec<_>>()
        })
    }
}

/// A site that was refused or stood out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Caught {
    /// Which.
    pub site: NodeId,
    /// In which round.
    pub round: u64,
    /// The refusal's word, or `outvoted`: far from what the rule made of the round.
    pub how: &'static str,
    /// The new site of that federation, in a cold start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub newcomer: Option<NodeId>,
    #[serde(skip)]
    hostile: bool,
}

/// What is told of one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteReport {
    /// Rows that its detector was fitted on.
    pub train_rows: usize,
    /// Rows that were scored.
    pub test_rows: usize,
    /// Alarms raised in them.
    pub alarms: u64,
    /// The same per day.
    pub alarms_per_day: f64,
    /// What its gate said of the global model; `null` when there was none.
    pub gate: Option<&'static str>,
    /// The figures that decided; `null` where there were none.
    pub gate_reason: Option<String>,
    /// ε that it spent; `null` without noise or federation.
    pub epsilon: Option<f64>,
    /// δ of that.
    pub delta: Option<f64>,
    /// Mean bytes from it in a round.
    pub bytes_up_per_round: Option<f64>,
    /// Mean bytes to it in a round.
    pub bytes_down_per_round: Option<f64>,
}

/// Makes `summary.json`.
pub fn summary(
    settings: &Settings,
    sites: &BTreeMap<NodeId, SiteReport>,
    federations: &[FederationReport],
    parameters: usize,
    seconds: f64,
) -> serde_json::Value {
    let args = &settings.args;
    let published = federations
        .iter()
        .map(|f| f.records.iter().filter(|r| r.outcome == PUBLISHED).count());
    let aborted = federations
        .iter()
        .map(|f| f.records.iter().filter(|r| r.outcome != PUBLISHED).count());
    let traffic: Vec<&Traffic> = federations.iter().flat_map(|f| f.traffic.values()).collect();
    let mean = |total: u64| {
        if traffic.is_empty() {
            0.0
        } else {
            total as f64 / traffic.len() as f64
        }
    };
    let mut refusals = BTreeMap::<&str, u64>::new();
    for refused in federations
        .iter()
        .flat_map(|f| &f.records)
        .flat_map(|r| &r.refused)
    {
        *refusals.entry(refused.reason).or_default() += 1;
    }
    let (caught, suspected): (Vec<Caught>, Vec<Caught>) = federations
        .iter()
        .flat_map(FederationReport::caught)
        .partition(|caught| caught.hostile);
    let attack = settings.malicious.map(|(_, attack)| {
        let malicious: BTreeSet<&NodeId> = federations.iter().flat_map(|f| &f.hostile).collect();
        serde_json::json!({
            "name": attack.name(),
            "malicious": malicious,
            "caught": caught,
            "honest_suspected": suspected,
        })
    });
    let terms = settings.terms.as_ref();
    serde_json::json!({
        "sites": sites.keys().collect::<Vec<_>>(),
        "parameters": parameters,
        "rounds": published.sum::<usize>(),
        "rounds_aborted": aborted.sum::<usize>(),
        "federations": federations.len(),
        "seconds": seconds,
        "bytes_up_per_site_round": mean(traffic.iter().map(|t| t.up).sum()),
        "bytes_down_per_site_round": mean(traffic.iter().map(|t| t.down).sum()),
        "privacy": {
            "unit": args.privacy,
            "windows": terms.and_then(|terms| terms.windows),
            "noise_multiplier": terms.map(|terms| terms.noise_multiplier),
            "clip_norm": terms.map(|terms| terms.clip_norm),
            "epsilon": federations.iter().flat_map(|f| f.epsilon.values()).flatten().copied().reduce(f64::max),
            "delta": terms.map(|terms| terms.delta),
        },
        "refusals": refusals,
        "attack": attack,
        "by_site": sites,
        "arguments": {
            "mode": args.mode,
            "recipe": args.recipe,
            "cold_start": args.cold_start.first(),
            "rounds": args.rounds(),
            "validators": args.validators,
            "seed": args.seed,
            "privacy": args.privacy,
            "epsilon": args.epsilon,
            "delta": args.delta,
            "rule": args.rule,
            "byzantine": settings.byzantine,
            "step_seconds": args.step,
        },
    })
}
