//! What a site has earned: a beta posterior of "its rows are as honest rows are", with a memory, and quarantine on it.
//!
//! All arithmetic is in whole millionths of an observation, so a reputation has the same bits everywhere and in every record.

use serde::{Deserialize, Serialize};

use super::law::Verdict;

/// One observation.
const ONE: u64 = 1_000_000;
/// What a site begins with: four consistent rounds and one that was not, so a site is trusted at 0.8 before it has done anything.
const PRIOR: (u64, u64) = (4 * ONE, ONE);
/// What is left of the past after each round that counts: a memory of about ten rounds.
const DECAY_PERCENT: u64 = 90;
/// Weight of a round that no honest row gives. Such a round is all but impossible for an honest site, a consistent one is
/// easy for a hostile site, so they do not weigh the same.
const INCONSISTENT: u64 = 3 * ONE;

/// When a site enters quarantine and when it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct QuarantineLimits {
    /// Whether it is in force. Records are kept either way.
    pub enabled: bool,
    /// Trust below which a site enters.
    pub enter_below: f64,
    /// Trust from which on it leaves.
    pub leave_at: f64,
}

/// What one site has earned so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reputation {
    /// Consistent rounds, decayed, in millionths.
    pub consistent: u64,
    /// Inconsistent rounds, weighted and decayed, in millionths.
    pub inconsistent: u64,
    /// The round after which it entered quarantine, while it is in it.
    pub quarantined_since: Option<u64>,
    /// Rounds that counted, ever.
    pub rounds: u64,
}

impl Reputation {
    /// Mean of the posterior in millionths: 0 to 1 000 000. It only ever decides between weight 1 and weight 0.
    pub fn trust_millionths(&self) -> u64 {
        let good = PRIOR.0 + self.consistent;
        good * ONE / (good + PRIOR.1 + self.inconsistent)
    }

    /// Mean of the posterior, 0 to 1.
    pub fn trust(&self) -> f64 {
        self.trust_millionths() as f64 / ONE as f64
    }

    /// Whether it is in quarantine.
    pub fn is_quarantined(&self) -> bool {
        self.quarantined_since.is_some()
    }

    /// With one more round. A neutral one changes nothing: a group of copies earns no trust.
    #[must_use]
    pub fn observe(self, verdict: Verdict) -> Self {
        let (good, bad) = match verdict {
            Verdict::Neutral => return self,
            Verdict::Consistent => (ONE, 0),
            Verdict::Inconsistent => (0, INCONSISTENT),
        };
        Self {
            consistent: self.consistent * DECAY_PERCENT / 100 + good,
            inconsistent: self.inconsistent * DECAY_PERCENT / 100 + bad,
            rounds: self.rounds.saturating_add(1),
            ..self
        }
    }

    /// Consistent rounds in a row until it leaves quarantine; 0 when it is in none.
    pub fn rounds_to_leave(&self, limits: &QuarantineLimits) -> u64 {
        let (mut next, mut rounds) = (*self, 0);
        while self.is_quarantined() && next.trust() < limits.leave_at && rounds < 1_000 {
            next = next.observe(Verdict::Consistent);
            rounds += 1;
        }
        rounds
    }
}

/// How the quarantine changed after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Sites that entered.
    pub entered: usize,
    /// Sites that left.
    pub left: usize,
    /// Sites whose trust is low enough, and that stay at weight 1 because `most` are in quarantine already.
    pub held: usize,
}

/// Lets sites leave and enter after `round`, at most `most` being in quarantine at one time. `sites` are in the order of their names; of those
/// that may enter the least trusted go first, equal ones by name. Those that are in stay in until they have earned it.
pub fn settle(sites: &mut [&mut Reputation], round: u64, most: usize, limits: &QuarantineLimits) -> Changes {
    let mut changes = Changes::default();
    for site in sites.iter_mut().filter(|site| site.is_quarantined()) {
        if !limits.enabled || site.trust() >= limits.leave_at {
            site.quarantined_since = None;
            changes.left += 1;
        }
    }
    if !limits.enabled {
        return changes;
    }
    let inside = sites.iter().filter(|site| site.is_quarantined()).count();
    let mut due: Vec<usize> = (0..sites.len())
        .filter(|&at| !sites[at].is_quarantined() && sites[at].trust() < limits.enter_below)
        .collect();
    // Stable: equal trust stays in the order of the names.
    due.sort_by_key(|&at| sites[at].trust_millionths());
    let room = most.saturating_sub(inside);
    changes.entered = due.len().min(room);
    changes.held = due.len() - changes.entered;
    for &at in due.iter().take(room) {
        sites[at].quarantined_since = Some(round);
    }
    changes
}

