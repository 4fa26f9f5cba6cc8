//! From recorded runs to figures: medians, what was pooled, and the bars.
//!
//! A run that was not healed has no time to health. It counts in a median as longer than any that was, so a median is `not healed` once
//! half of the runs were not; where times are added up it counts with its limit, which is what it cost at least.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Healer;
use super::fault::{Lane, Trouble};

/// Width of a column of the timelines, milliseconds.
pub(super) const BIN_MS: u64 = 250;

/// One fault under one healer, as it is written down: one line of `runs.jsonl`. Times are seconds since the fault began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunLog {
    /// The step's number in its lane.
    pub number: u32,
    /// Which time the fault came.
    pub run: u32,
    /// The fault.
    pub fault: Trouble,
    /// The healer.
    pub healer: Healer,
    /// Whether all was well before it.
    pub steady: bool,
    /// Why it could not be brought; everything below is empty then.
    pub not_injected: Option<String>,
    /// Whether it was over before its limit: no request failed any more, and what was broken was mended.
    pub healed: bool,
    /// When it is taken back.
    pub limit_s: f64,
    /// When it was over or taken back.
    pub ended_s: f64,
    /// The healer noticed, as it says.
    pub detect_s: Option<f64>,
    /// The healer first acted, as it says or as a new process shows.
    pub act_s: Option<f64>,
    /// What was broken was mended.
    pub gone_s: Option<f64>,
    /// The first request that failed, by when it was due.
    pub first_failure_s: Option<f64>,
    /// The last one.
    pub last_failure_s: Option<f64>,
    /// The first answer after the latest new process: until then whoever asks waits, also where none fails because a proxy holds them.
    pub answered_s: Option<f64>,
    /// The longest that a request took which was answered well.
    pub slowest_s: Option<f64>,
    /// Requests that failed, and reads among them.
    pub failed_requests: u64,
    /// Reads that failed.
    pub failed_reads: u64,
    /// Acknowledged writes that were not there afterwards.
    pub lost: u64,
    /// Acknowledged writes that nobody could look for.
    pub unverified: u64,
    /// Actions of the healer.
    pub actions: u64,
    /// Their names, as far as it says them.
    pub action_names: Vec<String>,
    /// What it took the fault to be.
    pub class: Option<String>,
    /// Actions after which most requests failed that were answered before; see [`RunLog::harm`].
    pub harmful: u64,
    /// Actions that the healer itself found to have done harm.
    pub harm_by_itself: u64,
    /// New processes of the service.
    pub renewals_s: Vec<f64>,
    /// Actions since the fault before, for which there was none.
    pub unprovoked: u64,
    /// Seconds spent on checkpoints since the fault before.
    pub checkpoint_s: f64,
    /// Checkpoints since then that became valid.
    pub checkpoints_valid: u64,
    /// Copies since then that were found to be bad.
    pub checkpoints_invalid: u64,
    /// The edge's page did not answer: its actions are the new processes alone.
    pub unread: bool,
    /// Failed requests in each quarter of a second.
    pub failures: Vec<u32>,
}

impl Default for RunLog {
    fn default() -> Self {
        Self {
            number: 0,
            run: 0,
            fault: Trouble::Kill9,
            healer: Healer::Theriac,
            steady: true,
            not_injected: None,
            healed: false,
            limit_s: 0.0,
            ended_s: 0.0,
            detect_s: None,
            act_s: None,
            gone_s: None,
            first_failure_s: None,
            last_failure_s: None,
            answered_s: None,
            slowest_s: None,
            failed_requests: 0,
            failed_reads: 0,
            lost: 0,
            unverified: 0,
            actions: 0,
            action_names: Vec::new(),
            class: None,
            harmful: 0,
            harm_by_itself: 0,
            renewals_s: Vec::new(),
            unprovoked: 0,
            checkpoint_s: 0.0,
            checkpoints_valid: 0,
            checkpoints_invalid: 0,
            unread: false,
            failures: Vec::new(),
        }
    }
}

