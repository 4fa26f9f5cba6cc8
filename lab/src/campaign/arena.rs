//! One healer with its ward under load, and one step: a pause, a fault, what comes of it.

use std::time::{Duration, Instant};

use theriac_edge::probe;
use tokio::time::sleep;

use super::Healer;
use super::inject::{Injected, inject};
use super::keeper::{Account, Checkpoints, Keeper};
use super::load::{self, Load, Seen};
use super::plan::Step;
use super::score::{BIN_MS, RunLog};
use super::ward::Ward;
use crate::demo::stage::unix_ms;
use crate::fleet::http::Client;
use crate::traffic::Answered;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Looks between two looks at whether the fault itself is gone, which may cost a session.
const GONE_LOOKS: u32 = 5;
/// Time without a failed request, beyond that in which a failure becomes known, after which a fault is over.
const QUIET: Duration = Duration::from_millis(1_500);
/// Requests that were under way when the fault came belong to it.
const BEFORE_MS: u64 = 50;
/// Time for a ward to be well again before the next fault.
const STEADY_LIMIT: Duration = Duration::from_secs(30);
/// Time for the service and its healer to begin.
const START_LIMIT: Duration = Duration::from_mins(3);
/// Time for an edge to learn what is normal.
const LEARN_LIMIT: Duration = Duration::from_mins(2);

/// A healer with what it looks after.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) healer: Healer,
    pub(super) ward: Ward,
    keeper: Keeper,
    load: Option<Load>,
    client: Client,
    pid: Option<u32>,
    /// New processes of the service since the arena was made, Unix milliseconds.
    renewals: Vec<u64>,
    /// When the latest step ended: what a healer does between two has no fault for a reason.
    ended_ms: u64,
    /// Its checkpoints until then.
    checkpoints: Checkpoints,
    /// A fault that could not be taken back.
    left: Option<Injected>,
}

impl Arena {
    pub(super) fn new(healer: Healer, ward: Ward, keeper: Keeper) -> Self {
        Self {
            healer,
            ward,
            keeper,
            load: None,
            client: Client::new(Duration::from_secs(1)),
            pid: None,
            renewals: Vec::new(),
            ended_ms: unix_ms(),
            checkpoints: Checkpoints::default(),
            left: None,
        }
    }

    /// Waits until the service answers, begins the load, and waits until the healer knows what is normal.
    ///
    /// # Errors
    /// In words, when the service does not answer in time.
    pub(super) async fn begin(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        while !self.answers().await {
            if begun.elapsed() >= START_LIMIT {
                return Err(format!(
                    "the service under {} did not answer within {} s",
                    self.healer.name(),
                    START_LIMIT.as_secs()
                ));
            }
            sleep(Duration::from_millis(100)).await;
        }
        self.pid = self.ward.pid();
        self.load = Some(Load::start(&self.ward, 0));
        let begun = Instant::now();
        while self.healer.foresees()
            && !self.keeper.has_learnt(&self.ward).await
            && begun.elapsed() < LEARN_LIMIT
        {
            sleep(Duration::from_millis(250)).await;
        }
        self.ended_ms = unix_ms();
        Ok(())
    }

    /// Somebody else's fault took the machine until then: what was done meanwhile was not done for nothing.
    pub(super) fn forgive(&mut self, until_ms: u64) {
        self.watch();
        self.ended_ms = self.ended_ms.max(until_ms);
    }

    /// Waits until all is well (or for so long), pauses, brings the fault, follows it until it is over or its limit is, takes it back.
    pub(super) async fn step(&mut self, step: &Step, seed: u64) -> RunLog {
        let steady = self.steady().await;
        sleep(Duration::from_millis(step.pause_ms)).await;
        self.watch();
        let between = self.account(self.ended_ms).await;
        // What renews the process is both.
        let unprovoked = self
            .renewals_since(self.ended_ms)
            .max(between.actions.len() as u64);
        let since_ms = unix_ms();
        let mut log = RunLog {
            number: step.number,
            run: step.run,
            fault: step.fault,
            healer: self.healer,
            steady,
            unprovoked,
            limit_s: step.fault.limit().as_secs_f64(),
            ..RunLog::default()
        };
        let injected = match self.take_back_left().await {
            Ok(()) => inject(step.fault, &self.ward, &self.client).await,
            Err(left) => Err(format!("an earlier fault is still in force: {left}")),
        };
        let mut injected = match injected {
            Ok(injected) => injected,
            Err(why) => {
                log.not_injected = Some(why);
                self.ended_ms = unix_ms();
                return log;
            }
        };
        let course = self.follow(step, &mut injected, since_ms).await;
        if course.healed_ms.is_none() {
            self.take_back(&mut injected).await;
        }
        let account = self.account(since_ms).await;
        let until_ms = unix_ms();
        // What came of it is settled; what is left of the fault's own means goes.
        if !self.take_back(&mut injected).await {
            self.left = Some(injected);
        }
        let seen = match self.load.take() {
            Some(load) => self.stopped(load).await,
            None => Seen::default(),
        };
        // Another one, so that what it finds lost belongs to one step.
        self.load = Some(Load::start(&self.ward, seed));
        self.fill(&mut log, &course, &account, &seen, since_ms, until_ms);
        self.count_checkpoints(&mut log).await;
        // What is done while its writes are read back belongs to the time between two faults, whoever does it.
        self.ended_ms = until_ms;
        log
    }

