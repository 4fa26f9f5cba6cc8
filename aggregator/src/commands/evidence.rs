//! `sites show`, the decisions of `rounds show`, and `rounds replay`: why everybody counted as they did.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;
use theriac_command::output::table;
use theriac_command::problem::{self, Problem};
use theriac_protocol::units::{NodeId, Round};

use super::{Common, load, open, print, store_problem};
use crate::combine::RowSource;
use crate::evidence::law::{Finding, Verdict};
use crate::evidence::reputation::QuarantineLimits;
use crate::evidence::{Decision, Record, words};
use crate::replay::{Replayed, replay as do_again};
use crate::spill::RoundMemory;
use crate::status::FormerLedgerStatus;
use crate::store::evidence::{self, RoundPlan};
use crate::store::history::RoundDetail;
use crate::store::records::{self, SiteRow};
use crate::store::sums::{self, SiteSum};
use crate::validation::Validation;

/// Exit code of a replay that cannot be done, with nothing wrong.
const CANNOT: u8 = 3;

/// A round with the record about everybody.
#[derive(Debug, Serialize)]
pub(super) struct RoundShown {
    #[serde(flatten)]
    pub(super) detail: RoundDetail,
    /// With what it was combined; absent for a round that gave no model.
    pub(super) plan: Option<RoundPlan>,
    /// What validators said of the candidate; absent: nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) validation: Option<Validation>,
    /// By site.
    pub(super) decisions: Vec<Record>,
}

/// The table of decisions, and a sentence about each that did not simply count.
pub(super) fn decisions(records: &[Record]) -> String {
    if records.is_empty() {
        return "no records of decisions: the round is open, or they were deleted after limits.records_kept rounds\n".into();
    }
    let header = [
        "site", "decision", "weight", "verdict", "trust", "norm", "distance", "cosine", "nearest", "trimmed",
    ];
    let rows: Vec<Vec<String>> = records
        .iter()
        .map(|record| figures(&record.site, record))
        .collect();
    let mut said = table(&header, &rows);
    for record in records {
        let plain = record.decision == Decision::Combined
            && record.findings.is_empty()
            && !record.held
            && record.stale.is_none()
            && !words::is_outvoted(record);
        if !plain {
            said.extend(["\n", &record.site, ": ", &words::decision(record)]);
            for finding in record
                .findings
                .iter()
                .filter(|finding| !is_the_refusal(record, finding))
            {
                said.extend(["\n  ", &words::finding(finding)]);
            }
        }
    }
    said
}

/// Its decision says that already.
fn is_the_refusal(record: &Record, finding: &Finding) -> bool {
    record.decision == Decision::Refused && matches!(finding, Finding::Refused { .. })
}

fn figures(first: &str, record: &Record) -> Vec<String> {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let features = record.features.as_ref();
    vec![
        first.to_owned(),
        match &record.reason {
            Some(reason) => format!("{}: {reason}", record.decision.word()),
            None => record.decision.word().to_owned(),
        },
        record.weight.to_string(),
        match record.verdict {
            Verdict::Consistent => "consistent",
            Verdict::Inconsistent => "inconsistent",
            Verdict::Neutral => "neutral",
        }
        .to_owned(),
        format!("{:.3}", record.after.trust()),
        number(features.map(|row| row.norm)),
        number(features.map(|row| row.distance)),
        number(features.map(|row| row.cosine)),
        number(features.and_then(|row| row.nearest)),
        number(features.and_then(|row| row.trimmed_share)),
    ]
}

#[derive(Debug, clap::Args)]
pub(super) struct ShowArgs {
    #[command(flatten)]
    common: Common,
    /// Name of the site.
    name: NodeId,
    /// How many of its newest rounds.
    #[arg(long, default_value_t = 20)]
    limit: u32,
}

