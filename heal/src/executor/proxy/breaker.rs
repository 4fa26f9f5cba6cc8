//! The circuit breaker before one upstream, and the budget of retries. Pure: the caller brings the time.

use std::time::Duration;

/// Closed while the upstream serves; open after so many failures in a row; then one request at a time finds out.
#[derive(Debug)]
pub(super) struct Breaker {
    failures_max: u32,
    open_for: Duration,
    state: State,
    /// Requests that were let through to find out, so far.
    probes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Duration,
    },
    /// Which request finds out, by its number.
    HalfOpen {
        probing: Option<u64>,
    },
}

/// Whether a request may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// The circuit is closed.
    Pass,
    /// It is half open, and this request, with that number, is the one that finds out.
    Probe(u64),
    /// Not now.
    Refused { retry_after: Duration },
}

/// How a request that was admitted ended, as far as it tells of the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It answered.
    Well,
    /// It did not: refused, closed, or too late.
    Badly,
    /// The client went away first: nothing was learnt.
    Unknown,
}

/// As metrics show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Circuit {
    /// Requests pass.
    #[default]
    Closed,
    /// One request at a time passes.
    HalfOpen,
    /// None passes.
    Open,
}

impl Breaker {
    pub(super) fn new(failures_max: u32, open_for: Duration) -> Self {
        Self {
            failures_max,
            open_for,
            state: State::Closed { failures: 0 },
            probes: 0,
        }
    }

    pub(super) fn admit(&mut self, now: Duration) -> Admission {
        if let State::Open { until } = self.state
            && until <= now
        {
            self.state = State::HalfOpen { probing: None };
        }
        match self.state {
            State::Closed { .. } => Admission::Pass,
            State::HalfOpen { probing: None } => {
                self.probes += 1;
                self.state = State::HalfOpen {
                    probing: Some(self.probes),
                };
                Admission::Probe(self.probes)
            }
            State::HalfOpen { probing: Some(_) } => Admission::Refused {
                retry_after: self.open_for,
            },
            State::Open { until } => Admission::Refused {
                retry_after: until.saturating_sub(now),
            },
        }
    }

    /// `by` is what [`Self::admit`] said of that request. What was admitted before the circuit changed says nothing about it now.
    pub(super) fn note(&mut self, by: Admission, ended: Ended, now: Duration) {
        let finds_out = match (self.state, by) {
            (State::HalfOpen { probing }, Admission::Probe(number)) => probing == Some(number),
            _ => false,
        };
        self.state = match (self.state, by, ended) {
            (State::Closed { .. }, Admission::Pass, Ended::Well) => State::Closed { failures: 0 },
            (State::Closed { failures }, Admission::Pass, Ended::Badly) => {
                self.failed_once_more(failures, now)
            }
            (_, _, Ended::Well) if finds_out => State::Closed { failures: 0 },
            (_, _, Ended::Badly) if finds_out => self.opened(now),
            (_, _, Ended::Unknown) if finds_out => State::HalfOpen { probing: None },
            (unchanged, ..) => unchanged,
        };
    }

    /// What somebody found who asked the upstream directly: well ends the waiting, ill counts as one failure.
    pub(super) fn told(&mut self, well: bool, now: Duration) {
        self.state = match (self.state, well) {
            (State::Open { .. }, true) => State::HalfOpen { probing: None },
            (State::Closed { failures }, false) => self.failed_once_more(failures, now),
            (unchanged, _) => unchanged,
        };
    }

    /// The upstream is another process now.
    pub(super) fn reset(&mut self) {
        self.state = State::Closed { failures: 0 };
    }

    pub(super) fn circuit(&self) -> Circuit {
        match self.state {
            State::Closed { .. } => Circuit::Closed,
            State::HalfOpen { .. } => Circuit::HalfOpen,
            State::Open { .. } => Circuit::Open,
        }
    }

    fn failed_once_more(&self, failures: u32, now: Duration) -> State {
        let failures = failures + 1;
        if failures >= self.failures_max {
            self.opened(now)
        } else {
            State::Closed { failures }
        }
    }

    fn opened(&self, now: Duration) -> State {
        State::Open {
            until: now.saturating_add(self.open_for),
        }
    }
}

/// Each request pays a share of a retry in; a retry costs a whole one. So retries are never more than that share of the requests.
#[derive(Debug)]
pub(super) struct RetryBudget {
    /// Per cent.
    share: u32,
    /// Hundredths of a retry.
    credit: u32,
}

impl RetryBudget {
    pub(super) fn new(share: u32) -> Self {
        Self { share, credit: 0 }
    }

    pub(super) fn request(&mut self) {
        self.credit = (self.credit + self.share).min(CREDIT_MAX);
    }

    /// Whether a retry may be made; it is paid for.
    pub(super) fn retry(&mut self) -> bool {
        let left = self.credit.checked_sub(RETRY);
        self.credit = left.unwrap_or(self.credit);
        left.is_some()
    }
}

