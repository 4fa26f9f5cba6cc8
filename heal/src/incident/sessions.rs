//! What a database server says of its own sessions: a pile-up behind a lock, slots that run out. Confirmed by two looks in a row, or at once
//! by the server's own refusal; cleared by two looks in a row.

use super::{PileUp, SessionsSeen};
use crate::types::{RootWaits, SessionId};

/// Latches of one server. A server that nobody looks at has none of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Sessions {
    /// The latest look that was let in.
    seen: Option<SessionsSeen>,
    /// The most slots that were free since the process began.
    free_most: u32,
    /// How many more sessions than at the quietest were connected at the latest look at which those were many, and looks since then.
    crowd: Option<(u32, u32)>,
    /// Looks in a row with a pile-up, and without.
    piled_run: u32,
    clear_run: u32,
    /// Looks in a row with too few slots, and with enough.
    short_run: u32,
    room_run: u32,
    piled: Option<PileUp>,
    exhausted: Option<Shortage>,
    /// Somebody looks at the sessions.
    watched: bool,
    /// Since the first of the probes that now fail in a row: whether a look was let in, and whether one was not.
    let_in: bool,
    /// How many these are.
    failed: u32,
    /// Failed probes since the server itself last refused a client.
    unrefused: u32,
    /// The root of the latest look.
    latest: Option<SessionId>,
    /// Its statement there.
    statement: u64,
    /// Looks in a row, all since that statement was first seen, at which it waited for the log.
    log_run: u32,
    /// Looks in a row that contradict what the confirmed root is taken to wait for.
    other_run: u32,
    kept_out: Option<String>,
}

/// Too few slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shortage {
    /// Slots left at the latest look.
    pub(super) free: u32,
    /// Asked for.
    pub(super) free_min: u32,
    /// The server's own words to a client that it refused.
    pub(super) refused: Option<String>,
}

/// What the looks say of a server whose probes fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    /// Nobody looks, or it let nobody in: nothing speaks against a hang.
    Nothing,
    /// A look is on its way.
    Awaited,
    /// It answers over the slot that it keeps back.
    Answers,
}

impl Sessions {
    /// Takes one look. Its words, when they are news.
    pub(super) fn look(&mut self, seen: SessionsSeen) -> Option<String> {
        self.watched = true;
        self.let_in = true;
        self.kept_out = None;
        self.seen = Some(seen);
        self.free_most = self.free_most.max(seen.free);
        let more = self.free_most.saturating_sub(seen.free);
        self.crowd = if more >= (self.free_most / 8).max(MORE_MIN) {
            Some((more, 0))
        } else {
            self.crowd
                .map(|(more, ago)| (more, ago.saturating_add(1)))
                .filter(|(_, ago)| *ago < BROUGHT_LASTS)
        };
        let piled = self.take_pile_up(seen.pile_up);
        let short = self.take_slots(seen);
        match (piled, short) {
            (Some(piled), Some(short)) => Some(format!("{piled}; {short}")),
            (piled, short) => piled.or(short),
        }
    }

    fn take_pile_up(&mut self, found: Option<PileUp>) -> Option<String> {
        let Some(found) = found else {
            (self.piled_run, self.other_run) = (0, 0);
            self.latest = None;
            self.clear_run = self.clear_run.saturating_add(1);
            if self.clear_run >= CLEAR {
                return self
                    .piled
                    .take()
                    .map(|_| "no sessions are piled up any more".to_owned());
            }
            return None;
        };
        self.clear_run = 0;
        // Who holds the lock next is another pile-up, and has to be confirmed like the first.
        let same = self.latest.replace(found.id()) == Some(found.id());
        let waits = self.take_waits(found, same);
        self.piled_run = if same { self.piled_run.saturating_add(1) } else { 1 };
        if self.piled_run >= CONFIRM {
            self.piled = Some(PileUp { waits, ..found });
        }
        (self.piled_run == 1).then(|| {
            format!(
                "{} sessions wait behind process {}, the longest for {} s",
                found.behind, found.pid, found.waited_s
            )
        })
    }