impl RunLog {
    /// Seconds to verified health; nothing unless healed. Of a fault that comes bit by bit it counts from the first failed request, and is
    /// 0 where there was none; of any other from its beginning until the last failed request or, where it shows in none, its end. Where a new
    /// process came it is at the earliest when a request was answered after that: one that waits behind a proxy is none that was answered.
    pub fn health_s(&self) -> Option<f64> {
        if !self.healed {
            return None;
        }
        let failed = self.last_failure_s.unwrap_or(0.0);
        let last = failed.max(self.answered_s.unwrap_or(0.0));
        Some(if self.fault.is_gradual() {
            self.first_failure_s.map_or(0.0, |first| failed - first)
        } else if shows_in_requests(self.fault) {
            last
        } else {
            last.max(self.gone_s.unwrap_or(0.0))
        })
    }

    /// The same, and the limit where it was not healed.
    fn health_at_least_s(&self) -> f64 {
        self.health_s().unwrap_or_else(|| {
            let from = if self.fault.is_gradual() {
                self.first_failure_s.unwrap_or(0.0)
            } else {
                0.0
            };
            (self.limit_s - from).max(0.0)
        })
    }

    /// New processes where a restart cannot help.
    pub fn needless_restarts(&self) -> u64 {
        if self.fault.forbids_restart() {
            self.renewals_s.len() as u64
        } else {
            0
        }
    }

    /// Actions that did harm: every restart where none can help, whose interruption is for nothing; elsewhere those after which most
    /// requests failed that were answered before, or that the healer itself found to be harmful.
    pub fn harm(&self) -> u64 {
        if self.fault.forbids_restart() {
            self.needless_restarts().max(self.harm_by_itself)
        } else {
            self.harmful.max(self.harm_by_itself)
        }
    }