    /// Whether the fault is gone.
    async fn take_back(&self, injected: &mut Injected) -> bool {
        let undone = injected.undo(&self.ward, &self.client).await;
        if let Err(why) = &undone {
            tracing::error!(why, "a fault is still in force");
        }
        undone.is_ok()
    }

    /// What is measured under an earlier fault would be laid to the next one.
    async fn take_back_left(&mut self) -> Result<(), String> {
        if let Some(left) = &mut self.left {
            left.undo(&self.ward, &self.client).await?;
            self.left = None;
        }
        Ok(())
    }

    /// Ends the load, which may take seconds, and goes on looking.
    async fn stopped(&mut self, load: Load) -> Seen {
        let stopping = load.stop();
        tokio::pin!(stopping);
        loop {
            tokio::select! {
                seen = &mut stopping => return seen,
                () = sleep(LOOK_EVERY) => self.watch(),
            }
        }
    }

    async fn follow(&mut self, step: &Step, injected: &mut Injected, since_ms: u64) -> Course {
        let begun = Instant::now();
        let quiet = load::patience(self.ward.lane) + QUIET;
        let mut course = Course::default();
        let mut looks = 0_u32;
        let mut passed = false;
        loop {
            sleep(LOOK_EVERY).await;
            self.watch();
            if let Some(lasts) = step
                .fault
                .lasts()
                .filter(|lasts| !passed && begun.elapsed() >= *lasts)
            {
                tracing::debug!(?lasts, "it passes by itself");
                self.take_back(injected).await;
                passed = true;
            }
            let waits = step.fault.lasts().is_some() && !passed;
            if looks.is_multiple_of(GONE_LOOKS) && !waits {
                let gone = injected.is_gone(&self.ward).await;
                course.gone_ms = match (gone, course.gone_ms) {
                    (true, None) => Some(unix_ms()),
                    (true, since) => since,
                    (false, _) => None,
                };
            }
            looks = looks.wrapping_add(1);
            if let Some(gone) = course.gone_ms {
                let last = self.last_failure(since_ms).unwrap_or(since_ms).max(gone);
                if unix_ms().saturating_sub(last) >= u64::try_from(quiet.as_millis()).unwrap_or(u64::MAX) {
                    course.healed_ms = Some(last);
                    return course;
                }
            }
            if begun.elapsed() >= step.fault.limit() {
                return course;
            }
        }
    }

    fn fill(
        &self,
        log: &mut RunLog,
        course: &Course,
        account: &Account,
        seen: &Seen,
        since_ms: u64,
        until_ms: u64,
    ) {
        let after = |ms: u64| ms.saturating_sub(since_ms) as f64 / 1e3;
        let of_it: Vec<&load::Failed> = seen
            .failures
            .iter()
            .filter(|failed| (since_ms.saturating_sub(BEFORE_MS)..=until_ms).contains(&failed.ms))
            .collect();
        log.healed = course.healed_ms.is_some();
        log.gone_s = course.gone_ms.map(after);
        log.first_failure_s = of_it.iter().map(|failed| failed.ms).min().map(after);
        log.last_failure_s = of_it.iter().map(|failed| failed.ms).max().map(after);
        log.failed_requests = of_it.len() as u64;
        log.failed_reads = of_it.iter().filter(|failed| !failed.write).count() as u64;
        log.ended_s = after(until_ms);
        log.lost = seen.lost;
        log.unverified = seen.unverified;
        log.detect_s = account.detected_ms.map(after);
        log.class.clone_from(&account.class);
        let renewals: Vec<u64> = self
            .renewals
            .iter()
            .copied()
            .filter(|ms| (since_ms..=until_ms).contains(ms))
            .collect();
        log.renewals_s = renewals.iter().map(|ms| after(*ms)).collect();
        let answers: Vec<Answered> = seen
            .answers
            .iter()
            .copied()
            .filter(|answered| (since_ms..=until_ms).contains(&answered.due_ms))
            .collect();
        log.slowest_s = answers
            .iter()
            .map(Answered::took_ms)
            .max()
            .map(|ms| ms as f64 / 1e3);
        // Whoever waits behind a proxy is answered by the new process, or not yet.
        log.answered_s = renewals.last().and_then(|renewed| {
            let since = seen.answers.iter().filter(|answered| answered.at_ms >= *renewed);
            since.map(|answered| after(answered.at_ms)).min_by(f64::total_cmp)
        });
        // Whoever says nothing is seen to have acted at the latest by a new process.
        log.act_s = account.acted_ms.or_else(|| renewals.first().copied()).map(after);
        // Each action of an edge, and each new process of whoever does nothing else (or did not say).
        let acted: Vec<u64> = if self.healer.is_edge() && !account.unread {
            account.actions.iter().map(|(ms, _)| *ms).collect()
        } else {
            renewals
        };
        log.unread = account.unread;
        log.actions = acted.len() as u64;
        log.action_names = account.actions.iter().map(|(_, name)| name.clone()).collect();
        log.harm_by_itself = account.harm;
        let rate = load::rate(self.ward.lane);
        log.harmful = acted.iter().filter(|ms| is_harm(&of_it, **ms, rate)).count() as u64;
        let bins = (until_ms.saturating_sub(since_ms) / BIN_MS + 1).min(1_000);
        log.failures = vec![0; usize::try_from(bins).unwrap_or(0)];
        for failed in &of_it {
            let bin = usize::try_from(failed.ms.saturating_sub(since_ms) / BIN_MS).unwrap_or(usize::MAX);
            if let Some(count) = log.failures.get_mut(bin) {
                *count += 1;
            }
        }
    }

