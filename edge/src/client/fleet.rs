//! What the link says to the fleet and hears of it: how the services are, how the others are, slots.
//!
//! Nothing is said before the aggregator has told how the fleet is: an older one, or one that keeps no account of it, hears nothing.

use std::time::Duration;

use rand::Rng as _;
use theriac_heal::executor::clock;
use theriac_heal::policy::fleet::FleetSeen;
use theriac_protocol::fleet::Borrower;
use theriac_protocol::message::{
    FleetReportV1, HealthV1, LeaseGrantedV1, LeaseKind, LeaseRefusedV1, ToAggregator,
};

use crate::fleet::{FleetEnd, Wish};

/// Least time between two words on how the services are.
const TOLD_EVERY_MIN: Duration = Duration::from_secs(1);
/// Longest time between two.
const TOLD_EVERY_MAX: Duration = Duration::from_secs(5);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Messages of the fleet that one session may bring at once. An honest aggregator sends two in a second at most, and while a long update is on its way
/// nobody reads: a quarter of an hour of them is heeded.
const BURST: u32 = 2_000;
/// Time after which one more may come.
const REFILL: Duration = Duration::from_millis(200);

/// The fleet as this link knows it.
#[derive(Debug)]
pub(super) struct Fleet {
    end: FleetEnd,
    borrower: Borrower,
    /// Whether this session's aggregator keeps account of the fleet.
    understood: bool,
    /// What was told last in this session, and when.
    told: Option<(HealthV1, Duration)>,
    /// So many messages may still come at once.
    left: u32,
    /// Until when one more each [`REFILL`] was added.
    refilled: Duration,
}

impl Fleet {
    pub(super) fn new(end: FleetEnd) -> Self {
        let share = end.budget.max_nodes_acting.hundredths();
        Self {
            borrower: Borrower::new(LeaseKind::Action, share),
            end,
            understood: false,
            told: None,
            left: BURST,
            refilled: Duration::ZERO,
        }
    }

    pub(super) fn disconnected(&mut self) {
        self.understood = false;
        self.told = None;
        self.left = BURST;
        self.borrower.disconnected();
    }

    /// Counts a message; false: they are more than any honest aggregator sends.
    pub(super) fn bears(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.refilled).as_millis() / REFILL.as_millis();
        let more = u32::try_from(passed).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(BURST);
        self.refilled += REFILL.saturating_mul(more);
        let bears = self.left > 0;
        self.left = self.left.saturating_sub(1);
        bears
    }

    /// One without nodes only tells that account is kept: what was heard before gets old by itself.
    pub(super) fn reported(&mut self, report: &FleetReportV1) {
        if !std::mem::replace(&mut self.understood, true) {
            tracing::info!(nodes = report.nodes, "the aggregator keeps account of the fleet");
        }
        let seen = FleetSeen {
            nodes: report.nodes,
            unhealthy: report.unhealthy,
            acting: report.acting,
        };
        if seen.nodes > 0 {
            self.end.desk.report(seen);
        }
    }

    pub(super) fn granted(&mut self, granted: &LeaseGrantedV1) {
        let now = clock::now().monotonic;
        let before = self.borrower.lease(now).is_some();
        self.borrower.granted(granted);
        // What answers nothing, and what only lasts longer now, is no news.
        if !before && self.borrower.lease(now).is_some() {
            tracing::info!(ttl_ms = granted.ttl_ms, "a slot of the fleet is lent");
        }
    }

    pub(super) fn refused(&mut self, refused: &LeaseRefusedV1) {
        let before = self.borrower.refusal();
        self.borrower.refused(clock::now().monotonic, refused);
        if self.borrower.refusal() != before {
            tracing::info!(why = refused.reason.words(), "no slot of the fleet");
        }
    }

    /// The next thing to say, until `None`.
    pub(super) fn next_to_say(&mut self) -> Option<ToAggregator> {
        // Read before anything is sent: a lease is counted from here.
        let now = clock::now().monotonic;
        let borrower = &mut self.borrower;
        let wish = self.end.desk.serve(|wish| {
            borrower.want(wish.slot);
            borrower.lease(now).map(|lease| lease.until)
        });
        if !self.understood {
            return None;
        }
        self.tell(now, wish)
            .or_else(|| self.borrower.poll(now, || rand::rng().random()))
    }

    fn tell(&mut self, now: Duration, wish: Wish) -> Option<ToAggregator> {
        // How many they are is nobody's business: the aggregator counts nodes.
        let health = HealthV1 {
            unhealthy: u16::from(wish.health.unhealthy > 0),
            acting: u16::from(wish.health.acting > 0),
        };
        let due = self.told.is_none_or(|(before, at)| {
            let least = if before == health {
                TOLD_EVERY_MAX
            } else {
                TOLD_EVERY_MIN
            };
            now.saturating_sub(at) >= least
        });
        if due {
            self.told = Some((health, now));
        }
        due.then_some(ToAggregator::Health(health))
    }
}