    fn acted_in_time(&self) -> bool {
        match (self.act_s, self.first_failure_s) {
            (Some(acted), Some(failed)) => acted <= failed,
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

/// Faults whose whole effect is on requests: nothing of them remains where all are answered.
fn shows_in_requests(fault: Trouble) -> bool {
    !matches!(
        fault,
        Trouble::CpuHog
            | Trouble::DiskFull
            | Trouble::PgDiskFull
            | Trouble::LockPileup
            | Trouble::ConnectionExhaustion
    )
}

/// Figures of one fault under one healer over its runs; times are medians, nothing where half were not detected or healed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResultRow {
    /// The fault.
    pub fault: &'static str,
    /// The healer.
    pub healer: &'static str,
    /// Number of runs.
    pub runs: usize,
    /// Runs that were healed before the limit.
    pub healed_runs: usize,
    /// Seconds from injection until the healer noticed.
    pub detect_s: Option<f64>,
    /// Seconds to verified health, as the load saw it; see [`RunLog::health_s`].
    pub heal_s: Option<f64>,
    /// Least and greatest of those that were healed.
    pub heal_s_range: Option<[f64; 2]>,
    /// Requests that failed.
    pub failed_requests: Option<f64>,
    /// Reads that failed.
    pub failed_reads: Option<f64>,
    /// The longest that a request took which was answered well.
    pub slowest_s: Option<f64>,
    /// Acknowledged writes that were not there, over all runs.
    pub lost_transactions: Option<f64>,
    /// Acknowledged writes that nobody could look for, over all runs.
    pub unverified_transactions: u64,
    /// Actions taken.
    pub actions: Option<f64>,
    /// Actions taken, over all runs.
    pub actions_total: u64,
    /// Actions that did harm, over all runs.
    pub harmful_actions: Option<f64>,
    /// New processes where a restart cannot help, over all runs.
    pub needless_restarts: u64,
    /// Runs in which it acted before the first request failed, where the fault comes bit by bit.
    pub acted_in_time: Option<usize>,
    /// Runs in which any request failed.
    pub seen_by_users: usize,
    /// Seconds spent on checkpoints, over all runs.
    pub checkpoint_seconds: f64,
    /// Checkpoints that became valid, over all runs.
    pub checkpoints_valid: u64,
    /// Copies that were found to be bad, over all runs.
    pub checkpoints_invalid: u64,
    /// What it took the fault to be: each class with the number of runs.
    pub classes: std::collections::BTreeMap<String, usize>,
}

/// One row for each fault and healer that has runs, in the order of the catalogue.
pub fn rows(runs: &[RunLog]) -> Vec<ResultRow> {
    let mut rows = Vec::new();
    for fault in Trouble::ALL {
        for healer in Healer::ALL {
            let of: Vec<&RunLog> = runs
                .iter()
                .filter(|run| run.fault == fault && run.healer == healer && run.not_injected.is_none())
                .collect();
            if !of.is_empty() {
                rows.push(row(fault, healer, &of));
            }
        }
    }
    rows
}

fn row(fault: Trouble, healer: Healer, runs: &[&RunLog]) -> ResultRow {
    let count = |pick: &dyn Fn(&RunLog) -> u64| -> u64 { runs.iter().map(|run| pick(run)).sum() };
    let middle = |pick: &dyn Fn(&RunLog) -> Option<f64>| median(runs.iter().map(|run| pick(run)));
    let healed: Vec<f64> = runs.iter().filter_map(|run| run.health_s()).collect();
    let mut classes = std::collections::BTreeMap::new();
    for class in runs.iter().filter_map(|run| run.class.clone()) {
        *classes.entry(class).or_default() += 1;
    }
    ResultRow {
        fault: fault.name(),
        healer: healer.name(),
        runs: runs.len(),
        healed_runs: healed.len(),
        detect_s: middle(&|run| run.detect_s),
        heal_s: middle(&RunLog::health_s),
        heal_s_range: (!healed.is_empty()).then(|| {
            [
                healed.iter().copied().fold(f64::INFINITY, f64::min),
                healed.iter().copied().fold(0.0, f64::max),
            ]
        }),
        failed_requests: middle(&|run| Some(run.failed_requests as f64)),
        failed_reads: middle(&|run| Some(run.failed_reads as f64)),
        slowest_s: middle(&|run| run.slowest_s),
        checkpoint_seconds: runs.iter().map(|run| run.checkpoint_s).sum(),
        checkpoints_valid: count(&|run| run.checkpoints_valid),
        checkpoints_invalid: count(&|run| run.checkpoints_invalid),
        lost_transactions: Some(count(&|run| run.lost) as f64),
        unverified_transactions: count(&|run| run.unverified),
        actions: middle(&|run| Some(run.actions as f64)),
        actions_total: count(&|run| run.actions),
        harmful_actions: Some(count(&RunLog::harm) as f64),
        needless_restarts: count(&RunLog::needless_restarts),
        acted_in_time: fault
            .is_gradual()
            .then(|| runs.iter().filter(|run| run.acted_in_time()).count()),
        seen_by_users: runs.iter().filter(|run| run.failed_requests > 0).count(),
        classes,
    }
}

/// The median where nothing is greater than everything: nothing once the middle is.
pub(super) fn median(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values = values.map(|value| value.unwrap_or(f64::INFINITY)).collect();
    crate::demo::record::median(values).filter(|middle| middle.is_finite())
}

/// One claim about a whole campaign.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bar {
    /// What is asked.
    pub what: String,
    /// What was measured.
    pub measured: String,
    /// Whether it holds.
    pub holds: bool,
}

/// The bars that these runs can speak for.
pub fn bars(runs: &[RunLog]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let rows = rows(runs);
    let of = |fault: Trouble, healer: Healer| {
        rows.iter()
            .find(|row| row.fault == fault.name() && row.healer == healer.name())
    };
    for (fault, most) in [
        (Trouble::Kill9, 1.5),
        (Trouble::PgKill9, 6.5),
        (Trouble::Hang, 5.0),
        (Trouble::PgHang, 5.0),
        (Trouble::RedisHang, 5.0),
    ] {
        if let Some(row) = of(fault, Healer::Theriac) {
            bars.push(Bar {
                what: format!("{}: median to health at most {most} s", fault.title()),
                measured: row
                    .heal_s
                    .map_or("not healed".to_owned(), |heal_s| format!("{heal_s:.2} s")),
                holds: row.heal_s.is_some_and(|heal_s| heal_s <= most),
            });
        }
    }
    for fault in [
        Trouble::ConnectionExhaustion,
        Trouble::ConnectionCreep,
        Trouble::LockPileup,
        Trouble::DiskFull,
        Trouble::DiskCreep,
        Trouble::PgDiskFull,
        Trouble::Overload,
        Trouble::DependencyDown,
        Trouble::SlowDisk,
        Trouble::PacketLoss,
    ] {
        if let Some(row) = of(fault, Healer::Theriac) {
            bars.push(Bar {
                what: format!("{}: healed or passed, without a restart", fault.title()),
                measured: format!(
                    "{} of {} healed, {} restarts",
                    row.healed_runs, row.runs, row.needless_restarts
                ),
                holds: row.healed_runs == row.runs && row.needless_restarts == 0,
            });
        }
    }
    bars.extend(reads_went_on(runs));
    bars.extend(in_time(runs));
    bars.extend(sooner(runs));
    bars.extend(pooled(runs, Healer::Monit));
    bars.extend(pooled(runs, Healer::Threshold));
    bars.extend(prevented(runs));
    bars.extend(harm(runs));
    bars
}

/// Disk full and dependency down leave reads alone. An overload does not: there they fail whoever heals.
fn reads_went_on(runs: &[RunLog]) -> Option<Bar> {
    let quiet = [Trouble::DiskFull, Trouble::PgDiskFull, Trouble::DependencyDown];
    let ours: Vec<&RunLog> = injected(runs)
        .filter(|run| run.healer == Healer::Theriac && quiet.contains(&run.fault))
        .collect();
    let failed = ours.iter().filter(|run| run.failed_reads > 0).count();
    (!ours.is_empty()).then(|| Bar {
        what: "disk full, dependency down: reads never interrupted".to_owned(),
        measured: format!("reads failed in {failed} of {} runs", ours.len()),
        holds: failed == 0,
    })
}

fn in_time(runs: &[RunLog]) -> Option<Bar> {
    let ours: Vec<&RunLog> = injected(runs)
        .filter(|run| run.healer == Healer::Theriac && run.fault.is_gradual())
        .collect();
    let acted = ours.iter().filter(|run| run.acted_in_time()).count();
    (!ours.is_empty()).then(|| Bar {
        what: "gradual faults: acted on before the first failed request in at least half of the runs"
            .to_owned(),
        measured: format!("{acted} of {}", ours.len()),
        holds: 2 * acted >= ours.len(),
    })
}

/// Detection of gradual faults against the threshold healer; whoever never noticed counts with the run's end.
fn sooner(runs: &[RunLog]) -> Option<Bar> {
    let noticed = |run: &RunLog| run.detect_s.unwrap_or(run.ended_s);
    let pairs = paired(runs, Healer::Threshold, Trouble::is_gradual, noticed);
    let what = "gradual faults: noticed at least 40 % sooner than by the threshold healer";
    compared(what.to_owned(), &pairs, 0.6)
}

/// A bar on our share of theirs. Where theirs is nothing there is no share, and the bar says so and does not hold.
fn compared(what: String, pairs: &[(f64, f64)], most: f64) -> Option<Bar> {
    if pairs.is_empty() {
        return None;
    }
    let found = share(pairs);
    let measured = found.map_or_else(
        || {
            let ours: f64 = pairs.iter().map(|(ours, _)| ours).sum();
            format!("nothing to compare with: {ours} to 0 ({} pairs)", pairs.len())
        },
        |(share, low, high)| told(share, low, high, pairs.len()),
    );
    Some(Bar {
        what,
        measured,
        holds: found.is_some_and(|(share, ..)| share <= most),
    })
}

/// Time to health over everything that both were given, against a competitor.
fn pooled(runs: &[RunLog], other: Healer) -> Option<Bar> {
    let pairs = paired(runs, other, |_| true, RunLog::health_at_least_s);
    let what = format!("time to health, pooled: at least 30 % below {}", other.name());
    compared(what, &pairs, 0.7)
}

/// Incidents of gradual faults that users saw, with prevention and without.
fn prevented(runs: &[RunLog]) -> Option<Bar> {
    let seen = |run: &RunLog| f64::from(u8::from(run.failed_requests > 0));
    let pairs = paired(runs, Healer::WithoutPrediction, Trouble::is_gradual, seen);
    let what = "preventable incidents that users saw: at least 25 % fewer with prevention";
    compared(what.to_owned(), &pairs, 0.75)
}

fn harm(runs: &[RunLog]) -> Option<Bar> {
    let ours: Vec<&RunLog> = injected(runs)
        .filter(|run| run.healer == Healer::Theriac)
        .collect();
    let actions: u64 = ours.iter().map(|run| run.actions).sum();
    let harmful: u64 = ours.iter().map(|run| run.harm()).sum();
    (actions > 0).then(|| Bar {
        what: "actions that did harm: at most 1 %".to_owned(),
        measured: format!("{harmful} of {actions}"),
        holds: harmful * 100 <= actions,
    })
}

/// What a reader has to know of the runs beside their figures: those that began while not all was well, and those whose page was silent.
pub fn caveats(runs: &[RunLog]) -> Vec<String> {
    let mut told = Vec::new();
    for healer in Healer::ALL {
        let of: Vec<&RunLog> = injected(runs).filter(|run| run.healer == healer).collect();
        let count = |pick: &dyn Fn(&RunLog) -> bool| of.iter().filter(|run| pick(run)).count();
        for (count, words) in [
            (count(&|run| !run.steady), "began while not all was well"),
            (
                count(&|run| run.unread),
                "left its page silent: only new processes count as actions there",
            ),
        ] {
            if count > 0 {
                told.push(format!("{}: {count} of {} runs {words}", healer.name(), of.len()));
            }
        }
    }
    told
}

fn injected(runs: &[RunLog]) -> impl Iterator<Item = &RunLog> {
    runs.iter().filter(|run| run.not_injected.is_none())
}

/// What Theriac and another measured in the same step.
fn paired(
    runs: &[RunLog],
    other: Healer,
    takes: impl Fn(Trouble) -> bool,
    value: impl Fn(&RunLog) -> f64,
) -> Vec<(f64, f64)> {
    injected(runs)
        .filter(|run| run.healer == Healer::Theriac && takes(run.fault))
        .filter_map(|ours| {
            let theirs = injected(runs).find(|run| {
                run.healer == other && (run.fault, run.number, run.run) == (ours.fault, ours.number, ours.run)
            })?;
            Some((value(ours), value(theirs)))
        })
        .collect()
}

/// Our sum as a share of theirs, with a 95 % interval by drawing pairs again 2 000 times (always the same draws); nothing where theirs
/// is nothing.
fn share(pairs: &[(f64, f64)]) -> Option<(f64, f64, f64)> {
    let of = |ours: f64, theirs: f64| (theirs > 0.0).then(|| ours / theirs);
    let sums = pairs.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    let whole = of(sums.0, sums.1)?;
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut drawn: Vec<f64> = (0..2_000)
        .filter_map(|_| {
            let (mut ours, mut theirs) = (0.0, 0.0);
            for _ in pairs {
                let (x, y) = pairs[random.random_range(0..pairs.len())];
                ours += x;
                theirs += y;
            }
            of(ours, theirs)
        })
        .collect();
    drawn.sort_by(f64::total_cmp);
    let at = |thousandths: usize| drawn[(drawn.len() - 1) * thousandths / 1_000];
    Some((whole, at(25), at(975)))
}

fn told(share: f64, low: f64, high: f64, pairs: usize) -> String {
    let less = |share: f64| format!("{:+.0} %", 100.0 * (share - 1.0));
    format!(
        "{} (95 % interval {} to {}, {pairs} pairs)",
        less(share),
        less(low),
        less(high)
    )
}

/// What makes a short campaign fail: a restart where none may be, or one of the plain faults not healed. Empty when all is well.
pub fn shortfalls(runs: &[RunLog]) -> Vec<String> {
    let must_heal = [
        Trouble::Kill9,
        Trouble::Hang,
        Trouble::PgKill9,
        Trouble::PgHang,
        Trouble::ConnectionExhaustion,
        Trouble::LockPileup,
        Trouble::DiskFull,
        Trouble::PgDiskFull,
        Trouble::RedisKill9,
        Trouble::RedisHang,
    ];
    let mut short = Vec::new();
    for run in runs.iter().filter(|run| run.healer == Healer::Theriac) {
        let what = format!("{}, run {}", run.fault, run.run);
        if let Some(why) = &run.not_injected {
            short.push(format!("{what}: could not be brought: {why}"));
        } else if !run.healed && must_heal.contains(&run.fault) {
            short.push(format!("{what}: not healed within {:.0} s", run.limit_s));
        }
        match run.needless_restarts() {
            0 => {}
            restarts => short.push(format!("{what}: {restarts} restarts where none may be")),
        }
        // What Redis had not saved when it ended is lost by its own design, whoever starts it again.
        if run.lost > 0 && run.fault.lane() != Lane::Redis {
            short.push(format!("{what}: {} acknowledged writes are lost", run.lost));
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(fault: Trouble, healer: Healer, number: u32, health_s: Option<f64>) -> RunLog {
        RunLog {
            number,
            run: number,
            fault,
            healer,
            healed: health_s.is_some(),
            limit_s: 20.0,
            ended_s: 20.0,
            first_failure_s: Some(0.0),
            last_failure_s: Some(health_s.unwrap_or(20.0)),
            failed_requests: 10 * u64::from(number),
            actions: 1,
            ..RunLog::default()
        }
    }

    #[test]
    fn a_median_is_not_healed_once_half_of_the_runs_were_not() {
        let times = |times: &[Option<f64>]| -> Vec<RunLog> {
            (1..)
                .zip(times)
                .map(|(number, time)| run(Trouble::Kill9, Healer::Theriac, number, *time))
                .collect()
        };
        let most = rows(&times(&[Some(1.0), None, Some(2.0)]));
        assert_eq!(
            (most[0].heal_s, most[0].healed_runs, most[0].runs),
            (Some(2.0), 2, 3),
            "the one that was not healed counts as the longest"
        );
        assert_eq!(most[0].heal_s_range, Some([1.0, 2.0]));
        assert_eq!(most[0].failed_requests, Some(20.0));
        assert_eq!(rows(&times(&[Some(1.0), None, None]))[0].heal_s, None);
        assert_eq!(rows(&times(&[Some(1.0), None]))[0].heal_s, None);
        let json = serde_json::to_value(&rows(&times(&[None]))[0]).unwrap();
        assert!(json["heal_s"].is_null() && json["detect_s"].is_null());
        for field in [
            "fault",
            "healer",
            "runs",
            "failed_requests",
            "lost_transactions",
            "actions",
            "harmful_actions",
        ] {
            assert!(!json[field].is_null(), "{field} is missing");
        }
    }

    #[test]
    fn the_same_rule_holds_for_every_healer() {
        for healer in Healer::ALL {
            let unhealed = run(Trouble::Hang, healer, 1, None);
            assert_eq!(unhealed.health_s(), None, "{}", healer.name());
            assert_eq!(rows(&[unhealed])[0].healed_runs, 0);
            let healed = run(Trouble::Hang, healer, 1, Some(3.0));
            assert_eq!(healed.health_s(), Some(3.0), "{}", healer.name());
        }
    }

    #[test]
    fn a_gradual_fault_counts_from_the_first_failure_and_nothing_where_none_was() {
        let mut prevented = run(Trouble::MemoryLeak, Healer::Theriac, 1, Some(0.0));
        (prevented.first_failure_s, prevented.last_failure_s) = (None, None);
        (prevented.act_s, prevented.gone_s) = (Some(5.0), Some(6.0));
        assert_eq!(prevented.health_s(), Some(0.0));
        assert!(prevented.acted_in_time());
        let mut late = run(Trouble::MemoryLeak, Healer::Monit, 1, Some(22.0));
        (late.first_failure_s, late.act_s) = (Some(19.0), Some(21.0));
        assert_eq!(late.health_s(), Some(3.0));
        assert!(!late.acted_in_time());
    }

    #[test]
    fn what_was_not_healed_costs_its_limit_when_times_are_added_up() {
        let runs = [
            run(Trouble::Hang, Healer::Theriac, 1, Some(1.0)),
            run(Trouble::Hang, Healer::Monit, 1, Some(6.0)),
            run(Trouble::LockPileup, Healer::Theriac, 2, Some(3.0)),
            run(Trouble::LockPileup, Healer::Monit, 2, None),
            // Nobody to compare with.
            run(Trouble::LockPileup, Healer::Theriac, 3, Some(100.0)),
        ];
        let pairs = paired(&runs, Healer::Monit, |_| true, RunLog::health_at_least_s);
        assert_eq!(pairs, [(1.0, 6.0), (3.0, 20.0)]);
        let (whole, low, high) = share(&pairs).unwrap();
        assert!((whole - 4.0 / 26.0).abs() < 1e-12);
        assert!(low <= whole && whole <= high);
        assert_eq!(share(&pairs), share(&pairs), "always the same draws");
        assert_eq!(share(&[]), None);
        assert_eq!(share(&[(1.0, 0.0)]), None);
    }

    #[test]
    fn a_restart_where_none_may_be_and_a_plain_fault_that_stays_fall_short() {
        let mut restarted = run(Trouble::DependencyDown, Healer::Theriac, 1, Some(8.0));
        restarted.renewals_s = vec![2.0];
        let stays = run(Trouble::LockPileup, Healer::Theriac, 2, None);
        let passes = run(Trouble::Overload, Healer::Theriac, 3, None);
        let other = run(Trouble::Hang, Healer::Threshold, 4, None);
        let short = shortfalls(&[restarted, stays, passes, other]);
        assert_eq!(short.len(), 2, "{short:?}");
        let needless = run(Trouble::DependencyDown, Healer::Monit, 1, Some(8.0));
        assert_eq!(needless.harm(), 0);
        let needless = RunLog {
            renewals_s: vec![2.0],
            ..needless
        };
        assert_eq!(needless.harm(), 1, "its interruption is for nothing");
        assert!(short[0].contains("1 restarts where none may be") && short[1].contains("not healed"));
        let mut crash = run(Trouble::Kill9, Healer::Theriac, 1, Some(0.1));
        crash.renewals_s = vec![0.1];
        assert!(
            shortfalls(&[crash]).is_empty(),
            "a crash is healed by a new process"
        );
    }

    #[test]
    fn what_cannot_be_compared_and_what_was_not_well_before_is_told() {
        let mut ours = run(Trouble::MemoryLeak, Healer::Theriac, 1, Some(0.0));
        (ours.failed_requests, ours.steady) = (0, false);
        let mut theirs = run(Trouble::MemoryLeak, Healer::WithoutPrediction, 1, Some(0.0));
        (theirs.failed_requests, theirs.unread) = (0, true);
        let runs = [ours, theirs];
        let bars = bars(&runs);
        let bar = bars.iter().find(|bar| bar.what.contains("preventable")).unwrap();
        assert!(
            !bar.holds && bar.measured.contains("nothing to compare with: 0 to 0"),
            "{bar:?}"
        );
        let told = caveats(&runs);
        assert!(
            told[0].contains("theriac: 1 of 1 runs began while not all was well"),
            "{told:?}"
        );
        assert!(
            told[1].contains("without_prediction: 1 of 1 runs left its page silent"),
            "{told:?}"
        );
        assert_eq!(
            caveats(&[run(Trouble::Hang, Healer::Monit, 1, None)]),
            Vec::<String>::new()
        );
    }

    #[test]
    fn bars_say_what_was_measured_also_when_they_do_not_hold() {
        let mut runs = vec![
            run(Trouble::Kill9, Healer::Theriac, 1, Some(0.2)),
            run(Trouble::Kill9, Healer::Monit, 1, Some(2.0)),
            run(Trouble::Hang, Healer::Theriac, 2, None),
        ];
        runs[2].harmful = 1;
        let bars = bars(&runs);
        let find = |words: &str| bars.iter().find(|bar| bar.what.contains(words)).unwrap();
        assert!(find("kill −9 of the HTTP").holds);
        assert_eq!(
            (
                find("hang of the HTTP").holds,
                find("hang of the HTTP").measured.as_str()
            ),
            (false, "not healed")
        );
        assert!(find("below monit").holds && find("below monit").measured.starts_with("-90 %"));
        assert_eq!(
            (find("harm").holds, find("harm").measured.as_str()),
            (false, "1 of 2")
        );
        assert!(
            !bars.iter().any(|bar| bar.what.contains("preventable")),
            "nothing to compare"
        );
    }
}
