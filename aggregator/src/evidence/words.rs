//! A record in plain words, with its figures and with what an operator can do.

use super::law::Finding;
use super::reputation::{QuarantineLimits, Reputation};
use super::{Decision, Features, Record};
use crate::accumulate::Behind;

/// What became of the site's part, in one sentence.
pub fn decision(record: &Record) -> String {
    let reason = record.reason.as_deref().unwrap_or("no reason on record");
    match record.decision {
        Decision::Combined if is_outvoted(record) => format!(
            "its update reached {} with weight 1{}, and the rule itself left all of it out: the others outvoted it",
            record.rule,
            made_of(record)
        ),
        Decision::Combined => format!(
            "its update counted with weight 1 of {}{}",
            record.rule,
            made_of(record)
        ),
        Decision::Quarantined => {
            "its update was measured and counted nothing: the site is in quarantine".into()
        }
        Decision::Screened => format!("its update was left out by a screen: {reason}"),
        Decision::NotCombined => "its update is stored, and the round gave no model".into(),
        Decision::Refused => {
            let found = record.findings.iter().find_map(|finding| match finding {
                Finding::Refused { detail, .. } => detail.as_deref(),
                _ => None,
            });
            format!("its update was refused: {}", refused(reason, found))
        }
        Decision::Declined => format!("it took no part: {reason}"),
        Decision::Silent => "it was asked and sent nothing before the round ended".into(),
        Decision::Late if record.reason.is_some() => {
            "its update came after the round had ended and was kept for the next one".into()
        }
        Decision::Late => "its update came after the round had ended and was not used".into(),
        Decision::Carried if record.weight == 0 => {
            let found = record.findings.iter().map(no_series).collect::<Vec<_>>();
            format!(
                "it sent nothing in this round, and its earlier releases count no more: {}",
                found.join("; ")
            )
        }
        Decision::Carried if is_outvoted(record) => format!(
            "it sent nothing in this round, its earlier releases reached {} with weight 1, {}, and the rule itself left all of them out: the others outvoted them",
            record.rule,
            record.behind.map_or_else(String::new, behind)
        ),
        Decision::Carried => format!(
            "it sent nothing in this round and counted with weight 1 of {} by its earlier releases: {}",
            record.rule,
            record.behind.map_or_else(String::new, behind)
        ),
    }
}

/// What stands behind a row: `12 releases of 24 to 720 blocks`.
pub fn behind(of: Behind) -> String {
    let Behind {
        releases,
        blocks_min,
        blocks_max,
    } = of;
    let plural = if releases == 1 { "" } else { "s" };
    let blocks = if blocks_min == blocks_max {
        blocks_min.to_string()
    } else {
        format!("{blocks_min} to {blocks_max}")
    };
    format!("{releases} release{plural} of {blocks} blocks in all")
}

/// What stands behind the model of a round whose records these are, where earlier releases are added.
pub fn all_behind(records: &[Record]) -> Option<String> {
    let counted = |decision| {
        let counted = records
            .iter()
            .filter(move |record| record.decision == decision && record.weight > 0);
        counted.filter_map(|record| record.behind)
    };
    let (own, carried) = (counted(Decision::Combined), counted(Decision::Carried));
    let (sites, carried_sites) = (own.clone().count(), carried.clone().count());
    let of = own.chain(carried).reduce(Behind::plus)?;
    let carried = match carried_sites {
        0 => String::new(),
        carried => format!(", {carried} of which sent nothing in this round"),
    };
    Some(format!(
        "{} from {} sites{carried}",
        behind(of),
        sites + carried_sites
    ))
}

/// Whether the rule itself gave the row no weight at all.
pub fn is_outvoted(record: &Record) -> bool {
    let share = record.features.as_ref().and_then(|row| row.trimmed_share);
    matches!(record.decision, Decision::Combined | Decision::Carried)
        && share.is_some_and(|share| share >= 1.0)
}

/// A refusal's word with what it means and what was found.
fn refused(code: &str, found: Option<&str>) -> String {
    match found {
        Some(found) => format!("{}: {found}", refusal(code)),
        None => refusal(code),
    }
}