/// Until it is worth asking [`Fleet::next_to_say`] again.
pub(super) async fn due(fleet: Option<&Fleet>) {
    match fleet {
        Some(fleet) => {
            tokio::select! {
                () = fleet.end.desk.wished() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use theriac_heal::incident::Health;
    use theriac_heal::policy::fleet::FleetBudget;

    use super::*;
    use crate::fleet::FleetDesk;

    fn end() -> FleetEnd {
        end_of(&FleetDesk::default())
    }

    fn end_of(desk: &FleetDesk) -> FleetEnd {
        FleetEnd {
            budget: FleetBudget::default(),
            desk: desk.clone(),
        }
    }

    fn all(fleet: &mut Fleet) -> Vec<ToAggregator> {
        std::iter::from_fn(|| fleet.next_to_say()).collect()
    }

    const REPORT: FleetReportV1 = FleetReportV1 {
        nodes: 20,
        unhealthy: 9,
        acting: 0,
    };

    #[test]
    fn nothing_is_said_to_an_aggregator_that_has_not_told_of_the_fleet() {
        let end = end();
        let desk = end.desk.clone();
        let mut fleet = Fleet::new(end);
        let health = Health {
            unhealthy: 2,
            acting: 3,
        };
        let slot = Some(Duration::from_secs(9));
        desk.wish(Wish { health, slot });
        assert_eq!(all(&mut fleet), []);
        fleet.reported(&REPORT);
        let said = all(&mut fleet);
        // Whether, not how many; in steps, not to the millisecond.
        let told = HealthV1 {
            unhealthy: 1,
            acting: 1,
        };
        assert_eq!(said[0], ToAggregator::Health(told));
        assert!(
            matches!(said[1], ToAggregator::LeaseRequest(asked) if asked.share == 20 && asked.need_ms == 10_000)
        );
        assert_eq!(said.len(), 2);
        // The next session's aggregator may be another one.
        fleet.disconnected();
        assert_eq!(all(&mut fleet), []);
    }

    #[test]
    fn a_slot_reaches_healing_while_it_is_wanted_and_is_given_back_after() {
        let end = end();
        let desk = end.desk.clone();
        let mut fleet = Fleet::new(end);
        fleet.reported(&REPORT);
        let wish = Wish {
            slot: Some(Duration::from_secs(9)),
            ..Wish::default()
        };
        desk.wish(wish);
        let asked = all(&mut fleet).into_iter().find_map(|said| match said {
            ToAggregator::LeaseRequest(asked) => Some(asked),
            _ => None,
        });
        let granted = LeaseGrantedV1 {
            request: asked.unwrap().request,
            kind: LeaseKind::Action,
            lease: 3,
            ttl_ms: 60_000,
        };
        fleet.granted(&granted);
        all(&mut fleet);
        let until = desk.wish(wish).unwrap();
        assert!(until <= clock::now().monotonic + Duration::from_mins(1));
        desk.wish(Wish::default());
        let said = all(&mut fleet);
        assert!(
            matches!(said[..], [ToAggregator::LeaseRelease(said)] if said.lease == 3),
            "{said:?}"
        );
        assert_eq!(desk.wish(wish), None);
    }
    #[test]
    fn an_empty_report_makes_an_edge_speak_and_tells_healing_nothing() {
        let end = end();
        let desk = end.desk.clone();
        let mut fleet = Fleet::new(end);
        fleet.reported(&REPORT);
        fleet.reported(&FleetReportV1 {
            nodes: 0,
            unhealthy: 0,
            acting: 0,
        });
        let heard = desk.take_report(Duration::from_secs(1)).unwrap();
        assert_eq!((heard.nodes, heard.unhealthy), (20, 9));
        let mut fleet = Fleet::new(end_of(&desk));
        fleet.reported(&FleetReportV1 {
            nodes: 0,
            unhealthy: 0,
            acting: 0,
        });
        assert_eq!(desk.take_report(Duration::from_secs(9)), None);
        assert!(matches!(all(&mut fleet)[..], [ToAggregator::Health(_)]));
    }

    #[test]
    fn a_flood_ends_the_session_and_what_an_honest_aggregator_sends_never_does() {
        let mut fleet = Fleet::new(end());
        let at = |ms| Duration::from_hours(1) + Duration::from_millis(ms);
        let borne = (0..100_000).filter(|_| fleet.bears(at(0))).count();
        assert_eq!(borne, 2_000);
        fleet.disconnected();
        // Two in a second for a day, and then a quarter of an hour of them at once.
        assert!((0..172_800).all(|count| fleet.bears(at(count * 500))));
        assert!((0..1_800).all(|_| fleet.bears(at(87_300_000))));
    }
}