/// Why a site counts as it does, in plain words.
pub(super) fn show_site(args: &ShowArgs) -> Result<ExitCode, Problem> {
    let config = load(&args.common.config)?;
    let (_, database) = open(&config)?;
    let read = database.read();
    let name = &args.name;
    let sites = records::sites(read).map_err(|error| store_problem(&error))?;
    let Some(site) = sites.into_iter().find(|site| site.node == *name) else {
        return Err(store_problem(&crate::store::StoreError::NotFound {
            what: "site",
            name: name.to_string(),
        }));
    };
    let reputations = evidence::reputations(read).map_err(|error| store_problem(&error))?;
    let reputation = reputations.get(name).copied().unwrap_or_default();
    let history = evidence::of_site(read, name, args.limit).map_err(|error| store_problem(&error))?;
    let state = crate::store::word(site.state);
    let sums = sums::standing(read, config.rounds.accumulate).map_err(|error| store_problem(&error))?;
    let sum = sums.get(name).copied();
    let mut story = story(name, &state, &history, reputation, &config.quarantine);
    story.kept = kept(sum);
    story.ledgers = ledgers(&site, config.privacy_floor.ledger_continuity);
    let former: Vec<FormerLedgerStatus> = site
        .former_ledgers
        .into_iter()
        .map(FormerLedgerStatus::from)
        .collect();
    let value = json!({
        "site": name.as_str(), "state": state, "trust": reputation.trust(),
        "quarantined_since": reputation.quarantined_since,
        "rounds_to_leave": reputation.rounds_to_leave(&config.quarantine),
        "standing": story.standing, "why": story.why, "figures": story.figures, "advice": story.advice,
        "accepted": site.accepted, "refusals": site.refusals, "declines": site.declines, "history": history,
        "epsilon": site.epsilon, "ledger_records": site.ledger.records, "former_ledgers": former,
        "ledger_unallowed": site.ledger_unallowed,
        "earlier_releases": sum.map(|sum| json!({
            "releases": sum.behind.releases, "blocks_min": sum.behind.blocks_min, "blocks_max": sum.behind.blocks_max, "since_round": sum.since,
        })),
    });
    print(args.common.format, &value, human(name, &state, &story, &history))?;
    Ok(ExitCode::SUCCESS)
}

/// What is said about a site.
#[derive(Debug, PartialEq)]
struct Story {
    standing: String,
    why: Vec<String>,
    figures: Vec<String>,
    advice: String,
    /// What of it counts in the next round besides what it sends.
    kept: String,
    /// Its privacy ledgers, where it had more than one.
    ledgers: Vec<String>,
}

/// What earlier releases of a site count in the next round.
fn kept(sum: Option<SiteSum>) -> String {
    sum.map_or_else(
        || "no earlier release of it counts in the next round".to_owned(),
        |sum| {
            format!(
                "in the next round count, besides what it sends: {}, taken in since round {}",
                words::behind(sum.behind),
                sum.since
            )
        },
    )
}

/// That a new ledger was begun, and what had been spent before.
fn ledgers(site: &SiteRow, continuity: bool) -> Vec<String> {
    let spent =
        |epsilon: Option<f64>| epsilon.map_or_else(|| "-".to_owned(), |epsilon| format!("{epsilon:.3}"));
    let mut said: Vec<String> = site
        .former_ledgers
        .iter()
        .map(|former| {
            format!(
                "a new ledger began on {}, the former one of {} records had spent epsilon {} since {}",
                super::records::rfc3339(former.ended.0),
                former.head.records,
                spent(former.epsilon),
                super::records::rfc3339(former.began.0)
            )
        })
        .collect();
    if said.is_empty() {
        return said;
    }
    said.push(format!(
        "in the present one it has spent epsilon {}; what its people have lost is at most the sum of all",
        spent(site.epsilon)
    ));
    if site.ledger_unallowed {
        let then = if continuity {
            "it is kept out until"
        } else {
            "with privacy_floor.ledger_continuity it would be kept out until"
        };
        let name = &site.node;
        said.push(format!(
            "nobody has allowed the new ledger: {then} `theriac-aggregator sites allow-ledger {name}`"
        ));
    }
    said
}

/// Reasons that are said at most.
const REASONS_MAX: usize = 5;

fn story(
    name: &NodeId,
    state: &str,
    history: &[Record],
    reputation: crate::evidence::reputation::Reputation,
    limits: &QuarantineLimits,
) -> Story {
    let last = history.first();
    let held = last.is_some_and(|record| record.held);
    // What decided: rounds with findings; without any, what became of the last round.
    let telling = history.iter().filter(|record| !record.findings.is_empty());
    let mut why: Vec<String> = telling
        .take(REASONS_MAX)
        .map(|record| {
            let findings: Vec<String> = record.findings.iter().map(words::finding).collect();
            format!("round {}: {}", record.round, findings.join("; "))
        })
        .collect();
    if let Some(last) = last.filter(|last| last.findings.is_empty()) {
        why.insert(0, format!("round {}: {}", last.round, words::decision(last)));
    }
    if why.is_empty() {
        why.push("no round with it is on record".into());
    }
    let suspicious = history
        .iter()
        .find(|record| !record.findings.is_empty() && record.features.is_some());
    let shown = suspicious.or_else(|| history.iter().find(|record| record.features.is_some()));
    Story {
        standing: words::standing(&reputation, limits, held),
        figures: shown.map_or_else(Vec::new, |record| {
            let lines = words::figures(record);
            std::iter::once(format!("round {}", record.round))
                .chain(lines)
                .collect()
        }),
        advice: match state {
            "suspended" => {
                format!("it is suspended; `theriac-aggregator sites resume {name}` lets it take part again")
            }
            "revoked" => "its key is revoked; enrol it anew with `theriac-aggregator token create`".into(),
            _ => words::advice(name.as_str(), last, &reputation),
        },
        why,
        kept: String::new(),
        ledgers: Vec::new(),
    }
}

