//! Between healing and the link: what the fleet is told of this node, the slot that is lent to it, and words for people.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use theriac_heal::executor::clock;
use theriac_heal::incident::{Health, IncidentMachine, Input};
use theriac_heal::policy::fleet::{FleetBudget, FleetSeen, brake};
use tokio::sync::Notify;

use crate::respond::Responder;

/// Least time between two reports of the fleet that healing takes; of those between them the last counts.
const HEARD_EVERY: Duration = Duration::from_secs(1);

/// What healing tells and wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// How the services are.
    pub health: Health,
    /// See [`IncidentMachine::slot_wanted`].
    pub slot: Option<Duration>,
}

/// Where healing and the link leave word for each other; cheap to clone.
///
/// A slot is given back only after a look at which healing wanted none, and healing takes one only together with leaving word that it wants one: so
/// none is in use that was given back.
///
/// Of reports it keeps the last: however many come, healing hears one in a second, and nothing else waits behind them.
#[derive(Debug, Clone, Default)]
pub struct FleetDesk(Arc<Desk>);

#[derive(Debug, Default)]
struct Desk {
    left: Mutex<Left>,
    /// For the link.
    wished: Notify,
    /// For healing.
    lent: Notify,
}

#[derive(Debug, Default)]
struct Left {
    wish: Wish,
    slot: Option<Duration>,
    /// The latest report, until healing takes it.
    report: Option<FleetSeen>,
    /// When healing took one.
    taken: Option<Duration>,
}

impl FleetDesk {
    /// Healing leaves word, and gets the end of the slot that the node holds while it wants one.
    pub fn wish(&self, wish: Wish) -> Option<Duration> {
        let mut left = self.lock();
        if left.wish != wish {
            left.wish = wish;
            self.0.wished.notify_one();
        }
        left.slot.filter(|_| wish.slot.is_some())
    }

    /// The link looks at what is wished and, before anybody else does, says until when the node then holds a slot.
    pub(crate) fn serve(&self, hold: impl FnOnce(Wish) -> Option<Duration>) -> Wish {
        let mut left = self.lock();
        let (wish, before) = (left.wish, left.slot);
        left.slot = hold(wish);
        if left.slot != before && left.slot.is_some() {
            self.0.lent.notify_one();
        }
        wish
    }

    /// The link leaves word of how the fleet is, in the place of what it said before.
    pub(crate) fn report(&self, seen: FleetSeen) {
        self.lock().report = Some(seen);
    }

    /// What healing has not heard yet, if it is time to.
    pub(crate) fn take_report(&self, now: Duration) -> Option<FleetSeen> {
        let mut left = self.lock();
        let due = left
            .taken
            .is_none_or(|taken| now.saturating_sub(taken) >= HEARD_EVERY);
        let report = if due { left.report.take() } else { None };
        if report.is_some() {
            left.taken = Some(now);
        }
        report
    }

    /// Until healing wishes something else.
    pub(crate) async fn wished(&self) {
        self.0.wished.notified().await;
    }

    /// Until a slot was lent.
    pub async fn lent(&self) {
        self.0.lent.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Left> {
        // Held for a few assignments.
        self.0.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The link's end: only there where the policy has budgets of the fleet.
#[derive(Debug, Clone)]
pub struct FleetEnd {
    /// What the policy says.
    pub budget: FleetBudget,
    /// Where word is left.
    pub desk: FleetDesk,
}

impl Responder {
    /// Leaves word of what the machine is and wants, and tells it of a report or a slot that it has not heard of. Whether it was told something. Called at
    /// each turn, of which there is one a second at least.
    pub(crate) fn meet_fleet(&self, machine: &mut IncidentMachine) -> bool {
        let now = clock::now();
        let report = self.fleet.take_report(now.monotonic);
        if let Some(seen) = report {
            machine.handle(now, Input::Fleet(seen));
        }
        let wish = Wish {
            health: machine.health(),
            slot: machine.slot_wanted(),
        };
        let slot = self.fleet.wish(wish);
        let news = slot.filter(|until| slot != machine.slot() && *until > now.monotonic);
        if let Some(until) = news {
            machine.handle(now, Input::Slot { until });
        }
        report.is_some() || news.is_some()
    }

    /// Shows how the fleet is, and what it holds back.
    pub(crate) fn show_fleet(&self, machine: &IncidentMachine) {
        let budget = self
            .hands
            .values()
            .find_map(|hand| hand.shared.config.healing.fleet);
        let words = budget.map(|budget| fleet_words(machine, budget, clock::now().when().monotonic_ms));
        self.board.update(|status| {
            if status.fleet != words {
                status.fleet = words;
            }
        });
    }
}

/// How the fleet is, in words: `20 nodes, 9 unhealthy, 0 others act; held by the fleet: 45 % of 20 nodes are unhealthy`.
fn fleet_words(machine: &IncidentMachine, budget: FleetBudget, now_ms: u64) -> String {
    let Some(heard) = machine.fleet_heard() else {
        return "nothing is heard of it, so it holds nothing back".to_owned();
    };
    let age = Duration::from_millis(now_ms.saturating_sub(heard.at_ms));
    let seen = heard.seen;
    let counts = format!(
        "{} nodes, {} unhealthy, {} others act",
        seen.nodes, seen.unhealthy, seen.acting
    );
    if age >= budget.report_age {
        return format!("last heard of {} s ago, so it holds nothing back", age.as_secs());
    }
    match brake(budget, Some(heard), now_ms) {
        Some((hold, _)) => format!("{counts}; {hold}"),
        None => counts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(seconds: u64) -> Wish {
        Wish {
            slot: Some(Duration::from_secs(seconds)),
            ..Wish::default()
        }
    }

    #[test]
    fn of_a_flood_of_reports_healing_hears_the_last_and_one_in_a_second() {
        let desk = FleetDesk::default();
        let sick = |unhealthy| FleetSeen {
            nodes: 200_000,
            unhealthy,
            acting: 0,
        };
        let at = Duration::from_millis;
        let mut heard = Vec::new();
        for count in 0..100_000_u32 {
            desk.report(sick(count));
            // A minute's flood, with a look at each.
            heard.extend(desk.take_report(at(u64::from(count) * 60 / 100)));
        }
        assert_eq!((heard.len(), heard[0]), (60, sick(0)));
        assert_eq!(desk.take_report(at(90_000)), Some(sick(99_999)));
        assert_eq!(desk.take_report(at(95_000)), None, "heard twice");
    }

    #[test]
    fn a_slot_is_handed_out_only_with_word_that_one_is_wanted() {
        let desk = FleetDesk::default();
        assert_eq!(desk.wish(wants(9)), None);
        let until = Duration::from_secs(77);
        assert_eq!(desk.serve(|_| Some(until)), wants(9));
        assert_eq!(desk.wish(Wish::default()), None);
        // Wanted again before the link looked: it was not given back meanwhile.
        assert_eq!(desk.wish(wants(9)), Some(until));
        desk.wish(Wish::default());
        desk.serve(|wish| wish.slot.map(|_| until));
        assert_eq!(desk.wish(wants(9)), None, "a slot that was given back");
    }
}