/// Which of `stored` rows (by trust in millionths, in order) count nothing in a round: those in quarantine, the least trusted first, as long as
/// at least `needed` rows, and 2f + 1, are left for the rule, `beside` others that count anyway among them. Quarantine may never leave the rule with fewer rows than it needs to withstand f.
pub fn left_out(stored: &[Option<u64>], byzantine: usize, needed: usize, beside: usize) -> Vec<bool> {
    let mut inside: Vec<usize> = (0..stored.len()).filter(|&at| stored[at].is_some()).collect();
    inside.sort_by_key(|&at| stored[at]);
    let needed = needed.max(2 * byzantine + 1);
    let room = (stored.len() + beside).saturating_sub(needed).min(byzantine);
    let mut out = vec![false; stored.len()];
    for &at in inside.iter().take(room) {
        out[at] = true;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: QuarantineLimits = QuarantineLimits {
        enabled: true,
        enter_below: 0.4,
        leave_at: 0.7,
    };

    fn after(start: Reputation, verdict: Verdict, rounds: usize) -> Reputation {
        (0..rounds).fold(start, |site, _| site.observe(verdict))
    }

    /// Rounds of `verdict` until the site is on the other side of quarantine.
    fn until_it_changes(mut site: Reputation, verdict: Verdict) -> usize {
        let before = site.is_quarantined();
        for round in 1..100 {
            site = site.observe(verdict);
            settle(&mut [&mut site], round, 1, &LIMITS);
            if site.is_quarantined() != before {
                return usize::try_from(round).unwrap();
            }
        }
        panic!("nothing changed in 100 rounds");
    }

    #[test]
    fn a_liar_is_caught_soon_and_let_back_later() {
        let newcomer = until_it_changes(Reputation::default(), Verdict::Inconsistent);
        let respected = after(Reputation::default(), Verdict::Consistent, 500);
        let turncoat = until_it_changes(respected, Verdict::Inconsistent);
        let mut long = after(Reputation::default(), Verdict::Inconsistent, 500);
        long.quarantined_since = Some(1);
        let back = until_it_changes(long, Verdict::Consistent);
        assert_eq!(
            (newcomer, turncoat, back),
            (2, 6, 19),
            "the figures of docs/robustness.md"
        );
        assert_eq!(long.rounds_to_leave(&LIMITS), 19);
        assert_eq!(respected.rounds_to_leave(&LIMITS), 0);
    }

    #[test]
    fn one_bad_round_in_a_while_changes_nothing_and_every_second_one_does() {
        let mut rare = Reputation::default();
        let mut often = Reputation::default();
        for round in 1..200_u64 {
            let verdict = |bad| {
                if bad {
                    Verdict::Inconsistent
                } else {
                    Verdict::Consistent
                }
            };
            rare = rare.observe(verdict(round % 10 == 0));
            often = often.observe(verdict(round % 2 == 0));
            settle(&mut [&mut rare, &mut often], round, 2, &LIMITS);
            assert!(!rare.is_quarantined(), "round {round}: {rare:?}");
        }
        assert!(often.is_quarantined());
    }

    #[test]
    fn copies_earn_and_lose_nothing() {
        let site = after(Reputation::default(), Verdict::Inconsistent, 3);
        assert_eq!(after(site, Verdict::Neutral, 100), site);
    }

    #[test]
    fn no_more_than_f_are_in_and_the_worst_go_first() {
        let bad = |rounds| after(Reputation::default(), Verdict::Inconsistent, rounds);
        let (mut a, mut b, mut c) = (bad(3), bad(9), bad(3));
        let changes = settle(&mut [&mut a, &mut b, &mut c], 5, 2, &LIMITS);
        assert_eq!((changes.entered, changes.held), (2, 1));
        assert_eq!(
            [a, b, c].map(|site| site.quarantined_since),
            [Some(5), Some(5), None]
        );
        let off = QuarantineLimits {
            enabled: false,
            ..LIMITS
        };
        assert_eq!(settle(&mut [&mut a, &mut b], 6, 2, &off).left, 2);
        assert!(!a.is_quarantined());
    }

    #[test]
    fn the_rule_keeps_the_rows_that_it_needs() {
        let none = None;
        assert_eq!(
            left_out(&[none, Some(3), none], 1, 0, 0),
            [false; 3],
            "three rows withstand one"
        );
        assert_eq!(
            left_out(&[none, Some(3), none, none], 1, 0, 0),
            [false, true, false, false]
        );
        let two = left_out(&[Some(9), Some(3), none, none, none, none], 2, 0, 0);
        assert_eq!(
            two,
            [false, true, false, false, false, false],
            "only one may go, the worst"
        );
        assert_eq!(left_out(&[Some(1), none], 0, 0, 0), [false; 2]);
        let carried = left_out(&[none, Some(3), none], 1, 3, 20);
        assert_eq!(carried, [false, true, false], "twenty-two others are left");
        let seven = [Some(1), none, none, none, none, none, none];
        assert_eq!(left_out(&seven, 1, 7, 0), [false; 7], "bulyan needs all seven");
    }

    #[test]
    fn trust_is_never_above_one_and_no_sum_overflows() {
        for verdict in [Verdict::Consistent, Verdict::Inconsistent] {
            let site = after(Reputation::default(), verdict, 10_000);
            assert!(site.trust() > 0.0 && site.trust() < 1.0, "{site:?}");
        }
    }
}