fn human(name: &NodeId, state: &str, story: &Story, history: &[Record]) -> String {
    let list = |lines: &[String]| {
        lines
            .iter()
            .flat_map(|line| ["  ", line.as_str(), "\n"])
            .collect::<String>()
    };
    let header = [
        "round", "decision", "weight", "verdict", "trust", "norm", "distance", "cosine", "nearest", "trimmed",
    ];
    let rows: Vec<Vec<String>> = history
        .iter()
        .map(|record| figures(&record.round.to_string(), record))
        .collect();
    let part = |title: &str, lines: &[String]| match lines {
        [] => String::new(),
        [line] if line.is_empty() => String::new(),
        lines => format!("{title}\n{}", list(lines)),
    };
    let figures = part("figures", &story.figures);
    format!(
        "{name}: {state}, {}\nwhy\n{}{figures}{}{}what you can do\n  {}\n\n{}",
        story.standing,
        list(&story.why),
        part("earlier releases", std::slice::from_ref(&story.kept)),
        part("privacy ledgers", &story.ledgers),
        story.advice,
        table(&header, &rows)
    )
}

/// Does a past round again. Exit code 0: the same bits; 1: not; 3: it cannot be done, and nothing is wrong.
pub(super) fn replay(common: &Common, round: u64) -> Result<ExitCode, Problem> {
    let config = load(&common.config)?;
    let (dir, database) = open(&config)?;
    let key = crate::audit::AuditKey::load(&dir.audit_key(), &config.federation)
        .map_err(|error| crate::serve::ServeError::from(error).problem())?;
    let key = key.log_key().public();
    let memory = RoundMemory::beside_the_server(&config);
    let source = RowSource {
        connection: database.read(),
        blobs: database.blobs(),
        memory: &memory,
    };
    match do_again(source, &config.model, &key, Round(round)) {
        Ok(same) => {
            print(common.format, &same, same_again(&same))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(crate::replay::ReplayError::Store(error)) => Err(store_problem(&error)),
        Err(error @ crate::replay::ReplayError::Spill(_)) => Err(Problem::failed("TH-E0704", error)
            .hint("check the disk of data_dir, or of the folder for temporary files (TMPDIR), or raise limits.round_memory_bytes")),
        Err(error) if error.is_impossible() => {
            let hint = match error {
                crate::replay::ReplayError::Pruned(_) => format!(
                    "updates are kept for limits.rounds_kept = {} rounds and records for limits.records_kept = {}; replay sooner, or raise them",
                    config.limits.rounds_kept, config.limits.records_kept
                ),
                _ => "`rounds list` says which rounds gave a model; nothing is wrong".to_owned(),
            };
            let problem = Problem::failed("TH-E0724", &error).hint(hint);
            problem::report(&problem, &mut std::io::stderr());
            Ok(ExitCode::from(CANNOT))
        }
        Err(error) => Err(Problem::failed("TH-E0723", format!("round {round}: {error}")).hint(
            "keep a copy of the data directory as evidence, compare it with a backup, and check the log with `audit export` and `audit verify`",
        )),
    }
}

/// For people: what a replay found.
fn same_again(same: &Replayed) -> String {
    let model = same.model_version.map_or_else(
        || "The model that it turned down".to_owned(),
        |version| format!("Model {version}"),
    );
    let head = match same.signed_head {
        Some(size) => format!("the round's own are under the head that was signed at {size} leaves"),
        None => {
            "no head is signed since the round ended, so nothing vouches for its own leaves yet".to_owned()
        }
    };
    let validation = same.validation.as_ref().map_or_else(String::new, |words| {
        format!("\nvalidation, decided again: {words}")
    });
    format!(
        "round {}: the same bits. {model} has SHA-256 {} again; {} updates counted, {} did not, {} records of the round \
         and {} hashes of the chain are as they were written. {} leaves of the audit log have their hashes and give the signed roots; {head}{validation}",
        same.round, same.model_digest, same.combined, same.left_out, same.records, same.chain, same.leaves
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::reputation::Reputation;

    const LIMITS: QuarantineLimits = QuarantineLimits {
        enabled: true,
        enter_below: 0.4,
        leave_at: 0.7,
    };

    fn refused(round: u64, before: Reputation) -> Record {
        let node = NodeId::new("plant-7").unwrap();
        let code = "norm_exceeded".to_owned();
        Record {
            reason: Some(code.clone()),
            findings: vec![Finding::Refused { code, detail: None }],
            verdict: Verdict::Inconsistent,
            after: before.observe(Verdict::Inconsistent),
            ..Record::blank(Round(round), &node, Decision::Refused, before)
        }
    }

    #[test]
    fn why_was_this_site_rejected_is_answered_with_figures_and_what_to_do() {
        let first = refused(1, Reputation::default());
        let second = refused(2, first.after);
        let inside = Reputation {
            quarantined_since: Some(2),
            ..second.after
        };
        let name = NodeId::new("plant-7").unwrap();
        let history = [second, first];
        let story = story(&name, "active", &history, inside, &LIMITS);
        let said = human(&name, "active", &story, &history);
        for wanted in [
            "plant-7: active, in quarantine since round 2: trust 0.374, it leaves at 0.70, after 7 rounds as honest ones are",
            "round 2: its update was refused as norm_exceeded (the update was longer than clipping and noise can make an honest one)",
            "sites suspend plant-7",
            "refused: norm_exceeded",
        ] {
            assert!(said.contains(wanted), "{wanted} is not in\n{said}");
        }
    }

    #[test]
    fn a_site_without_any_round_is_said_to_be_one() {
        let name = NodeId::new("new").unwrap();
        let story = story(&name, "active", &[], Reputation::default(), &LIMITS);
        assert_eq!(story.why, ["no round with it is on record"]);
        assert_eq!(story.advice, "nothing");
        assert!(story.standing.starts_with("trust 0.800"), "{}", story.standing);
    }

    #[test]
    fn a_new_ledger_is_said_with_what_the_former_one_had_spent() {
        use crate::store::ledgers::FormerLedger;
        use crate::store::records::LedgerHead;
        use theriac_protocol::units::Timestamp;
        let mut site = SiteRow {
            node: NodeId::new("plant-7").unwrap(),
            state: theriac_audit::leaf::SiteStanding::Active,
            enrolled: Timestamp(86_400_000),
            accepted: 1,
            refusals: std::collections::BTreeMap::new(),
            declines: std::collections::BTreeMap::new(),
            epsilon: Some(0.5),
            delta: Some(1e-6),
            last_verdict: None,
            ledger: LedgerHead::default(),
            guarantee: None,
            former_ledgers: Vec::new(),
            ledger_unallowed: false,
        };
        assert!(ledgers(&site, true).is_empty());
        site.former_ledgers.push(FormerLedger {
            began: Timestamp(0),
            ended: Timestamp(86_400_000),
            head: LedgerHead {
                records: 41,
                ..LedgerHead::default()
            },
            epsilon: Some(3.2),
            delta: Some(1e-6),
        });
        site.ledger_unallowed = true;
        let said = ledgers(&site, true).join("\n");
        for wanted in [
            "a new ledger began on 1970-01-02T00:00:00Z, the former one of 41 records had spent epsilon 3.200",
            "in the present one it has spent epsilon 0.500",
            "it is kept out until `theriac-aggregator sites allow-ledger plant-7`",
        ] {
            assert!(said.contains(wanted), "{wanted} is not in\n{said}");
        }
        assert!(ledgers(&site, false).join("\n").contains("would be kept out"));
    }

    #[test]
    fn decisions_that_are_not_plain_are_put_into_words() {
        let node = NodeId::new("plant-1").unwrap();
        let plain = Record::blank(Round(3), &node, Decision::Combined, Reputation::default());
        let said = decisions(&[plain, refused(3, Reputation::default())]);
        assert!(
            said.contains("plant-7: its update was refused: norm_exceeded"),
            "{said}"
        );
        assert!(!said.contains("plant-1: "), "{said}");
        assert!(decisions(&[]).contains("limits.records_kept"));
    }
}