    /// What the root waits for, of `same` as at the look before. Who writes much waits for the log now and then, and is at its commit only where it was never
    /// seen at anything else in its statement. What a confirmed root is taken to wait for changes with two looks in a row, so that plans last.
    fn take_waits(&mut self, found: PileUp, same: bool) -> RootWaits {
        let goes_on = same && self.statement == found.statement;
        self.statement = found.statement;
        self.log_run = match (found.waits, goes_on) {
            (RootWaits::Log, false) => 1,
            (RootWaits::Log, true) if self.log_run > 0 => self.log_run.saturating_add(1),
            _ => 0,
        };
        let seen = match found.waits {
            RootWaits::Log if self.log_run >= CONFIRM => RootWaits::Commit,
            RootWaits::Log => RootWaits::Nothing,
            other => other,
        };
        let before = self.piled.filter(|piled| piled.id() == found.id());
        let before = before.map_or(seen, |piled| piled.waits);
        self.other_run = if seen == before {
            0
        } else {
            self.other_run.saturating_add(1)
        };
        if self.other_run >= CONFIRM {
            self.other_run = 0;
            return seen;
        }
        before
    }

    fn take_slots(&mut self, seen: SessionsSeen) -> Option<String> {
        if seen.free >= seen.free_min {
            self.short_run = 0;
            self.room_run = self.room_run.saturating_add(1);
            if self.room_run >= CLEAR {
                let was = self.exhausted.take();
                return was.map(|_| format!("{} slots for clients are free again", seen.free));
            }
            return None;
        }
        self.room_run = 0;
        self.short_run = self.short_run.saturating_add(1);
        let before = self.exhausted.take();
        if self.short_run >= CONFIRM || before.is_some() {
            self.exhausted = Some(Shortage {
                free: seen.free,
                free_min: seen.free_min,
                refused: before.and_then(|before| before.refused),
            });
        }
        (self.short_run == 1).then(|| {
            format!(
                "{} slots for clients are free, fewer than {}",
                seen.free, seen.free_min
            )
        })
    }

    /// A look that was not let in says nothing of the sessions.
    pub(super) fn unseen(&mut self, detail: String) {
        self.watched = true;
        self.kept_out = Some(detail);
    }

    /// The server refused an ordinary client: that confirms it.
    pub(super) fn refused(&mut self, detail: String) -> Option<String> {
        self.unrefused = 0;
        self.room_run = 0;
        let seen = self.seen.unwrap_or_default();
        let news = self
            .exhausted
            .as_ref()
            .is_none_or(|shortage| shortage.refused.is_none());
        let words = format!("the server refuses a client: {detail}");
        self.exhausted = Some(Shortage {
            free: seen.free.min(seen.free_min),
            free_min: seen.free_min,
            refused: Some(detail),
        });
        news.then_some(words)
    }

    /// One more probe in a row failed.
    pub(super) fn probe_failed(&mut self) {
        if self.failed == 0 {
            self.let_in = false;
            self.kept_out = None;
        }
        self.failed = self.failed.saturating_add(1);
        self.unrefused = self.unrefused.saturating_add(1);
    }

    pub(super) fn probed_well(&mut self) {
        (self.failed, self.unrefused) = (0, 0);
    }

    /// It answers again, one probe after the other. Where no look tells of free slots, clients that are let in do.
    pub(super) fn lets_in(&mut self) {
        if !self.watched {
            self.exhausted = None;
        }
    }

    /// Its probes fail, no look is let in, and it does not even refuse: what was seen of its sessions is from before.
    pub(super) fn out_of_date(&self) -> bool {
        self.inside() == Inside::Nothing && self.unrefused >= SILENT
    }

    /// An action on the sessions was done: what was seen before says nothing of its effect.
    pub(super) fn await_effect(&mut self) {
        (self.clear_run, self.room_run) = (0, 0);
        if let Some(shortage) = &mut self.exhausted {
            shortage.refused = None;
        }
    }