/// What the rule saw of the site, where that was not its update as it came.
fn made_of(record: &Record) -> String {
    let late = record.stale.as_ref().map(|stale| {
        format!(
            ", late for round {} and {} models behind: multiplied by {:.3}",
            stale.of_round, stale.age, stale.weight
        )
    });
    let mean = record
        .averaged
        .map(|updates| format!(", as the mean of its last {updates} updates"));
    let sum = record
        .behind
        .filter(|of| of.releases > 1)
        .map(|of| format!(", as the mean of {}", behind(of)));
    [late, mean, sum].into_iter().flatten().collect()
}

/// A refusal's word with what it means.
pub fn refusal(code: &str) -> String {
    let meaning = match code {
        "non_finite" => "a value was NaN or infinite, and no honest program sends one",
        "norm_exceeded" => "the update was longer than clipping and noise can make an honest one",
        "implausible" => "moments that no time series has, or less noise than was agreed",
        "wrong_length" => "another number of values than the round collects",
        "digest_mismatch" => "the bytes are not those that its header announces",
        "privacy_too_weak" => "it claims less protection than the round or the fleet asks for",
        "layout_mismatch" => "another layout than the round collects",
        "wrong_base" => "it was built on another model",
        "duplicate" => "another update of this site was stored already; the first one stays",
        "ledger_rollback" => "the site's privacy ledger went backwards: a restored or copied disk",
        _ => return code.to_owned(),
    };
    format!("{code} ({meaning})")
}

/// What the vet says of the mean of a site's releases; of another finding its own words.
pub fn no_series(of: &Finding) -> String {
    match of {
        Finding::NoSeries {
            releases,
            what,
            found,
            bound,
        } => format!(
            "its last {releases} releases together are no moments of a series: {what} is {found:.4}, the bound {bound:.4}"
        ),
        other => finding(other),
    }
}

/// A finding in one sentence with its figures.
pub fn finding(finding: &Finding) -> String {
    match finding {
        Finding::Opposed { others, of, limit } => format!(
            "its update points against those of {others} of the {of} others further than noise can explain; \
             hostile sites alone could make that {limit}, an honest site breaks this with no honest one"
        ),
        Finding::TooLittleNoise { norm, limit } => format!(
            "its update has norm {norm:.4}, and the noise that it must carry alone gives at least {limit:.4}: noise was left out"
        ),
        Finding::NoiseLaw { distance, limit } => format!(
            "its values are {distance:.4} away from the shape of the noise that they must carry; chance and the signal give at most {limit:.4}"
        ),
        Finding::NearCopy { others } => format!(
            "it shares its noise with {}: one copied another. Who copied whom cannot be seen, so this counts for and against nobody",
            others.join(", ")
        ),
        Finding::NoSeries { .. } => format!(
            "{}. They are added no more, what it sends from now on begins anew; this counts for and against nobody",
            no_series(finding)
        ),
        Finding::Refused { code, detail } => {
            format!("its update was refused as {}", refused(code, detail.as_deref()))
        }
    }
}