const RETRY: u32 = 100;
/// So that a calm day does not pay for a storm.
const CREDIT_MAX: u32 = 20 * RETRY;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_one_request_finds_out() {
        let mut breaker = Breaker::new(3, at(10));
        for ended in [
            Ended::Badly,
            Ended::Badly,
            Ended::Well,
            Ended::Badly,
            Ended::Badly,
        ] {
            assert_eq!(breaker.admit(at(0)), Admission::Pass);
            breaker.note(Admission::Pass, ended, at(0));
        }
        assert_eq!(breaker.circuit(), Circuit::Closed, "a success in between counts");
        breaker.note(Admission::Pass, Ended::Badly, at(0));
        assert_eq!(
            breaker.admit(at(4)),
            Admission::Refused { retry_after: at(6) },
            "open"
        );
        assert_eq!(breaker.admit(at(10)), Admission::Probe(1));
        assert!(
            matches!(breaker.admit(at(10)), Admission::Refused { .. }),
            "one at a time"
        );
        // A request from before it opened says nothing.
        breaker.note(Admission::Pass, Ended::Well, at(10));
        assert_eq!(breaker.circuit(), Circuit::HalfOpen);
        breaker.note(Admission::Probe(1), Ended::Badly, at(11));
        assert_eq!(breaker.admit(at(20)), Admission::Refused { retry_after: at(1) });
        assert_eq!(breaker.admit(at(21)), Admission::Probe(2));
        breaker.note(Admission::Probe(2), Ended::Unknown, at(21));
        assert_eq!(
            breaker.admit(at(21)),
            Admission::Probe(3),
            "nobody else was left waiting"
        );
        breaker.note(Admission::Probe(3), Ended::Well, at(22));
        assert_eq!(breaker.admit(at(22)), Admission::Pass);
    }

    #[test]
    fn a_probe_from_outside_opens_it_and_ends_its_waiting() {
        let mut breaker = Breaker::new(2, at(10));
        breaker.told(false, at(0));
        breaker.told(false, at(1));
        assert_eq!(breaker.circuit(), Circuit::Open);
        breaker.told(true, at(2));
        assert_eq!(breaker.admit(at(2)), Admission::Probe(1));
        breaker.reset();
        assert_eq!(breaker.admit(at(2)), Admission::Pass);
    }

    proptest! {
        #[test]
        fn retries_are_never_more_than_their_share(share in 0_u32..=10, story in proptest::collection::vec(any::<bool>(), 0..2_000)) {
            let mut budget = RetryBudget::new(share);
            let (mut requests, mut retries) = (0_u64, 0_u64);
            for request in story {
                if request {
                    requests += 1;
                    budget.request();
                } else {
                    retries += u64::from(budget.retry());
                }
                prop_assert!(retries * 100 <= requests * u64::from(share));
            }
        }

        #[test]
        fn at_most_one_request_finds_out_at_a_time(story in proptest::collection::vec((0_u8..7, 0_u64..5), 0..300)) {
            let mut breaker = Breaker::new(2, at(3));
            // Requests on their way, and whether one finds out about the circuit as it is now.
            let (mut now, mut out) = (0, Vec::<(Admission, bool)>::new());
            for (operation, passed) in story {
                now += passed;
                match operation {
                    0 => {
                        let admitted = breaker.admit(at(now));
                        if !matches!(admitted, Admission::Refused { .. }) {
                            out.push((admitted, matches!(admitted, Admission::Probe(_))));
                        }
                    }
                    1..4 if !out.is_empty() => {
                        // Neither the first nor the last to have set out.
                        let (by, _) = out.swap_remove(usize::try_from(passed).unwrap() % out.len());
                        let ended = [Ended::Well, Ended::Badly, Ended::Unknown][usize::from(operation) - 1];
                        breaker.note(by, ended, at(now));
                    }
                    4 => {
                        breaker.reset();
                        for (_, finds_out) in &mut out {
                            *finds_out = false;
                        }
                    }
                    5 | 6 => breaker.told(operation == 5, at(now)),
                    _ => {}
                }
                let probes = out.iter().filter(|(_, finds_out)| *finds_out).count();
                prop_assert!(probes <= 1);
            }
        }
    }

    #[test]
    fn a_request_from_before_a_reset_says_nothing_about_the_one_that_finds_out_now() {
        for ended in [Ended::Well, Ended::Badly, Ended::Unknown] {
            let mut breaker = Breaker::new(1, at(10));
            breaker.told(false, at(0));
            breaker.told(true, at(1));
            let old = breaker.admit(at(1));
            breaker.reset();
            breaker.told(false, at(2));
            breaker.told(true, at(3));
            let new = breaker.admit(at(3));
            assert!(matches!((old, new), (Admission::Probe(_), Admission::Probe(_))));
            breaker.note(old, ended, at(4));
            assert_eq!(breaker.circuit(), Circuit::HalfOpen, "{ended:?}");
            assert!(
                matches!(breaker.admit(at(4)), Admission::Refused { .. }),
                "{ended:?}: two at a time"
            );
        }
    }
}
