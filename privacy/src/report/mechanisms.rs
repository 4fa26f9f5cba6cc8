//! The report's table of mechanisms: what was released, under which terms, how often, of how many blocks.

use std::fmt::{self, Write as _};

use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::Delta;

use super::html::{digits, escape};
use super::{ExportedRecord, Status};
use crate::ledger::loss::Loss;
use crate::ledger::{ChargedTerms, charged_terms};

/// Releases under the same terms.
#[derive(Debug, Clone, PartialEq)]
struct Mechanism {
    /// Of the first of them; its blocks are those of all, as runs that neither overlap nor touch.
    terms: ChargedTerms,
    releases: u64,
    /// Blocks named, each as often as it was.
    named: u64,
}

/// Writes the table; nothing without a charge.
pub(super) fn table(html: &mut String, records: &[ExportedRecord], status: &Status) -> fmt::Result {
    let found = mechanisms(charged_terms(records));
    if found.is_empty() {
        return Ok(());
    }
    html.push_str(
        "<section><h2>Mechanisms</h2><table><tr><th>release</th><th>values</th><th>C</th><th>σ</th><th>moves by</th>\
         <th>releases</th><th>blocks</th><th>of these different</th><th>ε of one</th></tr>\n",
    );
    let delta = Delta::new(status.delta).ok();
    for Mechanism {
        terms,
        releases,
        named,
    } in &found
    {
        let all = terms.blocks.is_empty();
        let count = |blocks: u64| if all { "all".to_owned() } else { blocks.to_string() };
        let loss = Loss::gaussian(
            terms.sensitivity,
            terms.noise_multiplier,
            terms.sampling_rate,
            terms.steps,
        );
        let epsilon = delta.map_or_else(|| "-".to_owned(), |delta| digits(loss.epsilon(delta).epsilon));
        writeln!(
            html,
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{} C</td>\
             <td class=\"n\">{releases}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{epsilon}</td></tr>",
            escape(&name(terms)),
            terms.values,
            digits(terms.clip_norm),
            digits(terms.noise_multiplier),
            digits(terms.sensitivity),
            count(*named),
            count(length(&terms.blocks)),
        )?;
    }
    html.push_str(
        "</table><p class=\"note\">Discrete Gaussian noise of standard deviation σC on sums that are clipped to C for each block; ε of one release, for a unit \
         that it reads. A block that several releases read loses by each of them.</p></section>\n",
    );
    Ok(())
}

/// Groups charges by their terms, in the order in which each came first.
fn mechanisms(charges: Vec<ChargedTerms>) -> Vec<Mechanism> {
    let mut found: Vec<Mechanism> = Vec::new();
    for charge in charges {
        let bare = |terms: &ChargedTerms| ChargedTerms {
            blocks: Vec::new(),
            ..terms.clone()
        };
        let named = length(&charge.blocks);
        match found.iter_mut().find(|known| bare(&known.terms) == bare(&charge)) {
            Some(known) => {
                known.releases += 1;
                known.named += named;
                known.terms.blocks.extend(charge.blocks);
            }
            None => found.push(Mechanism {
                terms: charge,
                releases: 1,
                named,
            }),
        }
    }
    for mechanism in &mut found {
        mechanism.terms.blocks = merged(std::mem::take(&mut mechanism.terms.blocks));
    }
    found
}

/// Runs of ids, first and last, without repeats.
fn merged(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for (first, last) in runs {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn length(runs: &[(u64, u64)]) -> u64 {
    let lengths = runs
        .iter()
        .map(|(first, last)| last.saturating_sub(*first).saturating_add(1));
    lengths.fold(0, u64::saturating_add)
}

/// `moments`, `gradient`, `delta, 20 steps at rate 0.03`, with the windows that blocks were cut into.
fn name(terms: &ChargedTerms) -> String {
    let kind = match terms.kind {
        UpdateKind::Moments => "moments",
        UpdateKind::Gradient => "gradient",
        UpdateKind::Delta => "delta",
    };
    let steps = if terms.steps > 1 || terms.sampling_rate < 1.0 {
        format!(", {} steps at rate {}", terms.steps, digits(terms.sampling_rate))
    } else {
        String::new()
    };
    let windows = terms.windows.map_or_else(String::new, |windows| {
        format!(
            ", windows of {} samples, {} apart",
            windows.window(),
            windows.stride()
        )
    });
    format!("{kind}{steps}{windows}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn charge(kind: UpdateKind, sigma: f64, blocks: &[(u64, u64)]) -> ChargedTerms {
        ChargedTerms {
            kind,
            values: 352,
            clip_norm: 17_200.0,
            noise_multiplier: sigma,
            sampling_rate: 1.0,
            steps: 1,
            sensitivity: 1.0,
            windows: None,
            blocks: blocks.to_vec(),
        }
    }

    #[test]
    fn releases_are_grouped_by_their_terms_and_blocks_are_counted_with_and_without_repeats() {
        let found = mechanisms(vec![
            charge(UpdateKind::Moments, 1.27, &[(10, 12)]),
            charge(UpdateKind::Gradient, 5.69, &[(10, 12)]),
            charge(UpdateKind::Moments, 1.27, &[(13, 14), (20, 20)]),
            charge(UpdateKind::Gradient, 5.69, &[(11, 15)]),
            charge(UpdateKind::Moments, 2.0, &[(30, 30)]),
        ]);
        let counts: Vec<(u64, u64, u64)> = found
            .iter()
            .map(|of| (of.releases, of.named, length(&of.terms.blocks)))
            .collect();
        assert_eq!(counts, [(2, 6, 6), (2, 8, 6), (1, 1, 1)]);
        assert_eq!(found[0].terms.blocks, [(10, 14), (20, 20)]);
        assert_eq!(merged(vec![(5, 9), (0, 20), (22, 22), (21, 21)]), [(0, 22)]);
        let steps = ChargedTerms {
            steps: 700,
            sampling_rate: 0.03,
            ..charge(UpdateKind::Delta, 1.28, &[])
        };
        assert_eq!(name(&steps), "delta, 700 steps at rate 0.03");
    }
}