/// The figures of a row against those of the round's updates, one line each: `distance 5.10 (the middle of the round is 1.20, the largest 5.10)`; of a site that is carried
/// without the round's, and first of what they are.
pub fn figures(record: &Record) -> Vec<String> {
    let Some(features) = &record.features else {
        return Vec::new();
    };
    let Features {
        norm,
        norm_bound,
        distance,
        cosine,
        nearest,
        nearest_site,
        neighbours_median,
        trimmed_share,
        noise_distance,
        layers,
    } = features;
    // A mean of releases has less noise than the updates that the round's figures are of.
    let comparable = record.decision != Decision::Carried;
    let against = |name: &str| {
        let quantiles = record.quantiles.get(name).filter(|_| comparable);
        quantiles.map_or_else(String::new, |[min, _, middle, _, max]| {
            format!(" (round: {min:.4} to {max:.4}, middle {middle:.4})")
        })
    };
    let carried = record.behind.filter(|_| record.decision == Decision::Carried);
    let carried = carried.map(|of| {
        let of = behind(of);
        format!(
            "of the mean of {of}, not of an update of this round: the more there are, the less noise is in it"
        )
    });
    let mut lines: Vec<String> = carried.into_iter().collect();
    lines.extend([
        format!(
            "norm {norm:.4}, at most {norm_bound:.4} is taken{}",
            against("norm")
        ),
        format!(
            "distance from the combined values {distance:.4}{}",
            against("distance")
        ),
        format!("cosine to the combined values {cosine:.4}{}", against("cosine")),
    ]);
    if let (Some(nearest), Some(site)) = (nearest, nearest_site) {
        lines.push(format!(
            "nearest row is {site}'s at {nearest:.4}{}",
            against("nearest")
        ));
    }
    if let Some(median) = neighbours_median {
        lines.push(format!(
            "middle distance to the others {median:.4}{}",
            against("neighbours_median")
        ));
    }
    if let Some(share) = trimmed_share {
        lines.push(format!(
            "{:.1} % of its values lay outside what the rule kept{}",
            100.0 * share,
            against("trimmed_share")
        ));
    }
    if let Some(distance) = noise_distance {
        lines.push(format!(
            "distance from the noise's law {distance:.4}{}",
            against("noise_distance")
        ));
    }
    if !layers.is_empty() {
        let parts: Vec<String> = layers
            .iter()
            .map(|layer| format!("{} ×{:.2}", layer.layer, layer.ratio))
            .collect();
        lines.push(format!(
            "deviates most in {} (times the ordinary distance there)",
            parts.join(", ")
        ));
    }
    lines
}

/// Where a site stands, in one sentence.
pub fn standing(reputation: &Reputation, limits: &QuarantineLimits, held: bool) -> String {
    let trust = reputation.trust();
    match reputation.quarantined_since {
        Some(round) => format!(
            "in quarantine since round {round}: trust {trust:.3}, it leaves at {:.2}, after {} rounds as honest ones are",
            limits.leave_at,
            reputation.rounds_to_leave(limits)
        ),
        None if held => format!(
            "trust {trust:.3} is below {:.2}, but as many sites as are assumed hostile are in quarantine already: it still counts",
            limits.enter_below
        ),
        None => format!(
            "trust {trust:.3}; below {:.2} it would enter quarantine",
            limits.enter_below
        ),
    }
}

/// What the operator of the fleet can do about it.
pub fn advice(site: &str, last: Option<&Record>, reputation: &Reputation) -> String {
    let said = last.map(|record| record.findings.as_slice()).unwrap_or_default();
    if said
        .iter()
        .any(|finding| matches!(finding, Finding::NearCopy { .. }))
    {
        return format!(
            "compare the hosts that are named: one sends the other's update. `theriac-aggregator sites suspend {site}` keeps this one out"
        );
    }
    match (reputation.is_quarantined(), last.map(|record| record.decision)) {
        (true, _) => format!(
            "nothing has to be done: it counts nothing and comes back by itself. If its host may be taken over: \
             `theriac-aggregator sites suspend {site}`, and `sites revoke {site}` when its key may be stolen. If the host is well, \
             compare its program's version with the others'"
        ),
        (false, Some(Decision::Refused)) => format!(
            "look at the edge's log and version; `theriac-edge doctor` on its host. `theriac-aggregator sites suspend {site}` keeps it out meanwhile"
        ),
        (false, Some(Decision::Silent | Decision::Late)) => {
            "look whether the host is up and how long its updates take; `rounds.deadline` may be too short"
                .into()
        }
        (false, Some(Decision::Declined)) => {
            "nothing: the site's own policy decided; `theriac-edge privacy status` on its host says more"
                .into()
        }
        (false, Some(Decision::Combined | Decision::Carried)) if last.is_some_and(is_outvoted) => format!(
            "nothing has to be done about one round: sites that differ are outvoted now and then. If the rule leaves it out in most rounds, compare its data \
             and its host with the others'; `theriac-aggregator sites suspend {site}` keeps it out meanwhile"
        ),
        (false, _) => "nothing".into(),
    }
}