    /// How many sessions more are connected than at the quietest, or were a short while ago, where that is an eighth of the slots that were free then, and
    /// some. Each is a process of the server: they bring memory and processor time along, which are theirs and no fault of it, and which the
    /// detector goes on seeing for a while when they have gone.
    pub(super) fn more_connected(&self) -> Option<u32> {
        self.crowd.map(|(more, _)| more)
    }

    /// Whether sessions waited behind another one at the latest look, where that is not out of date.
    pub(super) fn waits(&self) -> bool {
        self.piled_run > 0 && self.kept_out.is_none()
    }

    /// Whether the confirmed root is at its commit: another fault than a lock.
    pub(super) fn commits(&self) -> bool {
        self.piled
            .is_some_and(|piled| matches!(piled.waits, RootWaits::Commit | RootWaits::Standby))
    }

    pub(super) fn piled(&self) -> Option<PileUp> {
        self.piled
    }

    pub(super) fn exhausted(&self) -> Option<&Shortage> {
        self.exhausted.as_ref()
    }

    pub(super) fn is_sick(&self) -> bool {
        self.piled.is_some() || self.exhausted.is_some()
    }

    /// Sick, or on the way to it.
    pub(super) fn suspect(&self) -> bool {
        self.is_sick() || self.piled_run > 0 || self.short_run > 0
    }

    /// For a server whose probes fail.
    pub(super) fn inside(&self) -> Inside {
        match (self.watched, self.let_in, &self.kept_out) {
            (true, true, _) => Inside::Answers,
            (true, false, None) if self.failed < PATIENCE => Inside::Awaited,
            _ => Inside::Nothing,
        }
    }
}