    /// Those since the step before.
    async fn count_checkpoints(&mut self, log: &mut RunLog) {
        let Some(now) = self.keeper.checkpoints(&self.ward).await else {
            return;
        };
        let before = std::mem::replace(&mut self.checkpoints, now);
        log.checkpoint_s = (now.seconds - before.seconds).max(0.0);
        log.checkpoints_valid = now.valid.saturating_sub(before.valid);
        log.checkpoints_invalid = now.invalid.saturating_sub(before.invalid);
    }

    /// Looks at the service's process and at what the healer says.
    fn watch(&mut self) {
        self.keeper.look();
        if self.pid.is_some_and(|pid| self.ward.is_its(pid)) {
            return;
        }
        let now = self.ward.pid();
        if now.is_some() && now != self.pid {
            self.renewals.push(unix_ms());
            self.pid = now;
        }
    }

    fn renewals_since(&self, ms: u64) -> u64 {
        self.renewals.iter().filter(|at| **at >= ms).count() as u64
    }

    async fn account(&mut self, since_ms: u64) -> Account {
        self.keeper.look();
        self.keeper.account(&self.ward, since_ms).await
    }

    fn last_failure(&self, since_ms: u64) -> Option<u64> {
        let seen = self.load.as_ref()?.seen();
        seen.failures
            .iter()
            .map(|failed| failed.ms)
            .filter(|ms| *ms >= since_ms)
            .max()
    }

    async fn answers(&self) -> bool {
        matches!(
            probe::ask(&self.ward.probe(), Duration::from_secs(1)).await,
            Ok((true, _))
        )
    }

    /// Whether all was well within the limit.
    async fn steady(&mut self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < STEADY_LIMIT {
            self.watch();
            if self.answers().await && self.keeper.is_at_rest(&self.ward).await {
                return true;
            }
            sleep(Duration::from_millis(200)).await;
        }
        false
    }
}

/// How a fault went.
#[derive(Debug, Default)]
struct Course {
    /// What was broken is mended.
    gone_ms: Option<u64>,
    /// From then on no request failed, and the fault was gone.
    healed_ms: Option<u64>,
}

/// An action did harm when most requests were answered in the 2 s before it and most failed from 1 s to 3 s after it: the second in
/// which any restart fails some is left out.
fn is_harm(failures: &[&load::Failed], acted_ms: u64, rate: f64) -> bool {
    let failed = |from: u64, until: u64| {
        let count = failures
            .iter()
            .filter(|failed| (from..until).contains(&failed.ms))
            .count();
        count as f64 / (rate * (until - from) as f64 / 1e3)
    };
    failed(acted_ms.saturating_sub(2_000), acted_ms) < 0.5
        && failed(acted_ms + 1_000, acted_ms + 3_000) >= 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harm_is_what_was_answered_before_an_action_and_is_not_after_it() {
        let failed = |range: std::ops::Range<u64>| -> Vec<load::Failed> {
            range
                .step_by(25)
                .map(|ms| load::Failed { ms, write: false })
                .collect()
        };
        let judge = |failures: &[load::Failed]| is_harm(&failures.iter().collect::<Vec<_>>(), 10_000, 40.0);
        assert!(judge(&failed(10_000..13_000)), "down after it");
        assert!(!judge(&failed(10_000..10_900)), "a brief restart");
        assert!(!judge(&failed(8_000..13_000)), "down before it too");
        assert!(!judge(&[]));
    }
}