/// Looks in a row that confirm.
const CONFIRM: u32 = 2;
/// Fewer sessions more are no crowd.
const MORE_MIN: u32 = 4;
/// Looks for which what more sessions brought along is theirs after they have gone: a minute where nobody chose otherwise.
const BROUGHT_LASTS: u32 = 30;
/// Looks in a row that clear.
const CLEAR: u32 = 2;
/// Failed probes in a row without a refusal after which a server that lets no look in counts as silent.
const SILENT: u32 = 3;
/// Failed probes in a row after which a look that has not come back is waited for no longer.
const PATIENCE: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn look(behind: Option<u32>, free: u32) -> SessionsSeen {
        SessionsSeen {
            pile_up: behind.map(|behind| PileUp {
                pid: 7,
                birth: 1,
                behind,
                waited_s: 6,
                running: false,
                statement: 0,
                waits: RootWaits::Nothing,
                touchable: true,
            }),
            free,
            free_min: 5,
        }
    }

    #[test]
    fn two_looks_in_a_row_confirm_and_two_clear() {
        let mut sessions = Sessions::default();
        for (seen, piled, exhausted) in [
            (look(Some(3), 9), false, false),
            (look(None, 4), false, false),
            (look(Some(3), 9), false, false),
            (look(Some(4), 4), true, false),
            (look(None, 4), true, true),
            (look(None, 5), false, true),
            (look(None, 5), false, false),
        ] {
            sessions.look(seen);
            let found = (sessions.piled().is_some(), sessions.exhausted().is_some());
            assert_eq!(found, (piled, exhausted), "{seen:?}");
        }
        assert!(!sessions.suspect());
    }

    #[test]
    fn another_root_is_confirmed_by_two_looks_of_its_own() {
        let mut sessions = Sessions::default();
        let at = |birth: u64| {
            let mut seen = look(Some(3), 9);
            seen.pile_up = seen.pile_up.map(|pile| PileUp { birth, ..pile });
            seen
        };
        let found: Vec<Option<u64>> = [1, 2, 1, 1, 2, 2]
            .into_iter()
            .map(|birth| {
                sessions.look(at(birth));
                sessions.piled().map(|pile| pile.birth)
            })
            .collect();
        assert_eq!(found, [None, None, None, Some(1), Some(1), Some(2)]);
    }

    #[test]
    fn what_a_root_waits_for_is_confirmed_and_who_writes_much_is_not_at_its_commit() {
        use RootWaits::{Commit, Log, Nothing, Standby};
        for (looks, last) in [
            // From the first look on at the log, in one statement.
            (&[(Log, 1), (Log, 1)][..], Some(Commit)),
            // Seen at something else before, or later for a moment: it writes much.
            (&[(Nothing, 1), (Log, 1), (Log, 1), (Log, 1)], Some(Nothing)),
            (&[(Log, 1), (Nothing, 1), (Log, 1), (Log, 1)], Some(Nothing)),
            (&[(Log, 1), (Log, 2)], Some(Nothing)),
            (
                &[(Nothing, 1), (Nothing, 1), (Log, 2), (Log, 2), (Log, 2)],
                Some(Commit),
            ),
            // One look does not turn it, two do.
            (&[(Commit, 1), (Commit, 1), (Nothing, 1)], Some(Commit)),
            (
                &[(Commit, 1), (Commit, 1), (Nothing, 1), (Nothing, 1)],
                Some(Nothing),
            ),
            (&[(Nothing, 1), (Nothing, 1), (Standby, 2)], Some(Nothing)),
            (
                &[(Nothing, 1), (Nothing, 1), (Standby, 2), (Standby, 2)],
                Some(Standby),
            ),
            (&[(Standby, 1)], None),
        ] {
            let mut sessions = Sessions::default();
            for (waits, statement) in looks {
                let mut seen = look(Some(3), 9);
                seen.pile_up = seen.pile_up.map(|pile| PileUp {
                    waits: *waits,
                    statement: *statement,
                    ..pile
                });
                sessions.look(seen);
            }
            assert_eq!(sessions.piled().map(|pile| pile.waits), last, "{looks:?}");
        }
    }

    #[test]
    fn a_silent_server_is_told_from_one_that_refuses() {
        let mut sessions = Sessions::default();
        sessions.refused("too many clients".to_owned());
        for failed in 1..=12 {
            sessions.refused("too many clients".to_owned());
            sessions.probe_failed();
            assert!(!sessions.out_of_date(), "{failed}");
        }
        (1..SILENT).for_each(|_| sessions.probe_failed());
        assert!(sessions.out_of_date());
        sessions.look(look(None, 1));
        assert!(!sessions.out_of_date());
    }

    #[test]
    fn the_servers_own_refusal_confirms_at_once_and_lasts_until_two_looks_find_room() {
        let mut sessions = Sessions::default();
        assert!(sessions.refused("too many clients".to_owned()).is_some());
        assert!(
            sessions.refused("too many clients".to_owned()).is_none(),
            "told once"
        );
        assert!(sessions.exhausted().is_some());
        sessions.look(look(None, 9));
        assert!(sessions.exhausted().is_some());
        sessions.look(look(None, 9));
        assert!(sessions.exhausted().is_none());
    }

    #[test]
    fn only_a_look_that_is_let_in_after_the_probes_began_to_fail_speaks_against_a_hang() {
        let mut sessions = Sessions::default();
        assert_eq!(sessions.inside(), Inside::Nothing);
        sessions.look(look(None, 9));
        sessions.probe_failed();
        assert_eq!(sessions.inside(), Inside::Awaited);
        sessions.unseen("no answer".to_owned());
        assert_eq!(sessions.inside(), Inside::Nothing);
        sessions.look(look(None, 9));
        assert_eq!(sessions.inside(), Inside::Answers);
        sessions.probed_well();
        sessions.probe_failed();
        assert_eq!(sessions.inside(), Inside::Awaited);
        (2..=PATIENCE).for_each(|_| sessions.probe_failed());
        assert_eq!(sessions.inside(), Inside::Nothing, "a look that never comes back");
    }
}
